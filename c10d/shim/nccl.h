// Groups over NCCL, compiled only with the feature `cuda`.
#pragma once

#include <cstdint>
#include <memory>

#include "group.h"

namespace c10d_shim {

std::unique_ptr<Group> nccl_group(
    std::int32_t rank,
    std::int32_t world_size,
    std::uint64_t timeout_ms,
    std::int8_t device,
    rust::Box<StoreHandle> store,
    rust::Str prefix);

} // namespace c10d_shim
