#include "product.h"

#include <algorithm>
#include <optional>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/TracerMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "aten.h"

namespace c10d_shim {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor multiplied(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "no product of ", a.sizes(), " and ", b.sizes());
  if (!is_large_product(a, b)) {
    return at::mm(a, b);
  }
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

// A linear layer with a leaky ReLU as one node: of small batches autograd's own work takes as long as the
// products.
struct LeakyLinear : torch::autograd::Function<LeakyLinear> {
  static at::Tensor forward(
      AutogradContext* context,
      const at::Tensor& input,
      const at::Tensor& weight,
      const at::Tensor& bias,
      double slope) {
    at::Tensor out = multiplied(input, weight.t());
    out.add_(bias);
    at::leaky_relu_(out, slope);
    context->save_for_backward({input, weight, out});
    context->saved_data["slope"] = slope;
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const double slope = context->saved_data["slope"].toDouble();
    const at::Tensor of_sum = at::leaky_relu_backward(grads[0], saved[2], slope, /*self_is_result=*/true);
    variable_list of(4);
    if (context->needs_input_grad(0)) {
      of[0] = Product::apply(of_sum, saved[1]);
    }
    if (context->needs_input_grad(1)) {
      of[1] = Product::apply(of_sum.t(), saved[0]);
    }
    if (context->needs_input_grad(2)) {
      of[2] = of_sum.sum(0);
    }
    return of;
  }
};

// Whether a product is computed here. A program that is recorded knows libtorch's operators alone.
bool is_ours(const at::Tensor& input, const at::Tensor& weight) {
  const auto fits = [](const at::Tensor& tensor) {
    return tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.dim() == 2;
  };
  return fits(input) && fits(weight) && !at::tracer::impl::is_dispatch_enabled();
}

} // namespace

bool is_large_product(const at::Tensor& a, const at::Tensor& b) {
  // Number of weights below which libtorch's own product takes less time than the way to oneDNN's.
  constexpr std::int64_t few_weights = 1 << 15;
  const std::int64_t count = a.numel() / std::max<std::int64_t>(a.size(-1), 1) * b.size(-1);
  return std::max({a.numel(), b.numel(), count}) >= few_weights;
}

std::unique_ptr<at::Tensor> product(const at::Tensor& a, const at::Tensor& b) {
  return std::make_unique<at::Tensor>(is_ours(a, b) ? Product::apply(a, b) : at::mm(a, b));
}

std::unique_ptr<at::Tensor> linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  if (!is_ours(input, weight)) {
    return std::make_unique<at::Tensor>(
        at::linear(input, weight, bias.defined() ? std::make_optional(bias) : std::nullopt));
  }
  at::Tensor out = ProductOfRows::apply(input, weight);
  if (bias.defined()) {
    out.add_(bias);
  }
  return std::make_unique<at::Tensor>(std::move(out));
}

std::unique_ptr<at::Tensor>
leaky_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, double slope) {
  if (is_ours(input, weight) && slope > 0.0) {
    TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), "a bias of ", bias.sizes());
    return std::make_unique<at::Tensor>(LeakyLinear::apply(input, weight, bias, slope));
  }
  at::Tensor out = at::linear(input, weight, bias);
  return std::make_unique<at::Tensor>(at::leaky_relu_(out, slope));
}

} // namespace c10d_shim
