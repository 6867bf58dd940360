// The 8-bit blockwise code alone, from the definitions in csrc/core: a warp to a block of 256 elements.
#include "cuda/adam_block.h"
#include "cuda/kernels.h"

namespace gk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
// Beyond this many thread blocks each takes several rounds, which spares it loading its table of codes again.
constexpr index_t kMaxGrid = 4096;

index_t grid_for(index_t n) {
    const index_t blocks = divide_up(quant_blocks(n), kWarps);
    return blocks < kMaxGrid ? blocks : kMaxGrid;
}

__device__ __forceinline__ CodedMoment coded(void* codes, float* absmax, bool is_signed, const CodeTables* tables) {
    return CodedMoment{codes, absmax, is_signed ? &tables->first : &tables->second, is_signed};
}

__global__ void __launch_bounds__(kThreads)
    quantize_blockwise_kernel(const void* x, DType dtype, index_t n, bool is_signed, std::uint8_t* codes, float* absmax,
                              bool vector) {
    auto* tables = reinterpret_cast<CodeTables*>(shared_memory());
    load_code_tables(tables);
    __syncthreads();
    const CodedMoment moment = coded(codes, absmax, is_signed, tables);
    const int lane = threadIdx.x % kLanes;
    for (index_t block = static_cast<index_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes; block < quant_blocks(n);
         block += static_cast<index_t>(gridDim.x) * kWarps) {
        const index_t first = block * kQuantBlock + lane * kEight;
        float value[kEight];
        load8(value, x, first, n - first, dtype, vector);
        moment.store(value, block, first, n - first, vector, lane);
    }
}

__global__ void __launch_bounds__(kThreads)
    dequantize_blockwise_kernel(const std::uint8_t* codes, const float* absmax, index_t n, bool is_signed, float* out,
                                bool vector) {
    auto* tables = reinterpret_cast<CodeTables*>(shared_memory());
    load_code_tables(tables);
    __syncthreads();
    const CodedMoment moment =
        coded(const_cast<std::uint8_t*>(codes), const_cast<float*>(absmax), is_signed, tables);  // only read
    const int lane = threadIdx.x % kLanes;
    for (index_t block = static_cast<index_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes; block < quant_blocks(n);
         block += static_cast<index_t>(gridDim.x) * kWarps) {
        const index_t first = block * kQuantBlock + lane * kEight;
        float value[kEight];
        moment.load(value, block, first, n - first, vector);
        store8(out, value, first, n - first, DType::float32, vector);
    }
}

}  // namespace

const LaunchShape kQuantizeBlockwiseShape{"quantize_blockwise", kThreads, sizeof(CodeTables)};

cudaError_t quantize_blockwise(const void* x, DType dtype, index_t n, bool is_signed, std::uint8_t* codes,
                               float* absmax, const Queue& queue) {
    if (n == 0) return cudaSuccess;
    return launch(quantize_blockwise_kernel, Grid{grid_for(n), kThreads, sizeof(CodeTables)}, queue, x, dtype, n,
                  is_signed, codes, absmax, is_aligned(x) && is_aligned(codes));
}

cudaError_t dequantize_blockwise(const std::uint8_t* codes, const float* absmax, index_t n, bool is_signed, float* out,
                                 const Queue& queue) {
    if (n == 0) return cudaSuccess;
    return launch(dequantize_blockwise_kernel, Grid{grid_for(n), kThreads, sizeof(CodeTables)}, queue, codes, absmax, n,
                  is_signed, out, is_aligned(codes) && is_aligned(out));
}

}  // namespace gk::cuda
