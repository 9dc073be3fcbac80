#include "cuda.h"

#include <array>
#include <cstdio>
#include <optional>
#include <string>

#include <dlfcn.h>

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/env.h>

// Nothing here may call CUDA's own library: headers such as CUDAGuard.h do, in functions that are compiled into whoever
// uses them, and the library lies where only libtorch finds it.

namespace c10d_shim {

// cuBLAS reads its variable when it makes its first handle. Without it two streams may share a workspace, and the order
// of sums depends on timing; libtorch refuses that once deterministic algorithms are asked for.
void prepare_cuda() { c10::utils::set_env("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/false); }

rust::String pci_bus_id(std::int8_t device) {
  const auto* properties = at::cuda::getDeviceProperties(device);
  std::array<char, 32> text{};
  std::snprintf(
      text.data(),
      text.size(),
      "%04x:%02x:%02x.0",
      properties->pciDomainID,
      properties->pciBusID,
      properties->pciDeviceID);
  return rust::String(text.data());
}

// The thread has a stream of its own, so the copy runs beside what others told the GPU to do, and waits for the copy
// itself, so whoever gets the tensor need not.
std::unique_ptr<at::Tensor> upload(rust::Slice<const float> values, std::int8_t device) {
  c10::NoGradGuard no_grad;
  thread_local std::optional<c10::cuda::CUDAStream> own;
  if (!own || own->device_index() != device) {
    own = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device);
  }
  const c10::StreamGuard guard(own->unwrap());
  const auto count = static_cast<std::int64_t>(values.size());
  const at::Tensor pinned = at::from_blob(const_cast<float*>(values.data()), {count}, at::kFloat).pin_memory();
  at::Tensor there = pinned.to(at::Device(at::kCUDA, device), at::kFloat, /*non_blocking=*/true);
  own->synchronize();
  // Its memory is this stream's. It must not be used again before the stream that reads it has done so.
  c10::cuda::CUDACachingAllocator::recordStream(there.storage().data_ptr(), c10::cuda::getDefaultCUDAStream(device));
  return std::make_unique<at::Tensor>(std::move(there));
}

Mark::Mark(std::int8_t device) : event_(c10::DeviceType::CUDA) {
  event_.record(c10::cuda::getDefaultCUDAStream(device).unwrap());
}

void Mark::wait() const { event_.synchronize(); }

std::unique_ptr<Mark> mark(std::int8_t device) { return std::make_unique<Mark>(device); }

void wait_for_gpu(std::int8_t device) { c10::cuda::getDefaultCUDAStream(device).synchronize(); }

void empty_cuda_cache() { c10::cuda::CUDACachingAllocator::emptyCache(); }

std::uint64_t refused_allocations(std::int8_t device) {
  return static_cast<std::uint64_t>(c10::cuda::CUDACachingAllocator::getDeviceStats(device).num_ooms);
}

rust::String compute_capability(std::int8_t device) {
  const auto* properties = at::cuda::getDeviceProperties(device);
  return std::to_string(properties->major) + "." + std::to_string(properties->minor);
}

rust::String gpu_name(std::int8_t device) {
  const auto* properties = at::cuda::getDeviceProperties(device);
  return std::string(properties->name) + ", " + std::to_string(properties->multiProcessorCount) + " SMs";
}

// Looked up by name, since none of these libraries is linked: libtorch has loaded those that it computes
// with.
rust::String gpu_libraries() {
  std::string text;
  if (auto* version = reinterpret_cast<std::size_t (*)()>(dlsym(RTLD_DEFAULT, "cudnnGetVersion"))) {
    text += "cuDNN " + std::to_string(version());
  }
  if (auto* property = reinterpret_cast<int (*)(int, int*)>(dlsym(RTLD_DEFAULT, "cublasGetProperty"))) {
    text += text.empty() ? "cuBLAS" : ", cuBLAS";
    // The kinds of property are the major and the minor number, and the patch level.
    for (int kind = 0; kind < 3; ++kind) {
      int value = 0;
      property(kind, &value);
      text += (kind == 0 ? " " : ".") + std::to_string(value);
    }
  }
  return text;
}

// That of the headers of this build, which are those of libtorch's own.
rust::String cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

} // namespace c10d_shim
