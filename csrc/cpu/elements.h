// Rows of elements in memory, converted from and to fp32.
#pragma once

#include <type_traits>

#include "../core/philox.h"
#include "simd.h"

namespace gk::cpu::GK_ISA {

struct Bf16 {
    std::uint16_t bits;
};
struct Fp16 {
    std::uint16_t bits;
};

// Calls f with a value of the element type that dtype names.
template <class F>
static auto with_dtype(DType dtype, const F& f) {
    switch (dtype) {
        case DType::bfloat16:
            return f(Bf16{});
        case DType::float16:
            return f(Fp16{});
        default:
            return f(float{});
    }
}

// One element (F = float) or kLanes of them (F = Vector), as fp32.
template <class F, class T>
[[gnu::always_inline]] static inline F load_as(const T* p) {
    constexpr bool kVector = !std::is_same_v<F, float>;
    if constexpr (std::is_same_v<T, float>) {
        if constexpr (kVector)
            return load(p);
        else
            return *p;
    } else if constexpr (std::is_same_v<T, Bf16>) {
        if constexpr (kVector)
            return reinterpret_cast<Vector>(load_halves(&p->bits) << 16);
        else
            return bf16_to_float(p->bits);
    } else {
        if constexpr (kVector)
            return load_fp16(&p->bits);
        else
            return fp16_to_float(p->bits);
    }
}

// The reverse, rounded to nearest even.
template <class F, class T>
[[gnu::always_inline]] static inline void store_as(T* p, F x) {
    constexpr bool kVector = !std::is_same_v<F, float>;
    if constexpr (std::is_same_v<T, float>) {
        if constexpr (kVector)
            store(p, x);
        else
            *p = x;
    } else if constexpr (std::is_same_v<T, Bf16>) {
        if constexpr (kVector)
            store_halves(&p->bits, bf16_nearest(reinterpret_cast<VectorBits>(x)));
        else
            p->bits = float_to_bf16(x);
    } else {
        if constexpr (kVector)
            store_fp16(&p->bits, x);
        else
            p->bits = float_to_fp16(x);
    }
}

// bf16 only, rounded by the random bits of the elements.
template <class F>
[[gnu::always_inline]] static inline void store_stochastic(Bf16* p, F x, const std::uint16_t* random) {
    if constexpr (!std::is_same_v<F, float>) {
        store_halves(&p->bits, bf16_stochastic(reinterpret_cast<VectorBits>(x), load_halves(random)));
    } else {
        p->bits = float_to_bf16_stochastic(x, *random);
    }
}

template <class T>
[[gnu::always_inline]] static inline void load_row(const T* source, index_t n, float* __restrict out) {
    if constexpr (std::is_same_v<T, float>) {
        std::memcpy(out, source, static_cast<std::size_t>(n) * sizeof(float));
    } else {
        for_lanes(n, [&](index_t i, auto lanes) { store_as(out + i, load_as<decltype(lanes)>(source + i)); });
    }
}

template <class T>
[[gnu::always_inline]] static inline void store_row(const float* __restrict source, index_t n, T* out) {
    for_lanes(n, [&](index_t i, auto lanes) { store_as(out + i, load_as<decltype(lanes)>(source + i)); });
}

// Longest run of elements that random_row serves at once.
constexpr int kRandomRow = 256;

// Room for the elements' random bits and for the rest of the counter blocks at either end.
struct RandomBuffer {
    std::uint16_t bits[kRandomRow + 2 * kRandomsPerBlock];
};

// The random bits of elements first .. first + n - 1, n <= kRandomRow; the pointer returned is into the buffer.
static inline const std::uint16_t* random_row(std::uint64_t seed, std::uint64_t stream, index_t first, index_t n,
                                              RandomBuffer& buffer) {
    const std::uint64_t first_block = static_cast<std::uint64_t>(first / kRandomsPerBlock);
    const index_t offset = first % kRandomsPerBlock;
    const index_t blocks = ceil_div(offset + n, kRandomsPerBlock);
    for (index_t b = 0; b < blocks; ++b) {
        const Philox4x32 random = random_block(seed, stream, first_block + static_cast<std::uint64_t>(b));
        for (int i = 0; i < kRandomsPerBlock; ++i) {
            buffer.bits[kRandomsPerBlock * b + i] = static_cast<std::uint16_t>(random_bits16(random, i));
        }
    }
    return buffer.bits + offset;
}

}  // namespace gk::cpu::GK_ISA
