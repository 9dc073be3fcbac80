#include <chrono>
#include <string>
#include <utility>

#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "c10d/src/ffi.rs.h"
#include "engine.h"

namespace c10d_shim {
namespace {

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
