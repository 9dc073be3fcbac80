// Products of matrices that autograd can differentiate, by oneDNN where it is the faster one.
#pragma once

#include <memory>

#include <ATen/core/Tensor.h>

namespace c10d_shim {

// (m, k) and (k, n) to (m, n).
std::unique_ptr<at::Tensor> product(const at::Tensor& a, const at::Tensor& b);
// A linear layer: rows, (m, k), a weight, (n, k), and an addend of each row, (n), to (m, n). An undefined
// bias is none.
std::unique_ptr<at::Tensor> linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);
// The same with a bias, and then max(x, slope x) of each element.
std::unique_ptr<at::Tensor>
leaky_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, double slope);

} // namespace c10d_shim
