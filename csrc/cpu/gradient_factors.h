// gradient_factors: APOLLO's, of the gradient's long indices. row_squares: what norms of R and of the directions are
// made of. add_squares: the same of the gradient's long indices, by project(), while it has the gradient in the cache.
#pragma once

#include <numeric>

#include "../core/apollo.h"
#include "elements.h"
#include "kernels.h"

namespace gk::cpu::GK_ISA {

// x.x of n elements: fp32 lanes, summed in double.
template <class T>
[[gnu::always_inline]] static inline double squared_norm(const T* x, index_t n) {
    Vector lanes{};
    double rest = 0.0;
    for_lanes(n, [&](index_t i, auto kind) {
        using F = decltype(kind);
        const F element = load_as<F>(x + i);
        if constexpr (std::is_same_v<F, float>) {
            rest += static_cast<double>(element * element);
        } else {
            lanes += element * element;
        }
    });
    double sum = rest;
    for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(lanes[i]);
    return sum;
}

static void row_squares(const float* x, index_t rows, index_t columns, double* out, int threads) {
    constexpr index_t kRows = 64;
    for_each_task(ceil_div(rows, kRows), threads, [&](index_t task, int) {
        const index_t last = at_most((task + 1) * kRows, rows);
        for (index_t row = task * kRows; row < last; ++row) out[row] = squared_norm(x + row * columns, columns);
    });
}

// squares[i] += the squares of a region's long index i. The region has `elements` short indices; its long indices are
// the matrix' rows on the right side, its columns on the left.
template <Side kSide, class G>
static void add_squares(const G* region, index_t ld, index_t longs, index_t elements, float* squares) {
    if constexpr (kSide == Side::right) {
        for (index_t i = 0; i < longs; ++i) squares[i] += static_cast<float>(squared_norm(region + i * ld, elements));
    } else {
        for (index_t k = 0; k < elements; ++k) {
            const G* row = region + k * ld;
            for_lanes(longs, [&](index_t i, auto lanes) {
                using F = decltype(lanes);
                const F element = load_as<F>(row + i);
                store_as(squares + i, load_as<F>(squares + i) + element * element);
            });
        }
    }
}

// Returns the limited norm of the scaled gradient.
static float gradient_factors(const FactorSums& sums, index_t n, const FactorScalars& s, const AdamScalars& adam,
                              float* factors) {
    const double all_direction = std::accumulate(sums.direction, sums.direction + n, 0.0);
    const double all_lowrank = std::accumulate(sums.lowrank, sums.lowrank + n, 0.0);
    double squares = 0.0;
    for (index_t j = 0; j < n; ++j) {
        factors[j] = s.per_tensor ? gradient_factor(all_direction, all_lowrank)
                                  : gradient_factor(sums.direction[j], sums.lowrank[j]);
        squares += static_cast<double>(factors[j]) * factors[j] * sums.gradient[j];
    }
    const double root = std::sqrt(s.scale);
    const double norm = std::sqrt(squares) * adam.inv_grad_scale * (s.scale_front ? root : 1.0);
    const double limiter = growth_limiter(norm, s.previous_norm, s.norm_growth_limit);
    const float step_size = adam_coefficients(adam, root / limiter).step_size;
    for (index_t j = 0; j < n; ++j) factors[j] *= step_size;
    return static_cast<float>(norm / limiter);
}

static inline bool all_finite(const float* x, index_t n) {
    bool all = true;
    for (index_t i = 0; i < n; ++i) all = all && std::isfinite(x[i]);
    return all;
}

}  // namespace gk::cpu::GK_ISA
