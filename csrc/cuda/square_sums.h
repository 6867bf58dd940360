// Sums of the squares of a gradient's long indices, from its tiles in shared memory.
#pragma once

#include "cuda/tile.h"

namespace gk::cuda {

// What a thread sums. Its chunks have the same long indices in every tile: on the left side the elements of one column
// of chunks, on the right the rows it begins with and every kRowsAtOnce-th after. Between tiles the sums lie in shared
// memory: registers are needed for the products.
template <DType kind, Side side>
struct SquareSums {
    using O = Operand<kind>;
    static constexpr bool kLeft = side == Side::left;
    static constexpr int kChunks = kLeft ? O::kTransposedChunks : O::kRowChunks;
    static constexpr int kRowsAtOnce = kTileThreads / kChunks;
    static constexpr int kRounds = (kLeft ? O::kDepth : kTileEdge) / kRowsAtOnce;
    static constexpr int kSums = kLeft ? O::kPerChunk : kRounds;
    static constexpr int kBytes = kTileThreads * kSums * static_cast<int>(sizeof(float));
    static constexpr int kParts = kTileThreads * kSums / kTileEdge;  // of a long index, from as many threads
    static_assert(kSums % 4 == 0);

    // A thread's sums lie in groups of four, a group of all threads side by side.
    __device__ __forceinline__ static float4* own_sums(float* sums) {
        return reinterpret_cast<float4*>(sums) + threadIdx.x;
    }

    __device__ __forceinline__ static void clear(float* sums) {
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) own_sums(sums)[i * kTileThreads] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }

    __device__ __forceinline__ static void add(float* sums, const unsigned char* tile) {
        float sum[kSums];
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) {
            const float4 four = own_sums(sums)[i * kTileThreads];
            sum[4 * i] = four.x, sum[4 * i + 1] = four.y, sum[4 * i + 2] = four.z, sum[4 * i + 3] = four.w;
        }
        const unsigned char* own = tile + chunk_offset<kChunks>(threadIdx.x / kChunks, threadIdx.x % kChunks);
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            const uint4 chunk = *reinterpret_cast<const uint4*>(own + r * kRowsAtOnce * kChunks * kChunkBytes);
            const std::uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
            for (int k = 0; k < O::kPerChunk; ++k) {
                float x;
                if constexpr (O::kIs16Bit) {
                    x = to_float(words[k / 2] >> (16 * (k % 2)), kind);
                } else {
                    x = bits_float(words[k]);
                }
                float& s = sum[kLeft ? k : r];
                s = fmaf(x, x, s);
            }
        }
#pragma unroll
        for (int i = 0; i < kSums / 4; ++i) {
            own_sums(sums)[i * kTileThreads] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
        }
    }

    // Of a long index of the tile, behind a barrier; in an order that does not change.
    __device__ __forceinline__ static float total(const float* sums, int i) {
        const int chunk = kLeft ? i / O::kPerChunk : i % kRowsAtOnce * kChunks;
        const int k = kLeft ? i % O::kPerChunk : i / kRowsAtOnce;
        const float* first = sums + (k / 4 * kTileThreads + chunk) * 4 + k % 4;
        float sum = 0.0f;
        for (int part = 0; part < kParts; ++part) sum += first[part * (kLeft ? kChunks : 1) * 4];
        return sum;
    }
};

}  // namespace gk::cuda
