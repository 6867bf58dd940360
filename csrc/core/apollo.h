// APOLLO's scalar mathematics: what a long index of the gradient is multiplied by, and how fast its norm may grow.
// galore_kernels/ops/apollo_update.py has the equations.
#pragma once

#include <cmath>

#include "platform.h"

namespace gk {

// Added to norms that something is divided by.
constexpr float kNormEps = 1e-8f;

// Whether a sum of the squares of a long index of the gradient lets the update happen.
GK_HOST_DEVICE bool squares_are_finite(float sum) { return sum <= 0x1.fffffep+127f; }

GK_HOST_DEVICE float norm_of(double squares) { return static_cast<float>(std::sqrt(squares)); }

// s, of the norms of Adam's directions and of the low-rank gradient.
GK_HOST_DEVICE float factor_of_norms(float direction_norm, float lowrank_norm) {
    return direction_norm / (lowrank_norm + kNormEps);
}

// The same, of the sums of squares.
GK_HOST_DEVICE float gradient_factor(double direction_squares, double lowrank_squares) {
    return factor_of_norms(norm_of(direction_squares), norm_of(lowrank_squares));
}

// l, what the scaled gradient of this norm is divided by. limit: 0 for none. previous: the last step's norm; one as
// small as kNormEps tells nothing.
GK_HOST_DEVICE double growth_limiter(double norm, float previous, double limit) {
    if (limit == 0.0 || previous <= kNormEps) return 1.0;
    const double growth = norm / (static_cast<double>(previous) + 1e-8);
    return (growth > limit ? growth : limit) / limit;
}

// g: scaled and signed; factor: s * lr sqrt(1 - beta2^t) / (1 - beta1^t) sqrt(scale) / l, rounded once but for s.
template <class F>
GK_HOST_DEVICE F scaled_gradient_weight(F w, F g, F factor, float decay) {
    return (w - g * factor) * decay;
}

}  // namespace gk
