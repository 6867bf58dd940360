// random_basis: the entries of a random basis, times sqrt(rank), as bf16. It lives for one update.
#pragma once

#include "../core/random_basis.h"
#include "elements.h"

namespace gk::cpu::GK_ISA {

// Rows drawn by a task, and columns at a time.
constexpr index_t kBasisRows = 64;
constexpr index_t kBasisColumns = 256;

static void random_basis(std::uint64_t seed, index_t rows, index_t rank, const std::uint16_t* magnitudes,
                         std::uint16_t* out, int threads) {
    const index_t padded = basis_blocks(rank) * kRandomsPerBlock;
    const WeightRounding stream{true, seed, 0};
    for_each_task(ceil_div(rows, kBasisRows), threads, [&](index_t task, int) {
        const index_t last = at_most((task + 1) * kBasisRows, rows);
        for (index_t row = task * kBasisRows; row < last; ++row) {
            for (index_t column = 0; column < rank; column += kBasisColumns) {
                const index_t count = at_most(kBasisColumns, rank - column);
                RandomBuffer<kBasisColumns> buffer;
                const std::uint16_t* bits = random_row(stream, row * padded + column, count, buffer);
                std::uint16_t* entries = out + row * rank + column;
                for (index_t i = 0; i < count; ++i) entries[i] = basis_entry(bits[i], magnitudes);
            }
        }
    });
}

}  // namespace gk::cpu::GK_ISA
