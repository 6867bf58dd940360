// adam_update: full-rank Adam from gradient to weight. lowrank_adam: the moments' part alone, on R.
#pragma once

#include <atomic>

#include "quantize_blockwise.h"

namespace gk::cpu::GK_ISA {

// Updates the moments of one block of n elements. gradient(i, F{}) gives the gradient of element i, or of kLanes from
// there on, and direction(i, u) takes what moves the weights: it comes from the new moments before they are rounded to
// codes.
template <bool kQuantized, class Gradient, class Direction>
[[gnu::always_inline]] static inline void moments_block(const Moments& moments, index_t block, index_t n,
                                                        const AdamCoefficients& c, const Gradient& gradient,
                                                        const Direction& direction) {
    const index_t first = block * kQuantBlock;
    if constexpr (!kQuantized) {
        float* m = static_cast<float*>(moments.m) + first;
        float* v = static_cast<float*>(moments.v) + first;
        for_lanes(n, [&](index_t i, auto lanes) {
            using F = decltype(lanes);
            const F g = gradient(i, lanes);
            const F new_m = adam_first_moment(load_as<F>(m + i), g, c);
            const F new_v = adam_second_moment(load_as<F>(v + i), g, c);
            store_as(m + i, new_m);
            store_as(v + i, new_v);
            direction(i, adam_direction(new_m, square_root(new_v), c));
        });
    } else {
        std::uint8_t* m_codes = static_cast<std::uint8_t*>(moments.m) + first;
        std::uint8_t* v_codes = static_cast<std::uint8_t*>(moments.v) + first;
        const float m_absmax = moments.m_absmax[block], v_absmax = moments.v_absmax[block];
        float m[kQuantBlock], v[kQuantBlock];
        decode_block<true>(m_codes, n, m);
        decode_block<false>(v_codes, n, v);
        for_lanes(n, [&](index_t i, auto lanes) {
            using F = decltype(lanes);
            const F g = gradient(i, lanes);
            const F new_m = adam_first_moment(load_as<F>(m + i) * m_absmax, g, c);
            const F new_v = adam_second_moment(load_as<F>(v + i) * v_absmax, g, c);
            store_as(m + i, new_m);
            store_as(v + i, new_v);
            direction(i, adam_direction(new_m, square_root(new_v), c));
        });
        moments.m_absmax[block] = encode_block<true>(m, n, m_codes);
        moments.v_absmax[block] = encode_block<false>(v, n, v_codes);
    }
}

// out (n) = x * scale, or nothing where out is null. Returns whether all of it is representable.
static bool scale_and_check(const void* x, DType dtype, index_t n, float scale, float* out, int threads) {
    std::atomic<bool> all{true};
    with_dtype(dtype, [&](auto element) {
        const auto* source = static_cast<const decltype(element)*>(x);
        for_each_block(n, threads, [&](index_t, index_t first, index_t count) {
            float buffer[kQuantBlock];
            float* g = out == nullptr ? buffer : out + first;
            for_lanes(count, [&](index_t i, auto lanes) {
                store_as(g + i, load_as<decltype(lanes)>(source + first + i) * scale);
            });
            if (!row_is_representable(g, count)) all.store(false, std::memory_order_relaxed);
        });
    });
    return all.load();
}

template <bool kQuantized, bool kStochastic, class W, class G>
static void adam_update_as(const Weight& weight, const G* grad, const Moments& moments, index_t n,
                           const AdamCoefficients& coefficients, int threads) {
    for_each_block(n, threads, [&](index_t block, index_t first, index_t count) {
        const AdamCoefficients c = coefficients;  // a copy: no store can change it
        const G* source = grad + first;
        W* w = static_cast<W*>(weight.data) + first;
        RandomBuffer<kQuantBlock> buffer;
        [[maybe_unused]] const std::uint16_t* random = nullptr;
        if constexpr (kStochastic) random = random_row(weight.rounding, first, count, buffer);
        moments_block<kQuantized>(
            moments, block, count, c,
            [&](index_t i, auto lanes) { return load_as<decltype(lanes)>(source + i) * c.gradient_scale; },
            [&](index_t i, auto u) {
                const auto updated = adam_weight(load_as<decltype(u)>(w + i), u, c);
                if constexpr (kStochastic) {
                    store_stochastic(w + i, updated, random + i);
                } else {
                    store_as(w + i, updated);
                }
            });
    });
}

static void adam_update(const Weight& weight, const void* grad, DType grad_dtype, const Moments& moments, index_t n,
                        const AdamCoefficients& c, int threads) {
    const bool quantized = moments.m_absmax != nullptr;
    with_dtype(weight.dtype, [&](auto weight_element) {
        with_dtype(grad_dtype, [&](auto grad_element) {
            using W = decltype(weight_element);
            using G = decltype(grad_element);
            const G* source = static_cast<const G*>(grad);
            if constexpr (std::is_same_v<W, Bf16>) {
                if (weight.rounding.stochastic) {
                    const auto run = quantized ? adam_update_as<true, true, W, G> : adam_update_as<false, true, W, G>;
                    return run(weight, source, moments, n, c, threads);
                }
            }
            const auto run = quantized ? adam_update_as<true, false, W, G> : adam_update_as<false, false, W, G>;
            run(weight, source, moments, n, c, threads);
        });
    });
}

// The gradient scale was applied by the projection; only maximize's sign is left in the coefficients.
template <bool kQuantized>
static void lowrank_adam_as(float* lowrank, index_t n, const Moments& moments, const AdamCoefficients& coefficients,
                            int threads) {
    for_each_block(n, threads, [&](index_t block, index_t first, index_t count) {
        const AdamCoefficients c = coefficients;
        float* row = lowrank + first;
        moments_block<kQuantized>(
            moments, block, count, c,
            [&](index_t i, auto lanes) { return load_as<decltype(lanes)>(row + i) * c.gradient_scale; },
            [&](index_t i, auto u) { store_as(row + i, u); });
    });
}

static void lowrank_adam(float* lowrank, index_t n, const Moments& moments, const AdamCoefficients& c, int threads) {
    const auto run = moments.m_absmax != nullptr ? lowrank_adam_as<true> : lowrank_adam_as<false>;
    run(lowrank, n, moments, c, threads);
}

}  // namespace gk::cpu::GK_ISA
