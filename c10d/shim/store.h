// libtorch's own key-value store over TCP, as Rust sees it.
#pragma once

#include <cstdint>
#include <memory>

#include "error.h"
#include "rust/cxx.h"

namespace c10d {
class TCPStore;
}

namespace c10d_shim {

class TcpStore {
 public:
  explicit TcpStore(std::unique_ptr<c10d::TCPStore> store);
  ~TcpStore();

  std::uint16_t port() const;
  void set(rust::Str key, rust::Slice<const std::uint8_t> value) const;
  rust::Vec<std::uint8_t> get(rust::Str key, std::uint64_t timeout_ms) const;
  std::int64_t add(rust::Str key, std::int64_t amount) const;
  rust::Vec<std::uint8_t>
  compare_set(rust::Str key, rust::Slice<const std::uint8_t> expected, rust::Slice<const std::uint8_t> desired) const;
  bool remove(rust::Str key) const;
  bool contains(rust::Slice<const rust::Str> keys) const;

 private:
  std::unique_ptr<c10d::TCPStore> store_;
};

std::unique_ptr<TcpStore> tcp_store(rust::Str host, std::uint16_t port, bool is_server, std::uint64_t timeout_ms);

} // namespace c10d_shim
