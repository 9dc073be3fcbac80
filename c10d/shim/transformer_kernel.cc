#include "transformer_kernel.h"

#include <cstring>

#include "vector.h"

namespace {

using c10d_shim::HeadSizes;

// Calls `on(at, load, store)` for all vectors of 0..count, where `load` and `store` touch of the last one what
// is there.
template <typename On>
[[gnu::always_inline]] inline void for_each_vector(Index count, On on) {
  Index at = 0;
  for (; at + lanes <= count; at += lanes) {
    on(at, [](const float* from) { return load(from); }, [](float* to, Vec v) { store(to, v); });
  }
  if (at < count) {
    const int rest = static_cast<int>(count - at);
    on(
        at,
        [rest](const float* from) { return load_first(from, rest); },
        [rest](float* to, Vec v) { store_first(to, v, rest); });
  }
}

// e^x with an error of 2 units in the last place, for x from -87 to 87; beyond, that of the nearer end. NaN
// stays NaN. By Cody and Waite's reduction, and a polynomial in the rest of x, from -ln(2)/2 to ln(2)/2
// (Cephes, expf).
inline Vec exponential(Vec x) {
  x = smaller(all(87.0F), larger(all(-87.0F), x));
  const Vec power = rounded(multiply(x, all(1.44269504F)));
  // ln(2) in two parts, of which products with the first one are exact.
  Vec rest = multiply_add(power, all(-0.693359375F), x);
  rest = multiply_add(power, all(2.12194440e-4F), rest);
  constexpr float terms[] = {1.3981999507e-3F, 8.3334519073e-3F, 4.1665795894e-2F, 1.6666665459e-1F, 5.0000001201e-1F};
  Vec sum = all(1.9875691500e-4F);
  for (const float term : terms) {
    sum = multiply_add(sum, rest, all(term));
  }
  sum = add(multiply_add(sum, multiply(rest, rest), rest), all(1.0F));
  return multiply(sum, power_of_two(power));
}

inline Vec sigmoid(Vec x) { return divide(all(1.0F), add(all(1.0F), exponential(subtract(zero(), x)))); }

void swiglu(Index n, Index hidden, const float* rows, float* out) {
  for (; n > 0; n--, rows += 2 * hidden, out += hidden) {
    for_each_vector(hidden, [&](Index at, auto load, auto store) {
      const Vec gate = load(rows + at);
      store(out + at, multiply(multiply(gate, sigmoid(gate)), load(rows + hidden + at)));
    });
  }
}

void swiglu_backward(Index n, Index hidden, const float* rows, const float* grad, float* out) {
  const Vec one = all(1.0F);
  for (; n > 0; n--, rows += 2 * hidden, grad += hidden, out += 2 * hidden) {
    for_each_vector(hidden, [&](Index at, auto load, auto store) {
      const Vec gate = load(rows + at);
      const Vec share = sigmoid(gate);
      const Vec slope = multiply(share, multiply_add(gate, subtract(one, share), one));
      const Vec of_out = load(grad + at);
      store(out + at, multiply(multiply(of_out, load(rows + hidden + at)), slope));
      store(out + hidden + at, multiply(of_out, multiply(gate, share)));
    });
  }
}

// A vector turned by its place, or back: pairs of its halves' numbers, each by an angle.
template <bool back>
inline void turn(const float* from, float* to, const float* cos, const float* sin, Index half) {
  for_each_vector(half, [&](Index at, auto load, auto store) {
    const Vec a = load(from + at);
    const Vec b = load(from + half + at);
    const Vec of_cos = load(cos + at);
    const Vec of_sin = back ? subtract(zero(), load(sin + at)) : load(sin + at);
    store(to + at, subtract(multiply(a, of_cos), multiply(b, of_sin)));
    store(to + half + at, add(multiply(b, of_cos), multiply(a, of_sin)));
  });
}

// Copies a sample's vectors from one order to the other.
template <bool joins>
void copy(const HeadSizes& sizes, Index stride, const float* cos, const float* sin, const float* from, float* to) {
  const auto [tokens, parts, heads, width] = sizes;
  const Index half = width / 2;
  for (Index token = 0; token < tokens; token++) {
    for (Index part = 0; part < parts; part++) {
      for (Index head = 0; head < heads; head++) {
        const Index in_row = ((token * parts + part) * heads + head) * width;
        const Index in_part = part * stride + (head * tokens + token) * width;
        const float* source = from + (joins ? in_part : in_row);
        float* place = to + (joins ? in_row : in_part);
        if (cos != nullptr && part < 2) {
          turn<joins>(source, place, cos + token * half, sin + token * half, half);
        } else {
          std::memcpy(place, source, sizeof(float) * static_cast<std::size_t>(width));
        }
      }
    }
  }
}

} // namespace

namespace c10d_shim {

#if LANES == 16
const TransformerKernels transformer_kernels_16{swiglu, swiglu_backward, copy<false>, copy<true>};
#else
const TransformerKernels transformer_kernels_8{swiglu, swiglu_backward, copy<false>, copy<true>};
#endif

} // namespace c10d_shim
