// The register tile of the two matrix products, and the units that its operands are packed in.
//
// A unit is 32 bits: one fp32 number, or two bf16 numbers that are neighbours along the summed dimension where the
// processor multiplies and adds such pairs into fp32. Everything that moves units is the same for both.
#pragma once

#include "elements.h"

namespace gk::cpu::GK_ISA {

struct Fp32Units {
    static constexpr int kDepth = 1;  // summed elements per unit
    [[gnu::always_inline]] static Vector multiply_add(float a, Vector b, Vector accumulator) {
        return gk::cpu::GK_ISA::multiply_add(broadcast(a), b, accumulator);
    }
};

#if defined(__AVX512BF16__)
struct Bf16PairUnits {
    static constexpr int kDepth = 2;
    [[gnu::always_inline]] static Vector multiply_add(float a, Vector b, Vector accumulator) {
        return _mm512_dpbf16_ps(accumulator, reinterpret_cast<__m512bh>(broadcast(a)), reinterpret_cast<__m512bh>(b));
    }
};
#endif

// bf16 pairs are exact where both operands are bf16; anything else is multiplied in fp32.
template <bool kBothBf16>
struct UnitsFor {
    using type = Fp32Units;
};
#if defined(__AVX512BF16__)
template <>
struct UnitsFor<true> {
    using type = Bf16PairUnits;
};
#endif

// out (kTileRows, kColumns) = a (depth, kTileRows) stepping by kRowStride and kStepStride, times b (depth, kColumns).
// Each sum runs over the depth in order, so an element's value does not depend on where in a tile it lies.
template <class Units, int kVectors, int kRowStride, int kStepStride>
[[gnu::noinline]] static void multiply_tile(const float* __restrict a, const float* __restrict b, index_t depth,
                                            float* __restrict out) {
    Vector accumulators[kTileRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) accumulators[i][j] = broadcast(0.0f);
    }
    for (index_t k = 0; k < depth; ++k) {
        Vector columns[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) columns[j] = load(b + j * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) {
                accumulators[i][j] = Units::multiply_add(a[i * kRowStride], columns[j], accumulators[i][j]);
            }
        }
        a += kStepStride;
        b += kVectors * kLanes;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) store(out + (i * kVectors + j) * kLanes, accumulators[i][j]);
    }
}

// A packed operand of `count` columns: panels of kTileColumns, the last one narrower by whole vectors.
static inline index_t padded_columns(index_t count) { return ceil_div(count, kLanes) * kLanes; }

// Depth in units.
template <class Units>
static inline index_t units_deep(index_t elements) {
    return ceil_div(elements, Units::kDepth);
}

}  // namespace gk::cpu::GK_ISA
