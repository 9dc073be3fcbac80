#include "group.h"

#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "c10d/src/ffi.rs.h"
#include "engine.h"

namespace c10d_shim {
namespace {

// A tensor over the same memory with a storage of its own. c10d's works outlive the moment of their completion a
// little and keep their tensors; so their references do not count as aliases of the buffer that is handed back,
// and the handle tells when the last of them is gone.
at::Tensor lend(const at::Tensor& tensor) {
  auto handle = std::make_shared<Handle>();
  return at::from_blob(
      tensor.mutable_data_ptr(),
      tensor.sizes(),
      [handle](void*) {},
      tensor.options(),
      tensor.device());
}

std::vector<std::int64_t> to_vector(rust::Slice<const std::int64_t> slice) {
  return std::vector<std::int64_t>(slice.begin(), slice.end());
}

// Runs one launch and watches the work that it gives.
template <typename Launch>
std::unique_ptr<Work> start(Engine& engine, rust::Box<Signal> signal, Launch&& launch) {
  // Held for the launch alone. What was launched runs on libtorch's threads.
  std::lock_guard<std::mutex> turn(engine.launching());
  auto work = launch(engine.backend());
  return std::make_unique<Work>(engine.watch(std::move(work), std::move(signal)));
}

// Parts of a tensor, one after the other.
std::vector<Letter>
letters(const at::Tensor& tensor, rust::Slice<const std::int32_t> ranks, rust::Slice<const std::int64_t> counts) {
  std::vector<Letter> letters;
  std::int64_t at = 0;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    letters.push_back({tensor.narrow(0, at, counts[i]), ranks[i]});
    at += counts[i];
  }
  return letters;
}

} // namespace

Work::Work(std::unique_ptr<Watch> watch) : watch_(std::move(watch)) {}
Work::~Work() = default;
void Work::poll() const { watch_->poll(); }

Group::Group(std::unique_ptr<Engine> engine) : engine_(std::move(engine)) {}
Group::~Group() = default;
void Group::close() const { engine_->close(); }
bool Group::polls() const { return engine_->polls(); }
bool Group::exchanges() const { return engine_->exchanges(); }

std::unique_ptr<Work> Group::all_reduce(const at::Tensor& tensor, std::uint8_t op, rust::Box<Signal> signal) const {
  return start(*engine_, std::move(signal), [&](c10d::Backend& backend) {
    std::vector<at::Tensor> tensors{lend(tensor)};
    c10d::AllreduceOptions options;
    options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(op);
    return backend.allreduce(tensors, options);
  });
}

std::unique_ptr<Work> Group::all_to_all(
    const at::Tensor& send,
    rust::Slice<const std::int64_t> send_splits,
    const at::Tensor& receive,
    rust::Slice<const std::int64_t> receive_splits,
    rust::Box<Signal> signal) const {
  return start(*engine_, std::move(signal), [&](c10d::Backend& backend) {
    // alltoall_base and _allgather_base take flat tensors, so nothing is copied into lists of chunks.
    at::Tensor output = lend(receive);
    at::Tensor input = lend(send);
    auto output_counts = to_vector(receive_splits);
    auto input_counts = to_vector(send_splits);
    return backend.alltoall_base(output, input, output_counts, input_counts, c10d::AllToAllOptions());
  });
}

std::unique_ptr<Work> Group::exchange(
    const at::Tensor& send,
    rust::Slice<const std::int32_t> to,
    rust::Slice<const std::int64_t> send_counts,
    const at::Tensor& receive,
    rust::Slice<const std::int32_t> from,
    rust::Slice<const std::int64_t> receive_counts,
    rust::Box<Signal> signal) const {
  return start(*engine_, std::move(signal), [&](c10d::Backend&) {
    auto work = engine_->exchange(letters(lend(send), to, send_counts), letters(lend(receive), from, receive_counts));
    TORCH_CHECK(work, "this backend exchanges nothing between two ranks");
    return work;
  });
}

std::unique_ptr<Work> Group::all_gather(const at::Tensor& send, const at::Tensor& receive, rust::Box<Signal> signal)
    const {
  return start(*engine_, std::move(signal), [&](c10d::Backend& backend) {
    at::Tensor output = lend(receive);
    at::Tensor input = lend(send);
    return backend._allgather_base(output, input, c10d::AllgatherOptions());
  });
}

std::unique_ptr<Work> Group::broadcast(const at::Tensor& tensor, std::int64_t root, rust::Box<Signal> signal) const {
  return start(*engine_, std::move(signal), [&](c10d::Backend& backend) {
    std::vector<at::Tensor> tensors{lend(tensor)};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return backend.broadcast(tensors, options);
  });
}

std::unique_ptr<Work> Group::barrier(rust::Box<Signal> signal) const {
  return start(*engine_, std::move(signal), [&](c10d::Backend& backend) {
    c10d::BarrierOptions options;
    // NCCL's barrier is a reduce of one number, and has to know on which GPU.
    options.device = backend.getBoundDeviceId();
    if (options.device) {
      options.device_ids = {options.device->index()};
    }
    return backend.barrier(options);
  });
}

bool is_flat(const at::Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided && tensor.dim() == 1 && tensor.is_contiguous() &&
      !tensor.requires_grad();
}

bool is_exclusive(const at::Tensor& tensor) {
  // The first count is of tensors that share this object, the second of views over its memory.
  return tensor.use_count() == 1 && tensor.has_storage() && tensor.storage().use_count() == 1;
}

std::size_t byte_length(const at::Tensor& tensor) { return tensor.nbytes(); }

std::uint8_t* data_pointer(const at::Tensor& tensor) { return static_cast<std::uint8_t*>(tensor.mutable_data_ptr()); }

} // namespace c10d_shim
