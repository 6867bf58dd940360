// project: the low-rank gradient R (long, rank) = G @ P on the right side, G.T @ P on the left.
//
// A task owns a panel of long indices and sums over the short dimension in blocks, into R itself. P is packed once
// for all tasks, the panel's part of G once per block.
#pragma once

#include <atomic>

#include "kernels.h"
#include "pack.h"

namespace gk::cpu::GK_ISA {

// Units of the short dimension summed at a time, and tiles of long indices that share one pass over P.
constexpr index_t kProjectDepth = 256;
constexpr index_t kProjectTiles = 8;
constexpr index_t kProjectRows = kProjectTiles * kTileRows;

// R (rows, columns) of one tile: set or added to, and scaled and checked by the last block of the sum.
[[gnu::always_inline]] static inline bool store_lowrank_row(float* __restrict out, const float* __restrict sums,
                                                            index_t n, bool first, bool last, float scale) {
    if (!first) {
        for (index_t j = 0; j < n; ++j) out[j] += sums[j];
    } else {
        for (index_t j = 0; j < n; ++j) out[j] = sums[j];
    }
    bool representable = true;
    if (last) {
        for (index_t j = 0; j < n; ++j) {
            out[j] *= scale;
            representable &= gradient_is_representable(out[j]);
        }
    }
    return representable;
}

template <class Units, class G, class B, Side kSide>
static bool project_as(const G* grad, const B* basis, const Projection& p, float scale, float* lowrank, float* workspace,
                       int threads) {
    const index_t long_size = p.long_size(), short_size = p.short_size(), rank = p.rank;
    if (short_size == 0) {  // a sum of nothing
        std::memset(lowrank, 0, static_cast<std::size_t>(long_size * rank) * sizeof(float));
        return true;
    }
    const index_t padded_rank = padded_columns(rank);
    constexpr index_t kBlock = kProjectDepth * Units::kDepth;  // elements of the short dimension
    const index_t blocks = ceil_div(short_size, kBlock);
    float* packed_basis = workspace;
    float* packed_grad = workspace + padded_rank * blocks * kProjectDepth;

    for_each_task(blocks, threads, [&](index_t block, int) {
        const index_t first = block * kBlock, elements = at_most(kBlock, short_size - first);
        float* out = packed_basis + block * kProjectDepth * padded_rank;
        const index_t depth = units_deep<Units>(elements), narrow = padded_rank % kTileColumns;
        const index_t wide = padded_rank - narrow;
        pack_columns<Units, kTileColumns>(basis + first * rank, rank, elements, at_most(wide, rank), kTileColumns * depth,
                                          out);
        if (narrow != 0) {
            pack_columns<Units, kLanes>(basis + first * rank + wide, rank, elements, rank - wide, 0, out + wide * depth);
        }
    });

    std::atomic<bool> representable{true};
    for_each_task(ceil_div(long_size, kProjectRows), threads, [&](index_t task, int slot) {
        // On the right side a row of G runs along the sum, so a tile is a copy of rows; on the left side G's rows
        // run along the tile.
        constexpr int kRowStride = kSide == Side::right ? static_cast<int>(kProjectDepth) : 1;
        constexpr int kStepStride = kSide == Side::right ? 1 : kTileRows;
        float* tiles = packed_grad + slot * kProjectRows * kProjectDepth;
        const index_t first_row = task * kProjectRows, rows = at_most(kProjectRows, long_size - first_row);
        bool all = true;
        for (index_t block = 0; block < blocks; ++block) {
            const index_t first = block * kBlock, elements = at_most(kBlock, short_size - first);
            const index_t depth = units_deep<Units>(elements);
            if constexpr (kSide == Side::right) {
                for (index_t row = 0; row < rows; ++row) {
                    units_along<Units>(grad + (first_row + row) * short_size + first, elements, tiles + row * kProjectDepth);
                }
                // Rows beyond the edge repeat the last one; their sums are not stored.
                for (index_t row = rows; row % kTileRows != 0; ++row) {
                    std::memcpy(tiles + row * kProjectDepth, tiles + (rows - 1) * kProjectDepth, kProjectDepth * sizeof(float));
                }
            } else {
                pack_columns<Units, kTileRows>(grad + first * long_size + first_row, long_size, elements, rows,
                                               kTileRows * kProjectDepth, tiles);
            }
            // The tasks are handed out in order, so this thread's next one is about `threads` further on.
            const bool last_block = block == blocks - 1;
            const index_t next_row = last_block ? first_row + threads * kProjectRows : first_row;
            const index_t next_rows = at_most(kProjectRows, long_size - next_row);
            const index_t next_first = last_block ? 0 : first + kBlock;
            const index_t next_elements = next_rows > 0 ? at_most(kBlock, short_size - next_first) : 0;
            const index_t steps = ceil_div(rows, kTileRows) * ceil_div(rank, kTileColumns);
            RegionPrefetch ahead = kSide == Side::right
                                       ? RegionPrefetch(grad + next_row * short_size + next_first, next_elements * sizeof(G),
                                                        short_size * sizeof(G), next_rows, steps)
                                       : RegionPrefetch(grad + next_first * long_size + next_row, next_rows * sizeof(G),
                                                        long_size * sizeof(G), next_elements, steps);
            const float* panel = packed_basis + block * kProjectDepth * padded_rank;
            for (index_t column = 0; column < rank; column += kTileColumns) {
                const index_t width = at_most(kTileColumns, padded_rank - column);
                const index_t columns = at_most(width, rank - column);
                for (index_t row = 0; row < rows; row += kTileRows) {
                    alignas(64) float sums[kTileRows * kTileColumns];
                    const float* tile = tiles + row * kProjectDepth;
                    ahead.step();
                    if (width == kTileColumns) {
                        multiply_tile<Units, 2, kRowStride, kStepStride>(tile, panel, depth, sums);
                    } else {
                        multiply_tile<Units, 1, kRowStride, kStepStride>(tile, panel, depth, sums);
                    }
                    const index_t count = at_most(kTileRows, rows - row);
                    for (index_t i = 0; i < count; ++i) {
                        all &= store_lowrank_row(lowrank + (first_row + row + i) * rank + column, sums + i * width, columns,
                                                 block == 0, block == blocks - 1, scale);
                    }
                }
                panel += width * depth;
            }
        }
        if (!all) representable.store(false, std::memory_order_relaxed);
    });
    return representable.load();
}

static bool project(const void* grad, DType grad_dtype, const Projection& p, float scale, float* lowrank, void* workspace,
                    int threads) {
    return with_dtype(grad_dtype, [&](auto grad_element) {
        return with_dtype(p.basis_dtype, [&](auto basis_element) {
            using G = decltype(grad_element);
            using B = decltype(basis_element);
            using Units = typename UnitsFor<std::is_same_v<G, Bf16> && std::is_same_v<B, Bf16>>::type;
            const auto run = p.side == Side::right ? project_as<Units, G, B, Side::right> : project_as<Units, G, B, Side::left>;
            return run(static_cast<const G*>(grad), static_cast<const B*>(p.basis), p, scale, lowrank,
                       static_cast<float*>(workspace), threads);
        });
    });
}

static index_t project_workspace_floats(index_t short_size, index_t rank, int threads) {
    return padded_columns(rank) * ceil_div(short_size, kProjectDepth) * kProjectDepth +
           threads * kProjectRows * kProjectDepth;
}

}  // namespace gk::cpu::GK_ISA
