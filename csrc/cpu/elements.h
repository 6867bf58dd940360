// Rows of elements in memory, converted from and to fp32.
#pragma once

#include "../core/philox.h"
#include "../core/rounding.h"
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

static inline void load_row(const float* source, index_t n, float* out) {
    std::memcpy(out, source, static_cast<std::size_t>(n) * sizeof(float));
}

static inline void load_row(const Bf16* source, index_t n, float* __restrict out) {
    for (index_t i = 0; i < n; ++i) out[i] = bf16_to_float(source[i].bits);
}

// The compiler does not vectorize conversions of fp16, hence the intrinsics.
static inline void load_row(const Fp16* source, index_t n, float* __restrict out) {
    index_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
    }
#endif
    for (; i < n; ++i) out[i] = fp16_to_float(source[i].bits);
}

static inline void store_row(const float* source, index_t n, float* out) {
    std::memcpy(out, source, static_cast<std::size_t>(n) * sizeof(float));
}

static inline void store_row(const float* __restrict source, index_t n, Bf16* out) {
    for (index_t i = 0; i < n; ++i) out[i].bits = float_to_bf16(source[i]);
}

static inline void store_row(const float* __restrict source, index_t n, Fp16* out) {
    index_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
    }
#endif
    for (; i < n; ++i) out[i].bits = float_to_fp16(source[i]);
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
