#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

#include <dlfcn.h>

#include <c10/util/env.h>
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
      context->closeConnections();
    }
  }
};

class GlooWatch final : public Watch {
 public:
  GlooWatch(c10::intrusive_ptr<c10d::Work> work, rust::Box<Signal> signal) : work_(std::move(work)) {
    // A callback has to be copyable.
    auto shared = std::make_shared<rust::Box<Signal>>(std::move(signal));
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
  options->devices.push_back(
      interface.empty() ? c10d::ProcessGroupGloo::createDeviceForHostname(std::string(hostname))
                        : c10d::ProcessGroupGloo::createDeviceForInterface(std::string(interface)));
  auto group = c10::make_intrusive<Gloo>(
      make_store(std::move(store), prefix, timeout), rank, world_size, std::move(options));
  group->setTimeout(std::chrono::milliseconds(limits.operation_ms));
  return std::make_unique<Group>(std::make_unique<GlooEngine>(std::move(group)));
}

// Gloo has no other way to be told. The files are read again for each group.
void gloo_over_tls(rust::Str key, rust::Str certificate, rust::Str authorities) {
  // Gloo loads it by these names and no others. It would only be missed once a group is made.
  if (dlopen("libssl.so", RTLD_LAZY) == nullptr && dlopen("libssl.so.1.1", RTLD_LAZY) == nullptr) {
    throw std::runtime_error(
        "Gloo over TLS needs OpenSSL under the name libssl.so; install its development package, such as libssl-dev");
  }
  const auto set = [](const char* name, const std::string& value) {
    c10::utils::set_env(name, value.c_str(), /*overwrite=*/true);
  };
  set("GLOO_DEVICE_TRANSPORT", "TCP_TLS");
  set("GLOO_DEVICE_TRANSPORT_TCP_TLS_PKEY", std::string(key));
  set("GLOO_DEVICE_TRANSPORT_TCP_TLS_CERT", std::string(certificate));
  set("GLOO_DEVICE_TRANSPORT_TCP_TLS_CA_FILE", std::string(authorities));
}

} // namespace c10d_shim
