// Counts the C++ objects that Rust still keeps alive, so that a test can see that nothing leaks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace c10d_shim {

// One live group, work, or loan of a buffer's memory.
class Handle {
 public:
  Handle();
  ~Handle();
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
};

std::size_t live_handles();

// Waits until no handle is left, at most so long, and returns how many are left.
std::size_t wait_for_handles(std::uint64_t timeout_ms);

} // namespace c10d_shim
