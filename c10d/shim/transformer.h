// Operations between the products of a transformer's block, each one pass over memory on CPUs in fp32.
// Elsewhere they are several of libtorch's.
#pragma once

#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>

namespace c10d_shim {

struct Heads;

// SwiGLU (Shazeer, 2020, equation 6): rows of gates and values, (n, 2 hidden), to silu(gate) value, (n,
// hidden); and the gradient of the rows, by theirs and that of the output.
std::unique_ptr<at::Tensor> swiglu(const at::Tensor& rows);
std::unique_ptr<at::Tensor> swiglu_backward(const at::Tensor& rows, const at::Tensor& grad);

// Rows of all tokens, (samples tokens, parts heads width), to parts that each head reads, (parts, samples
// heads, tokens, width). The first two parts, queries and keys, are turned by their places (Su et al., 2021,
// equation 34) if there are cosines and sines, (tokens, width / 2) each; else these are undefined.
std::unique_ptr<at::Tensor>
split_heads(const at::Tensor& rows, const at::Tensor& cos, const at::Tensor& sin, const Heads& heads);
// Likewise back, where turning back is the gradient of turning.
std::unique_ptr<at::Tensor>
join_heads(const at::Tensor& vectors, const at::Tensor& cos, const at::Tensor& sin, const Heads& heads);

} // namespace c10d_shim
