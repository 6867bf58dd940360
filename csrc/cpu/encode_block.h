// One block to and from its codes: what core's encode() and decode() give for each element.
#pragma once

#include "../core/adam.h"
#include "code_table.h"
#include "encode_bytes.h"
#include "simd.h"

namespace gk::cpu::GK_ISA {

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
#if defined(GK_BYTE_PERMUTES)
    for (; done + 64 <= n; done += 64) encode_64<kSigned>(x + done, absmax, codes + done);
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

// The values of n codes, in units of the absmax. Not vectorized, as above.
template <bool kSigned>
[[gnu::noinline, gnu::optimize("no-tree-vectorize")]] static void decode_block(const std::uint8_t* __restrict codes,
                                                                               index_t n, float* __restrict out) {
    index_t done = 0;
#if defined(GK_BYTE_PERMUTES)
    for (; done + 64 <= n; done += 64) decode_64<kSigned>(codes + done, out + done);
#endif
    const float* values = (kSigned ? kSignedMap : kUnsignedMap).values;
    for (; done < n; ++done) out[done] = values[codes[done]];
}

}  // namespace gk::cpu::GK_ISA
