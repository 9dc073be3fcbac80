// Convolutions of images, on CPUs as products of matrices where an output has few channels: kernels of
// libraries compute 16 channels at once, present or not.
#pragma once

#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>

namespace c10d_shim {

// (n, inputs, h, w) with a weight (outputs, inputs, k, k), and a bias (outputs) unless it is undefined, to
// (n, outputs, h', w').
std::unique_ptr<at::Tensor> convolution(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& bias,
    std::int64_t stride,
    std::int64_t padding);
// The transposed one: (n, inputs, h, w) with a weight (inputs, outputs, k, k).
std::unique_ptr<at::Tensor> transposed_convolution(
    const at::Tensor& input,
    const at::Tensor& weight,
    const at::Tensor& bias,
    std::int64_t stride,
    std::int64_t padding);

} // namespace c10d_shim
