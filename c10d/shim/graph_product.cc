// Products of matrices in compiled graphs. They call libtorch by these C functions, and the dynamic linker
// takes a program's own before a library's. What is computed faster neither here nor by oneDNN goes on to
// libtorch.
#include <dlfcn.h>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include "aten.h"
#include "product.h"

namespace {

at::Tensor& tensor(AtenTensorHandle handle) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle); }

bool is_single(const at::Tensor& tensor) { return tensor.is_cpu() && tensor.scalar_type() == at::kFloat; }

// Whether a tensor, added to each row of `out`, lies as one row.
bool is_row(const at::Tensor& tensor, const at::Tensor& out) {
  const bool is_one = tensor.dim() == 1 || (tensor.dim() == 2 && (tensor.size(0) == 1 || tensor.stride(0) == 0));
  return is_one && tensor.size(-1) == out.size(-1) && tensor.stride(-1) == 1;
}

bool are_single(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  return is_single(out) && is_single(a) && is_single(b);
}

using Product = at::Tensor& (*)(at::Tensor&, const at::Tensor&, const at::Tensor&);
using AddedProduct = at::Tensor& (*)(
    at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    const at::Scalar&,
    const at::Scalar&);

// Writes a b, by libtorch's function where it is not ours.
void write_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, Product otherwise) {
  if (are_single(out, a, b) && c10d_shim::write_small_product(out, a, b, /*bias=*/nullptr)) {
    return;
  }
  if (are_single(out, a, b) && c10d_shim::is_large_product(a, b)) {
    c10d_shim::matmul_into(out, a, b, /*scale=*/1.0, /*add=*/false);
  } else {
    otherwise(out, a, b);
  }
}

// Writes beta addend + alpha a b, by libtorch's function where it is not ours.
void write_added_product(
    at::Tensor& out,
    const at::Tensor& addend,
    const at::Tensor& a,
    const at::Tensor& b,
    double beta,
    double alpha,
    AddedProduct otherwise) {
  const bool is_ours = beta == 1.0 && are_single(out, a, b);
  const bool has_bias = is_ours && alpha == 1.0 && is_single(addend) && is_row(addend, out);
  if (has_bias && c10d_shim::write_small_product(out, a, b, &addend)) {
    return;
  }
  if (is_ours && c10d_shim::is_large_product(a, b)) {
    out.copy_(addend.expand(out.sizes()));
    c10d_shim::matmul_into(out, a, b, alpha, /*add=*/true);
  } else {
    otherwise(out, addend, a, b, beta, alpha);
  }
}

} // namespace

AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(write_product(tensor(out), tensor(self), tensor(mat2), at::mm_out););
}

AOTITorchError aoti_torch_cpu_bmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(write_product(tensor(out), tensor(self), tensor(mat2), at::bmm_out););
}

AOTITorchError aoti_torch_cpu_addmm_out(
    AtenTensorHandle out,
    AtenTensorHandle self,
    AtenTensorHandle mat1,
    AtenTensorHandle mat2,
    double beta,
    double alpha) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      write_added_product(tensor(out), tensor(self), tensor(mat1), tensor(mat2), beta, alpha, at::addmm_out););
}

AOTITorchError aoti_torch_cpu_baddbmm_out(
    AtenTensorHandle out,
    AtenTensorHandle self,
    AtenTensorHandle batch1,
    AtenTensorHandle batch2,
    double beta,
    double alpha) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      write_added_product(tensor(out), tensor(self), tensor(batch1), tensor(batch2), beta, alpha, at::baddbmm_out););
}

namespace c10d_shim {

bool graphs_take_our_products() {
  // Searched in the order in which a graph's library is linked when it is loaded.
  return dlsym(RTLD_DEFAULT, "aoti_torch_cpu_mm_out") == reinterpret_cast<void*>(&aoti_torch_cpu_mm_out);
}

std::unique_ptr<at::Tensor> graph_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& addend) {
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  const auto handle = [](const at::Tensor& tensor) {
    // The functions only read what is not the output.
    return torch::aot_inductor::tensor_pointer_to_tensor_handle(const_cast<at::Tensor*>(&tensor));
  };
  const AOTITorchError failed = addend.defined()
      ? aoti_torch_cpu_addmm_out(handle(out), handle(addend), handle(a), handle(b), /*beta=*/1.0, /*alpha=*/1.0)
      : aoti_torch_cpu_mm_out(handle(out), handle(a), handle(b));
  TORCH_CHECK(failed == AOTI_TORCH_SUCCESS, "the product of a graph failed");
  return std::make_unique<at::Tensor>(out);
}

} // namespace c10d_shim
