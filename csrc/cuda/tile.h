// Tiles in shared memory and the products of two of them, on the matrix units.
//
// A tile is rows of 16-byte chunks; chunk c of row r lies at place c ^ (r % 8), so that the eight rows of a matrix
// which a warp reads at one column fall into different banks. An operand tile holds 128 rows of 128 bytes with the
// summed index running along the row, or, transposed, one row for each summed index and 128 elements along it: 16 KB
// either way.
//
// Two kinds of arithmetic. 16-bit operands of one dtype go to the matrix units as they are. Everything else is fp32 in
// shared memory, and each fp32 number the sum of three bf16 numbers (8 + 8 + 8 significant bits): of the nine products
// the six largest are added, which leaves an error of a few 2^-24, at the cost that three tf32 products would have,
// whose splitting in two leaves 2^-22. A quantized basis becomes whole numbers of either kind when it is loaded. The
// matrix units cut off what an accumulator has no bits for (Ootomo and Yokota 2022, "Recovering single precision
// accuracy from Tensor Cores"), which in a long sum is a bias far above that: the products of sixteen indices are
// summed there, and the sums of these by ordinary additions.
#pragma once

#include <type_traits>

#include "core/rounding.h"
#include "cuda/batch.h"
#include "cuda/elements.h"
#include "cuda/instructions.h"

namespace gk::cuda {

constexpr int kWarp = 32;
constexpr int kTileThreads = 256;
constexpr int kTileEdge = 128;   // long rows, short columns or columns of the basis in a tile
constexpr int kChunkBytes = 16;  // what copy_async16 and ldmatrix move
constexpr int kRowBytes = 128;   // of an operand's tile, along the summed index
constexpr int kOperandBytes = kTileEdge * kRowBytes;
constexpr int kLongestTile = 2 * kTileEdge;  // rows or columns of any

GK_HOST_DEVICE unsigned tiles_along(index_t size, int edge = kTileEdge) {
    return static_cast<unsigned>((size + edge - 1) / edge);
}

// kind: bfloat16 or float16 for operands of that dtype, float32 for everything else.
template <DType kind>
struct Operand {
    static constexpr bool kIs16Bit = kind != DType::float32;
    static constexpr int kElementBytes = kIs16Bit ? 2 : 4;
    static constexpr int kPerChunk = kChunkBytes / kElementBytes;
    static constexpr int kDepth = 128 / kElementBytes;  // summed indices in a tile
    static constexpr int kRowChunks = 8;                // along the summed index
    static constexpr int kTransposedChunks = kTileEdge / kPerChunk;
    // Blocks on a multiprocessor that registers leave room for: the split fragments take half of them.
    static constexpr int kBlocksAtOnce = kIs16Bit ? 2 : 1;
};

template <int kChunks>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
    static_assert(kChunks % 8 == 0, "the swizzle stays within eight chunks");
    return (row * kChunks + (chunk ^ (row & 7))) * kChunkBytes;
}

// A row-major matrix in global memory; a row of int4 codes begins with a byte.
struct MatrixView {
    const void* data;
    DType dtype;
    index_t rows, cols;
    bool aligned;  // address and rows are multiples of 16 bytes; rows of codes have a multiple of eight
};

// A number of elements left, as far as a tile is concerned: half the registers.
__device__ __forceinline__ int at_most_a_tile(index_t left) {
    return static_cast<int>(left < 0 ? 0 : (left < kLongestTile ? left : kLongestTile));
}

// Fills a tile of kRows x kChunks chunks from (row0, col0) on, with zeros beyond the matrix. The aligned way is
// asynchronous and needs commit_copies; both need a barrier. A thread keeps to one column of chunks: its places in the
// tile are a constant apart, since the swizzle repeats every eight rows.
template <DType kind, int kRows, int kChunks>
__device__ __forceinline__ void load_tile(unsigned char* tile, const MatrixView& matrix, index_t row0, index_t col0) {
    using O = Operand<kind>;
    constexpr int kRowsAtOnce = kTileThreads / kChunks;
    static_assert(kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0);
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    unsigned char* to = tile + chunk_offset<kChunks>(row, chunk);
    const index_t column = col0 + chunk * O::kPerChunk;
    const int columns_left = at_most_a_tile(matrix.cols - column), rows_left = at_most_a_tile(matrix.rows - row0 - row);
    index_t first = (row0 + row) * matrix.cols + column;
    if (matrix.aligned && matrix.dtype == kind) {
        const auto* from = static_cast<const unsigned char*>(matrix.data) + first * O::kElementBytes;
        const index_t step = kRowsAtOnce * matrix.cols * O::kElementBytes;
#pragma unroll
        for (int r = 0; r < kRows; r += kRowsAtOnce) {
            copy_async16(to + r * kChunks * kChunkBytes, from, columns_left > 0 && r < rows_left);
            from += step;
        }
        return;
    }
#pragma unroll 1
    for (int r = 0; r < kRows; r += kRowsAtOnce) {
        const int there = r < rows_left ? columns_left : 0;
        unsigned char* place = to + r * kChunks * kChunkBytes;
#pragma unroll
        for (int k = 0; k < O::kPerChunk; ++k) {
            if constexpr (O::kIs16Bit) {
                const auto* from = static_cast<const std::uint16_t*>(matrix.data);
                reinterpret_cast<std::uint16_t*>(place)[k] = k < there ? from[first + k] : std::uint16_t{0};
            } else {
                reinterpret_cast<float*>(place)[k] =
                    k < there ? load_element(matrix.data, first + k, matrix.dtype) : 0.0f;
            }
        }
        first += kRowsAtOnce * matrix.cols;
    }
}

namespace detail {

// kCount codes from `first` of a row on, of which `count` are there: kBits each, the others 0.
template <int kBits, int kCount>
__device__ __forceinline__ void load_code_words(std::uint32_t (&words)[2], const unsigned char* row, int first,
                                                int count, bool vector) {
    static_assert(kCount == 4 || kCount == 8);
    words[0] = words[1] = 0;
    if (vector) {
        if (count <= 0) return;
        const unsigned char* from = row + first * kBits / 8;
        if constexpr (kBits * kCount == 64) {
            const uint2 both = *reinterpret_cast<const uint2*>(from);
            words[0] = both.x, words[1] = both.y;
        } else if constexpr (kBits * kCount == 32) {
            words[0] = *reinterpret_cast<const std::uint32_t*>(from);
        } else {
            words[0] = *reinterpret_cast<const std::uint16_t*>(from);
        }
        return;
    }
    constexpr int kInWord = 32 / kBits, kInByte = 8 / kBits;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        if (k >= count) continue;
        const std::uint32_t byte = row[(first + k) / kInByte];
        const std::uint32_t code = (byte >> ((first + k) % kInByte * kBits)) & ((1u << kBits) - 1);
        words[k / kInWord] |= code << (k % kInWord * kBits);
    }
}

// A chunk of whole numbers, to a multiple of 16 bytes.
template <DType kind, int kBits>
__device__ __forceinline__ void store_codes(unsigned char* place, const std::uint32_t (&words)[2]) {
    constexpr int kCount = Operand<kind>::kPerChunk, kInWord = 32 / kBits;
    float x[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = whole_number<kBits>(words[k / kInWord], k % kInWord);
    if constexpr (Operand<kind>::kIs16Bit) {
        std::uint32_t bits[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) bits[k] = whole_to_bits16<kind>(x[k]);
        *reinterpret_cast<uint4*>(place) = pack8(bits);
    } else {
        *reinterpret_cast<float4*>(place) = make_float4(x[0], x[1], x[2], x[3]);
    }
}

template <DType kind, int kBits, int kRows, int kChunks>
__device__ __forceinline__ void load_codes(unsigned char* tile, const MatrixView& matrix, index_t row0, index_t col0) {
    constexpr int kPerChunk = Operand<kind>::kPerChunk;
    constexpr int kRowsAtOnce = kTileThreads / kChunks, kRounds = kRows / kRowsAtOnce;
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    unsigned char* to = tile + chunk_offset<kChunks>(row, chunk);
    const index_t pitch = (matrix.cols * kBits + 7) / 8;
    const int column = static_cast<int>(col0) + chunk * kPerChunk;
    const int columns_left = at_most_a_tile(matrix.cols - column), rows_left = at_most_a_tile(matrix.rows - row0 - row);
    const auto* from = static_cast<const unsigned char*>(matrix.data) + (row0 + row) * pitch;
    std::uint32_t words[kRounds][2];  // all of them under way at once
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
        const int there = i * kRowsAtOnce < rows_left ? columns_left : 0;
        load_code_words<kBits, kPerChunk>(words[i], from + i * kRowsAtOnce * pitch, column, there, matrix.aligned);
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) store_codes<kind, kBits>(to + i * kRowsAtOnce * kChunks * kChunkBytes, words[i]);
}

}  // namespace detail

// load_tile of a basis; of its codes, as whole numbers, if it is `coded`.
template <DType kind, bool coded, int kRows, int kChunks>
__device__ __forceinline__ void load_basis_tile(unsigned char* tile, const MatrixView& basis, index_t row0,
                                                index_t col0) {
    if constexpr (!coded) {
        load_tile<kind, kRows, kChunks>(tile, basis, row0, col0);
    } else if (basis.dtype == DType::int8) {
        detail::load_codes<kind, 8, kRows, kChunks>(tile, basis, row0, col0);
    } else {
        detail::load_codes<kind, 4, kRows, kChunks>(tile, basis, row0, col0);
    }
}

// One lane's part of a 16 x 16 block (of two 16 x 8 blocks, for the second operand) as multiply_accumulate wants it:
// word i packs the elements of summed indices t and t + 1.
struct Fragment {
    std::uint32_t word[4];
};

// fp32 as the sum of three bf16.
struct SplitFragment {
    Fragment part[3];
};

namespace detail {

__device__ __forceinline__ void split_pair(SplitFragment& f, int i, float x, float y) {
#pragma unroll
    for (int p = 0; p < 3; ++p) {
        const std::uint32_t high_x = float_to_bf16(x), high_y = float_to_bf16(y);
        f.part[p].word[i] = high_x | high_y << 16;
        x -= bits_float(high_x << 16);
        y -= bits_float(high_y << 16);
    }
}

template <int kChunks>
__device__ __forceinline__ float fp32_at(const unsigned char* tile, int row, int column) {
    return reinterpret_cast<const float*>(tile + chunk_offset<kChunks>(row, column / 4))[column % 4];
}

// Summed indices k, k + 1 of `row`, wherever the tile has them.
template <bool transposed, int kChunks>
__device__ __forceinline__ void split_from(SplitFragment& f, int i, const unsigned char* tile, int row, int k) {
    if constexpr (transposed) {
        split_pair(f, i, fp32_at<kChunks>(tile, k, row), fp32_at<kChunks>(tile, k + 1, row));
    } else {
        split_pair(f, i, fp32_at<kChunks>(tile, row, k), fp32_at<kChunks>(tile, row, k + 1));
    }
}

}  // namespace detail

// Of the first operand, sixteen rows from row0 + m * 16 on at sixteen summed indices from k0 on. Behind m and k0 stand
// constants: of an address, whose swizzle is an exclusive or, the lane's part is then computed once for all of them.
template <DType kind, bool transposed, int kChunks>
__device__ __forceinline__ auto first_fragment(const unsigned char* tile, int row0, int m, int k0) {
    const int lane = threadIdx.x % kWarp;
    if constexpr (Operand<kind>::kIs16Bit) {
        Fragment f;
        if constexpr (transposed) {
            const int own = chunk_offset<kChunks>(lane % 8 + lane / 16 * 8, row0 / 8 + lane / 8 % 2);
            load_matrices_transposed(f.word, tile + (own ^ (m * 2 * kChunkBytes)) + k0 * kChunks * kChunkBytes);
        } else {
            const int own = chunk_offset<kChunks>(row0 + lane % 16, lane / 16);
            load_matrices(f.word, tile + (own ^ (k0 / 8 * kChunkBytes)) + m * 16 * kChunks * kChunkBytes);
        }
        return f;
    } else {
        SplitFragment f;
        const int row = row0 + m * 16 + lane / 4, k = k0 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            detail::split_from<transposed, kChunks>(f, i, tile, row + i % 2 * 8, k + i / 2 * 8);
        }
        return f;
    }
}

// Of the second operand, sixteen columns from column0 + n * 16 on: words 0 and 1 are the first eight columns'.
template <DType kind, bool transposed, int kChunks>
__device__ __forceinline__ auto second_fragment(const unsigned char* tile, int column0, int n, int k0) {
    const int lane = threadIdx.x % kWarp;
    if constexpr (Operand<kind>::kIs16Bit) {
        Fragment f;
        if constexpr (transposed) {
            const int own = chunk_offset<kChunks>(lane % 16, column0 / 8 + lane / 16);
            load_matrices_transposed(f.word, tile + (own ^ (n * 2 * kChunkBytes)) + k0 * kChunks * kChunkBytes);
        } else {
            const int own = chunk_offset<kChunks>(column0 + lane % 8 + lane / 16 * 8, lane / 8 % 2);
            load_matrices(f.word, tile + (own ^ (k0 / 8 * kChunkBytes)) + n * 16 * kChunks * kChunkBytes);
        }
        return f;
    } else {
        SplitFragment f;
        const int column = column0 + n * 16 + lane / 4, k = k0 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            detail::split_from<transposed, kChunks>(f, i, tile, column + i / 2 * 8, k + i % 2 * 8);
        }
        return f;
    }
}

template <DType kind>
__device__ __forceinline__ void multiply_fragments(float (&c0)[4], float (&c1)[4], const Fragment& a,
                                                   const Fragment& b) {
    multiply_accumulate<kind>(c0, a.word, b.word[0], b.word[1]);
    multiply_accumulate<kind>(c1, a.word, b.word[2], b.word[3]);
}

// The smallest products first.
template <DType kind>
__device__ __forceinline__ void multiply_fragments(float (&c0)[4], float (&c1)[4], const SplitFragment& a,
                                                   const SplitFragment& b) {
    float sum0[4] = {}, sum1[4] = {};
#pragma unroll
    for (int size = 2; size >= 0; --size) {
#pragma unroll
        for (int p = 0; p <= size; ++p) {
            multiply_fragments<DType::bfloat16>(sum0, sum1, a.part[p], b.part[size - p]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        c0[i] += sum0[i];
        c1[i] += sum1[i];
    }
}

// A warp's accumulators: kM blocks of 16 rows by kN of 8 columns.
template <int kM, int kN>
using Accumulators = float[kM][kN][4];

template <int kM, int kN>
__device__ __forceinline__ void clear(Accumulators<kM, kN>& c) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
        }
    }
}

// How an operand lies in its tile: the summed index down the rows or along them, and the chunks in a row.
template <bool is_transposed, int chunks>
struct Layout {
    static constexpr bool kTransposed = is_transposed;
    static constexpr int kChunks = chunks;
};

// c += first @ second for sixteen summed indices from k0 on, of the warp's part at (row0, column0).
template <DType kind, class First, class Second, int kM, int kN>
__device__ __forceinline__ void multiply_step(Accumulators<kM, kN>& c, const unsigned char* first,
                                              const unsigned char* second, int row0, int column0, int k0) {
    static_assert(kN % 2 == 0, "a fragment of the second operand has two blocks of columns");
    std::conditional_t<Operand<kind>::kIs16Bit, Fragment, SplitFragment> b[kN / 2];
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
        b[n] = second_fragment<kind, Second::kTransposed, Second::kChunks>(second, column0, n, k0);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
        const auto a = first_fragment<kind, First::kTransposed, First::kChunks>(first, row0, m, k0);
#pragma unroll
        for (int n = 0; n < kN / 2; ++n) multiply_fragments<kind>(c[m][2 * n], c[m][2 * n + 1], a, b[n]);
    }
}

// The same for kSteps * 16 summed indices: a whole tile.
template <DType kind, class First, class Second, int kSteps, int kM, int kN>
__device__ __forceinline__ void multiply_tiles(Accumulators<kM, kN>& c, const unsigned char* first,
                                               const unsigned char* second, int row0, int column0) {
    // The next step's split fragments would take registers that this one's have.
#pragma unroll(Operand<kind>::kIs16Bit ? kSteps : 1)
    for (int step = 0; step < kSteps; ++step) {
        multiply_step<kind, First, Second>(c, first, second, row0, column0, step * 16);
    }
}

// A tile of products goes through shared memory, where its operands were, so that what follows reads and writes whole
// rows.
template <int kRows, int kColumns>
struct Products {
    static constexpr int kPitch = kColumns + 4;  // floats to a row: 8 of them begin in different banks
    static constexpr int kBytes = kRows * kPitch * static_cast<int>(sizeof(float));
};

// The lane's elements of the warp's part at (row0, column0).
template <class To, int kM, int kN>
__device__ __forceinline__ void store_products(float* products, const Accumulators<kM, kN>& c, int row0, int column0) {
    const int lane = threadIdx.x % kWarp;
    float* own = products + (row0 + lane / 4) * To::kPitch + column0 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            float* pair = own + m * 16 * To::kPitch + n * 8;
            *reinterpret_cast<float2*>(pair) = make_float2(c[m][n][0], c[m][n][1]);
            *reinterpret_cast<float2*>(pair + 8 * To::kPitch) = make_float2(c[m][n][2], c[m][n][3]);
        }
    }
}

// Eight products in a row, the first a multiple of 8.
template <class From>
__device__ __forceinline__ void load_products8(float (&x)[kEight], const float* products, int row, int column) {
    const float4* from = reinterpret_cast<const float4*>(products + row * From::kPitch + column);
    const float4 a = from[0], b = from[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

}  // namespace gk::cuda
