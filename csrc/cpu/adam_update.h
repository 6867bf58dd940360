// adam_update: full-rank Adam from gradient to weight. lowrank_adam: the moments' part alone, on R.
#pragma once

#include <atomic>
#include <type_traits>

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
        decode_block<true>(m_codes, moments.m_absmax[block], n, m);
        decode_block<false>(v_codes, moments.v_absmax[block], n, v);
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

// The bf16 case of the following; round_vector and round_one take the element's index and the new weight's bits.
template <class RoundVector, class RoundOne>
[[gnu::always_inline]] static inline void update_bf16_row(std::uint16_t* weight, const float* __restrict x, index_t n,
                                                          const AdamCoefficients& c, const RoundVector& round_vector,
                                                          const RoundOne& round_one) {
    index_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Vector w = reinterpret_cast<Vector>(load_halves(weight + i) << 16);
        store_halves(weight + i, round_vector(i, reinterpret_cast<VectorBits>(adam_weight(w, load(x + i), c))));
    }
    for (; i < n; ++i) {
        const float w = adam_weight(bf16_to_float(weight[i]), x[i], c);
        weight[i] = static_cast<std::uint16_t>(round_one(i, float_bits(w)));
    }
}

// Not inlined: the random bits would take the registers that the loops around the common case keep constants in.
[[gnu::noinline]] static void update_bf16_row_stochastic(std::uint16_t* weight, const float* x, index_t n, index_t first,
                                                         const WeightRounding& rounding, const AdamCoefficients& c) {
    RandomBuffer buffer;
    const std::uint16_t* random = random_row(rounding.seed, rounding.stream, first, n, buffer);
    update_bf16_row(
        weight, x, n, c, [&](index_t i, VectorBits w) { return bf16_stochastic(w, load_halves(random + i)); },
        [&](index_t i, std::uint32_t w) { return bf16_stochastic(w, std::uint32_t{random[i]}); });
}

// w <- adam_weight(w, x) for n consecutive elements, of which the first has the flat index first; n <= kRandomRow
// where the rounding is stochastic.
template <class T>
[[gnu::always_inline]] static inline void update_weight_row(T* weight, const float* __restrict x, index_t n,
                                                            index_t first, const WeightRounding& rounding,
                                                            const AdamCoefficients& coefficients) {
    const AdamCoefficients c = coefficients;  // a copy: a store to the weight cannot change it
    if constexpr (std::is_same_v<T, float>) {
        index_t i = 0;
        for (; i + kLanes <= n; i += kLanes) store(weight + i, adam_weight(load(weight + i), load(x + i), c));
        for (; i < n; ++i) weight[i] = adam_weight(weight[i], x[i], c);
    } else if constexpr (std::is_same_v<T, Fp16>) {
        float w[kQuantBlock];
        load_row(weight, n, w);
        for (index_t i = 0; i < n; ++i) w[i] = adam_weight(w[i], x[i], c);
        store_row(w, n, weight);
    } else if (rounding.stochastic) {
        update_bf16_row_stochastic(&weight->bits, x, n, first, rounding, c);
    } else {
        update_bf16_row(
            &weight->bits, x, n, c, [](index_t, VectorBits w) { return bf16_nearest(w); },
            [](index_t, std::uint32_t w) { return bf16_nearest(w); });
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
