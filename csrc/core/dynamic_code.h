// The dynamic 8-bit code of Dettmers et al. (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861),
// with bitsandbytes' maps bit for bit, from the formula.
//
// Decade i = 0..6 holds the midpoints of linspace(0.1, 1, k + 1), times 10^(i-6): k = 2^i mirrored for the
// signed map, 2^(i+1) for the unsigned one; 0 and 1.0 complete the 256 values.
#pragma once

#include "platform.h"

namespace gk {

constexpr int kCodes = 256;
constexpr std::uint8_t kSignedZeroCode = 127;

struct DynamicMap {
    float values[kCodes];
    // A normalized z has the code #{c : z > thresholds[c]}. Ties go to the even code: where the lower code is
    // odd the midpoint itself already belongs to the code above, so its threshold is the float below it.
    float thresholds[kCodes - 1];
};

namespace detail {

// The float just below x, for normal x; std::nextafter is not constexpr. The factors move |x| by more than a
// half and at most one and a half of its last place, in double, so that one rounding does the rest.
constexpr float next_below(float x) {
    return x > 0.0f ? static_cast<float>(static_cast<double>(x) * (1.0 - 0x1p-24))
                    : static_cast<float>(static_cast<double>(x) * (1.0 + 0x1.8p-24));
}

// torch.linspace(0.1, 1, count + 1)[j] in float32: counted from the nearer end, product and sum rounded once
// together (its vectorized kernel uses a fused multiply-add; here double is exact, so the cast is that rounding).
constexpr float linspace_tenth_to_one(int j, int count) {
    const float step = (1.0f - 0.1f) / static_cast<float>(count);
    const double exact = j < (count + 1) / 2
                             ? static_cast<double>(0.1f) + static_cast<double>(step) * static_cast<double>(j)
                             : 1.0 - static_cast<double>(step) * static_cast<double>(count - j);
    return static_cast<float>(exact);
}

constexpr float kDecades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};

}  // namespace detail

constexpr DynamicMap make_dynamic_map(bool is_signed) {
    DynamicMap map{};
    const int zero = is_signed ? kSignedZeroCode : 0;
    map.values[zero] = 0.0f;
    int distance = 1;  // codes away from zero
    for (int decade = 0; decade < 7; ++decade) {
        const int count = is_signed ? 1 << decade : 2 << decade;
        for (int j = 0; j < count; ++j, ++distance) {
            const float lower = detail::linspace_tenth_to_one(j, count);
            const float upper = detail::linspace_tenth_to_one(j + 1, count);
            const float value = detail::kDecades[decade] * ((lower + upper) / 2.0f);
            map.values[zero + distance] = value;
            if (is_signed) map.values[zero - distance] = -value;
        }
    }
    map.values[kCodes - 1] = 1.0f;
    for (int c = 0; c < kCodes - 1; ++c) {
        const float midpoint = (map.values[c] + map.values[c + 1]) * 0.5f;
        map.thresholds[c] = c % 2 == 1 ? detail::next_below(midpoint) : midpoint;
    }
    return map;
}

// The code nearest to z. Eight comparisons of a binary search: the definition, and what a GPU thread does.
GK_HOST_DEVICE int nearest_code(float z, const float* thresholds) {
    int code = 0;
    for (int half = kCodes / 2; half > 0; half /= 2) {
        if (z > thresholds[code + half - 1]) code += half;
    }
    return code;
}

// x is the number before its division by the block's absmax. The sign of a nonzero first moment is kept, and a
// positive second moment never becomes zero: its next update would divide by eps alone (up to 254 x lr was
// measured with codes that may).
GK_HOST_DEVICE std::uint8_t keep_sign(int code, float x, bool is_signed) {
    if (is_signed) return static_cast<std::uint8_t>(x < 0.0f && code == kSignedZeroCode ? code - 1 : code);
    return static_cast<std::uint8_t>(x > 0.0f && code == 0 ? 1 : code);
}

}  // namespace gk
