// rotate_moments: Adam's moments carried to another basis, in one pass over panels of rows.
//
// A panel owns whole quantization blocks of the new moments; those of the old ones it may share, as it only reads them.
#pragma once

#include <numeric>

#include "../core/rotate_moments.h"
#include "encode_block.h"
#include "kernels.h"
#include "pack.h"

namespace gk::cpu::GK_ISA {

// Rows of a panel that are worth a pass over T.
constexpr index_t kRotateRows = 4 * kTileRows;

// Whole blocks begin every 256 / gcd(256, new rank) rows, that is every 256 at the most.
static inline index_t rotate_panel(index_t new_rank) {
    const index_t unit = kQuantBlock / std::gcd<index_t, index_t>(kQuantBlock, new_rank);
    return ceil_div(kRotateRows, unit) * unit;
}

// Elements first .. first + n - 1 of a moment, decoded if it has codes.
template <bool kSigned>
static void load_moment(const void* moment, const float* absmax, index_t first, index_t n, float* __restrict out) {
    if (absmax == nullptr) return load_row(static_cast<const float*>(moment) + first, n, out);
    const auto* codes = static_cast<const std::uint8_t*>(moment);
    for (index_t i = first, end = first + n, next; i < end; out += next - i, i = next) {
        const index_t block = i / kQuantBlock;
        next = at_most((block + 1) * kQuantBlock, end);
        decode_block<kSigned>(codes + i, next - i, out);
        for_lanes(next - i,
                  [&](index_t j, auto lanes) { store_as(out + j, load_as<decltype(lanes)>(out + j) * absmax[block]); });
    }
}

template <bool kSigned>
static void store_moment(const float* __restrict source, index_t first, index_t n, void* moment, float* absmax) {
    auto* codes = static_cast<std::uint8_t*>(moment);
    for (index_t i = 0; i < n; i += kQuantBlock) {
        absmax[(first + i) / kQuantBlock] =
            encode_block<kSigned>(source + i, at_most(kQuantBlock, n - i), codes + first + i);
    }
}

// The moments of a panel's rows, as the products' operands: tiles of kTileRows rows.
struct PackedMoments {
    float* m;
    float* variance;
};

static void pack_moments(const Moments& source, index_t first_row, index_t rows, index_t rank, float c,
                         const PackedMoments& out) {
    for (index_t row = 0; row < rows; row += kTileRows) {
        const index_t count = at_most(kTileRows, rows - row);
        const auto element = [&](index_t j, index_t k) { return (first_row + row + j) * rank + k; };
        pack_rows<Fp32Units>([&](index_t j, index_t k, index_t n,
                                 float* m) { load_moment<true>(source.m, source.m_absmax, element(j, k), n, m); },
                             rank, count, kTileRows, out.m + row * rank);
        pack_rows<Fp32Units>(
            [&](index_t j, index_t k, index_t n, float* variance) {
                float m[kCodesAtOnce];
                load_moment<true>(source.m, source.m_absmax, element(j, k), n, m);
                load_moment<false>(source.v, source.v_absmax, element(j, k), n, variance);
                for_lanes(n, [&](index_t i, auto lanes) {
                    using F = decltype(lanes);
                    store_as(variance + i, variance_of_moments(load_as<F>(m + i), load_as<F>(variance + i), c));
                });
            },
            rank, count, kTileRows, out.variance + row * rank);
    }
}

// Rows of m' and v' (rows, new rank), from a panel's moments and from T and T*T.
static void turn_moments(const PackedMoments& moments, const float* turn, const float* squares, index_t rows,
                         const Rotation& r, float c, float* new_m, float* new_v) {
    const index_t padded = padded_columns(r.new_rank);
    for (index_t column = 0; column < r.new_rank; column += kTileColumns) {
        const index_t width = at_most(kTileColumns, padded - column);
        const index_t columns = at_most(width, r.new_rank - column);
        const auto multiply = width == kTileColumns ? multiply_tile<Fp32Units, 2, 1, kTileRows>
                                                    : multiply_tile<Fp32Units, 1, 1, kTileRows>;
        for (index_t row = 0; row < rows; row += kTileRows) {
            alignas(64) float m[kTileRows * kTileColumns], variance[kTileRows * kTileColumns];
            multiply(moments.m + row * r.rank, turn + column * r.rank, r.rank, m);
            multiply(moments.variance + row * r.rank, squares + column * r.rank, r.rank, variance);
            for (index_t i = 0; i < at_most(kTileRows, rows - row); ++i) {
                const index_t corner = (row + i) * r.new_rank + column;
                for_lanes(columns, [&](index_t j, auto lanes) {
                    using F = decltype(lanes);
                    const F turned = load_as<F>(m + i * width + j);
                    store_as(new_m + corner + j, turned);
                    store_as(new_v + corner + j,
                             second_moment_of_variance(load_as<F>(variance + i * width + j), turned, c));
                });
            }
        }
    }
}

static index_t packed_panel_floats(const Rotation& r) {
    return whole_lines(ceil_div(rotate_panel(r.new_rank), kTileRows) * kTileRows * r.rank);
}
static index_t packed_turn_floats(const Rotation& r) { return whole_lines(padded_columns(r.new_rank) * r.rank); }
static index_t new_panel_floats(const Rotation& r) { return whole_lines(rotate_panel(r.new_rank) * r.new_rank); }

static void rotate_moments(const Moments& source, const Moments& target, const Rotation& r, float c, void* workspace,
                           int threads) {
    if (r.rows == 0) return;
    const bool quantized = target.m_absmax != nullptr;
    const index_t panel = rotate_panel(r.new_rank), packed = packed_panel_floats(r), fresh = new_panel_floats(r);
    float* turn = first_line(workspace);
    float* squares = turn + packed_turn_floats(r);
    float* panels = squares + packed_turn_floats(r);

    pack_panels<Fp32Units>(r.matrix, r.new_rank, r.rank, turn);
    for (index_t i = 0; i < padded_columns(r.new_rank) * r.rank; ++i) squares[i] = turn[i] * turn[i];

    for_each_task(ceil_div(r.rows, panel), threads, [&](index_t task, int slot) {
        const index_t first = task * panel, rows = at_most(panel, r.rows - first);
        float* own = panels + slot * 2 * (packed + fresh);
        const PackedMoments moments{own, own + packed};
        pack_moments(source, first, rows, r.rank, c, moments);
        const index_t corner = first * r.new_rank, count = rows * r.new_rank;
        if (quantized) {
            float* new_m = own + 2 * packed;
            float* new_v = new_m + fresh;
            turn_moments(moments, turn, squares, rows, r, c, new_m, new_v);
            store_moment<true>(new_m, corner, count, target.m, target.m_absmax);
            store_moment<false>(new_v, corner, count, target.v, target.v_absmax);
        } else {
            turn_moments(moments, turn, squares, rows, r, c, static_cast<float*>(target.m) + corner,
                         static_cast<float*>(target.v) + corner);
        }
    });
}

// Bytes; the last term: the workspace need not begin at a cache line.
static index_t rotate_workspace_bytes(const Rotation& r, int threads) {
    return static_cast<index_t>(sizeof(float)) *
           (2 * packed_turn_floats(r) + threads * 2 * (packed_panel_floats(r) + new_panel_floats(r)) + kLineFloats);
}

}  // namespace gk::cpu::GK_ISA
