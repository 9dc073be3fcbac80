// What a group is made of, private to the shim.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "group.h"

namespace c10d_shim {

// Follows one c10d work until it is over.
class Watch {
 public:
  virtual ~Watch() = default;
  virtual void poll() {}
};

// A tensor that goes to a rank, or comes from it.
struct Letter {
  at::Tensor tensor;
  int rank;
};

// One c10d backend with what differs between backends.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual c10d::Backend& backend() = 0;
  virtual void close() = 0;
  virtual bool polls() const = 0;
  virtual bool exchanges() const { return false; }
  virtual std::unique_ptr<Watch> watch(c10::intrusive_ptr<c10d::Work> work, rust::Box<Signal> signal) = 0;
  // Starts sends and receives, each with the rank of the other side; the work is over when all of them are.
  // Null where the backend has no such operation.
  virtual c10::intrusive_ptr<c10d::Work> exchange(std::vector<Letter> /*sends*/, std::vector<Letter> /*receives*/) {
    return nullptr;
  }
  // What is held while an operation is launched: a backend assumes one launching thread.
  virtual std::mutex& launching() = 0;
};

// The Rust store under a prefix, as c10d sees it.
c10::intrusive_ptr<c10d::Store>
make_store(rust::Box<StoreHandle> store, rust::Str prefix, std::chrono::milliseconds timeout);

} // namespace c10d_shim
