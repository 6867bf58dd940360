// 64 elements to and from their codes where the processor permutes bytes across registers (AVX-512 VBMI): a table of
// 256 floats is then four tables of 256 bytes, each looked up for 64 elements at once. About twice as fast as loading
// entry by entry.
#pragma once

#if defined(GK_BYTE_PERMUTES)

#include "code_table.h"
#include "simd.h"

namespace gk::cpu::GK_ISA {

// 256 floats: byte b of entry i is plane[b][i].
struct alignas(64) BytePlanes {
    std::uint8_t plane[4][kCodes];
};

constexpr void set_entry(BytePlanes& planes, int i, float x) {
    for (int b = 0; b < 4; ++b) {
        planes.plane[b][i] = static_cast<std::uint8_t>(detail::constant_float_bits(x) >> (8 * b));
    }
}

constexpr BytePlanes make_value_planes(bool is_signed) {
    BytePlanes planes{};
    for (int code = 0; code < kCodes; ++code) set_entry(planes, code, make_dynamic_map(is_signed).values[code]);
    return planes;
}

// Within a decade the thresholds are evenly spaced, so the position of z among them is a line, rising by one from
// threshold to threshold; the spacing grows fivefold from decade to decade, so over all of them the position is the
// lowest line. The offsets are half a code low: truncation then gives a candidate that is right or one too small, also
// next to a decade's first threshold, which lies a fifth of a code off its line.
struct CodeLines {
    static constexpr int kDecades = 7;
    float slopes[kDecades];
    float offsets[kDecades];
    BytePlanes thresholds;  // by codes away from zero
};

constexpr CodeLines make_code_lines(bool is_signed) {
    const DynamicMap map = make_dynamic_map(is_signed);
    const int zero = is_signed ? kSignedZeroCode : 0;
    CodeLines lines{};
    double power = 1e6;
    for (int decade = 0; decade < CodeLines::kDecades; ++decade, power /= 10.0) {
        const int count = is_signed ? 1 << decade : 2 << decade;
        const int first = is_signed ? count : count - 1;
        lines.slopes[decade] = static_cast<float>(count * power / 0.9);
        lines.offsets[decade] = static_cast<float>(first - count * (0.1 / 0.9) - 0.5);
    }
    for (int i = 0; zero + i < kCodes - 1; ++i) set_entry(lines.thresholds, i, map.thresholds[zero + i]);
    return lines;
}

alignas(64) static constexpr BytePlanes kSignedValues = make_value_planes(true);
alignas(64) static constexpr BytePlanes kUnsignedValues = make_value_planes(false);
alignas(64) static constexpr CodeLines kSignedLines = make_code_lines(true);
alignas(64) static constexpr CodeLines kUnsignedLines = make_code_lines(false);

// Four vectors of 16 numbers as 64 bytes and back. Packing works within lanes of 128 bits, so the bytes come in another
// order; unpacking restores it, and in_order turns such bytes to the order of memory, or those of memory to this one.
struct FourVectors {
    __m512i part[4];
};

[[gnu::always_inline]] static inline __m512i pack_bytes(const FourVectors& numbers, bool is_signed) {
    const auto words = [&](int i) {
        return is_signed ? _mm512_packs_epi32(numbers.part[i], numbers.part[i + 1])
                         : _mm512_packus_epi32(numbers.part[i], numbers.part[i + 1]);
    };
    return is_signed ? _mm512_packs_epi16(words(0), words(2)) : _mm512_packus_epi16(words(0), words(2));
}

[[gnu::always_inline]] static inline __m512i in_order(__m512i bytes) {
    const __m512i transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(transposed, bytes);
}

// The floats at 64 indices below kEntries, 128 or 256.
template <int kEntries>
[[gnu::always_inline]] static inline FourVectors look_up(const BytePlanes& planes, __m512i index) {
    const auto bytes = [&](int b) {
        const std::uint8_t* plane = planes.plane[b];
        const __m512i lower = _mm512_permutex2var_epi8(_mm512_load_si512(plane), index, _mm512_load_si512(plane + 64));
        if constexpr (kEntries == 128) return lower;
        const __m512i upper =
            _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), index, _mm512_load_si512(plane + 192));
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), lower, upper);
    };
    const __m512i b0 = bytes(0), b1 = bytes(1), b2 = bytes(2), b3 = bytes(3);
    const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
    const __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
    return FourVectors{{_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                        _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)}};
}

template <bool kSigned>
[[gnu::always_inline]] static inline void decode_64(const std::uint8_t* codes, float* out) {
    const BytePlanes& planes = kSigned ? kSignedValues : kUnsignedValues;
    const FourVectors values = look_up<kCodes>(planes, in_order(_mm512_loadu_si512(codes)));
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + i * kLanes, values.part[i]);
}

template <bool kSigned>
[[gnu::always_inline]] static inline void encode_64(const float* x, float absmax, std::uint8_t* codes) {
    constexpr const CodeLines& lines = kSigned ? kSignedLines : kUnsignedLines;
    FourVectors signs, candidates;
    Vector z[4];
    for (int i = 0; i < 4; ++i) {
        const Vector element = load(x + i * kLanes) + 0.0f;  // -0.0 becomes 0.0, which has no sign to keep
        signs.part[i] = reinterpret_cast<__m512i>(element);
        z[i] = _mm512_abs_ps(element / absmax);
        Vector position = multiply_add(z[i], broadcast(lines.slopes[0]), broadcast(lines.offsets[0]));
#pragma GCC unroll 7
        for (int d = 1; d < CodeLines::kDecades; ++d) {
            const Vector line = multiply_add(z[i], broadcast(lines.slopes[d]), broadcast(lines.offsets[d]));
            position = _mm512_min_ps(position, line);
        }
        candidates.part[i] = _mm512_cvttps_epi32(position);
    }
    const FourVectors thresholds = look_up<kSigned ? 128 : 256>(lines.thresholds, pack_bytes(candidates, false));
    for (int i = 0; i < 4; ++i) {
        const __mmask16 above = _mm512_cmp_ps_mask(z[i], reinterpret_cast<Vector>(thresholds.part[i]), _CMP_GT_OQ);
        const __m512i one_more = _mm512_add_epi32(candidates.part[i], _mm512_set1_epi32(1));
        candidates.part[i] = _mm512_mask_mov_epi32(candidates.part[i], above, one_more);
    }
    const __m512i magnitude = pack_bytes(candidates, false);
    const __m512i at_least_one = _mm512_max_epu8(magnitude, _mm512_set1_epi8(1));  // the sign is kept, v stays positive
    const __m512i sign = pack_bytes(signs, true);
    __m512i code;
    if constexpr (kSigned) {
        const __m512i zero = _mm512_set1_epi8(kSignedZeroCode);
        const __m512i below = _mm512_min_epu8(at_least_one, zero);
        code = _mm512_mask_sub_epi8(_mm512_add_epi8(zero, magnitude), _mm512_movepi8_mask(sign), zero, below);
    } else {
        code = _mm512_maskz_mov_epi8(_mm512_cmpgt_epi8_mask(sign, _mm512_setzero_si512()), at_least_one);
    }
    _mm512_storeu_si512(codes, in_order(code));
}

}  // namespace gk::cpu::GK_ISA

#endif
