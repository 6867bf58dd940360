// A quantized state: codes plus one fp32 absmax for each 256 consecutive elements of the flattened tensor.
#pragma once

#include <cmath>

#include "dynamic_code.h"
#include "platform.h"

namespace gk {

constexpr int kQuantBlock = 256;

GK_HOST_DEVICE index_t quant_blocks(index_t elements) { return (elements + kQuantBlock - 1) / kQuantBlock; }

// One element given its block's absmax. A block of zeros has no scale: all its elements take the zero code.
GK_HOST_DEVICE std::uint8_t encode(float x, float absmax, const float* thresholds, bool is_signed) {
    if (absmax == 0.0f) return is_signed ? kSignedZeroCode : 0;
    return keep_sign(nearest_code(x / absmax, thresholds), x, is_signed);
}

GK_HOST_DEVICE float decode(std::uint8_t code, float absmax, const float* values) { return values[code] * absmax; }

// The block's absmax takes the larger magnitude of this and the next element; a NaN stays, so that a block that was
// given one (its contract is finite elements) does not come back looking sound.
GK_HOST_DEVICE float larger_magnitude(float absmax, float x) {
    const float magnitude = std::fabs(x);
    return magnitude > absmax || magnitude != magnitude ? magnitude : absmax;
}

}  // namespace gk
