// What one build of the CPU kernels offers. kernels.cpp is compiled once per instruction set, each time with
// another GK_ISA, and dispatch.cpp chooses among the tables; nothing else of those builds is visible outside.
//
// All buffers are contiguous and row-major. The callers check them; here nothing is allocated and nothing throws.
#pragma once

#include "../core/absmax_block.h"
#include "../core/adafactor.h"
#include "../core/adam.h"

namespace gk::cpu {

// Adam's moments: fp32 where both absmax are null, else 8-bit codes with one absmax per block.
struct Moments {
    void* m;
    void* v;
    float* m_absmax;
    float* v_absmax;
};

// seed is read only where stochastic is set.
struct WeightRounding {
    bool stochastic;
    std::uint64_t seed;
    std::uint64_t stream;
};

struct Weight {
    void* data;
    DType dtype;
    WeightRounding rounding;
    float* scale;  // of a row's groups of 256 where the weight is int8, else null
};

// The matrix of a weight or gradient and the subspace it is projected to.
struct Projection {
    index_t rows;
    index_t cols;
    Side side;
    const void* basis;  // (short, rank)
    DType basis_dtype;
    index_t rank;
    const float* basis_scale;  // (rank) where the basis is codes, else null

    index_t short_size() const { return side == Side::right ? cols : rows; }
    index_t long_size() const { return side == Side::right ? rows : cols; }
};

// Moments (rows, rank) turned by a matrix (rank, new_rank).
struct Rotation {
    index_t rows;
    const float* matrix;
    index_t rank;
    index_t new_rank;
};

// Sums of squares of each long index: of Adam's directions, of R, and of the unscaled gradient.
struct FactorSums {
    const double* direction;
    const double* lowrank;
    const float* gradient;
};

// How they become factors: see core/apollo.h.
struct FactorScalars {
    bool per_tensor;
    double scale;
    bool scale_front;
    double norm_growth_limit;
    float previous_norm;
};

// Adafactor's gradient as matrices of one shape; a second moment that is kept whole takes any.
struct Matrices {
    index_t planes;
    index_t rows;
    index_t cols;
};

// Rows of a matrix whose columns are summed together.
constexpr index_t kChunkRows = 64;
inline index_t row_chunks(const Matrices& g) { return (g.rows + kChunkRows - 1) / kChunkRows; }

// Sums that sum_of_squares() adds up: one of each run of elements, or of each row of int8 codes.
constexpr index_t kSquaresPerSum = 64 * kQuantBlock;
inline index_t square_sums(DType dtype, index_t rows, index_t cols) {
    return dtype == DType::int8 ? rows : (rows * cols + kSquaresPerSum - 1) / kSquaresPerSum;
}

// Adafactor's moments: the first one or null, and the second, whole or as means over rows and columns.
struct AdafactorMoments {
    float* first;
    float* whole;
    float* row;
    float* col;
};

// Of n elements in (planes, rows, cols).
struct AdafactorScratch {
    float* moment;       // the new second moment: n, or planes * (rows + cols)
    float* columns;      // sums of each chunk's columns: planes * row_chunks() * cols, none of a whole second moment
    float* col_factors;  // planes * cols, none of a whole one
    float* row_means;    // planes, none of a whole one
    double* partial;     // square_sums() of a float32 gradient and of the weight
};

struct Kernels {
    const char* isa;
    void (*quantize_blockwise)(const void* x, DType dtype, index_t n, bool is_signed, std::uint8_t* codes,
                               float* absmax, int threads);
    void (*dequantize_blockwise)(const std::uint8_t* codes, const float* absmax, index_t n, bool is_signed, float* out,
                                 int threads);
    // out (n) = x * scale, or null for the answer alone: whether all of that is representable.
    bool (*scale_and_check)(const void* x, DType dtype, index_t n, float scale, float* out, int threads);
    void (*adam_update)(const Weight& weight, const void* grad, DType grad_dtype, const Moments& moments, index_t n,
                        const AdamCoefficients& coefficients, int threads);
    // Returns whether every element of lowrank_out is representable. squares: null, or for the sums of the squares of
    // the gradient's long indices, unscaled; then it also returns whether these are finite.
    bool (*project)(const void* grad, DType grad_dtype, const Projection& projection, float scale, float* lowrank_out,
                    float* squares, void* workspace, int threads);
    void (*lowrank_adam)(float* lowrank_inout, index_t n, const Moments& moments, const AdamCoefficients& coefficients,
                         int threads);
    void (*back_project_update)(const Weight& weight, const Projection& projection, const float* update,
                                const AdamCoefficients& coefficients, void* workspace, int threads);
    index_t (*workspace_bytes)(index_t short_size, index_t rank, DType weight_dtype, int threads);
    // Writes every element of target's moments, which are quantized if source's are.
    void (*rotate_moments)(const Moments& source, const Moments& target, const Rotation& rotation, float c,
                           void* workspace, int threads);
    index_t (*rotate_workspace_bytes)(const Rotation& rotation, int threads);
    // bf16 bits of the entries (rows, rank); magnitudes: see core/random_basis.h.
    void (*random_basis)(std::uint64_t seed, index_t rows, index_t rank, const std::uint16_t* magnitudes,
                         std::uint16_t* out, int threads);
    // out (rows): the sums of the squares of x's rows.
    void (*row_squares)(const float* x, index_t rows, index_t columns, double* out, int threads);
    float (*gradient_factors)(const FactorSums& sums, index_t n, const FactorScalars& scalars, const AdamScalars& adam,
                              float* factors);
    // factors: of each row on the right side, of each column on the left.
    void (*scaled_gradient_update)(const Weight& weight, const void* grad, DType grad_dtype, index_t rows, index_t cols,
                                   Side side, const float* factors, const AdamCoefficients& coefficients, int threads);
    // scale: of int8 codes. partial: square_sums() numbers.
    double (*sum_of_squares)(const void* x, DType dtype, const float* scale, index_t rows, index_t cols,
                             double* partial, int threads);
    // The gradient becomes the direction, of root mean square 1 unless it is 0, and *size what that is multiplied by.
    // Returns whether the new moments are finite and have been stored; the gradient is lost if not. alpha: the step
    // size.
    bool (*adafactor_direction)(float* gradient_inout, const Matrices& shape, const AdafactorMoments& moments,
                                const AdafactorScalars& scalars, double alpha, const AdafactorScratch& scratch,
                                double* size, int threads);
    void (*random_bits)(std::uint64_t seed, std::uint64_t stream, index_t n, std::uint16_t* out);
};

// The widest set that this processor has, or the lower one that the environment variable GALORE_KERNELS_ISA names.
// Throws std::runtime_error when the variable names a set that is unknown or that the processor lacks.
const Kernels& selected_kernels();

}  // namespace gk::cpu
