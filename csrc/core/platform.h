// What lets one definition of the scalar mathematics be compiled by g++ and by nvcc.
#pragma once

#include <cstdint>
#include <cstring>

// Static, so that no function of these headers has external linkage: kernels are compiled once per instruction
// set, and the linker may keep any one copy of an inline function, also the one that needs AVX-512.
#if defined(__CUDACC__)
#define GK_HOST_DEVICE_MEMBER __host__ __device__ __forceinline__
#else
#define GK_HOST_DEVICE_MEMBER __attribute__((always_inline)) inline
#endif
#define GK_HOST_DEVICE static GK_HOST_DEVICE_MEMBER

namespace gk {

// Every matrix, state and file format of the library counts its elements in 64 bits.
using index_t = std::int64_t;

// int8 is a quantized weight's codes (galore_kernels/quantizers/weight.py) or a basis', int4 a basis' alone, with two
// to a byte (basis.py there).
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3, int4 = 4 };

// Long-major orientation: side right projects columns (S = cols, L = rows), side left projects rows.
enum class Side : int { right = 0, left = 1 };

// memcpy is the bit cast that both compilers turn into nothing; std::bit_cast would need C++20.
GK_HOST_DEVICE std::uint32_t float_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

GK_HOST_DEVICE float bits_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace gk
