// Copies of matrix operands in the order in which the register tile reads them.
//
// A panel is `width` columns wide and `depth` units deep, stored unit row by unit row. Columns and halves of pairs
// beyond the operand's edge are zero.
#pragma once

#include "tile.h"

namespace gk::cpu::GK_ISA {

// n elements that lie along the summed dimension, as units.
template <class Units, class T>
[[gnu::always_inline]] static inline void units_along(const T* source, index_t n, float* __restrict out) {
    if constexpr (Units::kDepth == 1) {
        load_row(source, n, out);
    } else {
        std::memcpy(out, source, static_cast<std::size_t>(n) * sizeof(T));
        if (n % 2 == 1) std::memset(reinterpret_cast<T*>(out) + n, 0, sizeof(T));
    }
}

// The same for fp32 numbers that are first rounded to the basis' type T (the low-rank update, see DESIGN of the
// mathematics in core: U is rounded to what the matrix units of every backend take).
template <class Units, class T>
[[gnu::always_inline]] static inline void rounded_units_along(const float* source, index_t n, float* __restrict out) {
    if constexpr (sizeof(T) == sizeof(float)) {
        load_row(source, n, out);
    } else {
        constexpr index_t kChunk = 256;
        T rounded[kChunk];
        for (index_t i = 0; i < n; i += kChunk) {
            const index_t count = at_most(kChunk, n - i);
            store_row(source + i, count, rounded);
            units_along<Units>(rounded, count, out + i / Units::kDepth);
        }
    }
}

// A panel from a matrix whose columns are contiguous: source (elements, count) with row stride ld.
template <class Units, class T>
static void pack_columns(const T* source, index_t ld, index_t elements, index_t count, index_t width,
                         float* __restrict out) {
    for (index_t k = 0; k < elements; k += Units::kDepth, out += width) {
        const T* row = source + k * ld;
        if constexpr (Units::kDepth == 1) {
            load_row(row, count, out);
        } else {
            const bool pair = k + 1 < elements;
            const T* next = pair ? row + ld : row;
            const std::uint32_t mask = pair ? 0xFFFF0000u : 0u;
            for (index_t j = 0; j < count; ++j) {
                out[j] = bits_float((static_cast<std::uint32_t>(next[j].bits) << 16 & mask) | row[j].bits);
            }
        }
        for (index_t j = count; j < width; ++j) out[j] = 0.0f;
    }
}

// A panel from a matrix whose rows become the panel's columns: read_row(j, first, n, out) gives units of row j.
template <class Units, class ReadRow>
static void pack_rows(const ReadRow& read_row, index_t elements, index_t count, index_t width, float* __restrict out) {
    constexpr index_t kChunk = 64;  // units; a chunk of all rows stays in the first-level cache
    float rows[kTileColumns][kChunk];
    for (index_t k = 0; k < elements; k += kChunk * Units::kDepth) {
        const index_t n = at_most(kChunk * Units::kDepth, elements - k);
        const index_t depth = units_deep<Units>(n);
        for (index_t j = 0; j < width; ++j) {
            if (j < count) {
                read_row(j, k, n, rows[j]);
            } else {
                std::memset(rows[j], 0, sizeof rows[j]);
            }
        }
        for (index_t d = 0; d < depth; ++d, out += width) {
            for (index_t j = 0; j < width; ++j) out[j] = rows[j][d];
        }
    }
}

}  // namespace gk::cpu::GK_ISA
