// row_squares: what norms of R and of the directions are made of. add_squares: the same of the gradient's long indices,
// by project(), while it has the gradient in the cache.
#pragma once

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

static inline bool all_finite(const float* x, index_t n) {
    bool all = true;
    for (index_t i = 0; i < n; ++i) all = all && std::isfinite(x[i]);
    return all;
}

}  // namespace gk::cpu::GK_ISA
