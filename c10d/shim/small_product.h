// Products with small weights, whose every number is summed in one order, whatever the number of rows: a
// fused multiply and add for each term, from the first to the last. So a row of a batch has the same bits as
// alone, and a processor with wider vectors computes the same. Includes nothing of libtorch: the kernels are
// compiled for more instructions than its headers may be.
#pragma once

#include <cstdint>

namespace c10d_shim {

// Sizes of a linear layer: rows of `inputs` numbers become rows of `outputs` numbers.
struct LayerSizes {
  std::int64_t rows;
  std::int64_t inputs;
  std::int64_t outputs;
};

// All matrices are contiguous: input (rows, inputs), weight (outputs, inputs), output and its gradient (rows,
// outputs).
struct SmallProducts {
  // out = input weight^T + bias, then max(x, slope x) of each element, for a slope from 0 to 1. A bias may be
  // null. `panel` is memory for `panel_width` x inputs floats.
  void (*output)(
      const LayerSizes& sizes,
      const float* input,
      const float* weight,
      const float* bias,
      float slope,
      float* out,
      float* panel);
  // out = grad weight, (rows, inputs).
  void (*of_input)(const LayerSizes& sizes, const float* grad, const float* weight, float* out);
  // out = grad^T input, (outputs, inputs), for each of `groups` neighbouring groups of rows, summed over the
  // groups as leaves of a binary tree. A tile of the sum stays in registers and the first cache until all of
  // it is there, where the groups' own products would pass through memory. `sizes.rows` is that of one group.
  void (*of_weight)(const LayerSizes& sizes, std::int64_t groups, const float* grad, const float* input, float* out);
  // out = the sums of grad's rows, (outputs), likewise.
  void (*of_bias)(const LayerSizes& sizes, std::int64_t groups, const float* grad, float* out);
};

// Largest number of columns of a panel.
constexpr std::int64_t panel_width = 64;
// Largest number of groups: the sums that wait for a neighbour have a place each.
constexpr std::int64_t most_groups = 1 << 15;

#ifdef __x86_64__
extern const SmallProducts small_products_8;
extern const SmallProducts small_products_16;
#endif

} // namespace c10d_shim
