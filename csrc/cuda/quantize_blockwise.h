// The 8-bit blockwise code on the GPU. Knows nothing of torch: device pointers, sizes, a device and a stream.
#pragma once

#include <cstdint>

// Both work asynchronously on `stream` (a cudaStream_t; null is the default one) of `device` and return the
// cudaError_t of preparing and launching, 0 for success. They leave current the device that was current. All
// pointers are to contiguous memory of `device`: n elements each, absmax one per started 256 of them.
// dtype, of x: 0 float32, 1 bfloat16, 2 float16.
int gk_cuda_quantize_blockwise(const void* x, int dtype, std::int64_t n, bool is_signed, std::uint8_t* codes,
                               float* absmax, int device, void* stream);

int gk_cuda_dequantize_blockwise(const std::uint8_t* codes, const float* absmax, std::int64_t n, bool is_signed,
                                 float* out, int device, void* stream);

// CUDA's description of an error that one of these returned.
const char* gk_cuda_error_string(int error);
