// adafactor_direction: Adafactor's step on the scaled and signed gradient, projected or not. sum_of_squares: what the
// size of a weight is made of.
#pragma once

#include <algorithm>
#include <atomic>
#include <numeric>

#include "../core/adafactor.h"
#include "../core/quantized_weight.h"
#include "gradient_factors.h"
#include "quantize_blockwise.h"

namespace gk::cpu::GK_ISA {

// Sums in double, one for each place in a row of this many: whatever the vectors' width, the same sum.
constexpr int kDoubleLanes = 16;

// The squares of n <= kQuantBlock elements times scale are added to the lanes.
template <class T>
[[gnu::always_inline]] static inline void add_squares_in_double(const T* x, index_t n, float scale, double* lanes) {
    alignas(64) float row[kQuantBlock];
    load_row(x, n, row);
    std::fill(row + n, row + ceil_div(n, kDoubleLanes) * kDoubleLanes, 0.0f);
    for (index_t i = 0; i < n; i += kDoubleLanes) {
        for (index_t lane = 0; lane < kDoubleLanes; ++lane) {
            const auto value = static_cast<double>(row[i + lane] * scale);
            lanes[lane] += value * value;
        }
    }
}

// The sum of the squares of n elements, a block of which has the scale that scale_of(its first element) says.
template <class T, class Scale>
static double squares_in_double(const T* x, index_t n, const Scale& scale_of) {
    double lanes[kDoubleLanes] = {};
    for (index_t first = 0; first < n; first += kQuantBlock) {
        add_squares_in_double(x + first, at_most(kQuantBlock, n - first), scale_of(first), lanes);
    }
    return std::accumulate(lanes, lanes + kDoubleLanes, 0.0);
}

// partial: square_sums() numbers.
static double sum_of_squares(const void* x, DType dtype, const float* scale, index_t rows, index_t cols,
                             double* partial, int threads) {
    const index_t sums = square_sums(dtype, rows, cols);
    if (dtype == DType::int8) {
        for_each_task(sums, threads, [&](index_t row, int) {
            const float* scales = scale + row * weight_groups(cols);
            partial[row] = squares_in_double(static_cast<const Int8*>(x) + row * cols, cols,
                                             [&](index_t first) { return scales[first / kWeightGroup]; });
        });
    } else {
        with_dtype(dtype, [&](auto element) {
            const auto* values = static_cast<const decltype(element)*>(x);
            for_each_task(sums, threads, [&](index_t task, int) {
                const index_t first = task * kSquaresPerSum, n = at_most(kSquaresPerSum, rows * cols - first);
                partial[task] = squares_in_double(values + first, n, [](index_t) { return 1.0f; });
            });
        });
    }
    return std::accumulate(partial, partial + sums, 0.0);
}
static_assert(kWeightGroup == kQuantBlock);

// Consecutive rows of one of the gradient's matrices.
struct Chunk {
    index_t plane;
    index_t first;  // row of the whole gradient
    index_t rows;
};

// f(index, chunk) over all chunks.
template <class F>
static void for_each_chunk(const Matrices& g, int threads, const F& f) {
    const index_t each = row_chunks(g), chunks = g.planes * each;
    // Kernels of convolutions are millions of small matrices.
    const index_t together = 1 + kChunkRows * kQuantBlock / (at_most(kChunkRows, g.rows) * g.cols);
    for_each_task(ceil_div(chunks, together), threads, [&](index_t task, int) {
        const index_t last = at_most((task + 1) * together, chunks);
        for (index_t i = task * together; i < last; ++i) {
            const index_t plane = i / each, row = i % each * kChunkRows;
            f(i, Chunk{plane, plane * g.rows + row, at_most(kChunkRows, g.rows - row)});
        }
    });
}

template <class F>
[[gnu::always_inline]] static inline F inverse_root(F x) {
    return adafactor_inverse_root(x, square_root(x));
}

// The sum of a row's squares, which are added to those of the columns.
[[gnu::always_inline]] static inline double add_row(const float* g, index_t n, float eps1, float* columns) {
    double sum = 0.0;
    for (index_t begin = 0; begin < n; begin += kQuantBlock) {  // a row may be long: few of its squares in a float
        Vector lanes{};
        float rest = 0.0f;
        for_lanes(at_most(kQuantBlock, n - begin), [&](index_t i, auto kind) {
            using F = decltype(kind);
            const F square = adafactor_square(load_as<F>(g + begin + i), eps1);
            store_as(columns + begin + i, load_as<F>(columns + begin + i) + square);
            if constexpr (std::is_same_v<F, float>) {
                rest += square;
            } else {
                lanes += square;
            }
        });
        sum += static_cast<double>(rest);
        for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(lanes[lane]);
    }
    return sum;
}

// The new means, and g over the root of what they stand for. Returns whether all means are finite.
static bool factored_direction(float* g, const Matrices& shape, const AdafactorMoments& old,
                               const AdafactorCoefficients& c, const AdafactorScratch& scratch, int threads) {
    const index_t rows = shape.rows, cols = shape.cols, each = row_chunks(shape);
    float* new_row = scratch.moment;
    float* new_col = new_row + shape.planes * rows;
    for_each_chunk(shape, threads, [&](index_t index, const Chunk& chunk) {
        float* columns = scratch.columns + index * cols;
        std::fill(columns, columns + cols, 0.0f);
        for (index_t row = chunk.first; row < chunk.first + chunk.rows; ++row) {
            const double sum = add_row(g + row * cols, cols, c.eps1, columns);
            const auto mean = static_cast<float>(sum / static_cast<double>(cols));
            new_row[row] = adafactor_second_moment(old.row[row], mean, c);
        }
    });
    const index_t blocks = ceil_div(cols, kQuantBlock);
    for_each_task(shape.planes * blocks, threads, [&](index_t task, int) {
        const index_t plane = task / blocks, begin = task % blocks * kQuantBlock;
        const index_t count = at_most(kQuantBlock, cols - begin);
        double sums[kQuantBlock] = {};
        for (index_t chunk = plane * each; chunk < (plane + 1) * each; ++chunk) {
            const float* columns = scratch.columns + chunk * cols + begin;
            for (index_t i = 0; i < count; ++i) sums[i] += static_cast<double>(columns[i]);
        }
        for (index_t i = 0; i < count; ++i) {
            const index_t column = plane * cols + begin + i;
            const auto mean = static_cast<float>(sums[i] / static_cast<double>(rows));
            new_col[column] = adafactor_second_moment(old.col[column], mean, c);
            scratch.col_factors[column] = inverse_root(new_col[column]);
        }
    });
    if (!all_finite(new_row, shape.planes * (rows + cols))) return false;
    for (index_t plane = 0; plane < shape.planes; ++plane) {
        const float* own = new_row + plane * rows;
        scratch.row_means[plane] =
            static_cast<float>(std::accumulate(own, own + rows, 0.0) / static_cast<double>(rows));
    }
    for_each_chunk(shape, threads, [&](index_t, const Chunk& chunk) {
        const float* col_factors = scratch.col_factors + chunk.plane * cols;
        for (index_t row = chunk.first; row < chunk.first + chunk.rows; ++row) {
            const float factor = inverse_root(new_row[row] / scratch.row_means[chunk.plane]);
            float* own = g + row * cols;
            for_lanes(cols, [&](index_t i, auto lanes) {
                using F = decltype(lanes);
                store_as(own + i, load_as<F>(own + i) * factor * load_as<F>(col_factors + i));
            });
        }
    });
    return true;
}

// The same with a second moment for each of the n elements.
static bool whole_direction(float* g, index_t n, const float* old, const AdafactorCoefficients& c, float* moment,
                            int threads) {
    for_each_block(n, threads, [&](index_t, index_t first, index_t count) {
        float *own = g + first, *v = moment + first;
        for_lanes(count, [&](index_t i, auto lanes) {
            using F = decltype(lanes);
            const F x = load_as<F>(own + i);
            const F squares = adafactor_square(x, c.eps1);
            const F second = adafactor_second_moment(load_as<F>(old + first + i), squares, c);
            store_as(v + i, second);
            store_as(own + i, x * inverse_root(second));
        });
    });
    return all_finite(moment, n);
}

static double root_mean_square(const float* x, index_t n, double* partial, int threads) {
    return std::sqrt(sum_of_squares(x, DType::float32, nullptr, n, 1, partial, threads) / static_cast<double>(n));
}

static bool adafactor_direction(float* g, const Matrices& shape, const AdafactorMoments& moments,
                                const AdafactorScalars& s, double alpha, const AdafactorScratch& scratch, double* size,
                                int threads) {
    const index_t n = shape.planes * shape.rows * shape.cols;
    const AdafactorCoefficients c = adafactor_coefficients(s);
    const bool finite = moments.whole != nullptr ? whole_direction(g, n, moments.whole, c, scratch.moment, threads)
                                                 : factored_direction(g, shape, moments, c, scratch, threads);
    if (!finite) return false;
    double own = root_mean_square(g, n, scratch.partial, threads);
    if (!std::isfinite(own)) return false;
    if (moments.whole != nullptr) {
        std::copy(scratch.moment, scratch.moment + n, moments.whole);
    } else {
        const float* new_col = scratch.moment + shape.planes * shape.rows;
        std::copy(static_cast<const float*>(scratch.moment), new_col, moments.row);
        std::copy(new_col, new_col + shape.planes * shape.cols, moments.col);
    }
    *size = alpha * std::min(own, s.clip_threshold);
    if (moments.first != nullptr) {
        const auto beta1 = static_cast<float>(s.beta1);
        const auto weight = static_cast<float>((1.0 - s.beta1) * *size / std::max(own, kLeastSize));
        for_each_block(n, threads, [&](index_t, index_t first, index_t count) {
            float *u = g + first, *m = moments.first + first;
            for_lanes(count, [&](index_t i, auto lanes) {
                using F = decltype(lanes);
                const F sum = load_as<F>(m + i) * beta1 + load_as<F>(u + i) * weight;
                store_as(m + i, sum);
                store_as(u + i, sum);
            });
        });
        own = *size = root_mean_square(g, n, scratch.partial, threads);
    }
    const auto divisor = static_cast<float>(std::max(own, kLeastSize));
    for_each_block(n, threads, [&](index_t, index_t first, index_t count) {
        float* u = g + first;
        for_lanes(count, [&](index_t i, auto lanes) { store_as(u + i, load_as<decltype(lanes)>(u + i) / divisor); });
    });
    return true;
}

}  // namespace gk::cpu::GK_ISA
