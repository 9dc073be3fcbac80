#include "nccl.h"

#include <chrono>
#include <mutex>
#include <utility>

#include <c10/util/env.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "c10d/src/ffi.rs.h"
#include "engine.h"

namespace c10d_shim {
namespace {

// NCCL's own monitors would end the process on an error, where the caller wants to abort and go on. The flight
// recorder's table of groups is not locked. c10d reads these variables when it makes a group.
void tame_nccl() {
  c10::utils::set_env("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", /*overwrite=*/true);
  c10::utils::set_env("TORCH_NCCL_ENABLE_MONITORING", "0", /*overwrite=*/true);
  c10::utils::set_env("TORCH_NCCL_BLOCKING_WAIT", "0", /*overwrite=*/true);
  c10::utils::set_env("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0", /*overwrite=*/true);
  c10::utils::set_env("TORCH_FR_BUFFER_SIZE", "0", /*overwrite=*/false);
}

// The future of an NCCL work is complete as soon as the kernel is enqueued, and c10d's watchdog looks ten times a
// second; so the waiter asks the work itself.
class NcclWatch final : public Watch {
 public:
  NcclWatch(c10::intrusive_ptr<c10d::Work> work, rust::Box<Signal> signal)
      : work_(std::move(work)), signal_(std::move(signal)) {}

  void poll() override {
    // A waiter and a launch may poll the same work at once; the signal is completed once.
    std::lock_guard<std::mutex> turn(mutex_);
    if (told_) {
      return;
    }
    try {
      if (!work_->isCompleted()) {
        return;
      }
      told_ = true;
      const auto error = work_->exception();
      signal_->complete(error ? describe(error) : std::string());
    } catch (...) {
      told_ = true;
      signal_->complete(describe(std::current_exception()));
    }
  }

 private:
  std::mutex mutex_;
  c10::intrusive_ptr<c10d::Work> work_;
  rust::Box<Signal> signal_;
  bool told_ = false;
};

class NcclEngine final : public Engine {
 public:
  explicit NcclEngine(c10::intrusive_ptr<c10d::ProcessGroupNCCL> group) : group_(std::move(group)) {}

  c10d::Backend& backend() override { return *group_; }
  // Waits until the GPU has left its kernels, so Rust calls this on a thread of its own.
  void close() override { group_->abort(); }
  bool polls() const override { return true; }
  // One for each group: a launch may wait for the peers, since NCCL connects two ranks when they first talk.
  std::mutex& launching() override { return launching_; }
  std::unique_ptr<Watch> watch(c10::intrusive_ptr<c10d::Work> work, rust::Box<Signal> signal) override {
    return std::make_unique<NcclWatch>(std::move(work), std::move(signal));
  }

 private:
  c10::intrusive_ptr<c10d::ProcessGroupNCCL> group_;
  std::mutex launching_;
};

} // namespace

std::unique_ptr<Group> nccl_group(
    std::int32_t rank,
    std::int32_t world_size,
    std::uint64_t timeout_ms,
    std::int8_t device,
    rust::Box<StoreHandle> store,
    rust::Str prefix) {
  tame_nccl();
  const std::chrono::milliseconds timeout(timeout_ms);
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  // Else the first operation would wait for what the making of the communicator did not.
  options->config.blocking = 1;
  auto group = c10::make_intrusive<c10d::ProcessGroupNCCL>(
      make_store(std::move(store), prefix, timeout),
      rank,
      world_size,
      std::move(options));
  const at::Device gpu(at::kCUDA, device);
  group->setBoundDeviceId(gpu);
  // Now, and not with the first operation: whoever forms a group expects to wait for the peers, and an abort cannot end
  // the making of a communicator that does not exist yet.
  group->eagerConnectSingleDevice(gpu);
  return std::make_unique<Group>(std::make_unique<NcclEngine>(std::move(group)));
}

} // namespace c10d_shim
