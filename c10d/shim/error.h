// How a C++ exception becomes a Rust error: one letter for its kind, a space, the first line of its message.
#pragma once

#include <exception>
#include <string>

namespace c10d_shim {

// The letters are T (time ran out), P (a peer or the network failed), A (aborted) and F (anything else).
std::string describe(const std::exception_ptr& error) noexcept;

} // namespace c10d_shim

// cxx calls this around every function that returns a Result.
namespace rust::behavior {

template <typename Try, typename Fail>
static void trycatch(Try&& func, Fail&& fail) noexcept {
  try {
    func();
  } catch (...) {
    fail(::c10d_shim::describe(std::current_exception()));
  }
}

} // namespace rust::behavior
