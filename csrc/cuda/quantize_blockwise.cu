// Quantization and dequantization of 8-bit states on the GPU, from the definitions in csrc/core.
//
// One warp takes one block of 256 elements, eight to a lane, so that the block's absmax needs no shared
// memory and no barrier. Lane l takes elements l, l + 32, ...: every load and store of a warp is then
// contiguous, whatever the buffers' alignment (vector loads would need 16 bytes of it, which a view into a
// larger tensor may not have).
#include "cuda/quantize_blockwise.h"

#include <cuda_runtime.h>

#include "core/absmax_block.h"
#include "core/dynamic_code.h"
#include "core/rounding.h"

namespace gk {
namespace {

constexpr int kWarp = 32;
constexpr int kPerLane = kQuantBlock / kWarp;
constexpr int kWarpsPerGroup = 8;
constexpr int kThreads = kWarpsPerGroup * kWarp;
// Beyond this many thread blocks each takes several rounds, which spares it loading its table of codes again.
constexpr index_t kMaxGrid = 4096;

static_assert(kThreads == kCodes, "each thread copies one entry of the table");

__constant__ DynamicMap signed_map = make_dynamic_map(true);
__constant__ DynamicMap unsigned_map = make_dynamic_map(false);

template <DType dtype>
__device__ float load(const void* x, index_t i) {
    if constexpr (dtype == DType::float32) return static_cast<const float*>(x)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(x)[i];
    return dtype == DType::bfloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

// The static runtime has an idea of its own of the current device, and torch has another; so the caller says
// which device the pointers and the stream belong to, and what was current before is restored.
class DeviceGuard {
 public:
    explicit DeviceGuard(int device) : error_(cudaGetDevice(&previous_)) {
        if (error_ != cudaSuccess || device == previous_) return;
        error_ = cudaSetDevice(device);
        switched_ = true;
    }
    ~DeviceGuard() {
        if (switched_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t error() const { return error_; }

 private:
    int previous_ = 0;
    bool switched_ = false;
    cudaError_t error_;
};

unsigned int grid_for(index_t n) {
    const index_t groups = (quant_blocks(n) + kWarpsPerGroup - 1) / kWarpsPerGroup;
    return static_cast<unsigned int>(groups < kMaxGrid ? groups : kMaxGrid);
}

template <DType dtype>
__global__ void __launch_bounds__(kThreads)
    quantize_blockwise_kernel(const void* __restrict__ x, index_t n, bool is_signed, std::uint8_t* __restrict__ codes,
                              float* __restrict__ absmax) {
    __shared__ float thresholds[kCodes - 1];
    if (threadIdx.x < kCodes - 1) {  // there is one between each two codes
        thresholds[threadIdx.x] = (is_signed ? signed_map : unsigned_map).thresholds[threadIdx.x];
    }
    __syncthreads();

    const int lane = threadIdx.x % kWarp;
    const index_t first = static_cast<index_t>(blockIdx.x) * kWarpsPerGroup + threadIdx.x / kWarp;
    const index_t stride = static_cast<index_t>(gridDim.x) * kWarpsPerGroup;
    for (index_t block = first; block < quant_blocks(n); block += stride) {
        const index_t start = block * kQuantBlock + lane;
        float value[kPerLane];
        float largest = 0.0f;
#pragma unroll
        for (int k = 0; k < kPerLane; ++k) {
            const index_t i = start + k * kWarp;
            value[k] = i < n ? load<dtype>(x, i) : 0.0f;
            largest = larger_magnitude(largest, value[k]);
        }
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            largest = larger_magnitude(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
        }
#pragma unroll
        for (int k = 0; k < kPerLane; ++k) {
            const index_t i = start + k * kWarp;
            if (i < n) codes[i] = encode(value[k], largest, thresholds, is_signed);
        }
        if (lane == 0) absmax[block] = largest;
    }
}

template <DType dtype>
cudaError_t launch_quantize_blockwise(const void* x, index_t n, bool is_signed, std::uint8_t* codes, float* absmax,
                                      cudaStream_t stream) {
    quantize_blockwise_kernel<dtype><<<grid_for(n), kThreads, 0, stream>>>(x, n, is_signed, codes, absmax);
    return cudaGetLastError();
}

__global__ void __launch_bounds__(kThreads)
    dequantize_blockwise_kernel(const std::uint8_t* __restrict__ codes, const float* __restrict__ absmax, index_t n,
                                bool is_signed, float* __restrict__ out) {
    __shared__ float values[kCodes];
    values[threadIdx.x] = (is_signed ? signed_map : unsigned_map).values[threadIdx.x];
    __syncthreads();

    const int lane = threadIdx.x % kWarp;
    const index_t first = static_cast<index_t>(blockIdx.x) * kWarpsPerGroup + threadIdx.x / kWarp;
    const index_t stride = static_cast<index_t>(gridDim.x) * kWarpsPerGroup;
    for (index_t block = first; block < quant_blocks(n); block += stride) {
        const float scale = absmax[block];
#pragma unroll
        for (int k = 0; k < kPerLane; ++k) {
            const index_t i = block * kQuantBlock + lane + k * kWarp;
            if (i < n) out[i] = decode(codes[i], scale, values);
        }
    }
}

cudaError_t launch_dequantize_blockwise(const std::uint8_t* codes, const float* absmax, index_t n, bool is_signed,
                                        float* out, cudaStream_t stream) {
    dequantize_blockwise_kernel<<<grid_for(n), kThreads, 0, stream>>>(codes, absmax, n, is_signed, out);
    return cudaGetLastError();
}

}  // namespace
}  // namespace gk

int gk_cuda_quantize_blockwise(const void* x, int dtype, std::int64_t n, bool is_signed, std::uint8_t* codes,
                               float* absmax, int device, void* stream) {
    if (n == 0) return cudaSuccess;
    const gk::DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return guard.error();
    const auto launch_stream = static_cast<cudaStream_t>(stream);
    switch (static_cast<gk::DType>(dtype)) {
        case gk::DType::float32:
            return gk::launch_quantize_blockwise<gk::DType::float32>(x, n, is_signed, codes, absmax, launch_stream);
        case gk::DType::bfloat16:
            return gk::launch_quantize_blockwise<gk::DType::bfloat16>(x, n, is_signed, codes, absmax, launch_stream);
        case gk::DType::float16:
            return gk::launch_quantize_blockwise<gk::DType::float16>(x, n, is_signed, codes, absmax, launch_stream);
    }
    return cudaErrorInvalidValue;
}

int gk_cuda_dequantize_blockwise(const std::uint8_t* codes, const float* absmax, std::int64_t n, bool is_signed,
                                 float* out, int device, void* stream) {
    if (n == 0) return cudaSuccess;
    const gk::DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return guard.error();
    return gk::launch_dequantize_blockwise(codes, absmax, n, is_signed, out, static_cast<cudaStream_t>(stream));
}

const char* gk_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
