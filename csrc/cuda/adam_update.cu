// adam8bit_update: full-rank Adam from gradient to weight. A first launch looks for gradients that have no second
// moment, since nothing of the tensor may change then; the gradient of all but the largest tensors is still in the
// second-level cache when the second launch reads it again.
#include "cuda/adam_block.h"
#include "cuda/kernels.h"

namespace gk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr index_t kMaxBlocks = 2048;

index_t blocks_for(const Batch& batch) {
    const index_t blocks = divide_up(quant_blocks(batch.rows), kWarps);
    return blocks < 1 ? 1 : (blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ __forceinline__ void load_gradient(float (&g)[kEight], const Batch& batch, const TensorRow& row,
                                              index_t first, float scale) {
    load8(g, row.grad, first, batch.rows - first, batch.grad_dtype, batch.aligned);
#pragma unroll
    for (int k = 0; k < kEight; ++k) g[k] *= scale;
}

__global__ void __launch_bounds__(kThreads) check_gradient_kernel(Batch batch, Control* control, int blocks_each) {
    const int tensor = static_cast<int>(blockIdx.x / blocks_each);
    const index_t part = blockIdx.x % blocks_each;
    const TensorRow row = batch.row(tensor);
    const float scale = control[tensor].coefficients.gradient_scale;
    bool bad = false;
    for (index_t first = (part * kThreads + threadIdx.x) * kEight; first < batch.rows;
         first += static_cast<index_t>(blocks_each) * kThreads * kEight) {
        float g[kEight];
        load_gradient(g, batch, row, first, scale);
#pragma unroll
        for (int k = 0; k < kEight; ++k) bad = bad || !gradient_is_representable(g[k]);
    }
    if (__syncthreads_or(bad) && threadIdx.x == 0) atomicOr(&control[tensor].skip, kSkipGradient);
}

__global__ void __launch_bounds__(kThreads) adam_update_kernel(Batch batch, const Control* control, int blocks_each) {
    const int tensor = static_cast<int>(blockIdx.x / blocks_each);
    const int part = static_cast<int>(blockIdx.x % blocks_each);
    const TensorRow row = batch.row(tensor);
    const Control own = control[tensor];
    if (part == 0 && threadIdx.x == 0) count_step(row, own.skip);
    if (own.skip != 0) return;

    auto* tables = reinterpret_cast<CodeTables*>(shared_memory());
    load_code_tables(tables);
    __syncthreads();
    const int lane = threadIdx.x % kLanes;
    for (index_t block = part * kWarps + threadIdx.x / kLanes; block < quant_blocks(batch.rows);
         block += static_cast<index_t>(blocks_each) * kWarps) {
        const index_t first = block * kQuantBlock + lane * kEight;
        float g[kEight], u[kEight];
        load_gradient(g, batch, row, first, own.coefficients.gradient_scale);
        update_moments(u, g, row, batch, block, own.coefficients, tables);
        update_weights(batch, row, own, u, first, batch.rows - first, batch.aligned);
    }
}

}  // namespace

const LaunchShape kAdamUpdateShape{"adam_update", kThreads, sizeof(CodeTables)};

cudaError_t adam_update(const Batch& batch, Control* control, const Queue& queue) {
    const index_t blocks = blocks_for(batch);
    const cudaError_t checked = launch(check_gradient_kernel, Grid{blocks * batch.count, kThreads}, queue, batch,
                                       control, static_cast<int>(blocks));
    if (checked != cudaSuccess) return checked;
    return launch(adam_update_kernel, Grid{blocks * batch.count, kThreads, sizeof(CodeTables)}, queue, batch, control,
                  static_cast<int>(blocks));
}

}  // namespace gk::cuda
