// One block to and from its codes: what core's encode() and decode() give for each element.
#pragma once

#include <type_traits>

#include "../core/adam.h"
#include "code_table.h"
#include "simd.h"

namespace gk::cpu::GK_ISA {

#if defined(__AVX512F__)

// table[index] for 2^n entries, from registers: a gather takes the processor one load per element.
template <int kEntries>
[[gnu::always_inline]] static inline Vector lookup(const float* table, __m512i index) {
    if constexpr (kEntries == 2 * kLanes) {
        return _mm512_permutex2var_ps(load(table), index, load(table + kLanes));
    } else {
        const Vector lower = lookup<kEntries / 2>(table, index);
        const Vector upper = lookup<kEntries / 2>(table + kEntries / 2, index);
        return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(kEntries / 2)), lower, upper);
    }
}

// The codes away from zero of kLanes magnitudes z <= 1: the position on the code's lines is right to less than half a
// code, and the threshold at the candidate decides.
template <bool kSigned>
[[gnu::always_inline]] static inline __m512i code_magnitudes(Vector z) {
    constexpr const CodeLines& code = kSigned ? kSignedLines : kUnsignedLines;
    Vector position = multiply_add(z, broadcast(code.slopes[0]), broadcast(code.offsets[0]));
#pragma GCC unroll 7
    for (int decade = 1; decade < kDecades; ++decade) {
        position =
            _mm512_min_ps(position, multiply_add(z, broadcast(code.slopes[decade]), broadcast(code.offsets[decade])));
    }
    const __m512i candidate = _mm512_cvttps_epi32(position);
    const Vector threshold = lookup<kSigned ? 128 : 256>(code.thresholds, candidate);
    const __mmask16 above = _mm512_cmp_ps_mask(z, threshold, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(candidate, above, candidate, _mm512_set1_epi32(1));
}

template <bool kSigned>
[[gnu::always_inline]] static inline void encode_lanes(const float* x, Vector absmax, std::uint8_t* codes) {
    const Vector elements = load(x);
    const Vector z = _mm512_abs_ps(elements / absmax);
    const __m512i magnitude = code_magnitudes<kSigned>(z);
    const __m512i at_least_one =
        _mm512_max_epi32(magnitude, _mm512_set1_epi32(1));  // the sign is kept, v stays positive
    __m512i code;
    if constexpr (kSigned) {
        const __m512i zero = _mm512_set1_epi32(kSignedZeroCode);
        const __mmask16 negative = _mm512_cmp_ps_mask(elements, _mm512_setzero_ps(), _CMP_LT_OQ);
        code = _mm512_mask_sub_epi32(_mm512_add_epi32(zero, magnitude), negative, zero,
                                     _mm512_min_epi32(at_least_one, zero));
    } else {
        code = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(elements, _mm512_setzero_ps(), _CMP_GT_OQ), at_least_one);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
}

#endif

// The codes away from zero of one |z| <= 1. Out-of-range buckets only come from non-finite inputs, whose code means
// nothing; the clamp keeps the lookup inside the table.
[[gnu::always_inline]] static inline int bucket_of(std::uint32_t magnitude_bits) {
    int bucket = static_cast<int>(magnitude_bits >> 16) - static_cast<int>(CodeTable::kFirstBucket);
    bucket = bucket < 0 ? 0 : bucket;
    return bucket >= CodeTable::kBuckets ? CodeTable::kBuckets - 1 : bucket;
}

template <bool kSigned>
[[gnu::always_inline]] static inline std::uint8_t code_from_entry(float x, std::uint32_t magnitude_bits,
                                                                  std::uint32_t entry) {
    const int magnitude = static_cast<int>(entry >> 16) + ((magnitude_bits & 0xFFFFu) > (entry & 0xFFFFu) ? 1 : 0);
    const int at_least_one = magnitude < 1 ? 1 : magnitude;  // the sign is kept, v stays positive
    if constexpr (kSigned) {
        const int below = at_least_one > kSignedZeroCode ? kSignedZeroCode : at_least_one;
        return static_cast<std::uint8_t>(kSignedZeroCode + (x < 0.0f ? -below : magnitude));
    } else {
        return static_cast<std::uint8_t>(x > 0.0f ? at_least_one : 0);
    }
}

// Not vectorized: a gather is slower than these loads.
[[gnu::noinline, gnu::optimize("no-tree-vectorize")]] static void look_up_entries(const std::uint32_t* entries,
                                                                                  const std::uint16_t* buckets,
                                                                                  index_t n, std::uint32_t* out) {
    for (index_t i = 0; i < n; ++i) out[i] = entries[buckets[i]];
}

// n <= 256 elements, absmax not 0.
template <bool kSigned>
static inline void encode_elements(const float* __restrict x, float absmax, index_t n, std::uint8_t* __restrict codes) {
    index_t done = 0;
#if defined(__AVX512F__)
    for (; done + kLanes <= n; done += kLanes) encode_lanes<kSigned>(x + done, broadcast(absmax), codes + done);
    if (done == n) return;
#endif
    std::uint32_t bits[kQuantBlock], entries[kQuantBlock];
    std::uint16_t buckets[kQuantBlock];
    for (index_t i = done; i < n; ++i) {
        bits[i] = float_bits(x[i] / absmax) & 0x7FFFFFFFu;
        buckets[i] = static_cast<std::uint16_t>(bucket_of(bits[i]));
    }
    look_up_entries((kSigned ? kSignedCodes : kUnsignedCodes).entries, buckets + done, n - done, entries + done);
    for (index_t i = done; i < n; ++i) codes[i] = code_from_entry<kSigned>(x[i], bits[i], entries[i]);
}

// The largest magnitude of a row. Magnitudes compare as integers do: NaN is the largest of all, and the compiler
// vectorizes without assuming that there is none.
static inline float largest_magnitude(const float* __restrict x, index_t n) {
    std::int32_t largest = 0;
    for (index_t i = 0; i < n; ++i) {
        const std::int32_t magnitude = static_cast<std::int32_t>(float_bits(x[i]) & 0x7FFFFFFFu);
        largest = magnitude > largest ? magnitude : largest;
    }
    return bits_float(static_cast<std::uint32_t>(largest));
}

static inline bool row_is_representable(const float* x, index_t n) {
    return gradient_is_representable(largest_magnitude(x, n));
}

// n <= 256 elements to codes; returns their absmax.
template <bool kSigned>
static inline float encode_block(const float* __restrict x, index_t n, std::uint8_t* __restrict codes) {
    const float absmax = largest_magnitude(x, n);
    if (absmax == 0.0f) {
        std::memset(codes, kSigned ? kSignedZeroCode : 0, static_cast<std::size_t>(n));
    } else {
        encode_elements<kSigned>(x, absmax, n, codes);
    }
    return absmax;
}

// The value of one code, or of kLanes codes, in units of the absmax.
template <bool kSigned, class F>
[[gnu::always_inline]] static inline F decode_as(const std::uint8_t* codes) {
    const float* values = (kSigned ? kSignedMap : kUnsignedMap).values;
    if constexpr (std::is_same_v<F, float>) {
        return values[*codes];
    } else {
#if defined(__AVX512F__)
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        return lookup<kCodes>(values, _mm512_cvtepu8_epi32(bytes));
#else
        Vector x{};
        for (int i = 0; i < kLanes; ++i) x[i] = values[codes[i]];
        return x;
#endif
    }
}

}  // namespace gk::cpu::GK_ISA
