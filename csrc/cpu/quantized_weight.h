// Rows of int8 weights, updated a group of 256 columns at a time: the group's new scale needs all of its new weights.
#pragma once

#include "../core/quantized_weight.h"
#include "encode_block.h"

namespace gk::cpu::GK_ISA {

// n <= kWeightGroup new weights of a row, in fp32, from their codes and the product's elements x.
[[gnu::always_inline]] static inline void update_codes(const Int8* __restrict codes, float scale,
                                                       const float* __restrict x, index_t n, const AdamCoefficients& c,
                                                       float* __restrict out) {
    for (index_t i = 0; i < n; ++i) out[i] = adam_weight(static_cast<float>(codes[i].code) * scale, x[i], c);
}

// Rounds a group's n new weights, which are lost. The first of them has the flat index `first`.
[[gnu::noinline]] static void store_group(float* __restrict weights, index_t n, index_t first,
                                          const WeightRounding& rounding, Int8* __restrict codes, float* scale) {
    RandomBuffer<kWeightGroup> buffer;
    const std::uint16_t* random = random_row(rounding, first, n, buffer);
    const float new_scale = weight_scale(largest_magnitude(weights, n), *scale);
    *scale = new_scale;
    for_lanes(n, [&](index_t i, auto lanes) {
        using F = decltype(lanes);
        const F bits = load_numbers<F>(random + i);
        store_as(weights + i, weight_code_number(load_as<F>(weights + i), new_scale, bits,
                                                 [](F number) { return floor_of_small(number); }));
    });
    for (index_t i = 0; i < n; ++i) codes[i].code = static_cast<std::int8_t>(static_cast<std::int32_t>(weights[i]));
}

}  // namespace gk::cpu::GK_ISA
