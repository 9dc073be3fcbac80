// Products of matrices in compiled graphs. They call libtorch by these C functions, and the dynamic linker
// takes a program's own before a library's. What oneDNN does not compute faster goes on to libtorch.
#include <dlfcn.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include "aten.h"
#include "product.h"

namespace {

at::Tensor& tensor(AtenTensorHandle handle) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle); }

bool is_ours(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const auto is_single = [](const at::Tensor& tensor) { return tensor.is_cpu() && tensor.scalar_type() == at::kFloat; };
  return is_single(out) && is_single(a) && is_single(b) && c10d_shim::is_large_product(a, b);
}

// Writes addend + alpha a b.
void add_product(at::Tensor& out, const at::Tensor& addend, const at::Tensor& a, const at::Tensor& b, double alpha) {
  const c10::NoGradGuard no_grad;
  out.copy_(addend.expand(out.sizes()));
  c10d_shim::matmul_into(out, a, b, alpha, /*add=*/true);
}

} // namespace

AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    if (is_ours(tensor(out), tensor(self), tensor(mat2))) {
      c10d_shim::matmul_into(tensor(out), tensor(self), tensor(mat2), /*scale=*/1.0, /*add=*/false);
    } else {
      at::mm_out(tensor(out), tensor(self), tensor(mat2));
    }
  });
}

AOTITorchError aoti_torch_cpu_bmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    if (is_ours(tensor(out), tensor(self), tensor(mat2))) {
      c10d_shim::matmul_into(tensor(out), tensor(self), tensor(mat2), /*scale=*/1.0, /*add=*/false);
    } else {
      at::bmm_out(tensor(out), tensor(self), tensor(mat2));
    }
  });
}

AOTITorchError aoti_torch_cpu_addmm_out(
    AtenTensorHandle out,
    AtenTensorHandle self,
    AtenTensorHandle mat1,
    AtenTensorHandle mat2,
    double beta,
    double alpha) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    if (beta == 1.0 && is_ours(tensor(out), tensor(mat1), tensor(mat2))) {
      add_product(tensor(out), tensor(self), tensor(mat1), tensor(mat2), alpha);
    } else {
      at::addmm_out(tensor(out), tensor(self), tensor(mat1), tensor(mat2), beta, alpha);
    }
  });
}

AOTITorchError aoti_torch_cpu_baddbmm_out(
    AtenTensorHandle out,
    AtenTensorHandle self,
    AtenTensorHandle batch1,
    AtenTensorHandle batch2,
    double beta,
    double alpha) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    if (beta == 1.0 && is_ours(tensor(out), tensor(batch1), tensor(batch2))) {
      add_product(tensor(out), tensor(self), tensor(batch1), tensor(batch2), alpha);
    } else {
      at::baddbmm_out(tensor(out), tensor(self), tensor(batch1), tensor(batch2), beta, alpha);
    }
  });
}

namespace c10d_shim {

bool graphs_take_our_products() {
  // Searched in the order in which a graph's library is linked when it is loaded.
  return dlsym(RTLD_DEFAULT, "aoti_torch_cpu_mm_out") == reinterpret_cast<void*>(&aoti_torch_cpu_mm_out);
}

} // namespace c10d_shim
