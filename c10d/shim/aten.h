// The few functions of ATen that tch has no safe wrapper for.
#pragma once

#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>

#include "error.h"
#include "rust/cxx.h"

namespace c10d_shim {

struct AdamSettings;
struct SgdSettings;
struct Keep;

void fused_adam(
    const at::Tensor& params,
    const at::Tensor& grads,
    const at::Tensor& exp_avg,
    const at::Tensor& exp_avg_sq,
    const AdamSettings& settings);
void fused_sgd(
    const at::Tensor& params,
    const at::Tensor& grads,
    const at::Tensor& momentum,
    const SgdSettings& settings);
double norm(const at::Tensor& tensor);
rust::Vec<std::uint8_t> default_generator_state();
rust::String cpu_capability();
rust::String libtorch_version();
void set_deterministic(bool deterministic);
void set_tf32(bool convolutions, bool products);
rust::String c_library_version();
void keep_freed_memory();
void use_huge_pages();
void trim_heap();
void leaky_relu(const at::Tensor& tensor, double slope);
bool all_finite(const at::Tensor& tensor);
void matmul_into(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double scale, bool add);
void layer_norm_backward(
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& mean,
    const at::Tensor& rstd,
    const at::Tensor& weight,
    const at::Tensor& grad_input,
    const at::Tensor& grad_weight);
std::uint64_t weighted_sum(const at::Tensor& tensor);

// Floats of somebody else's memory, which stays mapped as long as `keep` lives.
std::unique_ptr<at::Tensor> floats_at(std::size_t address, std::size_t numel, rust::Box<Keep> keep);

} // namespace c10d_shim
