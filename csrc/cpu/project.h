// project: the low-rank gradient R (long, rank) = G @ P on the right side, G.T @ P on the left, and if asked for the
// squared norms of G's long indices.
//
// A task owns a panel of long indices and sums over the short dimension in blocks, into R itself. P is packed once
// for all tasks, the panel's part of G once per block.
#pragma once

#include <atomic>

#include "encode_block.h"
#include "gradient_factors.h"
#include "kernels.h"
#include "pack.h"

namespace gk::cpu::GK_ISA {

// Units of the short dimension summed at a time, and tiles of long indices that share one pass over P.
constexpr index_t kProjectDepth = 256;
constexpr index_t kProjectTiles = 8;
constexpr index_t kProjectRows = kProjectTiles * kTileRows;

// What becomes of a tile's sums: set by the first block of the sum, added to by the others, and scaled by the last.
struct SumStore {
    bool first;
    bool last;
    float scale;
    const float* column_scale;  // of the tile's columns, or null
};

[[gnu::always_inline]] static inline void store_lowrank_row(float* out, const float* sums, index_t n,
                                                            const SumStore& how) {
    for_lanes(n, [&](index_t i, auto lanes) {
        using F = decltype(lanes);
        F sum = load_as<F>(sums + i);
        if (!how.first) sum += load_as<F>(out + i);
        if (how.last && how.column_scale != nullptr) sum *= load_as<F>(how.column_scale + i);
        if (how.last) sum *= how.scale;
        store_as(out + i, sum);
    });
}

// A tile's sums, `width` apart, into its rows of R.
[[gnu::noinline]] static void store_lowrank_tile(float* out, index_t rank, index_t rows, index_t columns,
                                                 const float* sums, index_t width, const SumStore& store) {
    const SumStore how = store;     // a copy: no store can change it
    if (columns == kTileColumns) {  // almost always: a length that the compiler knows
        for (index_t i = 0; i < rows; ++i) {
            store_lowrank_row(out + i * rank, sums + i * kTileColumns, kTileColumns, how);
        }
    } else {
        for (index_t i = 0; i < rows; ++i) store_lowrank_row(out + i * rank, sums + i * width, columns, how);
    }
}

// Tiles of G: `rows` long indices from first_row on, `elements` of the short dimension from `first` on. On the right
// side a row of G runs along the sum, so a tile is a copy of rows; on the left side G's rows run along the tile.
template <class Units, Side kSide, class G>
static void pack_gradient(const G* grad, const Projection& p, index_t first_row, index_t rows, index_t first,
                          index_t elements, float* tiles) {
    if constexpr (kSide == Side::left) {
        pack_columns<Units, kTileRows>(grad + first * p.cols + first_row, p.cols, elements, rows,
                                       kTileRows * kProjectDepth, tiles);
    } else {
        const index_t padded_rows = ceil_div(rows, kTileRows) * kTileRows;
        for (index_t row = 0; row < padded_rows; ++row) {
            // Rows beyond the edge repeat the last one; their sums are not stored.
            const index_t source = first_row + at_most(row, rows - 1);
            units_along<Units>(grad + source * p.cols + first, elements, tiles + row * kProjectDepth);
        }
    }
}

// The part of G that a task needs after this block: its next one, or the first of the thread's next task, which is
// about `threads` further on, since tasks are handed out in order. block_size: elements of the short dimension.
template <Side kSide, class G>
static RegionPrefetch next_region(const G* grad, const Projection& p, index_t task, index_t block, index_t blocks,
                                  index_t block_size, int threads, index_t steps) {
    const bool last_block = block == blocks - 1;
    const index_t row = (last_block ? task + threads : task) * kProjectRows;
    const index_t first = last_block ? 0 : (block + 1) * block_size;
    if (row >= p.long_size()) return RegionPrefetch(grad, 0, 0, 0, steps);
    const index_t rows = at_most(kProjectRows, p.long_size() - row);
    const index_t elements = at_most(block_size, p.short_size() - first);
    constexpr index_t kSize = sizeof(G);
    return kSide == Side::right
               ? RegionPrefetch(grad + row * p.cols + first, elements * kSize, p.cols * kSize, rows, steps)
               : RegionPrefetch(grad + first * p.cols + row, rows * kSize, p.cols * kSize, elements, steps);
}

// Packs `elements` rows of the basis from row `first` on.
using PackBasis = void (*)(const Projection& p, index_t first, index_t elements, float* out);

template <class Units, class B>
static void pack_basis(const Projection& p, index_t first, index_t elements, float* out) {
    pack_panels<Units>(static_cast<const B*>(p.basis) + first * row_length<B>(p.rank), p.rank, elements, out);
}

template <class Units, class G, Side kSide>
static bool project_as(const G* grad, const Projection& p, PackBasis pack, float scale, float* lowrank, float* squares,
                       float* workspace, int threads) {
    const index_t long_size = p.long_size(), short_size = p.short_size(), rank = p.rank;
    if (long_size == 0) return true;
    if (short_size == 0) {  // a sum of nothing
        std::memset(lowrank, 0, static_cast<std::size_t>(long_size * rank) * sizeof(float));
        if (squares != nullptr) std::memset(squares, 0, static_cast<std::size_t>(long_size) * sizeof(float));
        return true;
    }
    const index_t padded_rank = padded_columns(rank);
    constexpr index_t kBlock = kProjectDepth * Units::kDepth;  // elements of the short dimension
    const index_t blocks = ceil_div(short_size, kBlock);
    float* packed_basis = workspace;
    float* packed_grad = workspace + padded_rank * blocks * kProjectDepth;

    for_each_task(blocks, threads, [&](index_t block, int) {
        const index_t first = block * kBlock, elements = at_most(kBlock, short_size - first);
        pack(p, first, elements, packed_basis + block * kProjectDepth * padded_rank);
    });

    std::atomic<bool> representable{true};
    for_each_task(ceil_div(long_size, kProjectRows), threads, [&](index_t task, int slot) {
        constexpr int kRowStride = kSide == Side::right ? static_cast<int>(kProjectDepth) : 1;
        constexpr int kStepStride = kSide == Side::right ? 1 : kTileRows;
        float* tiles = packed_grad + slot * kProjectRows * kProjectDepth;
        const index_t first_row = task * kProjectRows, rows = at_most(kProjectRows, long_size - first_row);
        float own_squares[kProjectRows] = {};
        for (index_t block = 0; block < blocks; ++block) {
            const index_t first = block * kBlock, elements = at_most(kBlock, short_size - first);
            const index_t depth = units_deep<Units>(elements);
            pack_gradient<Units, kSide>(grad, p, first_row, rows, first, elements, tiles);
            if (squares != nullptr) {
                const index_t corner = kSide == Side::right ? first_row * p.cols + first : first * p.cols + first_row;
                add_squares<kSide>(grad + corner, p.cols, rows, elements, own_squares);
            }
            const index_t steps = ceil_div(rows, kTileRows) * ceil_div(rank, kTileColumns);
            RegionPrefetch ahead = next_region<kSide>(grad, p, task, block, blocks, kBlock, threads, steps);
            const float* panel = packed_basis + block * kProjectDepth * padded_rank;
            for (index_t column = 0; column < rank; column += kTileColumns) {
                const index_t width = at_most(kTileColumns, padded_rank - column);
                const index_t columns = at_most(width, rank - column);
                const float* column_scale = p.basis_scale == nullptr ? nullptr : p.basis_scale + column;
                const SumStore store{block == 0, block == blocks - 1, scale, column_scale};
                for (index_t row = 0; row < rows; row += kTileRows) {
                    alignas(64) float sums[kTileRows * kTileColumns];
                    const float* tile = tiles + row * kProjectDepth;
                    ahead.step();
                    if (width == kTileColumns) {
                        multiply_tile<Units, 2, kRowStride, kStepStride>(tile, panel, depth, sums);
                    } else {
                        multiply_tile<Units, 1, kRowStride, kStepStride>(tile, panel, depth, sums);
                    }
                    store_lowrank_tile(lowrank + (first_row + row) * rank + column, rank,
                                       at_most(kTileRows, rows - row), columns, sums, width, store);
                }
                panel += width * depth;
            }
        }
        if (squares != nullptr) std::memcpy(squares + first_row, own_squares, sizeof(float) * rows);
        if (!row_is_representable(lowrank + first_row * rank, rows * rank) ||
            (squares != nullptr && !all_finite(own_squares, rows))) {
            representable.store(false, std::memory_order_relaxed);
        }
    });
    return representable.load();
}

// Long indices that a task sums for a basis of one column.
constexpr index_t kVectorRows = 64;
constexpr index_t kVectorColumns = 512;

// x.y of n elements, y in fp32.
template <class T>
[[gnu::always_inline]] static inline float dot(const T* x, const float* y, index_t n) {
    Vector lanes{};
    float rest = 0.0f;
    for_lanes(n, [&](index_t i, auto kind) {
        using F = decltype(kind);
        const F product = load_as<F>(x + i) * load_as<F>(y + i);
        if constexpr (std::is_same_v<F, float>) {
            rest += product;
        } else {
            lanes += product;
        }
    });
    for (int i = 0; i < kLanes; ++i) rest += lanes[i];
    return rest;
}

// The same of a basis of one column, where a tile would be nearly empty and G alone is worth reading.
template <class G, class B, Side kSide>
static bool project_to_vector(const G* grad, const Projection& p, float scale, float* lowrank, float* squares,
                              float* vector, int threads) {
    const index_t long_size = p.long_size(), short_size = p.short_size();
    for_lanes(short_size, [&](index_t i, auto lanes) {
        store_as(vector + i, load_as<decltype(lanes)>(static_cast<const B*>(p.basis) + i));
    });
    constexpr index_t kPanel = kSide == Side::right ? kVectorRows : kVectorColumns;
    std::atomic<bool> representable{true};
    for_each_task(ceil_div(long_size, kPanel), threads, [&](index_t task, int) {
        const index_t first = task * kPanel, count = at_most(kPanel, long_size - first);
        float own_squares[kPanel] = {}, sums[kPanel] = {};
        if constexpr (kSide == Side::right) {
            for (index_t i = 0; i < count; ++i) {
                const G* row = grad + (first + i) * p.cols;
                sums[i] = dot(row, vector, short_size);
                if (squares != nullptr) add_squares<kSide>(row, p.cols, 1, short_size, own_squares + i);
            }
        } else {
            for (index_t block = 0; block < short_size; block += kProjectDepth) {
                float own_sums[kPanel] = {};
                for (index_t k = block; k < at_most(block + kProjectDepth, short_size); ++k) {
                    const G* row = grad + k * p.cols + first;
                    const float factor = vector[k];
                    for_lanes(count, [&](index_t i, auto lanes) {
                        using F = decltype(lanes);
                        store_as(own_sums + i, load_as<F>(own_sums + i) + load_as<F>(row + i) * factor);
                    });
                    if (squares != nullptr) add_squares<kSide>(row, p.cols, count, 1, own_squares);
                }
                for (index_t i = 0; i < count; ++i) sums[i] += own_sums[i];
            }
        }
        for (index_t i = 0; i < count; ++i) lowrank[first + i] = sums[i] * scale;
        if (squares != nullptr) std::memcpy(squares + first, own_squares, sizeof(float) * count);
        if (!row_is_representable(lowrank + first, count) || (squares != nullptr && !all_finite(own_squares, count))) {
            representable.store(false, std::memory_order_relaxed);
        }
    });
    return representable.load();
}

static bool project(const void* grad, DType grad_dtype, const Projection& p, float scale, float* lowrank,
                    float* squares, void* workspace, int threads) {
    return with_dtype(grad_dtype, [&](auto grad_element) {
        return with_basis_dtype(p.basis_dtype, [&](auto basis_element) {
            using G = decltype(grad_element);
            using B = decltype(basis_element);
            using Units = typename UnitsFor<std::is_same_v<G, Bf16> && kExactInBf16<B>>::type;
            if constexpr (!kIsCodes<B>) {
                if (p.rank == 1) {
                    const auto run = p.side == Side::right ? project_to_vector<G, B, Side::right>
                                                           : project_to_vector<G, B, Side::left>;
                    return run(static_cast<const G*>(grad), p, scale, lowrank, squares, first_line(workspace), threads);
                }
            }
            const auto run =
                p.side == Side::right ? project_as<Units, G, Side::right> : project_as<Units, G, Side::left>;
            return run(static_cast<const G*>(grad), p, pack_basis<Units, B>, scale, lowrank, squares,
                       first_line(workspace), threads);
        });
    });
}

static index_t project_workspace_floats(index_t short_size, index_t rank, int threads) {
    return padded_columns(rank) * ceil_div(short_size, kProjectDepth) * kProjectDepth +
           threads * kProjectRows * kProjectDepth;
}

}  // namespace gk::cpu::GK_ISA
