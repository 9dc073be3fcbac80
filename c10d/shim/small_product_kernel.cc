// The kernels of small_product.h, compiled once for each width of a vector, LANES floats. All are one product
// in tiles: a tile's numbers lie in registers while its terms are added.
#include "small_product.h"
#include "vector.h"

namespace {

// A tile has so many rows, and so many vectors of columns: as many as there are registers for.
constexpr int tile_rows = 6;
constexpr int vectors = lanes == 16 ? 4 : 2;
constexpr int tile_columns = vectors * lanes;
static_assert(tile_columns <= c10d_shim::panel_width);
// Heights of the binary tree over the groups.
constexpr int most_levels = 17;
static_assert(Index{1} << (most_levels - 2) >= c10d_shim::most_groups);

Index least(Index a, Index b) { return a < b ? a : b; }

// A product, or its part from some row and column on: out(r, c) = sum over k of a(r, k) b(k, c).
struct Terms {
  // a(r, k) is at a[r * a_row + k * a_step].
  const float* a;
  Index a_row;
  Index a_step;
  // b(k, c) is at b[k * b_step + c].
  const float* b;
  Index b_step;
  // Number of terms of a group.
  Index count;
  Index groups;
  float* out;
  Index out_row;
  // Addend of each row of the product, or null.
  const float* bias;
  float slope;
};

// The products of one group. Of the last vector of each row `cut` columns are there, if it is cut.
template <int rows, int width, bool is_cut>
[[gnu::always_inline]] inline void of_group(const Terms& terms, Index group, int cut, Vec (&sums)[rows][width]) {
  const float* a = terms.a + group * terms.count * terms.a_step;
  const float* b = terms.b + group * terms.count * terms.b_step;
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < width; v++) {
      sums[r][v] = zero();
    }
  }
  for (Index k = 0; k < terms.count; k++, a += terms.a_step, b += terms.b_step) {
    Vec of_b[width];
    for (int v = 0; v < width; v++) {
      of_b[v] = is_cut && v == width - 1 ? load_first(b + v * lanes, cut) : load(b + v * lanes);
    }
    for (int r = 0; r < rows; r++) {
      const Vec of_a = all(a[r * terms.a_row]);
      for (int v = 0; v < width; v++) {
        sums[r][v] = multiply_add(of_a, of_b[v], sums[r][v]);
      }
    }
  }
}

// Adds the products of all groups as leaves of a binary tree: a node as soon as both its children are there.
// Not a call: the sums of its caller would lie in memory and not in registers.
template <int rows, int width, bool is_cut>
[[gnu::always_inline]] inline void of_groups(const Terms& terms, int cut, Vec (&sums)[rows][width]) {
  alignas(64) float waiting[most_levels][rows][width * lanes];
  int heights[most_levels];
  int count = 0;
  for (Index group = 0;; group++) {
    of_group<rows, width, is_cut>(terms, group, cut, sums);
    const bool is_last = group + 1 == terms.groups;
    int height = 0;
    // Right of the last group there is none, so that all that waits is added to it.
    for (; count > 0 && (is_last || heights[count - 1] == height); height++) {
      count--;
      for (int r = 0; r < rows; r++) {
        for (int v = 0; v < width; v++) {
          sums[r][v] = add(load(&waiting[count][r][v * lanes]), sums[r][v]);
        }
      }
    }
    if (is_last) {
      return;
    }
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < width; v++) {
        store(&waiting[count][r][v * lanes], sums[r][v]);
      }
    }
    heights[count++] = height;
  }
}

template <int rows, int width, bool is_cut>
void tile(const Terms& terms, int cut) {
  Vec sums[rows][width];
  if (terms.groups == 1) {
    of_group<rows, width, is_cut>(terms, /*group=*/0, cut, sums);
  } else {
    of_groups<rows, width, is_cut>(terms, cut, sums);
  }
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < width; v++) {
      Vec sum = sums[r][v];
      if (terms.bias != nullptr) {
        sum = add(sum, all(terms.bias[r]));
      }
      if (terms.slope != 1.0F) {
        sum = leaky(sum, all(terms.slope));
      }
      float* to = terms.out + r * terms.out_row + v * lanes;
      if (is_cut && v == width - 1) {
        store_first(to, sum, cut);
      } else {
        store(to, sum);
      }
    }
  }
}

// Calls the tile of a size, at most that of the template.
template <int rows, int width>
void any_tile(const Terms& terms, Index of_rows, Index of_vectors, int cut) {
  if constexpr (rows > 1) {
    if (of_rows < rows) {
      return any_tile<rows - 1, width>(terms, of_rows, of_vectors, cut);
    }
  }
  if constexpr (width > 1) {
    if (of_vectors < width) {
      return any_tile<rows, width - 1>(terms, of_rows, of_vectors, cut);
    }
  }
  if (cut == lanes) {
    tile<rows, width, false>(terms, cut);
  } else {
    tile<rows, width, true>(terms, cut);
  }
}

void multiply(const Terms& whole, Index rows, Index columns) {
  for (Index c = 0; c < columns; c += tile_columns) {
    const Index wide = least(tile_columns, columns - c);
    const Index of_vectors = (wide + lanes - 1) / lanes;
    for (Index r = 0; r < rows; r += tile_rows) {
      Terms terms = whole;
      terms.a += r * whole.a_row;
      terms.b += c;
      terms.out += r * whole.out_row + c;
      terms.bias += whole.bias == nullptr ? 0 : r;
      const int cut = static_cast<int>(wide - (of_vectors - 1) * lanes);
      any_tile<tile_rows, vectors>(terms, least(tile_rows, rows - r), of_vectors, cut);
    }
  }
}

// Writes up to `panel_width` rows of an input as columns, with zeros up to a whole vector.
Index turn(const float* input, Index rows, Index inputs, float* panel) {
  const Index width = (rows + lanes - 1) / lanes * lanes;
  for (Index r = 0; r < width; r++) {
    for (Index i = 0; i < inputs; i++) {
      panel[i * width + r] = r < rows ? input[r * inputs + i] : 0.0F;
    }
  }
  return width;
}

// Columns of the tiles are rows of the input: a weight is read as it lies, one number for all of them.
void output(
    const c10d_shim::LayerSizes& sizes,
    const float* input,
    const float* weight,
    const float* bias,
    float slope,
    float* out,
    float* panel) {
  float turned[tile_rows * tile_columns];
  for (Index begin = 0; begin < sizes.rows; begin += tile_columns) {
    const Index rows = least(tile_columns, sizes.rows - begin);
    const Index width = turn(input + begin * sizes.inputs, rows, sizes.inputs, panel);
    for (Index o = 0; o < sizes.outputs; o += tile_rows) {
      const Index outputs = least(tile_rows, sizes.outputs - o);
      const float* own = weight + o * sizes.inputs;
      const float* of_row = bias == nullptr ? nullptr : bias + o;
      const Terms terms{own, sizes.inputs, 1, panel, width, sizes.inputs, 1, turned, tile_columns, of_row, slope};
      any_tile<tile_rows, vectors>(terms, outputs, width / lanes, lanes);
      float* to = out + begin * sizes.outputs + o;
      for (Index r = 0; r < rows; r++, to += sizes.outputs) {
        for (Index q = 0; q < outputs; q++) {
          to[q] = turned[q * tile_columns + r];
        }
      }
    }
  }
}

void of_input(const c10d_shim::LayerSizes& sizes, const float* grad, const float* weight, float* out) {
  const auto [rows, inputs, outputs] = sizes;
  const Terms terms{grad, outputs, 1, weight, inputs, outputs, 1, out, inputs, nullptr, 1.0F};
  multiply(terms, rows, inputs);
}

void of_weight(const c10d_shim::LayerSizes& sizes, Index groups, const float* grad, const float* input, float* out) {
  const auto [rows, inputs, outputs] = sizes;
  const Terms terms{grad, 1, outputs, input, inputs, rows, groups, out, inputs, nullptr, 1.0F};
  multiply(terms, outputs, inputs);
}

void of_bias(const c10d_shim::LayerSizes& sizes, Index groups, const float* grad, float* out) {
  // Times one: the sum of a row's numbers.
  const float one = 1.0F;
  const Terms terms{grad, 1, sizes.outputs, &one, 0, sizes.rows, groups, out, 1, nullptr, 1.0F};
  multiply(terms, sizes.outputs, 1);
}

} // namespace

namespace c10d_shim {

#if LANES == 16
const SmallProducts small_products_16{output, of_input, of_weight, of_bias};
#else
const SmallProducts small_products_8{output, of_input, of_weight, of_bias};
#endif

} // namespace c10d_shim
