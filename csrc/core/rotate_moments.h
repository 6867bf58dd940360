// Adam's moments carried to another basis: what happens to single elements between the two products with T and T*T.
//
//     m' = m @ T        v' = |(v - c m*m) @ (T*T) + c m'*m'|
//
// The formula and its source are in galore_kernels/ops/rotate_moments.py.
#pragma once

#include <cmath>

#include "platform.h"

namespace gk {

// c: what a squared mean has to be multiplied by to be on v's scale, as v and m carry different bias corrections.
GK_HOST_DEVICE float squared_mean_factor(double beta1, double beta2, index_t step) {
    if (step == 0) return 0.0f;
    const double t = static_cast<double>(step);
    const double correction1 = 1.0 - std::pow(beta1, t);
    return static_cast<float>((1.0 - std::pow(beta2, t)) / (correction1 * correction1));
}

// F is float, or a CPU kernel's vector of floats.
template <class F>
GK_HOST_DEVICE F variance_of_moments(F m, F v, float c) {
    return v - m * m * c;
}

template <class F>
GK_HOST_DEVICE F second_moment_of_variance(F variance, F m, float c) {
    const F v = variance + m * m * c;
    return v < 0.0f ? -v : v;
}

}  // namespace gk
