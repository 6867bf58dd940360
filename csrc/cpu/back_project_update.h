// back_project_update: W <- (W - c * X) * decay with X = U @ P.T (right side) or P @ U.T (left), tile by tile: the
// product never exists as a matrix, and the weight is read and written once.
#pragma once

#include "kernels.h"
#include "pack.h"
#include "quantized_weight.h"

namespace gk::cpu::GK_ISA {

// Floats of a task's own packed operand that leave the second-level cache room for the rest.
constexpr index_t kOwnOperand = 65536;
// Columns of W updated before the next rows are: the packed operand of these columns stays in the cache.
constexpr index_t kUpdateColumns = 16 * kTileColumns;

constexpr index_t kTilesPerPanel = 16;

// Long indices of a task: whole tiles, few enough for its packed part of U to stay in the cache. Where they are columns
// of int8 weights, whole groups: a task finds its groups' scales.
static inline index_t update_panel(index_t rank, Side side, DType weight_dtype) {
    const index_t tile = side == Side::right ? kTileRows : kTileColumns;
    const index_t step = side == Side::left && weight_dtype == DType::int8 ? kWeightGroup : tile;
    const index_t fitting = kOwnOperand / rank / step * step;
    const index_t largest = kTilesPerPanel * tile;
    return fitting < step || largest < step ? step : at_most(fitting, largest);
}
static_assert(kWeightGroup % kTileColumns == 0 &&
              (kTilesPerPanel * kTileColumns % kWeightGroup == 0 || kTilesPerPanel * kTileColumns < kWeightGroup));

struct PackedOperand {
    const float* data;  // panels of whole depth
    index_t first;      // row or column of W of the first element
    index_t count;
};

// A row of n weights with its row x of the product.
template <class W>
[[gnu::always_inline]] static inline void update_row(W* weight, const float* x, index_t n, const AdamCoefficients& c) {
    for_lanes(n, [&](index_t i, auto lanes) {
        using F = decltype(lanes);
        store_as(weight + i, adam_weight(load_as<F>(weight + i), load_as<F>(x + i), c));
    });
}

[[gnu::noinline]] static void update_tile_stochastic(Bf16* weight, index_t ld, index_t corner, index_t rows,
                                                     index_t columns, const float* x, index_t width,
                                                     const WeightRounding& rounding, const AdamCoefficients& c) {
    // All bits first: they are stored in pieces that a wider load would otherwise wait for.
    RandomBuffer<kTileColumns> buffers[kTileRows];
    const std::uint16_t* random[kTileRows];
    for (index_t i = 0; i < rows; ++i) random[i] = random_row(rounding, corner + i * ld, columns, buffers[i]);
    for (index_t i = 0; i < rows; ++i) {
        Bf16* row = weight + corner + i * ld;
        for_lanes(columns, [&](index_t j, auto lanes) {
            using F = decltype(lanes);
            const F updated = adam_weight(load_as<F>(row + j), load_as<F>(x + i * width + j), c);
            store_stochastic(row + j, updated, random[i] + j);
        });
    }
}

// `rows` rows of `columns` weights from the flat index corner on, with the product's rows `width` apart.
template <class W>
[[gnu::noinline]] static void update_tile(W* weight, index_t ld, index_t corner, index_t rows, index_t columns,
                                          const float* x, index_t width, const WeightRounding& rounding,
                                          const AdamCoefficients& coefficients) {
    const AdamCoefficients c = coefficients;  // a copy: no store can change it
    if constexpr (std::is_same_v<W, Bf16>) {
        if (rounding.stochastic) {
            return update_tile_stochastic(weight, ld, corner, rows, columns, x, width, rounding, c);
        }
    }
    if (columns == kTileColumns) {  // almost always: a length that the compiler knows
        for (index_t i = 0; i < rows; ++i) update_row(weight + corner + i * ld, x + i * kTileColumns, kTileColumns, c);
    } else {
        for (index_t i = 0; i < rows; ++i) update_row(weight + corner + i * ld, x + i * width, columns, c);
    }
}

// kTileRows x width elements of the product; width is kTileColumns or, at the edge, kLanes.
template <class Units>
[[gnu::always_inline]] static inline void product_tile(const float* tile, const float* panel, index_t depth,
                                                       index_t width, float* x) {
    if (width == kTileColumns) {
        multiply_tile<Units, 2, 1, kTileRows>(tile, panel, depth, x);
    } else {
        multiply_tile<Units, 1, 1, kTileRows>(tile, panel, depth, x);
    }
}

// The part of W with rows `a` and columns `b`.
template <class Units, class W>
static void update_region(W* weight, index_t ld, const PackedOperand& a, const PackedOperand& b, index_t depth,
                          const WeightRounding& rounding, const AdamCoefficients& c) {
    const index_t padded = padded_columns(b.count);
    for (index_t chunk = 0; chunk < b.count; chunk += kUpdateColumns) {
        const index_t chunk_end = at_most(chunk + kUpdateColumns, b.count);
        for (index_t row = 0; row < a.count; row += kTileRows) {
            const index_t rows = at_most(kTileRows, a.count - row);
            for (index_t column = chunk; column < chunk_end; column += kTileColumns) {
                const index_t width = at_most(kTileColumns, padded - column);
                const index_t columns = at_most(width, b.count - column);
                const index_t corner = (a.first + row) * ld + b.first + column;
                // Into the second-level cache: rows a power of two apart share so few sets of the first that they
                // would evict one another.
                for (index_t i = 0; i < rows; ++i) {
                    const char* line = reinterpret_cast<const char*>(weight + corner + i * ld);
                    __builtin_prefetch(line, 0, 1);
                    __builtin_prefetch(line + sizeof(W) * static_cast<std::size_t>(columns) - 1, 0, 1);
                }
                alignas(64) float x[kTileRows * kTileColumns];
                product_tile<Units>(a.data + row * depth, b.data + column * depth, depth, width, x);
                update_tile(weight, ld, corner, rows, columns, x, width, rounding, c);
            }
        }
    }
}

// The same of int8 weights, whose b.first is a group's first column: a tile's rows, a whole group wide, at a time.
template <class Units>
static void update_region_of_codes(const Weight& weight, index_t ld, const PackedOperand& a, const PackedOperand& b,
                                   index_t depth, const AdamCoefficients& coefficients) {
    const AdamCoefficients c = coefficients;  // a copy: no store can change it
    const index_t groups = weight_groups(ld), padded = padded_columns(b.count);
    for (index_t first = 0; first < b.count; first += kWeightGroup) {
        const index_t group_columns = at_most(kWeightGroup, b.count - first);
        for (index_t row = 0; row < a.count; row += kTileRows) {
            const index_t rows = at_most(kTileRows, a.count - row);
            const index_t corner = (a.first + row) * ld + b.first + first;
            Int8* codes = static_cast<Int8*>(weight.data) + corner;
            float* scales = weight.scale + (a.first + row) * groups + (b.first + first) / kWeightGroup;
            for (index_t i = 0; i < rows; ++i) {
                for (index_t j = 0; j < group_columns; j += 64) __builtin_prefetch(codes + i * ld + j, 1, 1);
                __builtin_prefetch(codes + i * ld + group_columns - 1, 1, 1);
            }
            alignas(64) float weights[kTileRows][kWeightGroup];
            for (index_t column = 0; column < group_columns; column += kTileColumns) {
                const index_t width = at_most(kTileColumns, padded - first - column);
                const index_t columns = at_most(width, group_columns - column);
                alignas(64) float x[kTileRows * kTileColumns];
                product_tile<Units>(a.data + row * depth, b.data + (first + column) * depth, depth, width, x);
                for (index_t i = 0; i < rows; ++i) {
                    update_codes(codes + i * ld + column, scales[i * groups], x + i * width, columns, c,
                                 weights[i] + column);
                }
            }
            for (index_t i = 0; i < rows; ++i) {
                store_group(weights[i], group_columns, corner + i * ld, weight.rounding, codes + i * ld,
                            scales + i * groups);
            }
        }
    }
}

// Packs `count` rows of the basis from row `first` on as a panel of `width` columns.
template <class Units, class B>
static void pack_basis_rows(const Projection& p, index_t first, index_t count, index_t width, float* out) {
    const index_t ld = row_length<B>(p.rank);
    const B* rows = static_cast<const B*>(p.basis) + first * ld;
    pack_rows<Units>([&](index_t j, index_t k, index_t n,
                         float* units) { units_along<Units>(at_column(rows + j * ld, k), n, units); },
                     p.rank, count, width, out);
}

// The same of the update's rows, times the basis' scales and rounded to T.
template <class Units, class T>
static void pack_update_rows(const Projection& p, const float* rows, index_t count, index_t width, float* out) {
    pack_rows<Units>(
        [&](index_t j, index_t k, index_t n, float* units) {
            const float* row = rows + j * p.rank + k;
            float scaled[kCodesAtOnce];
            if (p.basis_scale != nullptr) {
                for_lanes(n, [&](index_t i, auto lanes) {
                    using F = decltype(lanes);
                    store_as(scaled + i, load_as<F>(row + i) * load_as<F>(p.basis_scale + k + i));
                });
                row = scaled;
            }
            rounded_units_along<Units, T>(row, n, units);
        },
        p.rank, count, width, out);
}

struct Packing {
    void (*basis_rows)(const Projection& p, index_t first, index_t count, index_t width, float* out);
    void (*update_rows)(const Projection& p, const float* rows, index_t count, index_t width, float* out);
};

template <class Units, class W>
static void back_project_update_as(const Weight& weight, const Projection& p, const Packing& pack, const float* update,
                                   const AdamCoefficients& c, float* workspace, int threads) {
    const index_t long_size = p.long_size(), short_size = p.short_size(), rank = p.rank;
    if (long_size == 0 || short_size == 0) return;
    const index_t depth = units_deep<Units>(rank);
    const bool right = p.side == Side::right;
    const index_t basis_tile = right ? kTileColumns : kTileRows;
    const index_t update_tile = right ? kTileRows : kTileColumns;
    const index_t panel = update_panel(rank, p.side, weight.dtype);

    const index_t padded_basis = right ? padded_columns(short_size) : ceil_div(short_size, kTileRows) * kTileRows;
    for_each_task(ceil_div(short_size, basis_tile), threads, [&](index_t task, int) {
        const index_t first = task * basis_tile;
        pack.basis_rows(p, first, at_most(basis_tile, short_size - first), at_most(basis_tile, padded_basis - first),
                        workspace + first * depth);
    });

    float* own_operands = workspace + whole_lines(padded_basis * depth);
    const index_t own_size = whole_lines(panel * depth);
    for_each_task(ceil_div(long_size, panel), threads, [&](index_t task, int slot) {
        const index_t first = task * panel, count = at_most(panel, long_size - first);
        float* own = own_operands + slot * own_size;
        for (index_t j = 0; j < count; j += update_tile) {
            const index_t width = right ? update_tile : at_most(update_tile, padded_columns(count) - j);
            pack.update_rows(p, update + (first + j) * rank, at_most(update_tile, count - j), width, own + j * depth);
        }
        const PackedOperand of_update{own, first, count};
        const PackedOperand of_basis{workspace, 0, short_size};
        const PackedOperand& of_rows = right ? of_update : of_basis;
        const PackedOperand& of_columns = right ? of_basis : of_update;
        if constexpr (kIsCodes<W>) {
            update_region_of_codes<Units>(weight, p.cols, of_rows, of_columns, depth, c);
        } else {
            update_region<Units>(static_cast<W*>(weight.data), p.cols, of_rows, of_columns, depth, weight.rounding, c);
        }
    });
}

static void back_project_update(const Weight& weight, const Projection& p, const float* update,
                                const AdamCoefficients& c, void* workspace, int threads) {
    with_weight_dtype(weight.dtype, [&](auto weight_element) {
        with_basis_dtype(p.basis_dtype, [&](auto basis_element) {
            using W = decltype(weight_element);
            using B = decltype(basis_element);
            // What the update is rounded to.
            using OfCodes = std::conditional_t<kIsCodes<W>, Bf16, W>;
            using Factor = std::conditional_t<kIsCodes<B>, OfCodes, B>;
            using Units = typename UnitsFor<std::is_same_v<Factor, Bf16>>::type;
            const Packing pack{pack_basis_rows<Units, B>, pack_update_rows<Units, Factor>};
            back_project_update_as<Units, W>(weight, p, pack, update, c, first_line(workspace), threads);
        });
    });
}

// Enough for either side, and for units of one element. Either tile may have the larger panel: what fits is rounded
// down to whole tiles.
static index_t back_project_workspace_floats(index_t short_size, index_t rank, DType weight_dtype, int threads) {
    const index_t largest_tile = kTileRows > kTileColumns ? kTileRows : kTileColumns;
    const index_t panel_of_rows = update_panel(rank, Side::right, weight_dtype);
    const index_t panel_of_columns = update_panel(rank, Side::left, weight_dtype);
    const index_t panel = panel_of_rows > panel_of_columns ? panel_of_rows : panel_of_columns;
    return whole_lines((short_size + largest_tile) * rank) + threads * whole_lines(panel * rank);
}

}  // namespace gk::cpu::GK_ISA
