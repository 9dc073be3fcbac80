// Products of matrices that autograd can differentiate, by oneDNN where it is the faster one.
#pragma once

#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>

namespace c10d_shim {

class TensorList;

// Whether a product, also one of batches, is worth the way to oneDNN. Decided by shapes alone, never by what
// varies from run to run: the largest of the three matrices is that of the weights, or of their gradient.
bool is_large_product(const at::Tensor& a, const at::Tensor& b);
// Writes a b to its place, which nothing differentiates.
void write_product(at::Tensor out, const at::Tensor& a, const at::Tensor& b);
// Writes a b, or a b + bias of each row, by the kernels of small_product.h if these compute it faster than
// oneDNN; decided by shapes and strides alone. `out` is contiguous, `bias` null or (n). Returns whether it
// did.
bool write_small_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Tensor* bias);
// Whether the dynamic linker gives compiled graphs the products of graph_product.cc, and not libtorch's.
bool graphs_take_our_products();
// For a test: a product as a compiled graph has it, plus an addend, if it is defined.
std::unique_ptr<at::Tensor> graph_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& addend);

// (m, k) and (k, n) to (m, n).
std::unique_ptr<at::Tensor> product(const at::Tensor& a, const at::Tensor& b);
// A linear layer: rows, (m, k), a weight, (n, k), and an addend of each row, (n), to (m, n); then max(x,
// slope x) of each element, unless the slope is 1. An undefined bias is none. Where there are several groups
// of neighbouring rows, the gradients of weight and bias are those of the groups, summed as leaves of a
// binary tree.
std::unique_ptr<at::Tensor>
linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, double slope, std::int64_t groups);
// Until they are forgotten, the gradient of each of these weights is written to its place, at its next use
// in a backward pass of this thread; only that of `linear` on a CPU in fp32.
void place_gradients(const TensorList& weights, const TensorList& places);
void forget_places();
// Whether a layer takes several groups of so many rows, with so many weights.
bool sums_by_groups(std::int64_t rows, std::int64_t weights);

} // namespace c10d_shim
