// gradient_factors: what APOLLO multiplies a gradient by, from the norms of the rows of R and of Adam's direction.
//
// Two launches. row_norms reads both matrices, 8 r bytes for each long index, over the whole grid: of a Llama-7B matrix
// (11008 x 4096) at r = 256 that is 23 MB beside the 360 MB of gradient and weight, which one block, at some 100 GB/s,
// would read in 0.2 ms, twice what an H200 has for the whole step. What is left is 16 bytes for each long index, which
// one block of 1024 threads reads in 2 us (11008) to 6 us (32000), and sums in an order that does not change.
#include "core/apollo.h"
#include "cuda/adam_block.h"
#include "cuda/kernels.h"

namespace gk::cuda {
namespace {

constexpr int kNormThreads = 256;
constexpr int kRounds = 4;  // rows that a group of lanes takes
constexpr int kFactorThreads = 1024;
constexpr int kFactorWarps = kFactorThreads / kLanes;
constexpr int kSums = 3;
constexpr std::size_t kFactorShared = kSums * kFactorWarps * sizeof(double);

// Lanes for a row: the power of two from rank on, and at most a warp.
int lanes_for(int rank) {
    int lanes = 1;
    while (lanes < kLanes && lanes < rank) lanes *= 2;
    return lanes;
}

// norms = |R_j|, factors = |u_j|. In double: a row's squares of floats have a sum that float may not have.
__global__ void __launch_bounds__(kNormThreads)
    row_norms_kernel(Batch batch, const Control* control, const float* lowrank, const float* direction, float* norms,
                     float* factors, int lanes, int blocks_each) {
    const int tensor = static_cast<int>(blockIdx.x / blocks_each);
    const index_t part = blockIdx.x % blocks_each;
    if (control[tensor].skip != 0) return;
    const index_t long_size = batch.long_size();
    const int rows_at_once = kNormThreads / lanes, lane = threadIdx.x % lanes;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
        const index_t row = (part * kRounds + round) * rows_at_once + threadIdx.x / lanes;
        const index_t first = (tensor * long_size + row) * batch.rank;
        double r = 0.0, u = 0.0;
        for (int i = row < long_size ? lane : batch.rank; i < batch.rank; i += lanes) {
            const double own_r = static_cast<double>(lowrank[first + i]);
            const double own_u = static_cast<double>(direction[first + i]);
            r = fma(own_r, own_r, r);
            u = fma(own_u, own_u, u);
        }
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
            r += __shfl_xor_sync(0xFFFFFFFFu, r, distance);
            u += __shfl_xor_sync(0xFFFFFFFFu, u, distance);
        }
        if (lane == 0 && row < long_size) {
            norms[tensor * long_size + row] = norm_of(r);
            factors[tensor * long_size + row] = norm_of(u);
        }
    }
}

// All threads' sums of each kind, to every thread of the block.
__device__ __forceinline__ void sum_over_block(double (&sums)[kSums]) {
    auto* of_warps = reinterpret_cast<double*>(shared_memory());
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) {
            sums[k] += __shfl_xor_sync(0xFFFFFFFFu, sums[k], distance);
        }
        if (threadIdx.x % kLanes == 0) of_warps[k * kFactorWarps + threadIdx.x / kLanes] = sums[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
        sums[k] = 0.0;
        for (int warp = 0; warp < kFactorWarps; ++warp) sums[k] += of_warps[k * kFactorWarps + warp];
    }
}

// A block to a tensor. factors: |u_j| becomes what g_j is multiplied by.
__global__ void __launch_bounds__(kFactorThreads)
    gradient_factors_kernel(Batch batch, const Control* control, const float* squares, const float* norms,
                            float* factors, ApolloScalars apollo) {
    const int tensor = static_cast<int>(blockIdx.x);
    const Control own = control[tensor];
    if (own.skip != 0) return;
    float* scaled_norm = batch.row(tensor).scaled_norm;
    const float previous = *scaled_norm;
    const index_t long_size = batch.long_size(), offset = tensor * long_size;

    double sums[kSums] = {};  // of |u_j|^2, |R_j|^2 and |g_j|^2; or, with a factor for each j, the last is |s_j g_j|^2
    for (index_t j = threadIdx.x; j < long_size; j += kFactorThreads) {
        const float u = factors[offset + j], r = norms[offset + j];
        const double square = static_cast<double>(squares[offset + j]);
        if (apollo.one_factor) {
            sums[0] += static_cast<double>(u) * static_cast<double>(u);
            sums[1] += static_cast<double>(r) * static_cast<double>(r);
            sums[2] += square;
        } else {
            const double s = static_cast<double>(factor_of_norms(u, r));
            sums[2] += s * s * square;
        }
    }
    sum_over_block(sums);  // also tells that every thread has read the last step's norm

    const float one = apollo.one_factor ? gradient_factor(sums[0], sums[1]) : 1.0f;
    const double scale = fabs(static_cast<double>(own.coefficients.gradient_scale)) * apollo.norm_scale;
    const double norm = static_cast<double>(one) * sqrt(sums[2]) * scale;
    const double limiter = growth_limiter(norm, previous, apollo.limit);
    const float coefficient = static_cast<float>(own.step_size / limiter);
    for (index_t j = threadIdx.x; j < long_size; j += kFactorThreads) {
        const float s = apollo.one_factor ? one : factor_of_norms(factors[offset + j], norms[offset + j]);
        factors[offset + j] = s * coefficient;
    }
    if (threadIdx.x == 0) *scaled_norm = static_cast<float>(norm / limiter);
}

}  // namespace

const LaunchShape kRowNormsShape{"row_norms", kNormThreads, 0};
const LaunchShape kGradientFactorsShape{"gradient_factors", kFactorThreads, kFactorShared};

cudaError_t gradient_factors(const Batch& batch, const Control* control, const float* lowrank, const float* direction,
                             const float* squares, float* norms, float* factors, const ApolloScalars& apollo,
                             const Queue& queue) {
    const int lanes = lanes_for(batch.rank);
    const index_t blocks = divide_up(batch.long_size(), static_cast<index_t>(kNormThreads / lanes) * kRounds);
    if (blocks > 0) {
        const cudaError_t launched =
            launch(row_norms_kernel, Grid{blocks * batch.count, kNormThreads}, queue, batch, control, lowrank,
                   direction, norms, factors, lanes, static_cast<int>(blocks));
        if (launched != cudaSuccess) return launched;
    }
    return launch(gradient_factors_kernel, Grid{batch.count, kFactorThreads, kFactorShared}, queue, batch, control,
                  squares, norms, factors, apollo);
}

}  // namespace gk::cuda
