// scaled_gradient_update: W <- (W - g * factor) * decay, with a factor for each row (right side) or column (left).
#pragma once

#include "../core/apollo.h"
#include "quantized_weight.h"

namespace gk::cpu::GK_ISA {

// Rows of a task, which takes them whole: in strips of columns wide matrices took twice the time. Columns at a time are
// whole groups of int8 weights.
constexpr index_t kScaledRows = 16;
constexpr index_t kScaledColumns = 8 * kWeightGroup;

// n new weights: weight(i, F{}) is the old one of element i, or of kLanes from there on, take(i, w) gets the new one.
template <Side kSide, class G, class Weight, class Take>
[[gnu::always_inline]] static inline void scaled_row(const G* grad, const float* factor, index_t n,
                                                     const AdamCoefficients& c, const Weight& weight,
                                                     const Take& take) {
    for_lanes(n, [&](index_t i, auto lanes) {
        using F = decltype(lanes);
        const F own = kSide == Side::right ? F{} + *factor : load_as<F>(factor + (kSide == Side::right ? 0 : i));
        take(i, scaled_gradient_weight(weight(i, lanes), load_as<F>(grad + i) * c.gradient_scale, own, c.decay));
    });
}

// A row of n weights, the first of which has the flat index `first`.
template <Side kSide, class W, class G>
[[gnu::always_inline]] static inline void update_scaled_row(W* weight, const G* grad, const float* factor, index_t n,
                                                            index_t first, const WeightRounding& rounding,
                                                            const AdamCoefficients& c) {
    const auto old = [&](index_t i, auto lanes) { return load_as<decltype(lanes)>(weight + i); };
    if constexpr (std::is_same_v<W, Bf16>) {
        if (rounding.stochastic) {
            RandomBuffer<kScaledColumns> buffer;
            const std::uint16_t* random = random_row(rounding, first, n, buffer);
            scaled_row<kSide>(grad, factor, n, c, old,
                              [&](index_t i, auto w) { store_stochastic(weight + i, w, random + i); });
            return;
        }
    }
    scaled_row<kSide>(grad, factor, n, c, old, [&](index_t i, auto w) { store_as(weight + i, w); });
}

// The same of int8 weights and their groups' scales.
template <Side kSide, class G>
static void update_scaled_codes(Int8* codes, float* scales, const G* grad, const float* factor, index_t n,
                                index_t first, const WeightRounding& rounding, const AdamCoefficients& c) {
    for (index_t begin = 0; begin < n; begin += kWeightGroup, ++scales) {
        const index_t count = at_most(kWeightGroup, n - begin);
        alignas(64) float weights[kWeightGroup];
        load_row(codes + begin, count, weights);
        const float scale = *scales;
        scaled_row<kSide>(
            grad + begin, kSide == Side::right ? factor : factor + begin, count, c,
            [&](index_t i, auto lanes) { return load_as<decltype(lanes)>(weights + i) * scale; },
            [&](index_t i, auto w) { store_as(weights + i, w); });
        store_group(weights, count, first + begin, rounding, codes + begin, scales);
    }
}

template <Side kSide, class W, class G>
static void scaled_gradient_update_as(const Weight& weight, const G* grad, index_t rows, index_t cols,
                                      const float* factors, const AdamCoefficients& coefficients, int threads) {
    for_each_task(ceil_div(rows, kScaledRows), threads, [&](index_t task, int) {
        const AdamCoefficients c = coefficients;  // a copy: no store can change it
        const index_t last_row = at_most((task + 1) * kScaledRows, rows);
        for (index_t row = task * kScaledRows; row < last_row; ++row) {
            for (index_t column = 0; column < cols; column += kScaledColumns) {
                const index_t first = row * cols + column, n = at_most(kScaledColumns, cols - column);
                const float* factor = factors + (kSide == Side::right ? row : column);
                W* own = static_cast<W*>(weight.data) + first;
                if constexpr (kIsCodes<W>) {
                    float* scales = weight.scale + row * weight_groups(cols) + column / kWeightGroup;
                    update_scaled_codes<kSide>(own, scales, grad + first, factor, n, first, weight.rounding, c);
                } else {
                    update_scaled_row<kSide>(own, grad + first, factor, n, first, weight.rounding, c);
                }
            }
        }
    });
}

static void scaled_gradient_update(const Weight& weight, const void* grad, DType grad_dtype, index_t rows, index_t cols,
                                   Side side, const float* factors, const AdamCoefficients& c, int threads) {
    with_weight_dtype(weight.dtype, [&](auto weight_element) {
        with_dtype(grad_dtype, [&](auto grad_element) {
            using W = decltype(weight_element);
            using G = decltype(grad_element);
            const auto run = side == Side::right ? scaled_gradient_update_as<Side::right, W, G>
                                                 : scaled_gradient_update_as<Side::left, W, G>;
            run(weight, static_cast<const G*>(grad), rows, cols, factors, c, threads);
        });
    });
}

}  // namespace gk::cpu::GK_ISA
