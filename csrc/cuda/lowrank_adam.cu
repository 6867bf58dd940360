// lowrank_adam: moments and direction of low-rank gradients, a warp to a quantization block. scale_and_check: what
// makes a low-rank gradient of something else.
#include "core/apollo.h"
#include "cuda/adam_block.h"
#include "cuda/kernels.h"

namespace gk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
// Beyond this many thread blocks for a tensor each takes several rounds, which spares it loading its tables again.
constexpr index_t kMaxBlocks = 1024;

index_t blocks_for(index_t elements) {
    const index_t blocks = divide_up(quant_blocks(elements), kWarps);
    return blocks < 1 ? 1 : (blocks < kMaxBlocks ? blocks : kMaxBlocks);  // a tensor without elements counts its step
}

// direction may be lowrank itself: a lane writes what it has read. coded: of a quantized basis.
template <bool coded>
__global__ void __launch_bounds__(kThreads)
    lowrank_adam_kernel(Batch batch, const Control* control, const float* lowrank, void* direction,
                        DType direction_dtype, int blocks_each) {
    const int tensor = static_cast<int>(blockIdx.x / blocks_each);
    const int part = static_cast<int>(blockIdx.x % blocks_each);
    const TensorRow row = batch.row(tensor);
    const std::int32_t skip = control[tensor].skip;
    if (part == 0 && threadIdx.x == 0) count_step(row, skip);
    if (skip != 0) return;

    auto* tables = reinterpret_cast<CodeTables*>(shared_memory());
    load_code_tables(tables);
    __syncthreads();
    const AdamCoefficients c = control[tensor].coefficients;
    const int lane = threadIdx.x % kLanes;
    const index_t offset = tensor * batch.moments;
    const bool vector = batch.aligned && batch.moments % kEight == 0;
    for (index_t block = part * kWarps + threadIdx.x / kLanes; block < quant_blocks(batch.moments);
         block += static_cast<index_t>(blocks_each) * kWarps) {
        const index_t first = block * kQuantBlock + lane * kEight;
        const index_t count = batch.moments - first;
        float g[kEight], u[kEight];
        load8(g, lowrank, offset + first, count, DType::float32, vector);
        update_moments(u, g, row, batch, block, c, tables);
        if constexpr (coded) {
            int column = static_cast<int>(first % batch.rank);
#pragma unroll
            for (int k = 0; k < kEight; ++k) {
                u[k] *= row.basis_scale[column];
                column = column + 1 == batch.rank ? 0 : column + 1;
            }
        }
        store8(direction, u, offset + first, count, direction_dtype, vector);
    }
}

__global__ void __launch_bounds__(kThreads)
    scale_and_check_kernel(const void* source, DType dtype, int splits, index_t count, index_t elements, SumOf what,
                           Control* control, float* sums, int blocks_each) {
    const int tensor = static_cast<int>(blockIdx.x / blocks_each);
    const int part = static_cast<int>(blockIdx.x % blocks_each);
    if (control[tensor].skip & kSkipFoundInf) return;  // nothing has been projected
    const float scale = what == SumOf::gradients ? control[tensor].coefficients.gradient_scale : 1.0f;
    bool bad = false;
    for (index_t i = static_cast<index_t>(part) * kThreads + threadIdx.x; i < elements;
         i += static_cast<index_t>(blocks_each) * kThreads) {
        float sum = 0.0f;
        for (int split = 0; split < splits; ++split) {  // in order: bit-identical from run to run
            sum += load_element(source, (split * count + tensor) * elements + i, dtype);
        }
        sum *= scale;
        bad = bad || !(what == SumOf::squares ? squares_are_finite(sum) : gradient_is_representable(sum));
        sums[tensor * elements + i] = sum;
    }
    if (__syncthreads_or(what != SumOf::parts && bad) && threadIdx.x == 0)
        atomicOr(&control[tensor].skip, kSkipGradient);
}

}  // namespace

const LaunchShape kLowrankAdamShape{"lowrank_adam", kThreads, sizeof(CodeTables)};
const LaunchShape kScaleAndCheckShape{"scale_and_check", kThreads, 0};

cudaError_t lowrank_adam(const Batch& batch, const Control* control, const float* lowrank, void* direction,
                         DType direction_dtype, const Queue& queue) {
    const index_t blocks = blocks_for(batch.moments);
    const auto kernel = is_coded(batch.basis_dtype) ? lowrank_adam_kernel<true> : lowrank_adam_kernel<false>;
    return launch(kernel, Grid{blocks * batch.count, kThreads, sizeof(CodeTables)}, queue, batch, control, lowrank,
                  direction, direction_dtype, static_cast<int>(blocks));
}

cudaError_t scale_and_check(const void* source, DType dtype, int splits, index_t count, index_t elements, SumOf what,
                            Control* control, float* sums, const Queue& queue) {
    const index_t blocks = blocks_for(elements);
    return launch(scale_and_check_kernel, Grid{blocks * count, kThreads}, queue, source, dtype, splits, count, elements,
                  what, control, sums, static_cast<int>(blocks));
}

}  // namespace gk::cuda
