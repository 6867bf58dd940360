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

// The bits of a positive normal float below 2, in constant expressions, where memcpy is not allowed.
constexpr std::uint32_t constant_float_bits(float x) {
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

// The same code for vector registers. Within a decade the thresholds are evenly spaced, so the position of z among them
// is a line, rising by one from threshold to threshold; the spacing grows fivefold from decade to decade, so over all
// of them it is the lowest line. The offsets are half a code low: truncation then gives a candidate that is right or
// one too small, also next to a decade's first threshold, which lies a fifth of a code off its line.
constexpr int kDecades = 7;

struct CodeLines {
    float slopes[kDecades];
    float offsets[kDecades];
    float thresholds[kCodes];  // by codes away from zero
};

constexpr CodeLines make_code_lines(bool is_signed) {
    const DynamicMap map = make_dynamic_map(is_signed);
    const int zero = is_signed ? kSignedZeroCode : 0;
    CodeLines lines{};
    double power = 1e6;
    for (int decade = 0; decade < kDecades; ++decade, power /= 10.0) {
        const int count = is_signed ? 1 << decade : 2 << decade;
        const int first = is_signed ? count : count - 1;
        lines.slopes[decade] = static_cast<float>(count * power / 0.9);
        lines.offsets[decade] = static_cast<float>(first - count * (0.1 / 0.9) - 0.5);
    }
    for (int i = 0; i < kCodes; ++i) {
        lines.thresholds[i] = zero + i < kCodes - 1 ? map.thresholds[zero + i] : 2.0f;  // 2: beyond every z
    }
    return lines;
}

alignas(64) static constexpr CodeLines kSignedLines = make_code_lines(true);
alignas(64) static constexpr CodeLines kUnsignedLines = make_code_lines(false);
alignas(64) static constexpr CodeTable kSignedCodes = make_code_table(true);
alignas(64) static constexpr CodeTable kUnsignedCodes = make_code_table(false);
static_assert(kSignedCodes.one_threshold_per_bucket && kUnsignedCodes.one_threshold_per_bucket);
static_assert(kSignedCodes.entries[CodeTable::kBuckets - 1] >> 16 == 128);
static_assert(kUnsignedCodes.entries[CodeTable::kBuckets - 1] >> 16 == 255);

alignas(64) static constexpr DynamicMap kSignedMap = make_dynamic_map(true);
alignas(64) static constexpr DynamicMap kUnsignedMap = make_dynamic_map(false);

}  // namespace gk::cpu::GK_ISA
