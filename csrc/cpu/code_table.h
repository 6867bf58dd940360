// The 8-bit code as one table lookup per element, built from the thresholds that define it.
//
// The top 16 bits of a positive float (exponent and 7 bits of mantissa) name a bucket so narrow that at most one
// threshold lies in it. An entry holds the code at the bucket's lower end, and the low 16 bits of its threshold
// (0xFFFF for none): the comparison with the remaining bits of z is exact, and there is no search.
#pragma once

#include "../core/absmax_block.h"

namespace gk::cpu::GK_ISA {

// Magnitudes: the number of codes away from zero, up to 128 for the signed map (whose +1.0 has no mirror image)
// and up to 255 for the unsigned one.
struct CodeTable {
    static constexpr std::uint32_t kFirstBucket = 0x3400;  // 2^-23; the smallest threshold is 2^-22.6
    static constexpr std::uint32_t kLastBucket = 0x3F80;   // 1.0, the largest a normalized element can be
    static constexpr int kBuckets = static_cast<int>(kLastBucket - kFirstBucket) + 1;
    std::uint32_t entries[kBuckets];
    bool one_threshold_per_bucket;
};

namespace detail {

// The bits of a float that is zero or normal and less than 2, in constant expressions, where memcpy is not allowed.
constexpr std::uint32_t constant_float_bits(float x) {
    if (x == 0.0f) return 0;
    if (x < 0.0f) return 0x80000000u | constant_float_bits(-x);
    std::uint32_t exponent = 127;
    while (x < 1.0f) {
        x *= 2.0f;
        --exponent;
    }
    return (exponent << 23) + static_cast<std::uint32_t>((x - 1.0f) * 0x1p23f);
}

}  // namespace detail

constexpr CodeTable make_code_table(bool is_signed) {
    const DynamicMap map = make_dynamic_map(is_signed);
    const int zero = is_signed ? kSignedZeroCode : 0;
    const int magnitudes = kCodes - 1 - zero;
    CodeTable table{};
    table.one_threshold_per_bucket = true;
    int magnitude = 0;
    for (int bucket = 0; bucket < CodeTable::kBuckets; ++bucket) {
        const std::uint32_t at_lower_end = static_cast<std::uint32_t>(magnitude) << 16;
        table.entries[bucket] = at_lower_end | 0xFFFFu;
        for (int crossed = 0; magnitude < magnitudes; ++crossed) {
            const std::uint32_t bits = detail::constant_float_bits(map.thresholds[zero + magnitude]);
            if ((bits >> 16) != CodeTable::kFirstBucket + static_cast<std::uint32_t>(bucket)) break;
            if (crossed > 0) table.one_threshold_per_bucket = false;
            table.entries[bucket] = at_lower_end | (bits & 0xFFFFu);
            ++magnitude;
        }
    }
    return table;
}

alignas(64) static constexpr CodeTable kSignedCodes = make_code_table(true);
alignas(64) static constexpr CodeTable kUnsignedCodes = make_code_table(false);
static_assert(kSignedCodes.one_threshold_per_bucket && kUnsignedCodes.one_threshold_per_bucket);
static_assert(kSignedCodes.entries[CodeTable::kBuckets - 1] >> 16 == 128);
static_assert(kUnsignedCodes.entries[CodeTable::kBuckets - 1] >> 16 == 255);

alignas(64) static constexpr DynamicMap kSignedMap = make_dynamic_map(true);
alignas(64) static constexpr DynamicMap kUnsignedMap = make_dynamic_map(false);

}  // namespace gk::cpu::GK_ISA
