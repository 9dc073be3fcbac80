#include <chrono>
#include <string>
#include <utility>

#include <c10/util/env.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "c10d/src/ffi.rs.h"
#include "engine.h"

namespace c10d_shim {
namespace {

// Waits for sends and receives on one of Gloo's threads, so that their end is told like that of a collective.
class Exchange final : public c10d::ProcessGroupGloo::AsyncWork {
 public:
  Exchange(
      std::shared_ptr<::gloo::Context> context,
      std::vector<c10::intrusive_ptr<c10d::Work>> works,
      std::vector<at::Tensor> sent,
      std::vector<at::Tensor> received,
      std::chrono::milliseconds timeout)
      : AsyncWork(std::move(context), {received}, c10d::OpType::UNKNOWN, 0, timeout),
        works_(std::move(works)),
        sent_(std::move(sent)),
        received_(std::move(received)) {}

  void run() override {
    for (auto& work : works_) {
      work->wait(timeout_);
    }
  }
  const std::vector<at::Tensor> getInputTensors() override { return sent_; }
  const std::vector<at::Tensor> getOutputTensors() override { return received_; }

 private:
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
  std::vector<at::Tensor> sent_;
  std::vector<at::Tensor> received_;
};

// Gloo has no abort. Its connections are protected members, and cutting them is what its peers notice.
class Gloo final : public c10d::ProcessGroupGloo {
 public:
  using ProcessGroupGloo::ProcessGroupGloo;

  void cut() {
    for (auto& context : contexts_) {
      // May leave a local waiter asleep. Nobody in Rust waits inside of libtorch, so none is
      // (flight.rs).
      context->closeConnections();
    }
  }

  c10::intrusive_ptr<c10d::Work> exchange(const std::vector<Letter>& sends, const std::vector<Letter>& receives) {
    std::vector<c10::intrusive_ptr<c10d::Work>> works;
    std::vector<at::Tensor> sent;
    std::vector<at::Tensor> received;
    // Messages between two ranks arrive in the order in which they were sent, so one tag serves all.
    for (const auto& letter : receives) {
      received.push_back(letter.tensor);
      std::vector<at::Tensor> tensors{letter.tensor};
      works.push_back(recv(tensors, letter.rank, 0));
    }
    for (const auto& letter : sends) {
      sent.push_back(letter.tensor);
      std::vector<at::Tensor> tensors{letter.tensor};
      works.push_back(send(tensors, letter.rank, 0));
    }
    auto work = c10::make_intrusive<Exchange>(
        getContext(0),
        std::move(works),
        std::move(sent),
        std::move(received),
        options_->timeout);
    enqueue(work);
    return work;
  }
};

class GlooWatch final : public Watch {
 public:
  GlooWatch(c10::intrusive_ptr<c10d::Work> work, rust::Box<Signal> signal) : work_(std::move(work)) {
    // A callback has to be copyable.
    auto shared = std::make_shared<rust::Box<Signal>>(std::move(signal));
    // Runs on Gloo's thread, or at once on this one if the work is over already. It must not throw:
    // there is nobody to catch it.
    work_->getFuture()->addCallback([shared](c10::ivalue::Future& future) noexcept {
      (*shared)->complete(future.hasError() ? describe(future.exception_ptr()) : std::string());
    });
  }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
};

class GlooEngine final : public Engine {
 public:
  explicit GlooEngine(c10::intrusive_ptr<Gloo> group) : group_(std::move(group)) {}

  c10d::Backend& backend() override { return *group_; }
  void close() override { group_->cut(); }
  bool polls() const override { return false; }
  bool exchanges() const override { return true; }
  c10::intrusive_ptr<c10d::Work> exchange(std::vector<Letter> sends, std::vector<Letter> receives) override {
    return group_->exchange(sends, receives);
  }
  // One for all groups of the process: each launch writes to libtorch's flight recorder, whose table of groups is
  // global and not locked. A launch only enqueues, so nobody waits here for a peer.
  std::mutex& launching() override {
    static std::mutex* const instance = new std::mutex();
    return *instance;
  }
  std::unique_ptr<Watch> watch(c10::intrusive_ptr<c10d::Work> work, rust::Box<Signal> signal) override {
    return std::make_unique<GlooWatch>(std::move(work), std::move(signal));
  }

 private:
  c10::intrusive_ptr<Gloo> group_;
};

} // namespace

// Gloo reads these with each group: peers' addresses are asked for together, and connections to one listener
// are told apart by ranks, so that what a rank says of itself has one length.
void prepare_gloo() {
  c10::utils::set_env("GLOO_ENABLE_STORE_V2_API", "1", /*overwrite=*/false);
  c10::utils::set_env("GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER", "1", /*overwrite=*/false);
}

std::unique_ptr<Group> gloo_group(
    std::int32_t rank,
    std::int32_t world_size,
    const GlooLimits& limits,
    rust::Str hostname,
    rust::Str interface,
    rust::Box<StoreHandle> store,
    rust::Str prefix) {
  const std::chrono::milliseconds timeout(limits.meeting_ms);
  auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  // One device: each adds connections to every peer.
  options->devices.push_back(
      interface.empty() ? c10d::ProcessGroupGloo::createDeviceForHostname(std::string(hostname))
                        : c10d::ProcessGroupGloo::createDeviceForInterface(std::string(interface)));
  auto group =
      c10::make_intrusive<Gloo>(make_store(std::move(store), prefix, timeout), rank, world_size, std::move(options));
  // The meeting had its own, shorter limit above. From here on operations have theirs.
  group->setTimeout(std::chrono::milliseconds(limits.operation_ms));
  return std::make_unique<Group>(std::make_unique<GlooEngine>(std::move(group)));
}

} // namespace c10d_shim
