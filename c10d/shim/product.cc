#include "product.h"

#include <algorithm>
#include <array>
#include <optional>
#include <unordered_map>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/TracerMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "aten.h"
#include "package.h"
#include "processor.h"
#include "small_product.h"

namespace c10d_shim {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Where gradients go, by the memory of their weights.
thread_local std::unordered_map<const void*, at::Tensor> places_of_gradients;

// The place of a weight's gradient, which is taken: a further gradient of the weight is added to it, and must
// lie elsewhere. New memory if it has none.
at::Tensor take_place(const at::Tensor& weight) {
  const auto known = places_of_gradients.find(weight.const_data_ptr());
  if (known == places_of_gradients.end() || !weight.is_contiguous() || known->second.numel() != weight.numel()) {
    return at::empty(weight.sizes(), weight.options());
  }
  const at::Tensor place = known->second.view(weight.sizes());
  places_of_gradients.erase(known);
  return place;
}

// The widest kernels that this processor has instructions for; null if it has none of them.
const SmallProducts* small_products() {
#ifdef __x86_64__
  const int lanes = vector_lanes();
  return lanes == 16 ? &small_products_16 : lanes == 8 ? &small_products_8 : nullptr;
#else
  return nullptr;
#endif
}

at::Tensor multiplied(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "no product of ", a.sizes(), " and ", b.sizes());
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  write_product(out, a, b);
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

// Whether the kernels of small_product.h take a layer's shapes. Beyond them oneDNN's take less time: they
// bring large matrices into another order first.
bool is_small_layer(const at::Tensor& input, const at::Tensor& weight, std::int64_t groups) {
  return sums_by_groups(input.size(0) / groups, weight.numel());
}

const float* floats(const at::Tensor& tensor) { return tensor.const_data_ptr<float>(); }

LayerSizes sizes_of(const at::Tensor& input, const at::Tensor& weight, std::int64_t groups) {
  return {input.size(0) / groups, input.size(1), weight.size(0)};
}

void write_output(at::Tensor& out, const at::Tensor& input, const at::Tensor& weight, const float* bias, double slope) {
  const at::Tensor panel = at::empty({panel_width * input.size(1)}, input.options());
  small_products()->output(
      sizes_of(input, weight, /*groups=*/1),
      floats(input),
      floats(weight),
      bias,
      static_cast<float>(slope),
      out.mutable_data_ptr<float>(),
      panel.mutable_data_ptr<float>());
}

// A linear layer, perhaps with a leaky ReLU, as one node: of small batches autograd's own work takes as long
// as the products. Gradients of weight and bias are sums over groups of rows, which only small layers tell
// apart.
struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(
      AutogradContext* context,
      const at::Tensor& input,
      const at::Tensor& weight,
      const std::optional<at::Tensor>& bias,
      double slope,
      std::int64_t groups) {
    const at::Tensor addend = bias.value_or(at::Tensor());
    at::Tensor out;
    if (is_small_layer(input, weight, groups)) {
      out = at::empty({input.size(0), weight.size(0)}, input.options());
      const float* of_row = addend.defined() ? floats(addend) : nullptr;
      write_output(out, input.contiguous(), weight.contiguous(), of_row, slope);
    } else {
      out = multiplied(input, weight.t());
      if (addend.defined()) {
        out.add_(addend);
      }
      if (slope != 1.0) {
        at::leaky_relu_(out, slope);
      }
    }
    context->save_for_backward({input, weight, slope == 1.0 ? at::Tensor() : out});
    context->saved_data["slope"] = slope;
    context->saved_data["groups"] = groups;
    context->saved_data["has_bias"] = addend.defined();
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const double slope = context->saved_data["slope"].toDouble();
    const std::int64_t groups = context->saved_data["groups"].toInt();
    at::Tensor grad = grads[0];
    if (slope != 1.0) {
      grad = at::leaky_relu_backward(grad, saved[2], slope, /*self_is_result=*/true);
    }
    // A gradient that is differentiated in its turn consists of products that are nodes themselves.
    const bool is_small = is_small_layer(saved[0], saved[1], groups) && !at::GradMode::is_enabled();
    TORCH_CHECK(is_small || groups == 1, "only small layers without second derivatives sum by groups of rows");
    // An input that is not there has no place among them.
    const bool has_bias = context->saved_data["has_bias"].toBool();
    const std::array<bool, 3> needs = {
        context->needs_input_grad(0),
        context->needs_input_grad(1),
        has_bias && context->needs_input_grad(2)};
    return is_small ? small_gradients(saved[0].contiguous(), saved[1].contiguous(), grad.contiguous(), groups, needs)
                    : gradients(saved[0], saved[1], grad, needs);
  }

  static variable_list
  gradients(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& grad, std::array<bool, 3> needs) {
    variable_list of(5);
    if (needs[0]) {
      of[0] = Product::apply(grad, weight);
    }
    if (needs[1] && at::GradMode::is_enabled()) {
      of[1] = Product::apply(grad.t(), input);
    } else if (needs[1]) {
      of[1] = take_place(weight);
      write_product(of[1], grad.t(), input);
    }
    if (needs[2]) {
      of[2] = grad.sum(0);
    }
    return of;
  }

  static variable_list small_gradients(
      const at::Tensor& input,
      const at::Tensor& weight,
      const at::Tensor& grad,
      std::int64_t groups,
      std::array<bool, 3> needs) {
    const SmallProducts& products = *small_products();
    const LayerSizes sizes = sizes_of(input, weight, groups);
    const auto place = [&](at::IntArrayRef shape) { return at::empty(shape, input.options()); };
    variable_list of(5);
    if (needs[0]) {
      of[0] = place(input.sizes());
      const LayerSizes whole = sizes_of(input, weight, /*groups=*/1);
      products.of_input(whole, floats(grad), floats(weight), of[0].mutable_data_ptr<float>());
    }
    if (needs[1]) {
      of[1] = take_place(weight);
      products.of_weight(sizes, groups, floats(grad), floats(input), of[1].mutable_data_ptr<float>());
    }
    if (needs[2]) {
      of[2] = place({weight.size(0)});
      products.of_bias(sizes, groups, floats(grad), of[2].mutable_data_ptr<float>());
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

bool sums_by_groups(std::int64_t rows, std::int64_t weights) {
  constexpr std::int64_t most_weights = 1 << 20;
  constexpr std::int64_t most_rows = 256;
  const bool is_small = weights <= most_weights && rows <= most_rows;
  return small_products() != nullptr && is_small && weights > 0 && rows > 0;
}

void place_gradients(const TensorList& weights, const TensorList& places) {
  for (std::size_t i = 0; i < weights.size(); i++) {
    const auto [weight, place] = std::pair(weights.get(i), places.get(i));
    const bool fits = weight->is_cpu() && place->is_cpu() && place->is_contiguous() &&
        weight->scalar_type() == at::kFloat && place->scalar_type() == at::kFloat;
    if (fits) {
      places_of_gradients.insert_or_assign(weight->const_data_ptr(), *place);
    }
  }
}

void forget_places() { places_of_gradients.clear(); }

bool write_small_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Tensor* bias) {
  const SmallProducts* products = small_products();
  const bool are_matrices = a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0);
  if (products == nullptr || !are_matrices || !out.is_contiguous()) {
    return false;
  }
  // One of the factors, or the product, is that of the weights: the product is then a layer's output, the
  // gradient of its input, or of its weight.
  const auto is_small = [](std::int64_t rows, const at::Tensor& weight) {
    return sums_by_groups(rows, weight.numel());
  };
  if (a.is_contiguous() && b.t().is_contiguous() && is_small(a.size(0), b)) {
    write_output(out, a, b.t(), bias == nullptr ? nullptr : floats(*bias), /*slope=*/1.0);
  } else if (bias != nullptr || !b.is_contiguous()) {
    return false;
  } else if (a.is_contiguous() && is_small(a.size(0), b)) {
    products->of_input({a.size(0), b.size(1), b.size(0)}, floats(a), floats(b), out.mutable_data_ptr<float>());
  } else if (a.t().is_contiguous() && is_small(a.size(1), out)) {
    const LayerSizes sizes{b.size(0), b.size(1), a.size(0)};
    products->of_weight(sizes, /*groups=*/1, floats(a), floats(b), out.mutable_data_ptr<float>());
  } else {
    return false;
  }
  return true;
}

bool is_large_product(const at::Tensor& a, const at::Tensor& b) {
  // Number of weights below which libtorch's own product takes less time than the way to oneDNN's.
  constexpr std::int64_t few_weights = 1 << 15;
  const std::int64_t count = a.numel() / std::max<std::int64_t>(a.size(-1), 1) * b.size(-1);
  return std::max({a.numel(), b.numel(), count}) >= few_weights;
}

void write_product(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  if (is_ours(a, b) && is_large_product(a, b)) {
    matmul_into(out, a, b, /*scale=*/1.0, /*add=*/false);
  } else {
    at::mm_out(out, a, b);
  }
}

std::unique_ptr<at::Tensor> product(const at::Tensor& a, const at::Tensor& b) {
  return std::make_unique<at::Tensor>(is_ours(a, b) ? Product::apply(a, b) : at::mm(a, b));
}

std::unique_ptr<at::Tensor>
linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, double slope, std::int64_t groups) {
  TORCH_CHECK(groups > 0 && groups <= most_groups && input.size(0) % groups == 0, "no groups of rows: ", groups);
  const auto addend = bias.defined() ? std::make_optional(bias.contiguous()) : std::nullopt;
  // Gradients are told from outputs, which they are for a slope from 0 to 1 alone.
  if (is_ours(input, weight) && slope > 0.0 && slope <= 1.0) {
    TORCH_CHECK(input.size(1) == weight.size(1), "no product of ", input.sizes(), " and ", weight.sizes());
    TORCH_CHECK(!addend || (bias.dim() == 1 && bias.size(0) == weight.size(0)), "a bias of ", bias.sizes());
    TORCH_CHECK(groups == 1 || is_small_layer(input, weight, groups), "a layer too large for groups of rows");
    return std::make_unique<at::Tensor>(Linear::apply(input, weight, addend, slope, groups));
  }
  TORCH_CHECK(groups == 1, "no groups of rows on this device or in this precision");
  at::Tensor out = at::linear(input, weight, addend);
  return std::make_unique<at::Tensor>(slope == 1.0 ? out : at::leaky_relu_(out, slope));
}

} // namespace c10d_shim
