// Kernels of transformer.h, compiled once for each width of a vector. An operation on a number is the same
// instruction for any width, so bits are as well. Includes nothing of libtorch: the kernels are compiled for
// more instructions than its headers may be.
#pragma once

#include <cstdint>

namespace c10d_shim {

// Vectors that the heads of a transformer read.
struct HeadSizes {
  std::int64_t tokens;
  std::int64_t parts;
  std::int64_t heads;
  // Length of a head's vectors.
  std::int64_t width;
};

struct TransformerKernels {
  // All matrices are contiguous: rows (n, 2 hidden), out (n, hidden).
  void (*swiglu)(std::int64_t n, std::int64_t hidden, const float* rows, float* out);
  // Out has the shape of the rows, and grad that of their output.
  void (*swiglu_backward)(std::int64_t n, std::int64_t hidden, const float* rows, const float* grad, float* out);
  // The vectors of one sample, (tokens, parts, heads, width), to (parts, heads, tokens, width), of which a
  // part begins `stride` floats after the one before. Cosines and sines are null where nothing is turned.
  void (*split)(
      const HeadSizes& sizes,
      std::int64_t stride,
      const float* cos,
      const float* sin,
      const float* rows,
      float* parts);
  // Likewise back.
  void (*join)(
      const HeadSizes& sizes,
      std::int64_t stride,
      const float* cos,
      const float* sin,
      const float* parts,
      float* rows);
};

#ifdef __x86_64__
extern const TransformerKernels transformer_kernels_8;
extern const TransformerKernels transformer_kernels_16;
#endif

} // namespace c10d_shim
