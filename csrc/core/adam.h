// Adam on one element: the one definition that every backend computes.
//
// fp32 arithmetic, every operation rounded separately (compile with -ffp-contract=off, nvcc -fmad=false), and
// one rounding when the weight is stored. Two choices follow galore_torch, whose trajectories users compare
// with: eps is added to the uncorrected sqrt(v), and the decay is applied after the update.
#pragma once

#include <cmath>

#include "platform.h"

namespace gk {

// The largest float whose square is finite, 0x1.fffffep+63: a gradient beyond it would make v infinite.
constexpr float kLargestGradient = 0x1.fffffep+63f;

// What the caller states about one step, in the precision of Python's numbers.
struct AdamScalars {
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    index_t step;  // updates applied so far, so this one is number step + 1
    double inv_grad_scale;
    bool maximize;
};

// The same, rounded once to what the element-wise formula reads.
struct AdamCoefficients {
    float gradient_scale;  // inv_grad_scale, negated to maximize: both are exact up to one rounding
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float eps;
    float step_size;  // lr * bias correction * scale
    float decay;      // 1 - lr * weight_decay
};

// lr * bias correction * scale in double. scale: 1 for full rank, GaLore's alpha where x = U @ P.T.
GK_HOST_DEVICE double adam_step_size(const AdamScalars& s, double scale) {
    const double t = static_cast<double>(s.step + 1);
    const double correction1 = 1.0 - std::pow(s.beta1, t);
    const double correction2 = 1.0 - std::pow(s.beta2, t);
    return s.lr * std::sqrt(correction2) / correction1 * scale;
}

GK_HOST_DEVICE AdamCoefficients adam_coefficients(const AdamScalars& s, double scale) {
    AdamCoefficients c;
    c.gradient_scale = static_cast<float>(s.maximize ? -s.inv_grad_scale : s.inv_grad_scale);
    c.beta1 = static_cast<float>(s.beta1);
    c.one_minus_beta1 = static_cast<float>(1.0 - s.beta1);
    c.beta2 = static_cast<float>(s.beta2);
    c.one_minus_beta2 = static_cast<float>(1.0 - s.beta2);
    c.eps = static_cast<float>(s.eps);
    c.step_size = static_cast<float>(adam_step_size(s, scale));
    c.decay = static_cast<float>(1.0 - s.lr * s.weight_decay);
    return c;
}

// False for NaN, infinities and everything whose square overflows.
GK_HOST_DEVICE bool gradient_is_representable(float g) { return std::fabs(g) <= kLargestGradient; }

// F is float, or a CPU kernel's vector of floats.
template <class F>
GK_HOST_DEVICE F adam_first_moment(F m, F g, const AdamCoefficients& c) {
    return c.beta1 * m + c.one_minus_beta1 * g;
}

template <class F>
GK_HOST_DEVICE F adam_second_moment(F v, F g, const AdamCoefficients& c) {
    return c.beta2 * v + c.one_minus_beta2 * (g * g);
}

// u = m / (sqrt(v) + eps), and 0 where the denominator is 0 (eps = 0 and no gradient yet). The caller takes the root,
// which every kind of F has under another name.
template <class F>
GK_HOST_DEVICE F adam_direction(F m, F sqrt_v, const AdamCoefficients& c) {
    const F denominator = sqrt_v + c.eps;
    // Dividing first keeps vectors free of branches; the quotient is then not used.
    const F quotient = m / denominator;
    return denominator == 0.0f ? F{} : quotient;
}

// x is u at full rank and the element of U @ P.T at low rank.
template <class F>
GK_HOST_DEVICE F adam_weight(F w, F x, const AdamCoefficients& c) {
    return (w - c.step_size * x) * c.decay;
}

}  // namespace gk
