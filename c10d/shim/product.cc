#include "product.h"

#include <optional>
#include <utility>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "aten.h"

namespace c10d_shim {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Number of weights below which libtorch's own product takes less time than the way to oneDNN's.
constexpr std::int64_t few_weights = 1 << 15;

at::Tensor multiplied(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "no product of ", a.sizes(), " and ", b.sizes());
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  matmul_into(out, a, b, /*scale=*/1.0, /*add=*/false);
  return out;
}

// Its gradients are products too, so it has all derivatives.
struct Product : torch::autograd::Function<Product> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& a, const at::Tensor& b) {
    context->save_for_backward({a, b});
    return multiplied(a, b);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list factors = context->get_saved_variables();
    variable_list of(2);
    if (context->needs_input_grad(0)) {
      of[0] = Product::apply(grads[0], factors[1].t());
    }
    if (context->needs_input_grad(1)) {
      of[1] = Product::apply(factors[0].t(), grads[0]);
    }
    return of;
  }
};

// As the product of input and transposed weight, but the weight's gradient comes in the order of the weight.
struct ProductOfRows : torch::autograd::Function<ProductOfRows> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight) {
    context->save_for_backward({input, weight});
    return multiplied(input, weight.t());
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list factors = context->get_saved_variables();
    variable_list of(2);
    if (context->needs_input_grad(0)) {
      of[0] = Product::apply(grads[0], factors[1]);
    }
    if (context->needs_input_grad(1)) {
      of[1] = Product::apply(grads[0].t(), factors[0]);
    }
    return of;
  }
};

// By kinds and shapes alone: never by what varies from run to run.
bool is_faster(const at::Tensor& input, const at::Tensor& weight) {
  const auto fits = [](const at::Tensor& tensor) {
    return tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.dim() == 2;
  };
  return fits(input) && fits(weight) && weight.numel() >= few_weights;
}

} // namespace

std::unique_ptr<at::Tensor> product(const at::Tensor& a, const at::Tensor& b) {
  return std::make_unique<at::Tensor>(is_faster(a, b) ? Product::apply(a, b) : at::mm(a, b));
}

std::unique_ptr<at::Tensor> linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  if (!is_faster(input, weight)) {
    return std::make_unique<at::Tensor>(
        at::linear(input, weight, bias.defined() ? std::make_optional(bias) : std::nullopt));
  }
  at::Tensor out = ProductOfRows::apply(input, weight);
  if (bias.defined()) {
    out.add_(bias);
  }
  return std::make_unique<at::Tensor>(std::move(out));
}

} // namespace c10d_shim
