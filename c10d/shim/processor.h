// The processor as kernels of our own see it: vectors, and threads.
#pragma once

#include <cstdint>

#include <c10/util/FunctionRef.h>

namespace c10d_shim {

// Number of floats in the widest vectors that kernels are compiled for and this processor has: 16, 8, or 0 if
// it has none of them.
int vector_lanes();
// For a test: lets this thread's kernels take vectors of 8 floats, as on a processor that has no wider ones.
void narrow_vectors(bool narrow);

// Calls `work(begin, end)` for parts of 0..count of at least `grain` each, on as many threads as libtorch's
// own operations take. Its `parallel_for` is none without the compiler's OpenMP.
void for_each_part(std::int64_t count, std::int64_t grain, c10::function_ref<void(std::int64_t, std::int64_t)> work);

} // namespace c10d_shim
