#include "cuda.h"

#include <array>
#include <cstdio>

#include <ATen/cuda/CUDAContext.h>
#include <c10/util/env.h>

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

} // namespace c10d_shim
