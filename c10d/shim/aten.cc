#include "aten.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <gnu/libc-version.h>
#include <malloc.h>
#include <unistd.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Version.h>
#include <c10/core/GradMode.h>
#include <c10/util/env.h>
#include <torch/version.h>

#include "c10d/src/aten_ffi.rs.h"

namespace at::native {
// Exported by libtorch without a header: result = beta * result + alpha * mat1 mat2, by oneDNN. Of beta it takes 0
// and 1.
TORCH_API void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta, float alpha);
} // namespace at::native

namespace c10d_shim {

namespace {

std::vector<at::Tensor> cut(const at::Tensor& flat, const rust::Vec<Span>& spans) {
  std::vector<at::Tensor> parts;
  parts.reserve(spans.size());
  for (const Span& span : spans) {
    parts.push_back(flat.narrow(0, static_cast<std::int64_t>(span.start), static_cast<std::int64_t>(span.len)));
  }
  return parts;
}

// On the parameters' device, as a kernel reads all its tensors there.
at::Tensor scalar(const at::Tensor& params, double value) {
  return at::full({}, value, params.options().dtype(at::kFloat).requires_grad(false));
}

// A division by one would write the gradient back for nothing.
std::optional<at::Tensor> divisor_of(const at::Tensor& params, float divisor) {
  return divisor == 1.0f ? std::nullopt : std::make_optional(scalar(params, divisor));
}

} // namespace

void fused_adam(
    const at::Tensor& params,
    const at::Tensor& grads,
    const at::Tensor& exp_avg,
    const at::Tensor& exp_avg_sq,
    const AdamSettings& settings) {
  // The parameters are leaves that require gradients, which autograd lets nobody change in place.
  c10::NoGradGuard no_grad;
  // The kernel does not count: its correction of the bias takes the count from here.
  const std::vector<at::Tensor> counts(settings.spans.size(), scalar(params, settings.count));
  const auto step = [&](auto kernel) {
    kernel(
        cut(params, settings.spans),
        cut(grads, settings.spans),
        cut(exp_avg, settings.spans),
        cut(exp_avg_sq, settings.spans),
        /*max_exp_avg_sqs=*/at::TensorList{},
        counts,
        settings.lr,
        settings.beta1,
        settings.beta2,
        settings.weight_decay,
        settings.eps,
        /*amsgrad=*/false,
        /*maximize=*/false,
        /*grad_scale=*/divisor_of(params, settings.divisor));
  };
  // Without decay both are one function, and each has a compiled form of its own.
  if (settings.weight_decay == 0.0) {
    step([](auto&&... all) { at::_fused_adam_(all...); });
  } else {
    step([](auto&&... all) { at::_fused_adamw_(all...); });
  }
}

void fused_sgd(
    const at::Tensor& params,
    const at::Tensor& grads,
    const at::Tensor& momentum,
    const SgdSettings& settings) {
  c10::NoGradGuard no_grad;
  const bool moves = settings.momentum != 0.0;
  at::_fused_sgd_(
      cut(params, settings.spans),
      cut(grads, settings.spans),
      moves ? cut(momentum, settings.spans) : std::vector<at::Tensor>{},
      settings.weight_decay,
      settings.momentum,
      settings.lr,
      /*dampening=*/0.0,
      settings.nesterov,
      /*maximize=*/false,
      // The first momentum is the first gradient, as the sum of it and of zeros.
      /*is_first_step=*/false,
      /*grad_scale=*/divisor_of(params, settings.divisor));
}

namespace {

// In lanes that a compiler can vectorise and may not reorder, so in one order on any number of threads. A square
// of a float is exact in double, and sums of squares are far below its limit.
double sum_of_squares(const char* floats, std::int64_t count) {
  constexpr std::int64_t lanes = 16;
  double sums[lanes] = {};
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    float values[lanes];
    std::memcpy(values, floats + 4 * i, sizeof(values));
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      sums[lane] += static_cast<double>(values[lane]) * values[lane];
    }
  }
  double sum = 0.0;
  for (; i < count; ++i) {
    float value;
    std::memcpy(&value, floats + 4 * i, 4);
    sum += static_cast<double>(value) * value;
  }
  for (const double lane : sums) {
    sum += lane;
  }
  return sum;
}

} // namespace

double norm(const at::Tensor& tensor) {
  c10::NoGradGuard no_grad;
  TORCH_CHECK(at::isFloatingType(tensor.scalar_type()), "only a tensor of floats has a norm");
  if (tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous()) {
    return std::sqrt(sum_of_squares(static_cast<const char*>(tensor.const_data_ptr()), tensor.numel()));
  }
  return at::linalg_vector_norm(tensor.detach().flatten(), 2, at::OptionalIntArrayRef(), false, at::kDouble)
      .item<double>();
}

rust::Vec<std::uint8_t> default_generator_state() {
  auto generator = at::detail::getDefaultCPUGenerator();
  // A draw holds this lock too, so no state is read in the middle of one.
  std::lock_guard<std::mutex> guard(generator.mutex());
  const at::Tensor state = generator.get_state().contiguous();
  const auto* begin = state.const_data_ptr<std::uint8_t>();
  rust::Vec<std::uint8_t> bytes;
  bytes.reserve(static_cast<std::size_t>(state.numel()));
  for (const auto* byte = begin; byte != begin + state.numel(); ++byte) {
    bytes.push_back(*byte);
  }
  return bytes;
}

rust::String cpu_capability() { return at::get_cpu_capability(); }

rust::String libtorch_version() { return TORCH_VERSION; }

void set_deterministic(bool deterministic) {
  auto& context = at::globalContext();
  context.setDeterministicAlgorithms(deterministic, /*warn_only=*/false);
  // Filling memory that is about to be written finds bugs and costs a kernel for each tensor.
  context.setDeterministicFillUninitializedMemory(false);
  // cuDNN would choose its algorithms by how fast they just were.
  context.setBenchmarkCuDNN(!deterministic && context.benchmarkCuDNN());
  context.setDeterministicCuDNN(deterministic);
}

void set_tf32(bool convolutions, bool products) {
  auto& context = at::globalContext();
  context.setAllowTF32CuDNN(convolutions);
  context.setAllowTF32CuBLAS(products);
  // Products of bf16 are summed in fp32 to the end, as on a CPU.
  context.setAllowBF16ReductionCuBLAS(/*allow_reduced_precision=*/false);
}

rust::String c_library_version() { return std::string("glibc ") + gnu_get_libc_version(); }

// glibc gives memory of tensors back whenever they are freed, and the kernel clears each page that it then
// takes anew: a fifth of the time of a small transformer's step. The threshold is the largest that glibc takes.
void keep_freed_memory() {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
}

// With 64 MB matrices a step takes 0.7 times as long as with small pages: their first touch and their
// addresses both cost time. Where the kernel has no huge pages, libtorch would warn with each large
// tensor.
void use_huge_pages() {
  if (::access("/sys/kernel/mm/transparent_hugepage/enabled", F_OK) == 0) {
    c10::utils::set_env("THP_MEM_ALLOC_ENABLE", "1", /*overwrite=*/false);
  }
}

// glibc keeps freed memory for itself otherwise, for as long as the process lives.
void trim_heap() { malloc_trim(/*pad=*/0); }

void leaky_relu(const at::Tensor& tensor, double slope) {
  // Another handle on the same tensor, as its in-place operations want one that can change.
  at::Tensor same = tensor;
  at::leaky_relu_(same, slope);
}

namespace {

// Infinities and NaNs, and only they, have an exponent of all ones. Without a way out of the loop it is vectorised.
bool all_finite_bits(const char* floats, std::int64_t count) {
  constexpr std::uint32_t exponent = 0x7f800000;
  constexpr std::uint32_t lowest = 0x00800000;
  std::uint32_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, floats + 4 * i, 4);
    // Adding one to an exponent of all ones carries into the sign's place.
    found |= (bits & exponent) + lowest;
  }
  return (found >> 31) == 0;
}

} // namespace

bool all_finite(const at::Tensor& tensor) {
  c10::NoGradGuard no_grad;
  TORCH_CHECK(at::isFloatingType(tensor.scalar_type()), "only a tensor of floats is finite or not");
  if (tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous()) {
    return all_finite_bits(static_cast<const char*>(tensor.const_data_ptr()), tensor.numel());
  }
  // The largest absolute value: one kernel on a GPU, where `isfinite` is several.
  return tensor.numel() == 0 || std::isfinite(at::linalg_vector_norm(tensor, INFINITY).item<double>());
}

namespace {

// Whether oneDNN is asked directly. libtorch asks MKL for single precision, which is half as fast on processors of
// another maker; for bf16 it asks oneDNN itself, where the processor has instructions for it.
bool is_for_onednn(const at::Tensor& out, const at::Tensor& a) {
  const bool is_single = out.scalar_type() == at::kFloat && a.scalar_type() == at::kFloat;
  return is_single && out.is_cpu() && at::hasMKLDNN() && out.numel() > 0 && a.numel() > 0;
}

void multiply(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double scale, bool add) {
  const double kept = add ? 1.0 : 0.0;
  if (is_for_onednn(out, a)) {
    at::native::mkldnn_matmul(a, b, out, static_cast<float>(kept), static_cast<float>(scale));
  } else if (a.dim() == 2) {
    at::addmm_out(out, out, a, b, kept, scale);
  } else {
    at::baddbmm_out(out, out, a, b, kept, scale);
  }
}

} // namespace

void matmul_into(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double scale, bool add) {
  c10::NoGradGuard no_grad;
  at::Tensor same = out;
  if (a.scalar_type() == out.scalar_type()) {
    return multiply(same, a, b, scale, add);
  }
  auto sizes = a.sizes().vec();
  sizes.back() = b.size(-1);
  at::Tensor product = at::empty(sizes, a.options());
  multiply(product, a, b, scale, /*add=*/false);
  if (add) {
    same.add_(product);
  } else {
    same.copy_(product);
  }
}

void layer_norm_backward(
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& mean,
    const at::Tensor& rstd,
    const at::Tensor& weight,
    const at::Tensor& grad_input,
    const at::Tensor& grad_weight) {
  c10::NoGradGuard no_grad;
  const auto [of_input, of_weight, _] = at::native_layer_norm_backward(
      grad,
      input,
      weight.sizes(),
      mean,
      rstd,
      weight,
      /*bias=*/std::nullopt,
      {true, true, false});
  grad_input.add_(of_input);
  grad_weight.copy_(of_weight);
}

namespace {

// A constant of splitmix64 (Steele, Lea, Flood, 2014), as the signed number with its bits.
std::int64_t bits(std::uint64_t constant) { return static_cast<std::int64_t>(constant); }

// For each place from `start` on an odd number that looks random: the finisher of splitmix64, but for the
// shifts' signs.
at::Tensor make_weights(std::int64_t start, std::int64_t count, at::Device device) {
  at::Tensor weights = at::arange(start + 1, start + count + 1, at::TensorOptions(at::kLong).device(device));
  weights.mul_(bits(0x9e3779b97f4a7c15));
  weights.bitwise_xor_(weights.bitwise_right_shift(30)).mul_(bits(0xbf58476d1ce4e5b9));
  weights.bitwise_xor_(weights.bitwise_right_shift(27)).mul_(bits(0x94d049bb133111eb));
  return weights.bitwise_xor_(weights.bitwise_right_shift(31)).bitwise_or_(1);
}

// Number of words that are summed at once: a weight has 8 bytes, and a product as many.
constexpr std::int64_t most_at_once = 1 << 23;

// The weights of a few short lengths are kept: a run hashes the same tensors again and again.
at::Tensor weights_of(std::int64_t count, at::Device device) {
  // At most 64 MiB for one length, and 512 MiB in all.
  constexpr std::size_t most_kept = 8;
  // Never destroyed: another thread may still hash while the process exits.
  static std::mutex* const mutex = new std::mutex();
  static auto* const kept = new std::map<std::pair<std::string, std::int64_t>, at::Tensor>();
  std::lock_guard<std::mutex> turn(*mutex);
  const auto key = std::make_pair(device.str(), count);
  const auto known = kept->find(key);
  if (known != kept->end()) {
    return known->second;
  }
  // A run has few lengths. Another objective in the same process brings others, and starts anew.
  if (kept->size() >= most_kept) {
    kept->clear();
  }
  return kept->emplace(key, make_weights(/*start=*/0, count, device)).first->second;
}

} // namespace

std::uint64_t weighted_sum(const at::Tensor& tensor) {
  c10::NoGradGuard no_grad;
  TORCH_CHECK(tensor.is_contiguous() && tensor.element_size() == 4, "only contiguous words of 32 bits are summed");
  // By their bits, so -0.0 and NaNs differ from what compares equal to them.
  const at::Tensor words = tensor.detach().flatten().view(at::kInt);
  const std::int64_t count = words.numel();
  // Products of 64 bits wrap, so a GPU may sum in any order, and piece by piece.
  if (count <= most_at_once) {
    return static_cast<std::uint64_t>(words.mul(weights_of(count, tensor.device())).sum().item<std::int64_t>());
  }
  at::Tensor sum = at::zeros({}, at::TensorOptions(at::kLong).device(tensor.device()));
  for (std::int64_t start = 0; start < count; start += most_at_once) {
    const std::int64_t piece = std::min(most_at_once, count - start);
    sum.add_(words.narrow(0, start, piece).mul(make_weights(start, piece, tensor.device())).sum());
  }
  return static_cast<std::uint64_t>(sum.item<std::int64_t>());
}

std::unique_ptr<at::Tensor> floats_at(std::size_t address, std::size_t numel, rust::Box<Keep> keep) {
  // A deleter is copied, and a box is not.
  const auto kept = std::make_shared<rust::Box<Keep>>(std::move(keep));
  const auto release = [kept](void*) {};
  const std::int64_t length = static_cast<std::int64_t>(numel);
  return std::make_unique<at::Tensor>(at::from_blob(reinterpret_cast<void*>(address), {length}, release, at::kFloat));
}

} // namespace c10d_shim
