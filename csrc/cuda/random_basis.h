// Tiles of a random basis, drawn where a stored one's would be loaded. A chunk of a 16-bit tile is one block of random
// bits: eight columns of a row.
#pragma once

#include "core/random_basis.h"
#include "cuda/tile.h"

namespace gk::cuda {

constexpr int kMagnitudeBytes = kMagnitudes * static_cast<int>(sizeof(std::uint16_t));

// The magnitudes as 16-bit operands of that kind; bfloat16 for fp32 ones. By all threads, in front of a barrier.
template <DType kind>
__device__ __forceinline__ void load_magnitudes(std::uint16_t* table, const std::uint16_t* magnitudes) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kMagnitudes; i += kTileThreads) {
        table[i] = kind == DType::float16 ? float_to_fp16(bf16_to_float(magnitudes[i])) : magnitudes[i];
    }
}

// The entries of eight columns of a row, as bits: `block` counts such blocks from the first row on.
__device__ __forceinline__ void draw_entries8(std::uint32_t (&bits)[kEight], std::uint64_t seed, index_t block,
                                              const std::uint16_t* magnitudes) {
    const Philox4x32 random = random_block(seed, 0, static_cast<std::uint64_t>(block));
#pragma unroll
    for (int k = 0; k < kEight; ++k) bits[k] = basis_entry(random_bits16(random, k), magnitudes);
}

// Rows of a tile from row0 on, and of its columns those from column0 on that the basis has, rounded up to blocks.
// Beyond them the tile stays as it is: nobody looks at the products of such columns. Rows that the basis does not have
// are drawn all the same; the gradient's tile has zeros there. Sixteen columns or one, all threads have work.
template <DType kind>
__device__ __forceinline__ void draw_basis_tile(unsigned char* tile, const std::uint16_t* table, std::uint64_t seed,
                                                index_t row0, int column0, int rank) {
    using O = Operand<kind>;
    const int in_row = static_cast<int>(basis_blocks(rank)), block0 = column0 / kEight;
    const int blocks = in_row - block0 < kTileEdge / kEight ? in_row - block0 : kTileEdge / kEight;
#pragma unroll 1
    for (int i = threadIdx.x; i < blocks * O::kDepth; i += kTileThreads) {
        const int row = i % O::kDepth, block = i / O::kDepth;
        std::uint32_t bits[kEight];
        // The keys of the rounds, computed once for all tiles, would be kept in registers that fp32 products need.
        const std::uint64_t own_seed = O::kIs16Bit ? seed : not_known_before(seed);
        draw_entries8(bits, own_seed, (row0 + row) * in_row + block0 + block, table);
        if constexpr (O::kIs16Bit) {
            *reinterpret_cast<uint4*>(tile + chunk_offset<O::kTransposedChunks>(row, block)) = pack8(bits);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const std::uint32_t* own = bits + half * O::kPerChunk;
                *reinterpret_cast<uint4*>(tile + chunk_offset<O::kTransposedChunks>(row, 2 * block + half)) =
                    make_uint4(own[0] << 16, own[1] << 16, own[2] << 16, own[3] << 16);
            }
        }
    }
}

}  // namespace gk::cuda
