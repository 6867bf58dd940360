// Rows of elements in memory, converted from and to fp32.
#pragma once

#include <type_traits>

#include "../core/philox.h"
#include "kernels.h"
#include "simd.h"

namespace gk::cpu::GK_ISA {

struct Bf16 {
    std::uint16_t bits;
};
struct Fp16 {
    std::uint16_t bits;
};

// Codes of a quantized weight or basis, in two's complement: one, or an even column's in the low half and the next
// one's above.
struct Int8 {
    std::int8_t code;
};
struct Int4Pair {
    std::uint8_t codes;
};

template <class T>
constexpr bool kIsCodes = std::is_same_v<T, Int8> || std::is_same_v<T, Int4Pair>;

// Types whose every value is a bf16 number too.
template <class T>
constexpr bool kExactInBf16 = kIsCodes<T> || std::is_same_v<T, Bf16>;

// Elements that a row of `columns` takes, and its element at an even column.
template <class T>
static inline index_t row_length(index_t columns) {
    return std::is_same_v<T, Int4Pair> ? (columns + 1) / 2 : columns;
}
template <class T>
static inline const T* at_column(const T* row, index_t column) {
    return row + (std::is_same_v<T, Int4Pair> ? column / 2 : column);
}

// Calls f with a value of the element type that dtype names: a gradient's, or a weight's or basis' of any kind.
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

template <class F>
static auto with_weight_dtype(DType dtype, const F& f) {
    return dtype == DType::int8 ? f(Int8{}) : with_dtype(dtype, f);
}

template <class F>
static auto with_basis_dtype(DType dtype, const F& f) {
    switch (dtype) {
        case DType::int8:
            return f(Int8{});
        case DType::int4:
            return f(Int4Pair{});
        default:
            return with_dtype(dtype, f);
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

// The 16-bit integers at p as fp32.
template <class F>
[[gnu::always_inline]] static inline F load_numbers(const std::uint16_t* p) {
    if constexpr (!std::is_same_v<F, float>) {
        return __builtin_convertvector(reinterpret_cast<VectorIntegers>(load_halves(p)), Vector);
    } else {
        return static_cast<float>(*p);
    }
}

static inline void unpack_codes(const Int4Pair* source, index_t n, Int8* __restrict out) {
    const auto low = [](std::uint8_t codes) { return Int8{static_cast<std::int8_t>(((codes & 15) ^ 8) - 8)}; };
    for (index_t i = 0; i < n / 2; ++i) {
        out[2 * i] = low(source[i].codes);
        out[2 * i + 1] = low(static_cast<std::uint8_t>(source[i].codes >> 4));
    }
    if (n % 2 == 1) out[n - 1] = low(source[n / 2].codes);
}

// A row of n columns as fp32; of Int4Pair at most kCodesAtOnce.
constexpr index_t kCodesAtOnce = 128;

template <class T>
[[gnu::always_inline]] static inline void load_row(const T* source, index_t n, float* __restrict out) {
    if constexpr (std::is_same_v<T, float>) {
        std::memcpy(out, source, static_cast<std::size_t>(n) * sizeof(float));
    } else if constexpr (std::is_same_v<T, Int8>) {
        for (index_t i = 0; i < n; ++i) out[i] = static_cast<float>(source[i].code);
    } else if constexpr (std::is_same_v<T, Int4Pair>) {
        Int8 codes[kCodesAtOnce];
        unpack_codes(source, n, codes);
        load_row(codes, n, out);
    } else {
        for_lanes(n, [&](index_t i, auto lanes) { store_as(out + i, load_as<decltype(lanes)>(source + i)); });
    }
}

template <class T>
[[gnu::always_inline]] static inline void store_row(const float* __restrict source, index_t n, T* out) {
    for_lanes(n, [&](index_t i, auto lanes) { store_as(out + i, load_as<decltype(lanes)>(source + i)); });
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bf16 pairs and random bits are laid out so");

// Room for the random bits of kElements elements, the rest of the counter blocks at either end, and of a last batch.
template <int kElements>
struct RandomBuffer {
    std::uint16_t bits[kElements + (1 + kWideLanes) * kRandomsPerBlock];
};

// The random bits of elements first .. first + n - 1, n <= kElements; the pointer returned is into the buffer.
template <int kElements>
static inline const std::uint16_t* random_row(const WeightRounding& rounding, index_t first, index_t n,
                                              RandomBuffer<kElements>& buffer) {
    const std::uint64_t seed = rounding.seed, stream = rounding.stream;
    const std::uint64_t first_block = static_cast<std::uint64_t>(first / kRandomsPerBlock);
    const index_t offset = first % kRandomsPerBlock;
    const index_t blocks = ceil_div(offset + n, kRandomsPerBlock);
    for (index_t b = 0; b < blocks; b += kWideLanes) {
        WideVector block{};
        for (int i = 0; i < kWideLanes; ++i) block[i] = first_block + static_cast<std::uint64_t>(b + i);
        WideVector words[4] = {block, block >> 32, WideVector{} + stream, WideVector{} + (stream >> 32)};
        philox_rounds(words, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                      [](WideVector a, std::uint32_t factor) { return multiply_halves(a, factor); });
        // A block's eight 16-bit numbers are the bytes of its four words in little-endian order.
        const WideVector low_half = (words[0] & 0xFFFFFFFFu) | (words[1] << 32);
        const WideVector high_half = (words[2] & 0xFFFFFFFFu) | (words[3] << 32);
        std::uint64_t halves[2][kWideLanes];
        std::memcpy(halves[0], &low_half, sizeof low_half);
        std::memcpy(halves[1], &high_half, sizeof high_half);
        for (int i = 0; i < kWideLanes; ++i) {
            std::uint16_t* out = buffer.bits + (b + i) * kRandomsPerBlock;
            std::memcpy(out, &halves[0][i], sizeof(std::uint64_t));
            std::memcpy(out + 4, &halves[1][i], sizeof(std::uint64_t));
        }
    }
    return buffer.bits + offset;
}

}  // namespace gk::cpu::GK_ISA
