// What a process that computes on a GPU needs of CUDA; defined only with the feature `cuda`.
#pragma once

#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include "rust/cxx.h"

namespace c10d_shim {

// A place in the work of a GPU's default stream.
class Mark {
 public:
  explicit Mark(std::int8_t device);
  void wait() const;

 private:
  // Libtorch's own and not CUDA's, whose functions are compiled into whoever uses them.
  c10::Event event_;
};

std::unique_ptr<Mark> mark(std::int8_t device);
void prepare_cuda();
rust::String pci_bus_id(std::int8_t device);
std::unique_ptr<at::Tensor> upload(rust::Slice<const float> values, std::int8_t device);
void wait_for_gpu(std::int8_t device);
void empty_cuda_cache();
std::uint64_t refused_allocations(std::int8_t device);
rust::String compute_capability(std::int8_t device);
rust::String gpu_name(std::int8_t device);
rust::String gpu_libraries();
rust::String cuda_version();

} // namespace c10d_shim
