// APOLLO's scalar mathematics: what a long index of the gradient is multiplied by, and how fast its norm may grow.
// galore_kernels/ops/apollo_update.py has the equations.
#pragma once

#include <cmath>

#include "platform.h"

namespace gk {

// Added to norms that something is divided by.
constexpr float kNormEps = 1e-8f;

// s, of the sums of squares of Adam's directions and of the low-rank gradient.
GK_HOST_DEVICE float gradient_factor(double direction_squares, double lowrank_squares) {
    return static_cast<float>(std::sqrt(direction_squares)) /
           (static_cast<float>(std::sqrt(lowrank_squares)) + kNormEps);
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
