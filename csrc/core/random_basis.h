// An entry of a random basis, times sqrt(rank), as the bits of a bfloat16: galore_kernels/ops/random_basis.py has the
// definition. Eight consecutive columns of a row share a block of random bits.
#pragma once

#include <cmath>

#include "philox.h"

namespace gk {

constexpr int kMagnitudes = 2048;

// Blocks of random bits in a row of `rank` columns; row s begins with block s * basis_blocks(rank), of stream 0.
GK_HOST_DEVICE index_t basis_blocks(index_t rank) { return (rank + kRandomsPerBlock - 1) / kRandomsPerBlock; }

// magnitudes: bfloat16 bits of the family's kMagnitudes possible values, which are positive.
GK_HOST_DEVICE std::uint16_t basis_entry(std::uint32_t random16, const std::uint16_t* magnitudes) {
    const std::uint32_t sign = random16 & 0x8000u;
    return static_cast<std::uint16_t>(sign | magnitudes[(random16 >> 4) % kMagnitudes]);
}

// What the entries are multiplied by, 1 / sqrt(rank).
GK_HOST_DEVICE float basis_factor(index_t rank) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(rank)));
}

}  // namespace gk
