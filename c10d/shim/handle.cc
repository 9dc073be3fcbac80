#include "handle.h"

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace c10d_shim {
namespace {

struct Ledger {
  std::mutex mutex;
  std::condition_variable changed;
  std::size_t live = 0;
};

// Never destroyed: a group may still wind down on another thread while the process exits.
Ledger& ledger() {
  static Ledger* const instance = new Ledger();
  return *instance;
}

} // namespace

Handle::Handle() {
  std::lock_guard<std::mutex> guard(ledger().mutex);
  ledger().live += 1;
}

Handle::~Handle() {
  std::lock_guard<std::mutex> guard(ledger().mutex);
  ledger().live -= 1;
  ledger().changed.notify_all();
}

std::size_t live_handles() {
  std::lock_guard<std::mutex> guard(ledger().mutex);
  return ledger().live;
}

std::size_t wait_for_handles(std::uint64_t timeout_ms) {
  std::unique_lock<std::mutex> guard(ledger().mutex);
  ledger().changed.wait_for(guard, std::chrono::milliseconds(timeout_ms), [] { return ledger().live == 0; });
  return ledger().live;
}

} // namespace c10d_shim
