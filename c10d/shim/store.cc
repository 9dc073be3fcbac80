#include "store.h"

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "c10d/src/ffi.rs.h"
#include "engine.h"

namespace c10d_shim {
namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes to_bytes(rust::Slice<const std::uint8_t> slice) { return Bytes(slice.begin(), slice.end()); }
Bytes to_bytes(const rust::Vec<std::uint8_t>& vec) { return Bytes(vec.begin(), vec.end()); }

rust::Slice<const std::uint8_t> to_slice(const Bytes& bytes) { return {bytes.data(), bytes.size()}; }

rust::Vec<std::uint8_t> to_vec(const Bytes& bytes) {
  rust::Vec<std::uint8_t> vec;
  vec.reserve(bytes.size());
  for (const std::uint8_t byte : bytes) {
    vec.push_back(byte);
  }
  return vec;
}

std::vector<rust::Str> to_strs(const std::vector<std::string>& keys) {
  return std::vector<rust::Str>(keys.begin(), keys.end());
}

// A c10d store whose every operation is answered by a Rust one. Errors come back as rust::Error.
class RustStore final : public c10d::Store {
 public:
  RustStore(rust::Box<StoreHandle> store, std::chrono::milliseconds timeout)
      : RustStore(std::make_shared<rust::Box<StoreHandle>>(std::move(store)), timeout) {}

  RustStore(std::shared_ptr<rust::Box<StoreHandle>> store, std::chrono::milliseconds timeout)
      : c10d::Store(timeout), store_(std::move(store)) {}

  c10::intrusive_ptr<c10d::Store> clone() override {
    // c10d clones the store for threads of its own. All clones ask the same Rust store.
    return c10::make_intrusive<RustStore>(store_, timeout_);
  }

  void set(const std::string& key, const Bytes& value) override { (*store_)->set(key, to_slice(value)); }

  Bytes compareSet(const std::string& key, const Bytes& expected, const Bytes& desired) override {
    return to_bytes((*store_)->compare_set(key, to_slice(expected), to_slice(desired)));
  }

  Bytes get(const std::string& key) override {
    return to_bytes((*store_)->get(key, static_cast<std::uint64_t>(timeout_.count())));
  }

  // The group asks for its peers' addresses by few calls then.
  bool hasExtendedApi() const override { return true; }

  std::vector<Bytes> multiGet(const std::vector<std::string>& keys) override {
    const auto strs = to_strs(keys);
    const auto framed = (*store_)->get_many({strs.data(), strs.size()}, static_cast<std::uint64_t>(timeout_.count()));
    std::vector<Bytes> values;
    for (auto at = framed.begin(); at != framed.end();) {
      std::uint64_t length = 0;
      for (int shift = 0; shift < 64; shift += 8) {
        length |= static_cast<std::uint64_t>(*at++) << shift;
      }
      values.emplace_back(at, at + static_cast<std::ptrdiff_t>(length));
      at += static_cast<std::ptrdiff_t>(length);
    }
    return values;
  }

  std::int64_t add(const std::string& key, std::int64_t value) override { return (*store_)->add(key, value); }

  bool deleteKey(const std::string& key) override { return (*store_)->remove(key); }

  bool check(const std::vector<std::string>& keys) override {
    const auto strs = to_strs(keys);
    return (*store_)->contains({strs.data(), strs.size()});
  }

  // Neither Gloo nor NCCL asks for it.
  std::int64_t getNumKeys() override { C10_THROW_ERROR(NotImplementedError, "the store does not count its keys"); }

  void wait(const std::vector<std::string>& keys) override { wait(keys, timeout_); }

  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) override {
    // A group asks with its own limit or with c10d's default of five minutes; the shorter one holds.
    const auto limit = std::min(timeout, timeout_);
    const auto strs = to_strs(keys);
    (*store_)->wait({strs.data(), strs.size()}, static_cast<std::uint64_t>(limit.count()));
  }

 private:
  std::shared_ptr<rust::Box<StoreHandle>> store_;
};

} // namespace

c10::intrusive_ptr<c10d::Store>
make_store(rust::Box<StoreHandle> store, rust::Str prefix, std::chrono::milliseconds timeout) {
  return c10::make_intrusive<c10d::PrefixStore>(
      std::string(prefix),
      c10::make_intrusive<RustStore>(std::move(store), timeout));
}

TcpStore::TcpStore(std::unique_ptr<c10d::TCPStore> store) : store_(std::move(store)) {}
TcpStore::~TcpStore() = default;

std::uint16_t TcpStore::port() const { return store_->getPort(); }

void TcpStore::set(rust::Str key, rust::Slice<const std::uint8_t> value) const {
  store_->set(std::string(key), to_bytes(value));
}

rust::Vec<std::uint8_t> TcpStore::get(rust::Str key, std::uint64_t timeout_ms) const {
  const std::string name(key);
  // `get` alone would wait for the limit of the whole store.
  store_->wait({name}, std::chrono::milliseconds(timeout_ms));
  return to_vec(store_->get(name));
}

std::int64_t TcpStore::add(rust::Str key, std::int64_t amount) const { return store_->add(std::string(key), amount); }

rust::Vec<std::uint8_t> TcpStore::compare_set(
    rust::Str key,
    rust::Slice<const std::uint8_t> expected,
    rust::Slice<const std::uint8_t> desired) const {
  return to_vec(store_->compareSet(std::string(key), to_bytes(expected), to_bytes(desired)));
}

bool TcpStore::remove(rust::Str key) const { return store_->deleteKey(std::string(key)); }

bool TcpStore::contains(rust::Slice<const rust::Str> keys) const {
  std::vector<std::string> names;
  for (const rust::Str& key : keys) {
    names.emplace_back(key);
  }
  return store_->check(names);
}

std::unique_ptr<TcpStore> tcp_store(rust::Str host, std::uint16_t port, bool is_server, std::uint64_t timeout_ms) {
  c10d::TCPStoreOptions options;
  options.port = port;
  options.isServer = is_server;
  // The server does not count its clients: a group's members come and go.
  options.waitWorkers = false;
  options.timeout = std::chrono::milliseconds(timeout_ms);
  return std::make_unique<TcpStore>(std::make_unique<c10d::TCPStore>(std::string(host), options));
}

} // namespace c10d_shim
