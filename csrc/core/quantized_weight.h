// int8 weights: codes from -127 to 127, and one fp32 scale for each 256 consecutive elements of a row. The rule by
// which an update keeps scales and rounds codes; why it is that rule is in galore_kernels/quantizers/weight.py.
#pragma once

#include <cmath>

#include "platform.h"

namespace gk {

constexpr int kWeightGroup = 256;
constexpr float kLargestWeightCode = 127.0f;
constexpr float kLeastWeightCode = 64.0f;  // of a group's largest magnitude, while its scale is kept
constexpr float kNewWeightCode = 112.0f;   // of the same under a new scale

// A row's groups; its last may have fewer than 256 elements.
GK_HOST_DEVICE index_t weight_groups(index_t columns) { return (columns + kWeightGroup - 1) / kWeightGroup; }

// The scale of an updated group. absmax: its largest magnitude, NaN if it has one (larger_magnitude() of
// absmax_block.h keeps it), so that such a group does not come back looking sound.
GK_HOST_DEVICE float weight_scale(float absmax, float old_scale) {
    const bool kept = absmax <= old_scale * kLargestWeightCode && absmax >= old_scale * kLeastWeightCode;
    return kept ? old_scale : absmax / kNewWeightCode;
}

// The code of an updated weight, as a whole number, rounded stochastically by random16, uniform on 0..65535: with
// x = value / scale, floor(x) or, with the probability x - floor(x), floor(x) + 1. The probability is a number of
// 65536ths, to nearest even, which hides the rounding of x: c * scale / scale may miss c by half of one. NaN, of an
// infinite weight or scale, has the code 0. F is float, or a CPU kernel's vector of floats; floor is called with
// magnitudes up to 127.
template <class F, class Floor>
GK_HOST_DEVICE F weight_code_number(F value, float scale, F random16, const Floor& floor) {
    const F x = scale > 0.0f ? value / scale : F{};
    // Clamping first gives the same code as clamping last, and keeps every conversion to integers defined. The
    // comparisons' order lets NaN through to the third.
    const F least = F{} - kLargestWeightCode, largest = F{} + kLargestWeightCode;
    const F above = x < least ? least : x;
    const F within = above > largest ? largest : above;
    const F number = within == within ? within : F{};
    const F whole = floor(number);
    constexpr float kUnit = 8388608.0f;  // 2^23: floats from there on are whole numbers
    const F share = (number - whole) * 65536.0f + kUnit - kUnit;
    return random16 < share ? whole + 1.0f : whole;
}

GK_HOST_DEVICE std::int8_t weight_code(float value, float scale, std::uint32_t random16) {
    const float random = static_cast<float>(static_cast<std::int32_t>(random16));
    const float code = weight_code_number(value, scale, random, [](float x) { return std::floor(x); });
    return static_cast<std::int8_t>(static_cast<std::int32_t>(code));
}

}  // namespace gk
