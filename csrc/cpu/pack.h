// Copies of matrix operands in the order in which the register tile reads them.
//
// A panel is `width` columns wide and `depth` units deep, stored unit row by unit row. Columns and halves of pairs
// beyond the operand's edge are zero.
#pragma once

#include "tile.h"

namespace gk::cpu::GK_ISA {

// Workspaces are used from the first cache line that begins in them, and each operand in them begins a line.
constexpr index_t kLineFloats = 16;

static inline float* first_line(void* workspace) {
    const auto address = reinterpret_cast<std::uintptr_t>(workspace);
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

static inline index_t whole_lines(index_t floats) { return ceil_div(floats, kLineFloats) * kLineFloats; }

[[gnu::always_inline]] static inline std::uint32_t bf16_bits(Bf16 x) { return x.bits; }
[[gnu::always_inline]] static inline std::uint32_t bf16_bits(Int8 x) {
    return float_bits(static_cast<float>(x.code)) >> 16;
}

template <class T>
[[gnu::always_inline]] static inline float bf16_pair(T first, T second) {
    return bits_float(bf16_bits(second) << 16 | bf16_bits(first));
}

// n elements that lie along the summed dimension, as units; of Int4Pair at most kCodesAtOnce.
template <class Units, class T>
[[gnu::always_inline]] static inline void units_along(const T* source, index_t n, float* __restrict out) {
    if constexpr (Units::kDepth == 1) {
        load_row(source, n, out);
    } else if constexpr (std::is_same_v<T, Int8>) {
        for (index_t i = 0; i < n / 2; ++i) out[i] = bf16_pair(source[2 * i], source[2 * i + 1]);
        if (n % 2 == 1) out[n / 2] = bf16_pair(source[n - 1], Int8{0});
    } else if constexpr (std::is_same_v<T, Int4Pair>) {
        Int8 codes[kCodesAtOnce];
        unpack_codes(source, n, codes);
        units_along<Units>(codes, n, out);
    } else {
        std::memcpy(out, source, static_cast<std::size_t>(n) * sizeof(T));
        if (n % 2 == 1) std::memset(reinterpret_cast<T*>(out) + n, 0, sizeof(T));
    }
}

// The same for fp32 numbers that are first rounded to T (the low-rank update: matrix units take both operands in one
// type).
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

// Asks for the memory of a matrix region that is packed next, a share at each step of the work before it: the packing
// itself is too short to wait for memory, and its rows are too short for the processor to see a pattern in them.
class RegionPrefetch {
 public:
    RegionPrefetch(const void* corner, index_t row_bytes, index_t stride_bytes, index_t rows, index_t steps)
        : row_(static_cast<const char*>(corner)),
          stride_(stride_bytes),
          row_lines_(ceil_div(row_bytes, kCacheLine) + 1),  // a row need not begin at a line
          lines_(row_lines_ * rows),
          per_step_(ceil_div(lines_, steps)) {}

    void step() {
        for (index_t i = at_most(per_step_, lines_); i > 0; --i, --lines_) {
            __builtin_prefetch(row_ + line_ * kCacheLine, 0, 2);
            if (++line_ == row_lines_) {
                line_ = 0;
                row_ += stride_;
            }
        }
    }

 private:
    static constexpr index_t kCacheLine = 64;
    const char* row_;
    index_t stride_;
    index_t row_lines_;
    index_t lines_;  // left
    index_t per_step_;
    index_t line_ = 0;  // within the row
};

// One unit row of a panel: `count` <= kCodesAtOnce columns of one element row, or of a pair of rows (next null: the
// pair's second half is zero).
template <class Units, class T>
[[gnu::always_inline]] static inline void interleave_row(const T* row, const T* next, index_t count,
                                                         float* __restrict out) {
    if constexpr (Units::kDepth == 1) {
        (void)next;
        load_row(row, count, out);
    } else if constexpr (std::is_same_v<T, Int4Pair>) {
        Int8 codes[kCodesAtOnce], next_codes[kCodesAtOnce];
        unpack_codes(row, count, codes);
        if (next != nullptr) unpack_codes(next, count, next_codes);
        interleave_row<Units>(codes, next != nullptr ? next_codes : nullptr, count, out);
    } else if (next != nullptr) {
        for (index_t j = 0; j < count; ++j) out[j] = bf16_pair(row[j], next[j]);
    } else {
        for (index_t j = 0; j < count; ++j) out[j] = bf16_pair(row[j], T{});
    }
}

// Panels of kWidth columns from a matrix whose columns are contiguous: source (elements, count) with row stride ld.
// The panels lie panel_stride floats apart. Row by row through all panels, in the order of memory; `count` columns
// are copied, the rest of the last panel is zero.
template <class Units, int kWidth, class T>
static void pack_columns(const T* source, index_t ld, index_t elements, index_t count, index_t panel_stride,
                         float* __restrict out) {
    for (index_t k = 0; k < elements; k += Units::kDepth, out += kWidth) {
        const T* row = source + k * ld;
        const T* next = k + 1 < elements ? row + ld : nullptr;
        float* panel = out;
        index_t j = 0;
        for (; j + kWidth <= count; j += kWidth, panel += panel_stride) {  // a constant length, hence no call
            interleave_row<Units>(at_column(row, j), next == nullptr ? next : at_column(next, j), kWidth, panel);
        }
        if (j == count) continue;
        interleave_row<Units>(at_column(row, j), next == nullptr ? next : at_column(next, j), count - j, panel);
        for (index_t i = count - j; i < kWidth; ++i) panel[i] = 0.0f;
    }
}

// A whole operand of contiguous rows: panels of kTileColumns, the last one narrower by whole vectors.
template <class Units, class T>
static void pack_panels(const T* source, index_t columns, index_t elements, float* __restrict out) {
    const index_t ld = row_length<T>(columns), depth = units_deep<Units>(elements);
    const index_t padded = padded_columns(columns), narrow = padded % kTileColumns, wide = padded - narrow;
    pack_columns<Units, kTileColumns>(source, ld, elements, at_most(wide, columns), kTileColumns * depth, out);
    if (narrow != 0) {
        pack_columns<Units, kLanes>(at_column(source, wide), ld, elements, columns - wide, 0, out + wide * depth);
    }
}

// A panel from a matrix whose rows become the panel's columns: read_row(j, first, n, out) gives units of row j.
template <class Units, class ReadRow>
static void pack_rows(const ReadRow& read_row, index_t elements, index_t count, index_t width, float* __restrict out) {
    constexpr index_t kChunk = 64;  // units; a chunk of all rows stays in the first-level cache
    static_assert(kChunk * Units::kDepth <= kCodesAtOnce);
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
