// quantize_blockwise, dequantize_blockwise: tensors to and from 8-bit codes with one absmax per block of 256.
#pragma once

#include "code_table.h"
#include "elements.h"
#include "kernels.h"

namespace gk::cpu::GK_ISA {

// Consecutive blocks that one thread takes at a time: enough work to be worth the hand-over.
constexpr index_t kBlocksPerTask = 64;

// The codes away from zero of |z| <= 1. Out-of-range buckets only come from non-finite inputs, whose code means
// nothing; the clamp keeps the lookup inside the table.
[[gnu::always_inline]] static inline int code_magnitude(float z, const CodeTable& table) {
    const std::uint32_t bits = float_bits(z) & 0x7FFFFFFFu;
    int bucket = static_cast<int>(bits >> 16) - static_cast<int>(CodeTable::kFirstBucket);
    bucket = bucket < 0 ? 0 : bucket;
    bucket = bucket >= CodeTable::kBuckets ? CodeTable::kBuckets - 1 : bucket;
    // Below the first bucket the low bits mean nothing, but there entry 0 holds code 0 and no threshold.
    const std::uint32_t entry = table.entries[bucket];
    return static_cast<int>(entry >> 16) + ((bits & 0xFFFFu) > (entry & 0xFFFFu) ? 1 : 0);
}

// One block, n <= 256: what core's encode() gives for each element. Returns the absmax.
template <bool kSigned>
static inline float encode_block(const float* __restrict x, index_t n, std::uint8_t* __restrict codes) {
    // Magnitudes compare as integers do, which the compiler vectorizes without assuming that NaN never happens.
    std::int32_t largest = 0;
    for (index_t i = 0; i < n; ++i) {
        const std::int32_t magnitude = static_cast<std::int32_t>(float_bits(x[i]) & 0x7FFFFFFFu);
        largest = magnitude > largest ? magnitude : largest;
    }
    const float absmax = bits_float(static_cast<std::uint32_t>(largest));
    if (absmax == 0.0f) {
        std::memset(codes, kSigned ? kSignedZeroCode : 0, static_cast<std::size_t>(n));
        return absmax;
    }
    for (index_t i = 0; i < n; ++i) {
        const float z = x[i] / absmax;
        if constexpr (kSigned) {
            const int magnitude = code_magnitude(z, kSignedCodes);
            int below = magnitude < 1 ? 1 : magnitude;  // the sign is kept
            below = below > kSignedZeroCode ? kSignedZeroCode : below;
            codes[i] = static_cast<std::uint8_t>(kSignedZeroCode + (x[i] < 0.0f ? -below : magnitude));
        } else {
            const int magnitude = code_magnitude(z, kUnsignedCodes);
            const int positive = magnitude < 1 ? 1 : magnitude;  // never zero
            codes[i] = static_cast<std::uint8_t>(x[i] > 0.0f ? positive : 0);
        }
    }
    return absmax;
}

static inline void decode_block(const std::uint8_t* __restrict codes, float absmax, index_t n, bool is_signed,
                                float* __restrict out) {
    const float* values = is_signed ? kSignedMap.values : kUnsignedMap.values;
    for (index_t i = 0; i < n; ++i) out[i] = values[codes[i]] * absmax;
}

// Calls f(block, first element, elements) for every block.
template <class F>
static void for_each_block(index_t n, int threads, const F& f) {
    const index_t blocks = quant_blocks(n);
    for_each_task(ceil_div(blocks, kBlocksPerTask), threads, [&](index_t task, int) {
        const index_t end = at_most((task + 1) * kBlocksPerTask, blocks);
        for (index_t block = task * kBlocksPerTask; block < end; ++block) {
            const index_t first = block * kQuantBlock;
            f(block, first, at_most(kQuantBlock, n - first));
        }
    });
}

static void quantize_blockwise(const void* x, DType dtype, index_t n, bool is_signed, std::uint8_t* codes, float* absmax,
                               int threads) {
    with_dtype(dtype, [&](auto element) {
        const auto* source = static_cast<const decltype(element)*>(x);
        for_each_block(n, threads, [&](index_t block, index_t first, index_t count) {
            float values[kQuantBlock];
            load_row(source + first, count, values);
            absmax[block] = is_signed ? encode_block<true>(values, count, codes + first)
                                      : encode_block<false>(values, count, codes + first);
        });
    });
}

static void dequantize_blockwise(const std::uint8_t* codes, const float* absmax, index_t n, bool is_signed, float* out,
                                 int threads) {
    for_each_block(n, threads, [&](index_t block, index_t first, index_t count) {
        decode_block(codes + first, absmax[block], count, is_signed, out + first);
    });
}

}  // namespace gk::cpu::GK_ISA
