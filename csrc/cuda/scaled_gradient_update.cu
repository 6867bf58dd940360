// scaled_gradient_update: W <- (W - g * factor) * decay, a factor for each long index of the gradient. A warp takes 256
// consecutive elements of a row, which of int8 weights are those that share a scale.
#include "cuda/adam_block.h"
#include "cuda/kernels.h"
#include "cuda/weight_group.h"

namespace gk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kInBlock = 64;  // segments of 256: eight for a warp, so that what a block reads first is soon made up for

index_t segments_of(const Batch& batch) { return batch.rows * divide_up(batch.cols, kWeightGroup); }

// Calls update(row of the tensor, control, changes, row of the weight, segment), with the lane's eight of the changes,
// which are 0 beyond the row's end.
template <class Update>
__device__ __forceinline__ void for_each_segment(const Batch& batch, const Control* control, const float* factors,
                                                 int blocks_each, const Update& update) {
    const int tensor = static_cast<int>(blockIdx.x / blocks_each);
    const index_t first = static_cast<index_t>(blockIdx.x % blocks_each) * kInBlock;
    Control own = control[tensor];
    if (own.skip != 0) return;
    own.coefficients.step_size = 1.0f;  // the factors have it
    const TensorRow row = batch.row(tensor);
    const float* own_factors = factors + tensor * batch.long_size();
    const unsigned in_row = static_cast<unsigned>((batch.cols + kWeightGroup - 1) / kWeightGroup);
    const index_t row0 = first / in_row;  // the others are a few further: a division in 64 bits for all of them
    const unsigned segment0 = static_cast<unsigned>(first - row0 * in_row);
    const int lane = threadIdx.x % kLanes;
#pragma unroll 1
    for (unsigned i = threadIdx.x / kLanes; i < kInBlock; i += kWarps) {
        const index_t weight_row = row0 + (segment0 + i) / in_row;
        if (weight_row >= batch.rows) return;
        const unsigned segment = (segment0 + i) % in_row;
        const index_t column = static_cast<index_t>(segment) * kWeightGroup + lane * kEight;
        const index_t there = batch.cols - column;
        float x[kEight];
        load8(x, row.grad, weight_row * batch.cols + column, there, batch.grad_dtype, batch.aligned);
#pragma unroll
        for (int k = 0; k < kEight; ++k) x[k] *= own.coefficients.gradient_scale;
        if (batch.side == Side::left) {
            multiply8(x, own_factors, column, there, batch.aligned);
        } else {
            const float factor = own_factors[weight_row];
#pragma unroll
            for (int k = 0; k < kEight; ++k) x[k] *= factor;
        }
        update(row, own, x, weight_row, segment);
    }
}

__global__ void __launch_bounds__(kThreads)
    scaled_gradient_update_kernel(Batch batch, const Control* control, const float* factors, int blocks_each) {
    for_each_segment(
        batch, control, factors, blocks_each,
        [&](const TensorRow& row, const Control& own, const float (&x)[kEight], index_t weight_row, unsigned segment) {
            const index_t column = static_cast<index_t>(segment) * kWeightGroup + threadIdx.x % kLanes * kEight;
            update_weights(batch, row, own, x, weight_row * batch.cols + column, batch.cols - column, batch.aligned);
        });
}

__global__ void __launch_bounds__(kThreads)
    scaled_gradient_update_int8_kernel(Batch batch, const Control* control, const float* factors, int blocks_each) {
    for_each_segment(batch, control, factors, blocks_each,
                     [&](const TensorRow& row, const Control& own, const float (&x)[kEight], index_t weight_row,
                         unsigned segment) { update_weight_group(batch, row, own, x, weight_row, segment); });
}

}  // namespace

const LaunchShape kScaledGradientUpdateShape{"scaled_gradient_update", kThreads, 0};
const LaunchShape kScaledGradientUpdateInt8Shape{"scaled_gradient_update_int8", kThreads, 0};

cudaError_t scaled_gradient_update(const Batch& batch, const Control* control, const float* factors,
                                   const Queue& queue) {
    const index_t blocks = divide_up(segments_of(batch), kInBlock);
    if (blocks == 0) return cudaSuccess;
    const bool int8 = batch.weight_dtype == DType::int8;
    return launch(int8 ? scaled_gradient_update_int8_kernel : scaled_gradient_update_kernel,
                  Grid{blocks * batch.count, kThreads}, queue, batch, control, factors, static_cast<int>(blocks));
}

}  // namespace gk::cuda
