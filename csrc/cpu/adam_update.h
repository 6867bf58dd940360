// adam_update: full-rank Adam from gradient to weight. lowrank_adam: the moments' part alone, on R.
#pragma once

#include <atomic>

#include "quantize_blockwise.h"

namespace gk::cpu::GK_ISA {

// Updates the moments of one block and turns its gradient g into the direction u. With 8-bit moments u comes from
// the new moments before they are rounded to codes.
static inline void moments_block(const Moments& moments, index_t block, index_t n, float* __restrict g,
                                 const AdamCoefficients& coefficients) {
    const AdamCoefficients c = coefficients;
    const index_t first = block * kQuantBlock;
    const bool quantized = moments.m_absmax != nullptr;
    float decoded_m[kQuantBlock];
    float decoded_v[kQuantBlock];
    float* __restrict m = quantized ? decoded_m : static_cast<float*>(moments.m) + first;
    float* __restrict v = quantized ? decoded_v : static_cast<float*>(moments.v) + first;
    std::uint8_t* m_codes = static_cast<std::uint8_t*>(moments.m) + first;
    std::uint8_t* v_codes = static_cast<std::uint8_t*>(moments.v) + first;
    if (quantized) {
        decode_block(m_codes, moments.m_absmax[block], n, true, m);
        decode_block(v_codes, moments.v_absmax[block], n, false, v);
    }
    for (index_t i = 0; i < n; ++i) {
        m[i] = adam_first_moment(m[i], g[i], c);
        v[i] = adam_second_moment(v[i], g[i], c);
        g[i] = adam_direction(m[i], v[i], c);
    }
    if (quantized) {
        moments.m_absmax[block] = encode_block<true>(m, n, m_codes);
        moments.v_absmax[block] = encode_block<false>(v, n, v_codes);
    }
}

// w <- adam_weight(w, x) for n consecutive elements, of which the first has the flat index first; n <= kRandomRow
// where the rounding is stochastic.
template <class T>
[[gnu::always_inline]] static inline void update_weight_row(T* weight, const float* __restrict x, index_t n,
                                                            index_t first, const WeightRounding& rounding,
                                                            const AdamCoefficients& coefficients) {
    const AdamCoefficients c = coefficients;  // a copy: a store to the weight cannot change it
    if constexpr (sizeof(T) == sizeof(float)) {
        for (index_t i = 0; i < n; ++i) weight[i] = adam_weight(weight[i], x[i], c);
    } else {
        float w[kQuantBlock];
        load_row(weight, n, w);
        for (index_t i = 0; i < n; ++i) w[i] = adam_weight(w[i], x[i], c);
        if (!rounding.stochastic) return store_row(w, n, weight);
        RandomBuffer buffer;
        const std::uint16_t* random = random_row(rounding.seed, rounding.stream, first, n, buffer);
        for (index_t i = 0; i < n; ++i) weight[i].bits = float_to_bf16_stochastic(w[i], random[i]);
    }
}

template <class T>
[[gnu::always_inline]] static inline void load_gradient(const T* grad, index_t n, float scale, float* __restrict g) {
    load_row(grad, n, g);
    for (index_t i = 0; i < n; ++i) g[i] *= scale;
}

static bool all_representable(const void* x, DType dtype, index_t n, float scale, int threads) {
    std::atomic<bool> all{true};
    with_dtype(dtype, [&](auto element) {
        const auto* source = static_cast<const decltype(element)*>(x);
        for_each_block(n, threads, [&](index_t, index_t first, index_t count) {
            float g[kQuantBlock];
            load_gradient(source + first, count, scale, g);
            bool block = true;
            for (index_t i = 0; i < count; ++i) block &= gradient_is_representable(g[i]);
            if (!block) all.store(false, std::memory_order_relaxed);
        });
    });
    return all.load();
}

static void adam_update(const Weight& weight, const void* grad, DType grad_dtype, const Moments& moments, index_t n,
                        const AdamCoefficients& c, int threads) {
    with_dtype(weight.dtype, [&](auto weight_element) {
        with_dtype(grad_dtype, [&](auto grad_element) {
            auto* w = static_cast<decltype(weight_element)*>(weight.data);
            const auto* source = static_cast<const decltype(grad_element)*>(grad);
            for_each_block(n, threads, [&](index_t block, index_t first, index_t count) {
                float g[kQuantBlock];
                load_gradient(source + first, count, c.gradient_scale, g);
                moments_block(moments, block, count, g, c);
                update_weight_row(w + first, g, count, first, weight.rounding, c);
            });
        });
    });
}

// The gradient scale was applied by the projection; only maximize's sign is left in the coefficients.
static void lowrank_adam(float* lowrank, index_t n, const Moments& moments, const AdamCoefficients& c, int threads) {
    for_each_block(n, threads, [&](index_t block, index_t first, index_t count) {
        float* g = lowrank + first;
        for (index_t i = 0; i < count; ++i) g[i] *= c.gradient_scale;
        moments_block(moments, block, count, g, c);
    });
}

}  // namespace gk::cpu::GK_ISA
