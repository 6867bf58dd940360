// The launchers of the CUDA backend, one for each stage of galore_kernels/backends/stages.py. Each only enqueues
// work on the queue's stream and returns what preparing and launching gave. Pointers are to memory of that device.
#pragma once

#include "cuda/batch.h"
#include "cuda/launch.h"

namespace gk::cuda {

// What a stage's kernels are launched with, for those who count registers and shared memory.
struct LaunchShape {
    const char* stage;
    int threads;
    std::size_t shared_bytes;
};

extern const LaunchShape kWriteColumnShape, kPrepareShape, kProjectShape, kProjectWithSquaresShape, kScaleAndCheckShape,
    kLowrankAdamShape, kBackProjectUpdateShape, kBackProjectUpdateInt8Shape, kAdamUpdateShape, kGaloreUpdateShape,
    kRowNormsShape, kGradientFactorsShape, kScaledGradientUpdateShape, kScaledGradientUpdateInt8Shape,
    kRandomBasisShape, kQuantizeBlockwiseShape, kRotateMomentsShape;

// Whether the device and its driver can run the kernels: what asking for one gives.
cudaError_t usable(int device);

// A number on the device, null where there is none.
struct Scalar {
    const void* data;
    bool is_double;
};

struct StepScalars {
    AdamScalars adam;  // but for lr, step and inv_grad_scale, which are read on the device
    Scalar lr, grad_scale, found_inf;
    double scale;  // GaLore's alpha; 1 at full rank
};

// table[:, column] = values, of a row-major table. The values travel with the launches: no host memory has to outlive
// them, and a graph that captures them holds them.
cudaError_t write_column(std::uint64_t* table, index_t columns, index_t column, const std::uint64_t* values,
                         index_t count, const Queue& queue);

cudaError_t prepare(const Batch& batch, const StepScalars& scalars, Control* control, const Queue& queue);

// The kind of arithmetic for the product of a matrix and a basis: see tile.h. Codes are exact in every dtype.
DType product_kind(DType dtype, DType basis_dtype);

struct Projected {
    float* lowrank;  // (count, long * rank)
    float* squares;  // (count, long): the sums of the squares of the gradients' long indices; null where nobody asks
};

// The projected gradients. `final`: scaled, signed, and the skip flags set. With several splits of the short dimension,
// partial has (splits, count, ...) of both, for their sums in between.
int project_splits(const Batch& batch, int device);
cudaError_t project(const Batch& batch, Control* control, const Projected& to, bool final, int splits,
                    const Projected& partial, const Queue& queue);

// What is summed over splits. Gradients are scaled and signed then, and set the skip flags; squares set them too.
enum class SumOf : int { parts = 0, gradients = 1, squares = 2 };

// sums = source (splits, count, elements) over the splits.
cudaError_t scale_and_check(const void* source, DType dtype, int splits, index_t count, index_t elements, SumOf what,
                            Control* control, float* sums, const Queue& queue);

cudaError_t lowrank_adam(const Batch& batch, const Control* control, const float* lowrank, void* direction,
                         DType direction_dtype, const Queue& queue);

cudaError_t back_project_update(const Batch& batch, const Control* control, const void* direction,
                                DType direction_dtype, const Queue& queue);

// APOLLO's options, as gradient_factors takes them.
struct ApolloScalars {
    bool one_factor;    // "tensor" scaling
    double norm_scale;  // sqrt(scale) where the limiter is to see it, else 1
    double limit;       // 0 for none
};

// factors (count, long) of the gradients' long indices, and scaled_norm. norms: as many floats in between.
cudaError_t gradient_factors(const Batch& batch, const Control* control, const float* lowrank, const float* direction,
                             const float* squares, float* norms, float* factors, const ApolloScalars& apollo,
                             const Queue& queue);

cudaError_t scaled_gradient_update(const Batch& batch, const Control* control, const float* factors,
                                   const Queue& queue);

// entries (rows, rank): bfloat16 bits of a random basis, times sqrt(rank).
cudaError_t random_basis(std::uint16_t* entries, index_t rows, index_t rank, std::uint64_t seed,
                         const std::uint16_t* magnitudes, const Queue& queue);

cudaError_t adam_update(const Batch& batch, Control* control, const Queue& queue);

// Whether galore_update takes the batch, and fills the device with it.
bool in_one_pass(const Batch& batch, int device);
cudaError_t galore_update(const Batch& batch, Control* control, const Queue& queue);

// Both moments of an (L, r) gradient: 8-bit with an absmax for each block, or fp32 with null for both.
struct MomentMatrix {
    void* m;
    void* v;
    float* m_absmax;
    float* v_absmax;
    index_t rows;
    int rank;
};

// target's moments = source's in another basis; rotation (r, r'). Both are 8-bit, or both fp32.
cudaError_t rotate_moments(const MomentMatrix& source, const MomentMatrix& target, const float* rotation,
                           const float* step, double beta1, double beta2, const Queue& queue);

cudaError_t quantize_blockwise(const void* x, DType dtype, index_t n, bool is_signed, std::uint8_t* codes,
                               float* absmax, const Queue& queue);
cudaError_t dequantize_blockwise(const std::uint8_t* codes, const float* absmax, index_t n, bool is_signed, float* out,
                                 const Queue& queue);

}  // namespace gk::cuda
