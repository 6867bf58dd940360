// Adafactor's scalar mathematics. galore_kernels/ops/adafactor_update.py has the equations.
//
// Moments and directions are fp32, every operation rounded separately; scalars and root mean squares are double.
#pragma once

#include <cmath>

#include "platform.h"

namespace gk {

// The least root mean square that something is divided by: the smallest normal float.
constexpr double kLeastSize = 0x1p-126;

// What the caller states about one step.
struct AdafactorScalars {
    double lr;  // not read with relative_step
    bool relative_step;
    bool warmup_init;
    bool scale_parameter;
    double eps1;
    double eps2;
    double clip_threshold;
    double decay_rate;
    double beta1;  // not read where there is no first moment
    double weight_decay;
    index_t step;  // updates applied so far, so this one is number step + 1
    double inv_grad_scale;
    bool maximize;
};

// The second moment's, rounded once to what the element-wise formula reads.
struct AdafactorCoefficients {
    float beta2;
    float one_minus_beta2;
    float eps1;
};

GK_HOST_DEVICE AdafactorCoefficients adafactor_coefficients(const AdafactorScalars& s) {
    const double beta2 = 1.0 - std::pow(static_cast<double>(s.step + 1), s.decay_rate);
    return {static_cast<float>(beta2), static_cast<float>(1.0 - beta2), static_cast<float>(s.eps1)};
}

// alpha. size: the weight's root mean square, not read without scale_parameter.
GK_HOST_DEVICE double adafactor_step_size(const AdafactorScalars& s, double size) {
    double alpha = s.lr;
    if (s.relative_step) {
        const double t = static_cast<double>(s.step + 1), decaying = 1.0 / std::sqrt(t);
        const double largest = s.warmup_init ? 1e-6 * t : 1e-2;
        alpha = decaying < largest ? decaying : largest;
    }
    if (!s.scale_parameter) return alpha;
    return alpha * (size < s.eps2 ? s.eps2 : size);
}

// F is float, or a CPU kernel's vector of floats.
template <class F>
GK_HOST_DEVICE F adafactor_square(F g, float eps1) {
    return g * g + eps1;
}

// squares: adafactor_square, or its mean over a row or column.
template <class F>
GK_HOST_DEVICE F adafactor_second_moment(F v, F squares, const AdafactorCoefficients& c) {
    return v * c.beta2 + squares * c.one_minus_beta2;
}

// 1 / root, and 0 where x is 0 (no gradient yet and eps1 = 0) or NaN, of 0 / 0. The caller takes the root of x, which
// every kind of F has under another name.
template <class F>
GK_HOST_DEVICE F adafactor_inverse_root(F x, F root) {
    const F quotient = 1.0f / root;
    return x > 0.0f ? quotient : F{};
}

// weight = (weight - size * direction) * decay, as the kernels take weight * decay - change * direction.
struct AdafactorChange {
    double size;
    double decay;
};

// Of no weight at all, decay = 0, they leave 1e-15 of it, less than a rounding.
GK_HOST_DEVICE AdafactorChange adafactor_change(double change, double decay) {
    const double own = decay == 0.0 ? 0x1p-50 : decay;
    return {change / own, own};
}

}  // namespace gk
