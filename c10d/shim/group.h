// Groups, works and loans as Rust sees them. What is inside is declared in engine.h.
#pragma once

#include <cstdint>
#include <memory>

#include "error.h"
#include "handle.h"
#include "rust/cxx.h"

namespace at {
class Tensor;
}

namespace c10d_shim {

struct Signal;
struct StoreHandle;
struct GlooLimits;
class Engine;
class Watch;

// One operation in flight.
class Work {
 public:
  explicit Work(std::unique_ptr<Watch> watch);
  ~Work();

  // Tells the signal if the operation is over, for engines that do not tell it themselves. Any thread.
  void poll() const;

 private:
  std::unique_ptr<Watch> watch_;
  Handle handle_;
};

// A process group. All members may be called from any thread; launches take turns.
class Group {
 public:
  explicit Group(std::unique_ptr<Engine> engine);
  // Blocks until the operations in flight are over.
  ~Group();

  // Each launches one operation that ends by completing the signal, exactly once, on some thread. The tensors'
  // memory must live, and stay unwritten by others, until the signal says success or the group is destroyed.
  std::unique_ptr<Work> all_reduce(const at::Tensor& tensor, std::uint8_t op, rust::Box<Signal> signal) const;
  std::unique_ptr<Work> all_to_all(
      const at::Tensor& send,
      rust::Slice<const std::int64_t> send_splits,
      const at::Tensor& receive,
      rust::Slice<const std::int64_t> receive_splits,
      rust::Box<Signal> signal) const;
  // Sends parts of `send`, one after the other, each as long as its count, to these ranks, and receives
  // likewise.
  std::unique_ptr<Work> exchange(
      const at::Tensor& send,
      rust::Slice<const std::int32_t> to,
      rust::Slice<const std::int64_t> send_counts,
      const at::Tensor& receive,
      rust::Slice<const std::int32_t> from,
      rust::Slice<const std::int64_t> receive_counts,
      rust::Box<Signal> signal) const;
  std::unique_ptr<Work> all_gather(const at::Tensor& send, const at::Tensor& receive, rust::Box<Signal> signal) const;
  std::unique_ptr<Work> broadcast(const at::Tensor& tensor, std::int64_t root, rust::Box<Signal> signal) const;
  std::unique_ptr<Work> barrier(rust::Box<Signal> signal) const;

  // Cuts the connections to all peers, so that they notice.
  void close() const;
  // Whether works have to be polled.
  bool polls() const;
  // Whether the backend has `exchange`.
  bool exchanges() const;

 private:
  std::unique_ptr<Engine> engine_;
  Handle handle_;
};

void prepare_gloo();
std::unique_ptr<Group> gloo_group(
    std::int32_t rank,
    std::int32_t world_size,
    const GlooLimits& limits,
    rust::Str hostname,
    rust::Str interface,
    rust::Box<StoreHandle> store,
    rust::Str prefix);

// Whether this tensor is dense, contiguous, one-dimensional, without gradient.
bool is_flat(const at::Tensor& tensor);
// Whether this is the only tensor object that refers to its memory, and the only reference to it.
bool is_exclusive(const at::Tensor& tensor);
std::size_t byte_length(const at::Tensor& tensor);
std::uint8_t* data_pointer(const at::Tensor& tensor);

} // namespace c10d_shim
