// Products of matrices that autograd can differentiate, by oneDNN where it is the faster one.
#pragma once

#include <memory>

#include <ATen/core/Tensor.h>

namespace c10d_shim {

// Whether a product, also one of batches, is worth the way to oneDNN. Decided by shapes alone, never by what
// varies from run to run: the largest of the three matrices is that of the weights, or of their gradient.
bool is_large_product(const at::Tensor& a, const at::Tensor& b);
// Whether the dynamic linker gives compiled graphs the products of graph_product.cc, and not libtorch's.
bool graphs_take_our_products();

// (m, k) and (k, n) to (m, n).
std::unique_ptr<at::Tensor> product(const at::Tensor& a, const at::Tensor& b);
// A linear layer: rows, (m, k), a weight, (n, k), and an addend of each row, (n), to (m, n). An undefined
// bias is none.
std::unique_ptr<at::Tensor> linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);
// The same with a bias, and then max(x, slope x) of each element.
std::unique_ptr<at::Tensor>
leaky_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, double slope);

} // namespace c10d_shim
