// Conversions between fp32 and the 16-bit formats: nearest even, and stochastic for bf16.
#pragma once

#include "platform.h"

namespace gk {

GK_HOST_DEVICE float bf16_to_float(std::uint16_t bits) { return bits_float(static_cast<std::uint32_t>(bits) << 16); }

// The bf16 pattern nearest to a float's bits, ties to even; a NaN becomes the quiet one (adding the rounding bias
// could turn it into an infinity). U is std::uint32_t, or a CPU kernel's vector of them.
template <class U>
GK_HOST_DEVICE U bf16_nearest(U bits) {
    const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? U{} + 0x7FC0u : rounded;
}

// Rounds up with the probability of the discarded fraction: random16 is uniform on 0..65535. Infinities and NaN
// have no neighbours to choose from and are rounded to nearest.
template <class U>
GK_HOST_DEVICE U bf16_stochastic(U bits, U random16) {
    const U rounded = (bits + random16) >> 16;
    return (bits & 0x7F800000u) == 0x7F800000u ? bf16_nearest(bits) : rounded;
}

GK_HOST_DEVICE std::uint16_t float_to_bf16(float x) { return static_cast<std::uint16_t>(bf16_nearest(float_bits(x))); }

GK_HOST_DEVICE std::uint16_t float_to_bf16_stochastic(float x, std::uint32_t random16) {
    return static_cast<std::uint16_t>(bf16_stochastic(float_bits(x), random16));
}

// Integer arithmetic alone: correct whatever the rounding and denormal modes, and the same on every compiler.
GK_HOST_DEVICE float fp16_to_float(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t exponent = (half >> 10) & 0x1Fu;
    std::uint32_t mantissa = half & 0x3FFu;
    if (exponent == 0x1Fu) {  // a NaN keeps its payload and becomes quiet, as the conversion instructions do
        return bits_float(sign | 0x7F800000u | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u));
    }
    if (exponent != 0) return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    if (mantissa == 0) return bits_float(sign);
    std::uint32_t biased = 113u;  // subnormal: shift the leading one into place
    while ((mantissa & 0x400u) == 0) {
        mantissa <<= 1;
        --biased;
    }
    return bits_float(sign | (biased << 23) | ((mantissa & 0x3FFu) << 13));
}

GK_HOST_DEVICE std::uint16_t float_to_fp16(float x) {
    const std::uint32_t bits = float_bits(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
    if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // 65520 and above
    if (magnitude >= 0x38800000u) {                                                   // normal: 2^-14 and above
        const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
        return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
    }
    if (magnitude < 0x33000000u) return static_cast<std::uint16_t>(sign);  // below half the least subnormal
    const std::uint32_t shift = 126u - (magnitude >> 23);                  // 14 .. 24 bits leave the mantissa
    const std::uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
    const std::uint32_t kept = mantissa >> shift;
    const std::uint32_t rest = mantissa & ((1u << shift) - 1u);
    const std::uint32_t half = 1u << (shift - 1u);
    const std::uint32_t up = rest > half || (rest == half && (kept & 1u)) ? 1u : 0u;
    return static_cast<std::uint16_t>(sign | (kept + up));
}

}  // namespace gk
