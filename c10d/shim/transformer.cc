#include "transformer.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "c10d/src/aten_ffi.rs.h"
#include "processor.h"
#include "transformer_kernel.h"

namespace c10d_shim {

namespace {

// The widest kernels for this processor; null if there are none.
const TransformerKernels* kernels() {
#ifdef __x86_64__
  const int lanes = vector_lanes();
  return lanes == 16 ? &transformer_kernels_16 : lanes == 8 ? &transformer_kernels_8 : nullptr;
#else
  return nullptr;
#endif
}

bool is_ours(const at::Tensor& tensor) {
  return tensor.is_cpu() && tensor.scalar_type() == at::kFloat && kernels() != nullptr;
}

// Null for an undefined tensor.
const float* numbers(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

// Calls `work(begin, end)` for parts of `count` rows of this length.
template <typename Work>
void for_each_rows(std::int64_t count, std::int64_t length, Work work) {
  // What a thread computes at least, as of libtorch's own operations.
  constexpr std::int64_t grain = 1 << 15;
  for_each_part(count, std::max<std::int64_t>(1, grain / std::max<std::int64_t>(1, length)), work);
}

// Hidden units of rows of gates and values.
std::int64_t hidden_of(const at::Tensor& rows) {
  TORCH_CHECK(rows.dim() == 2 && rows.size(1) % 2 == 0, "no gates and values: ", rows.sizes());
  return rows.size(1) / 2;
}

// Sizes of the vectors in rows of all tokens or in parts, which are checked.
HeadSizes sizes_of(
    const at::Tensor& vectors,
    std::int64_t tokens,
    std::int64_t width,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const Heads& heads) {
  const std::int64_t count = heads.samples * tokens * heads.parts * heads.heads * width;
  TORCH_CHECK(count == vectors.numel() && count > 0, "no vectors of heads: ", vectors.sizes());
  const auto fits = [&](const at::Tensor& table) {
    return table.is_contiguous() && table.scalar_type() == vectors.scalar_type() &&
        table.sizes() == at::IntArrayRef({tokens, width / 2});
  };
  const bool is_turned = cos.defined() && sin.defined() && heads.parts >= 2 && width % 2 == 0 && fits(cos) && fits(sin);
  TORCH_CHECK(is_turned || !(cos.defined() || sin.defined()), "no angles for heads of ", tokens, " x ", width);
  return {tokens, heads.parts, heads.heads, width};
}

// Turns vectors, (parts, .., tokens, width).
at::Tensor turned(const at::Tensor& parts, const at::Tensor& cos, const at::Tensor& sin) {
  if (!cos.defined()) {
    return parts;
  }
  const auto halves = parts.narrow(0, 0, 2).chunk(2, -1);
  const at::Tensor both = at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1);
  return at::cat({both, parts.narrow(0, 2, parts.size(0) - 2)}, 0);
}

// Copies the vectors of all samples from one order to the other, and turns them.
at::Tensor copied(
    const at::Tensor& from,
    const std::vector<std::int64_t>& shape,
    const HeadSizes& sizes,
    std::int64_t samples,
    const at::Tensor& cos,
    const at::Tensor& sin,
    bool joins) {
  at::Tensor out = at::empty(shape, from.options());
  // Floats of one sample: in rows they lie together, in parts those of a part.
  const std::int64_t in_part = sizes.heads * sizes.tokens * sizes.width;
  const std::int64_t in_rows = sizes.parts * in_part;
  const std::int64_t in = joins ? in_part : in_rows;
  const std::int64_t next = joins ? in_rows : in_part;
  const auto copy = joins ? kernels()->join : kernels()->split;
  for_each_rows(samples, in_rows, [&, to = out.mutable_data_ptr<float>()](std::int64_t begin, std::int64_t end) {
    for (; begin < end; begin++) {
      copy(sizes, samples * in_part, numbers(cos), numbers(sin), numbers(from) + begin * in, to + begin * next);
    }
  });
  return out;
}

} // namespace

std::unique_ptr<at::Tensor> swiglu(const at::Tensor& rows) {
  const std::int64_t hidden = hidden_of(rows);
  if (!is_ours(rows) || !rows.is_contiguous()) {
    const auto halves = rows.chunk(2, 1);
    return std::make_unique<at::Tensor>(at::silu(halves[0]).mul_(halves[1]));
  }
  at::Tensor out = at::empty({rows.size(0), hidden}, rows.options());
  const auto* own = kernels();
  for_each_rows(rows.size(0), hidden, [&, to = out.mutable_data_ptr<float>()](std::int64_t begin, std::int64_t end) {
    own->swiglu(end - begin, hidden, numbers(rows) + begin * 2 * hidden, to + begin * hidden);
  });
  return std::make_unique<at::Tensor>(std::move(out));
}

std::unique_ptr<at::Tensor> swiglu_backward(const at::Tensor& rows, const at::Tensor& grad) {
  const std::int64_t hidden = hidden_of(rows);
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({rows.size(0), hidden}), "no gradient of SwiGLU: ", grad.sizes());
  if (!is_ours(rows) || !is_ours(grad) || !rows.is_contiguous() || !grad.is_contiguous()) {
    const auto halves = rows.chunk(2, 1);
    const at::Tensor of_gate = at::silu_backward(grad * halves[1], halves[0]);
    return std::make_unique<at::Tensor>(at::cat({of_gate, at::silu(halves[0]).mul_(grad)}, 1));
  }
  at::Tensor out = at::empty_like(rows);
  const auto* own = kernels();
  for_each_rows(rows.size(0), hidden, [&, to = out.mutable_data_ptr<float>()](std::int64_t begin, std::int64_t end) {
    const std::int64_t place = begin * 2 * hidden;
    own->swiglu_backward(end - begin, hidden, numbers(rows) + place, numbers(grad) + begin * hidden, to + place);
  });
  return std::make_unique<at::Tensor>(std::move(out));
}

std::unique_ptr<at::Tensor>
split_heads(const at::Tensor& rows, const at::Tensor& cos, const at::Tensor& sin, const Heads& heads) {
  const auto [samples, parts, count] = heads;
  TORCH_CHECK(rows.dim() == 2 && samples > 0 && parts > 0 && count > 0, "no rows of tokens: ", rows.sizes());
  const HeadSizes sizes = sizes_of(rows, rows.size(0) / samples, rows.size(1) / (parts * count), cos, sin, heads);
  const std::vector<std::int64_t> shape = {parts, samples * count, sizes.tokens, sizes.width};
  if (!is_ours(rows) || !rows.is_contiguous()) {
    const at::Tensor all = rows.reshape({samples, sizes.tokens, parts, count, sizes.width}).permute({2, 0, 3, 1, 4});
    return std::make_unique<at::Tensor>(turned(all.reshape(shape), cos, sin));
  }
  return std::make_unique<at::Tensor>(copied(rows, shape, sizes, heads.samples, cos, sin, /*joins=*/false));
}

std::unique_ptr<at::Tensor>
join_heads(const at::Tensor& vectors, const at::Tensor& cos, const at::Tensor& sin, const Heads& heads) {
  const auto [samples, parts, count] = heads;
  TORCH_CHECK(vectors.dim() == 4 && samples > 0 && parts > 0 && count > 0, "no parts of heads: ", vectors.sizes());
  const HeadSizes sizes = sizes_of(vectors, vectors.size(2), vectors.size(3), cos, sin, heads);
  const std::vector<std::int64_t> shape = {samples * sizes.tokens, parts * count * sizes.width};
  if (!is_ours(vectors) || !vectors.is_contiguous()) {
    const at::Tensor all = turned(vectors, cos, sin.defined() ? -sin : sin);
    const at::Tensor by_sample = all.reshape({parts, samples, count, sizes.tokens, sizes.width});
    return std::make_unique<at::Tensor>(by_sample.permute({1, 3, 0, 2, 4}).reshape(shape));
  }
  return std::make_unique<at::Tensor>(copied(vectors, shape, sizes, heads.samples, cos, sin, /*joins=*/true));
}

} // namespace c10d_shim
