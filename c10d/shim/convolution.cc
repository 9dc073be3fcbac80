#include "convolution.h"

#include <algorithm>
#include <array>
#include <optional>

#include <ATen/ATen.h>
#include <ATen/TracerMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "processor.h"
#include "product.h"

namespace c10d_shim {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Index = std::int64_t;

// An image of the size (height, width, channels), and the places where a square kernel lies on it.
struct Places {
  Index samples;
  Index height;
  Index width;
  Index channels;
  Index kernel;
  Index stride;
  Index padding;

  Index rows() const { return (height + 2 * padding - kernel) / stride + 1; }
  Index columns() const { return (width + 2 * padding - kernel) / stride + 1; }
  Index patch() const { return kernel * kernel * channels; }
};

// Calls `with(place, pixels, count)` for each line of the kernel at each place of a sample that lies on the
// image: `count` numbers of the patches from `place` on are those of the image from `pixels` on.
template <typename With>
void for_each_line(const Places& at, With with) {
  const Index line = at.kernel * at.channels;
  for (Index row = 0; row < at.rows(); row++) {
    for (Index column = 0; column < at.columns(); column++) {
      const Index left = column * at.stride - at.padding;
      const Index begin = std::max<Index>(0, -left);
      const Index end = std::min(at.kernel, at.width - left);
      for (Index k = 0; k < at.kernel; k++) {
        const Index y = row * at.stride - at.padding + k;
        if (y >= 0 && y < at.height && begin < end) {
          const Index place = (row * at.columns() + column) * at.patch() + k * line + begin * at.channels;
          with(place, (y * at.width + left + begin) * at.channels, (end - begin) * at.channels);
        }
      }
    }
  }
}

// Calls `with(sample)` for all samples, several at a time if there are threads for it.
template <typename With>
void for_each_sample(const Places& at, With with) {
  for_each_part(at.samples, /*grain=*/1, [&](Index begin, Index end) {
    for (Index sample = begin; sample < end; sample++) {
      with(sample);
    }
  });
}

// (n, h, w, c) to the patches of all places, (n rows columns, k k c); 0 beyond the edges.
at::Tensor cut(const at::Tensor& image, const Places& at) {
  at::Tensor patches = at::zeros({at.samples * at.rows() * at.columns(), at.patch()}, image.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, image.scalar_type(), "cut", [&] {
    const scalar_t* from = image.const_data_ptr<scalar_t>();
    scalar_t* to = patches.mutable_data_ptr<scalar_t>();
    for_each_sample(at, [&](Index sample) {
      const scalar_t* own = from + sample * at.height * at.width * at.channels;
      scalar_t* out = to + sample * at.rows() * at.columns() * at.patch();
      for_each_line(at, [&](Index place, Index pixels, Index count) { std::copy_n(own + pixels, count, out + place); });
    });
  });
  return patches;
}

// Adds patches up to an image, in single precision at least: what `cut` transposed is.
at::Tensor lay(const at::Tensor& given, const Places& at) {
  const at::Tensor patches = given.to(given.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  at::Tensor image = at::zeros({at.samples, at.height, at.width, at.channels}, patches.options());
  AT_DISPATCH_FLOATING_TYPES(patches.scalar_type(), "lay", [&] {
    const scalar_t* from = patches.const_data_ptr<scalar_t>();
    scalar_t* to = image.mutable_data_ptr<scalar_t>();
    for_each_sample(at, [&](Index sample) {
      const scalar_t* own = from + sample * at.rows() * at.columns() * at.patch();
      scalar_t* out = to + sample * at.height * at.width * at.channels;
      for_each_line(at, [&](Index place, Index pixels, Index count) {
        for (Index i = 0; i < count; i++) {
          out[pixels + i] += own[place + i];
        }
      });
    });
  });
  return image.to(given.scalar_type());
}

// A graph keeps whole numbers, and no struct.
c10::List<Index> kept(const Places& at) {
  return {at.samples, at.height, at.width, at.channels, at.kernel, at.stride, at.padding};
}

Places places(const c10::IValue& kept) {
  const auto of = kept.toIntVector();
  return {of[0], of[1], of[2], of[3], of[4], of[5], of[6]};
}

// Cut and Lay are each the other's gradient, so both have all derivatives.
struct Cut : torch::autograd::Function<Cut> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& image, const Places& at) {
    context->saved_data["places"] = kept(at);
    return cut(image.contiguous(), at);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads);
};

struct Lay : torch::autograd::Function<Lay> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& patches, const Places& at) {
    context->saved_data["places"] = kept(at);
    return lay(patches, at);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    return {Cut::apply(grads[0], places(context->saved_data["places"])), at::Tensor()};
  }
};

variable_list Cut::backward(AutogradContext* context, const variable_list& grads) {
  return {Lay::apply(grads[0], places(context->saved_data["places"])), at::Tensor()};
}

at::Tensor channels_last(const at::Tensor& tensor) { return tensor.permute({0, 2, 3, 1}); }

at::Tensor channels_first(const at::Tensor& tensor) { return tensor.permute({0, 3, 1, 2}); }

// Maps whose features lie together, and no view: an activation may overwrite them.
at::Tensor maps(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options, at::MemoryFormat::ChannelsLast);
}

at::Tensor as_rows(const at::Tensor& maps) { return channels_last(maps).reshape({-1, maps.size(1)}); }

at::Tensor as_rows_of(const at::Tensor& weight) { return channels_last(weight).reshape({weight.size(0), -1}); }

// The gradient of `as_rows_of`.
at::Tensor as_weight(const at::Tensor& rows, const at::Tensor& weight) {
  return channels_first(rows.view({weight.size(0), weight.size(2), weight.size(3), weight.size(1)}));
}

at::Tensor patches_of(const at::Tensor& image, const Places& at) { return Cut::apply(channels_last(image), at); }

at::Tensor image_of(const at::Tensor& patches, const Places& at) { return channels_first(Lay::apply(patches, at)); }

// A convolution of an image with few channels: its patches times the weights.
struct OfPatches : torch::autograd::Function<OfPatches> {
  static at::Tensor
  forward(AutogradContext* context, const at::Tensor& image, const at::Tensor& weight, const Places& at) {
    context->save_for_backward({image, weight});
    context->saved_data["places"] = kept(at);
    at::Tensor out = maps({at.samples, weight.size(0), at.rows(), at.columns()}, image.options());
    write_product(as_rows(out), patches_of(image, at), as_rows_of(weight).t());
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const Places at = places(context->saved_data["places"]);
    const at::Tensor grad = as_rows(grads[0]);
    variable_list of(3);
    if (context->needs_input_grad(0)) {
      of[0] = image_of(*product(grad, as_rows_of(saved[1])), at);
    }
    if (context->needs_input_grad(1)) {
      of[1] = as_weight(*product(grad.t(), patches_of(saved[0], at)), saved[1]);
    }
    return of;
  }
};

// A transposed convolution to an image with few channels: maps times the weights are its patches.
struct ToPatches : torch::autograd::Function<ToPatches> {
  static at::Tensor
  forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight, const Places& at) {
    context->save_for_backward({input, weight});
    context->saved_data["places"] = kept(at);
    at::Tensor out = maps({at.samples, at.channels, at.height, at.width}, input.options());
    out.copy_(image_of(*product(as_rows(input), as_rows_of(weight)), at));
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor patches = patches_of(grads[0], places(context->saved_data["places"]));
    variable_list of(3);
    if (context->needs_input_grad(0)) {
      const at::Tensor& input = saved[0];
      const at::Tensor grad = *product(patches, as_rows_of(saved[1]).t());
      of[0] = channels_first(grad.view({input.size(0), input.size(2), input.size(3), input.size(1)}));
    }
    if (context->needs_input_grad(1)) {
      of[1] = as_weight(*product(as_rows(saved[0]).t(), patches), saved[1]);
    }
    return of;
  }
};

// A convolution, perhaps transposed, whose weight's gradient is a product with patches.
struct OnSmallMaps : torch::autograd::Function<OnSmallMaps> {
  static at::Tensor forward(
      AutogradContext* context,
      const at::Tensor& input,
      const at::Tensor& weight,
      const Places& at,
      bool is_transposed) {
    context->save_for_backward({input, weight});
    context->saved_data["places"] = kept(at);
    context->saved_data["is_transposed"] = is_transposed;
    const std::array<Index, 2> strides{at.stride, at.stride}, paddings{at.padding, at.padding};
    return is_transposed ? at::conv_transpose2d(input, weight, {}, strides, paddings)
                         : at::conv2d(input, weight, {}, strides, paddings);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const Places at = places(context->saved_data["places"]);
    const bool is_transposed = context->saved_data["is_transposed"].toBool();
    const at::Tensor& grad = grads[0];
    variable_list of(4);
    if (context->needs_input_grad(0)) {
      const std::array<Index, 2> strides{at.stride, at.stride}, paddings{at.padding, at.padding};
      of[0] = std::get<0>(at::convolution_backward(
          grad,
          saved[0],
          saved[1],
          /*bias_sizes=*/at::OptionalIntArrayRef(),
          strides,
          paddings,
          /*dilation=*/{1, 1},
          is_transposed,
          /*output_padding=*/{0, 0},
          /*groups=*/1,
          /*output_mask=*/{true, false, false}));
    }
    if (context->needs_input_grad(1)) {
      const at::Tensor& image = is_transposed ? grad : saved[0];
      const at::Tensor& maps = is_transposed ? saved[0] : grad;
      of[1] = as_weight(*product(as_rows(maps).t(), patches_of(image, at)), saved[1]);
    }
    return of;
  }
};

// Whether a convolution may be computed here. A program that is recorded knows libtorch's operators alone.
bool are_ours(const at::Tensor& input, const at::Tensor& weight) {
  const bool are_images = input.dim() == 4 && weight.dim() == 4 && weight.size(2) == weight.size(3);
  return are_images && input.is_cpu() && !at::tracer::impl::is_dispatch_enabled();
}

// Whether images of so many channels are cut into patches, or laid from them.
bool is_few(Index channels) { return channels <= 4; }

// Whether a weight's gradient takes less time from patches. Of a strided convolution kernels of libraries add
// what comes of each image to the whole gradient: of a large one from few places that is mostly waiting for
// memory, where the products themselves are those of bf16.
bool has_small_maps(const Places& at, const at::Tensor& weight) {
  const bool is_large = weight.numel() >= 1 << 19;
  return weight.scalar_type() == at::kBFloat16 && is_large && at.stride > 1 && at.rows() * at.columns() <= 64;
}

// The places of a convolution, which are checked.
Places places_on(const at::Tensor& image, const at::Tensor& weight, Index stride, Index padding) {
  TORCH_CHECK(stride > 0, "a convolution of the stride ", stride);
  const Places at{image.size(0), image.size(2), image.size(3), image.size(1), weight.size(2), stride, padding};
  TORCH_CHECK(at.channels == weight.size(1), "no convolution of ", image.sizes(), " by ", weight.sizes());
  TORCH_CHECK(at.kernel <= at.height + 2 * padding && at.kernel <= at.width + 2 * padding, "a kernel beyond the image");
  return at;
}

// The places of a transposed one, on its output.
Places places_under(const at::Tensor& input, const at::Tensor& weight, Index stride, Index padding) {
  TORCH_CHECK(stride > 0, "a convolution of the stride ", stride);
  const auto side = [&](Index size) { return (size - 1) * stride - 2 * padding + weight.size(2); };
  const Places
      at{input.size(0), side(input.size(2)), side(input.size(3)), weight.size(1), weight.size(2), stride, padding};
  TORCH_CHECK(input.size(1) == weight.size(0), "no convolution of ", input.sizes(), " by ", weight.sizes());
  TORCH_CHECK(at.height > 0 && at.width > 0, "an image of no pixels");
  return at;
}

// A convolution of stride 1, as the transposed one that it is.
at::Tensor turned(const at::Tensor& input, const at::Tensor& weight, std::int64_t padding) {
  const at::Tensor opposite = weight.transpose(0, 1).flip({2, 3});
  return ToPatches::apply(input, opposite, places_under(input, opposite, /*stride=*/1, weight.size(2) - 1 - padding));
}

std::unique_ptr<at::Tensor> with_bias(at::Tensor out, const at::Tensor& bias) {
  return std::make_unique<at::Tensor>(bias.defined() ? out + bias.view({1, -1, 1, 1}) : out);
}

std::optional<at::Tensor> if_defined(const at::Tensor& bias) {
  return bias.defined() ? std::make_optional(bias) : std::nullopt;
}

} // namespace

std::unique_ptr<at::Tensor> convolution(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& bias,
    std::int64_t stride,
    std::int64_t padding) {
  if (are_ours(input, weight)) {
    const Places at = places_on(input, weight, stride, padding);
    // Only the gradient of the image takes long: its channels are then those of an output.
    const bool is_differentiated = input.requires_grad() && at::GradMode::is_enabled();
    if (is_differentiated && is_few(weight.size(1))) {
      return with_bias(OfPatches::apply(input, weight, at), bias);
    }
    if (is_few(weight.size(0)) && stride == 1 && padding < weight.size(2)) {
      return with_bias(turned(input, weight, padding), bias);
    }
    if (has_small_maps(at, weight)) {
      return with_bias(OnSmallMaps::apply(input, weight, at, /*is_transposed=*/false), bias);
    }
  }
  const std::array<std::int64_t, 2> strides{stride, stride}, paddings{padding, padding};
  return std::make_unique<at::Tensor>(at::conv2d(input, weight, if_defined(bias), strides, paddings));
}

std::unique_ptr<at::Tensor> transposed_convolution(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& bias,
    std::int64_t stride,
    std::int64_t padding) {
  if (are_ours(input, weight)) {
    const Places at = places_under(input, weight, stride, padding);
    if (is_few(weight.size(1))) {
      return with_bias(ToPatches::apply(input, weight, at), bias);
    }
    if (has_small_maps(at, weight)) {
      return with_bias(OnSmallMaps::apply(input, weight, at, /*is_transposed=*/true), bias);
    }
  }
  const std::array<std::int64_t, 2> strides{stride, stride}, paddings{padding, padding};
  return std::make_unique<at::Tensor>(at::conv_transpose2d(input, weight, if_defined(bias), strides, paddings));
}

} // namespace c10d_shim
