#include "processor.h"

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>

namespace c10d_shim {

namespace {

// Whether this thread's kernels take vectors of 8 floats alone.
thread_local bool is_narrow = false;

} // namespace

int vector_lanes() {
#ifdef __x86_64__
  static const bool has_wide = __builtin_cpu_supports("avx512f") != 0;
  static const bool has_narrow = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  return has_wide && !is_narrow ? 16 : has_narrow ? 8 : 0;
#else
  return 0;
#endif
}

void narrow_vectors(bool narrow) { is_narrow = narrow; }

void for_each_part(std::int64_t count, std::int64_t grain, c10::function_ref<void(std::int64_t, std::int64_t)> work) {
  if (count == 0) {
    return;
  }
  // Bytes that nobody touches: an iterator deals their addresses to its threads, and these say which part.
  at::Tensor places = at::empty({count}, at::kByte);
  const char* first = static_cast<const char*>(places.const_data_ptr());
  auto iterator = at::TensorIterator::nullary_op(places);
  const auto part = [&](char** data, const std::int64_t*, std::int64_t length) {
    const std::int64_t begin = data[0] - first;
    work(begin, begin + length);
  };
  iterator.for_each(part, grain);
}

} // namespace c10d_shim
