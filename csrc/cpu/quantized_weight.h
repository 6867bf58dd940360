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

// Rounds a group's n new weights, the first of which has the flat index `first`.
[[gnu::noinline]] static void store_group(const float* __restrict weights, index_t n, index_t first,
                                          const WeightRounding& rounding, Int8* __restrict codes, float* scale) {
    RandomBuffer<kWeightGroup> buffer;
    const std::uint16_t* random = random_row(rounding, first, n, buffer);
    const float new_scale = weight_scale(largest_magnitude(weights, n), *scale);
    *scale = new_scale;
    for (index_t i = 0; i < n; ++i) codes[i].code = weight_code(weights[i], new_scale, random[i]);
}

}  // namespace gk::cpu::GK_ISA
