// A vector of LANES floats, for kernels that are compiled once for each width. What is here has a name of its
// own in each of them: linked, one width's functions would stand for the other's.
#pragma once

#include <cstdint>

#include <immintrin.h>

namespace {

using Index = std::int64_t;

constexpr int lanes = LANES;

#if LANES == 16
using Vec = __m512;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
inline __mmask16 first(int n) { return static_cast<__mmask16>((1U << n) - 1U); }
inline Vec load_first(const float* from, int n) { return _mm512_maskz_loadu_ps(first(n), from); }
inline void store_first(float* to, Vec v, int n) { _mm512_mask_storeu_ps(to, first(n), v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec leaky(Vec v, Vec slope) {
  return _mm512_mask_mul_ps(v, _mm512_cmp_ps_mask(v, zero(), _CMP_NGT_UQ), v, slope);
}
// The larger and the smaller one; b where one of them is NaN.
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// To the nearest whole number, of two the even one.
inline Vec rounded(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^v for a whole number from -126 to 127.
inline Vec power_of_two(Vec v) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
#else
using Vec = __m256;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_first(const float* from, int n) { return _mm256_maskload_ps(from, first(n)); }
inline void store_first(float* to, Vec v, int n) { _mm256_maskstore_ps(to, first(n), v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec leaky(Vec v, Vec slope) {
  return _mm256_blendv_ps(_mm256_mul_ps(v, slope), v, _mm256_cmp_ps(v, zero(), _CMP_GT_OQ));
}
// The larger and the smaller one; b where one of them is NaN.
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
// To the nearest whole number, of two the even one.
inline Vec rounded(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^v for a whole number from -126 to 127.
inline Vec power_of_two(Vec v) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
#endif

} // namespace
