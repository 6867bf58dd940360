// Eight consecutive elements at a time, of any dtype: what a thread loads, computes and stores in fp32.
#pragma once

#include "core/philox.h"
#include "core/rounding.h"
#include "cuda/instructions.h"

namespace gk::cuda {

constexpr int kEight = 8;

__device__ __forceinline__ float load_element(const void* source, index_t i, DType dtype) {
    if (dtype == DType::float32) return static_cast<const float*>(source)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(source)[i];
    return dtype == DType::bfloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

__device__ __forceinline__ float to_float(std::uint32_t bits16, DType dtype) {
    const std::uint16_t bits = static_cast<std::uint16_t>(bits16);
    return dtype == DType::bfloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

__device__ __forceinline__ std::uint32_t to_bits16(float x, DType dtype) {
    return dtype == DType::bfloat16 ? float_to_bf16(x) : float_to_fp16(x);
}

// Field k of a word of two's complement fields.
template <int kBits>
__device__ __forceinline__ float whole_number(std::uint32_t word, int k) {
    constexpr std::uint32_t kHalf = 1u << (kBits - 1);
    const std::uint32_t offset = ((word >> (kBits * k)) & (2 * kHalf - 1)) ^ kHalf;
    // The low bits of 2^23's float count ones. Conversion instructions would have an eighth of the speed.
    return bits_float(0x4B000000u | offset) - static_cast<float>(0x800000u + kHalf);
}

// Of a whole number from -128 to 127, which both formats have.
template <DType dtype>
__device__ __forceinline__ std::uint32_t whole_to_bits16(float x) {
    const std::uint32_t bits = float_bits(x);
    if constexpr (dtype == DType::bfloat16) return bits >> 16;
    return bits == 0 ? 0u : ((bits >> 16) & 0x8000u) | (((bits & 0x7FFFFFFFu) - 0x38000000u) >> 13);
}

// x[k] = element first + k, 0 from `count` on. `vector`: its address is a multiple of 16 bytes.
__device__ __forceinline__ void load8(float (&x)[kEight], const void* source, index_t first, index_t count, DType dtype,
                                      bool vector) {
    if (!vector || count < kEight) {
#pragma unroll
        for (int k = 0; k < kEight; ++k) x[k] = k < count ? load_element(source, first + k, dtype) : 0.0f;
        return;
    }
    if (dtype == DType::float32) {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(source) + first);
        const float4 a = from[0], b = from[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
        return;
    }
    const uint4 packed = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(source) + first);
    const std::uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int k = 0; k < kEight; ++k) x[k] = to_float(words[k / 2] >> (16 * (k % 2)), dtype);
}

// x[k] *= factors[first + k]; `vector` as of load8.
__device__ __forceinline__ void multiply8(float (&x)[kEight], const float* factors, index_t first, index_t count,
                                          bool vector) {
    float factor[kEight];
    load8(factor, factors, first, count, DType::float32, vector);
#pragma unroll
    for (int k = 0; k < kEight; ++k) x[k] *= factor[k];
}

__device__ __forceinline__ uint4 pack8(const std::uint32_t (&bits)[kEight]) {
    return make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
                      bits[6] | bits[7] << 16);
}

__device__ __forceinline__ void store_bits8(void* target, const std::uint32_t (&bits)[kEight], index_t first,
                                            index_t count, bool vector) {
    std::uint16_t* to = static_cast<std::uint16_t*>(target) + first;
    if (vector && count >= kEight) {
        *reinterpret_cast<uint4*>(to) = pack8(bits);
        return;
    }
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
        if (k < count) to[k] = static_cast<std::uint16_t>(bits[k]);
    }
}

// Rounded to nearest.
__device__ __forceinline__ void store8(void* target, const float (&x)[kEight], index_t first, index_t count,
                                       DType dtype, bool vector) {
    if (dtype != DType::float32) {
        std::uint32_t bits[kEight];
#pragma unroll
        for (int k = 0; k < kEight; ++k) bits[k] = to_bits16(x[k], dtype);
        store_bits8(target, bits, first, count, vector);
        return;
    }
    float* to = static_cast<float*>(target) + first;
    if (vector && count >= kEight) {
        reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
        return;
    }
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
        if (k < count) to[k] = x[k];
    }
}

// random_bits16 for an i that the compiler does not know: indexing would put the words into local memory.
__device__ __forceinline__ std::uint32_t pick_bits16(const Philox4x32& random, int i) {
    const std::uint32_t low = i < 2 ? random.word[0] : random.word[1];
    const std::uint32_t high = i < 6 ? random.word[2] : random.word[3];
    return ((i < 4 ? low : high) >> (16 * (i % 2))) & 0xFFFFu;
}

// The random bits of eight elements from `first` on: an element's depend on its index alone, however it is grouped.
struct RandomBits8 {
    int offset;
    Philox4x32 near, far;

    __device__ __forceinline__ RandomBits8(std::uint64_t seed, std::uint64_t step, index_t first)
        : offset(static_cast<int>(first % kRandomsPerBlock)) {
        const std::uint64_t block = static_cast<std::uint64_t>(first) / kRandomsPerBlock;
        near = random_block(seed, step, block);
        far = offset == 0 ? near : random_block(seed, step, block + 1);
    }

    __device__ __forceinline__ std::uint32_t operator[](int k) const {
        const int i = offset + k;
        return i < kRandomsPerBlock ? pick_bits16(near, i) : pick_bits16(far, i - kRandomsPerBlock);
    }
};

// bf16, rounded stochastically.
__device__ __forceinline__ void store8_stochastic(void* target, const float (&x)[kEight], index_t first, index_t count,
                                                  bool vector, std::uint64_t seed, std::uint64_t step) {
    const RandomBits8 random(seed, step, first);
    std::uint32_t bits[kEight];
#pragma unroll
    for (int k = 0; k < kEight; ++k) bits[k] = float_to_bf16_stochastic(x[k], random[k]);
    store_bits8(target, bits, first, count, vector);
}

}  // namespace gk::cuda
