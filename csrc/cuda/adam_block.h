// Adam's moments of one quantization block, by one warp: eight consecutive elements to a lane, so that states are
// loaded and stored as vectors, and a lane's random bits are one block of Philox's.
#pragma once

#include "core/absmax_block.h"
#include "core/adam.h"
#include "cuda/batch.h"
#include "cuda/elements.h"
#include "cuda/tables.h"

namespace gk::cuda {

constexpr int kLanes = kQuantBlock / kEight;
static_assert(kLanes == 32, "a block is a warp's work");

namespace detail {

__device__ __forceinline__ void load_codes8(std::uint32_t (&codes)[kEight], const void* source, index_t first,
                                            index_t count, bool vector) {
    const auto* from = static_cast<const std::uint8_t*>(source) + first;
    if (vector && count >= kEight) {
        const uint2 packed = *reinterpret_cast<const uint2*>(from);
#pragma unroll
        for (int k = 0; k < kEight; ++k) codes[k] = ((k < 4 ? packed.x : packed.y) >> (8 * (k % 4))) & 0xFFu;
        return;
    }
#pragma unroll
    for (int k = 0; k < kEight; ++k) codes[k] = k < count ? from[k] : 0u;
}

__device__ __forceinline__ void store_codes8(void* target, const std::uint32_t (&codes)[kEight], index_t first,
                                             index_t count, bool vector) {
    auto* to = static_cast<std::uint8_t*>(target) + first;
    if (vector && count >= kEight) {
        *reinterpret_cast<uint2*>(to) = make_uint2(codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24,
                                                   codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24);
        return;
    }
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
        if (k < count) to[k] = static_cast<std::uint8_t>(codes[k]);
    }
}

}  // namespace detail

// The largest magnitude of the warp's elements; a lane's beyond the tensor's end are 0.
__device__ __forceinline__ float block_absmax(const float (&x)[kEight]) {
    float largest = 0.0f;
#pragma unroll
    for (int k = 0; k < kEight; ++k) largest = larger_magnitude(largest, x[k]);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        largest = larger_magnitude(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
    }
    return largest;
}

// One 8-bit moment of the block. Decoding and encoding frame the update of all its elements.
struct CodedMoment {
    void* codes;
    float* absmax;
    const DynamicMap* map;
    bool is_signed;

    __device__ __forceinline__ void load(float (&x)[kEight], index_t block, index_t first, index_t count,
                                         bool vector) const {
        std::uint32_t code[kEight];
        detail::load_codes8(code, codes, first, count, vector);
        const float scale = absmax[block];
#pragma unroll
        for (int k = 0; k < kEight; ++k) {
            x[k] = k < count ? decode(static_cast<std::uint8_t>(code[k]), scale, map->values) : 0.0f;
        }
    }

    __device__ __forceinline__ void store(const float (&x)[kEight], index_t block, index_t first, index_t count,
                                          bool vector, int lane) const {
        const float largest = block_absmax(x);  // also tells that every lane has read the old one
        std::uint32_t code[kEight];
#pragma unroll
        for (int k = 0; k < kEight; ++k) code[k] = encode(x[k], largest, map->thresholds, is_signed);
        detail::store_codes8(codes, code, first, count, vector);
        if (lane == 0) absmax[block] = largest;
    }
};

// Both moments of the block. Those that are not 8-bit lie where the codes would.
__device__ __forceinline__ void store_moments(const float (&m)[kEight], const float (&v)[kEight],
                                              const CodedMoment& coded_m, const CodedMoment& coded_v, bool eight_bit,
                                              index_t block, index_t first, index_t count, bool vector, int lane) {
    if (eight_bit) {
        coded_m.store(m, block, first, count, vector, lane);
        coded_v.store(v, block, first, count, vector, lane);
    } else {
        store8(coded_m.codes, m, first, count, DType::float32, vector);
        store8(coded_v.codes, v, first, count, DType::float32, vector);
    }
}

// Updates the moments of block `block` of a tensor of `total` elements with the lane's gradients g, which are scaled
// and signed, and 0 beyond the end. u is what moves the weights; it comes from the new moments before they are rounded
// to codes. All lanes of the warp call it.
__device__ __forceinline__ void update_moments(float (&u)[kEight], const float (&g)[kEight], const TensorRow& row,
                                               const Batch& batch, index_t block, const AdamCoefficients& c,
                                               const CodeTables* tables) {
    const int lane = threadIdx.x % kLanes;
    const index_t first = block * kQuantBlock + lane * kEight;
    const index_t count = batch.moments - first;
    const CodedMoment coded_m{row.m, row.m_absmax, &tables->first, true};
    const CodedMoment coded_v{row.v, row.v_absmax, &tables->second, false};
    float m[kEight], v[kEight];
    if (batch.eight_bit) {
        coded_m.load(m, block, first, count, batch.aligned);
        coded_v.load(v, block, first, count, batch.aligned);
    } else {
        load8(m, row.m, first, count, DType::float32, batch.aligned);
        load8(v, row.v, first, count, DType::float32, batch.aligned);
    }
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
        m[k] = adam_first_moment(m[k], g[k], c);
        v[k] = adam_second_moment(v[k], g[k], c);
        u[k] = adam_direction(m[k], sqrtf(v[k]), c);
    }
    store_moments(m, v, coded_m, coded_v, batch.eight_bit, block, first, count, batch.aligned, lane);
}

// By one thread of a tensor's launch, once.
__device__ __forceinline__ void count_step(const TensorRow& row, std::int32_t skip) {
    if (skip == 0) *row.step += 1.0f;
    if (skip == kSkipGradient) *row.skipped += 1;
}

// The new weights of eight elements from `first` on, of which `count` are there; x moves them.
__device__ __forceinline__ void update_weights(const Batch& batch, const TensorRow& row, const Control& control,
                                               const float (&x)[kEight], index_t first, index_t count, bool vector) {
    float w[kEight];
    load8(w, row.param, first, count, batch.weight_dtype, vector);
#pragma unroll
    for (int k = 0; k < kEight; ++k) w[k] = adam_weight(w[k], x[k], control.coefficients);
    if (batch.stochastic) {
        store8_stochastic(row.param, w, first, count, vector, row.seed, control.step);
    } else {
        store8(row.param, w, first, count, batch.weight_dtype, vector);
    }
}

}  // namespace gk::cuda
