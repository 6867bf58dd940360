// project: R = G @ P (right) or G.T @ P (left), in tiles of 128 long rows x 128 columns of the basis. Where a batch has
// too few tiles to fill the device, the short dimension is split, and the parts are summed by scale_and_check.
//
// For apollo_update the basis is drawn tile by tile, and its first 128 columns' blocks sum the gradient's squares too.
#include "core/apollo.h"
#include "cuda/kernels.h"
#include "cuda/random_basis.h"
#include "cuda/square_sums.h"
#include "cuda/tile.h"

namespace gk::cuda {
namespace {

constexpr int kStages = 3;
using SquareProducts = Products<kTileEdge, kTileEdge>;

// The tiles under way in shared memory. The table that bases are drawn with would be too much for sm_89 beside three
// tiles of the basis; a drawn one needs no third, since nothing is waited for.
template <bool with_squares>
struct Tiles {
    static constexpr int kBasisStages = with_squares ? 2 : kStages;
    static constexpr int kTableOffset = (kStages + kBasisStages) * kOperandBytes;
    static constexpr int kSquaresOffset = kTableOffset + kMagnitudeBytes;
    static constexpr int kSharedBytes =
        with_squares ? kSquaresOffset + SquareSums<DType::bfloat16, Side::left>::kBytes : kTableOffset;
    static_assert(SquareProducts::kBytes <= kTableOffset);

    __device__ __forceinline__ static unsigned char* gradient(int i) {
        return shared_memory() + i % kStages * kOperandBytes;
    }
    __device__ __forceinline__ static unsigned char* basis(int i) {
        return shared_memory() + (kStages + i % kBasisStages) * kOperandBytes;
    }
};

// A split that sums less than this many bytes of a gradient's row is not worth its partial result.
constexpr int kLeastTilesInSplit = 8;

// with_squares: what apollo_update asks for, a drawn basis and the sums of squares; either may be missing.
template <DType kind, Side side, bool coded, bool with_squares>
__device__ __forceinline__ void project_tile(const Batch& batch, Control* control, float* out, bool final, int splits,
                                             float* squares) {
    using O = Operand<kind>;
    using Shared = Tiles<with_squares>;
    constexpr bool kLeft = side == Side::left;  // the gradient's rows are the summed ones
    const index_t long_size = batch.long_size(), short_size = batch.short_size();
    const unsigned rank_tiles = tiles_along(batch.rank), long_tiles = tiles_along(long_size);
    unsigned tile = blockIdx.x;  // rank tiles next to one another: they share a panel of the gradient
    const int rank0 = static_cast<int>(tile % rank_tiles) * kTileEdge;
    tile /= rank_tiles;
    const index_t long0 = static_cast<index_t>(tile % long_tiles) * kTileEdge;
    tile /= long_tiles;
    const int split = static_cast<int>(tile % splits), tensor = static_cast<int>(tile / splits);
    const TensorRow row = batch.row(tensor);
    if (control[tensor].skip & kSkipFoundInf) return;

    const MatrixView grad{row.grad, batch.grad_dtype, batch.rows, batch.cols, batch.aligned};
    const MatrixView basis{row.basis, batch.basis_dtype, short_size, batch.rank, batch.aligned};
    const int tiles = static_cast<int>(divide_up(short_size, O::kDepth));
    const int in_split = static_cast<int>(divide_up(tiles, splits));
    const int begin = split * in_split;
    const int count = begin + in_split < tiles ? in_split : (begin < tiles ? tiles - begin : 0);

    const bool drawn = with_squares && batch.magnitudes != nullptr;
    const bool sums_squares = with_squares && squares != nullptr && rank0 == 0;
    [[maybe_unused]] auto* magnitudes = reinterpret_cast<std::uint16_t*>(shared_memory() + Shared::kTableOffset);
    const auto short_of = [&](int i) { return static_cast<index_t>(begin + i) * O::kDepth; };
    const auto load_gradient = [&](int i) {
        if (i >= count) return;
        if constexpr (kLeft) {
            load_tile<kind, O::kDepth, O::kTransposedChunks>(Shared::gradient(i), grad, short_of(i), long0);
        } else {
            load_tile<kind, kTileEdge, O::kRowChunks>(Shared::gradient(i), grad, long0, short_of(i));
        }
    };
    const auto load_basis = [&](int i) {
        if (drawn || i >= count) return;
        load_basis_tile<kind, coded, O::kDepth, O::kTransposedChunks>(Shared::basis(i), basis, short_of(i), rank0);
    };
    const auto draw_basis = [&](int i) {
        if constexpr (with_squares) {
            if (!drawn || i >= count) return;
            draw_basis_tile<kind>(Shared::basis(i), magnitudes, row.basis_seed, short_of(i), rank0, batch.rank);
        }
    };

    const int warp = threadIdx.x / kWarp;
    const int row0 = warp / 4 * 64, column0 = warp % 4 * 32;
    Accumulators<4, 4> sums;
    clear(sums);
    [[maybe_unused]] auto* square_sums = reinterpret_cast<float*>(shared_memory() + Shared::kSquaresOffset);
    if constexpr (with_squares) {
        SquareSums<kind, side>::clear(square_sums);
        if (drawn) load_magnitudes<kind>(magnitudes, batch.magnitudes);
        __syncthreads();
        draw_basis(0);
    }
    for (int i = 0; i < kStages - 1; ++i) {
        if (i < Shared::kBasisStages - 1) load_basis(i);
        load_gradient(i);
        commit_copies();  // also where there was nothing: waiting counts groups
    }
    for (int i = 0; i < count; ++i) {
        wait_copies<kStages - 2>();
        __syncthreads();  // tile i is there, and tile i - 1 has been read by all
        load_basis(i + Shared::kBasisStages - 1);
        // Of the group that is not waited for in the next round, the basis can't be a part if it is needed there.
        if constexpr (Shared::kBasisStages < kStages) commit_copies();
        load_gradient(i + kStages - 1);
        commit_copies();
        if (rank0 + column0 < batch.rank) {
            using First = Layout<kLeft, kLeft ? O::kTransposedChunks : O::kRowChunks>;
            multiply_tiles<kind, First, Layout<true, O::kTransposedChunks>, O::kDepth / 16>(
                sums, Shared::gradient(i), Shared::basis(i), row0, column0);
        }
        draw_basis(i + 1);
        if constexpr (with_squares) {
            if (sums_squares) SquareSums<kind, side>::add(square_sums, Shared::gradient(i));
        }
    }

    const bool scaled = final && splits == 1;
    const float scale = scaled ? control[tensor].coefficients.gradient_scale : 1.0f;
    const float factor = drawn ? basis_factor(batch.rank) : 1.0f;
    float* own_out = out + (split * batch.count + tensor) * (long_size * batch.rank);
    const bool vector = batch.aligned && batch.rank % kEight == 0;
    bool bad = false;
    __syncthreads();  // the last tile has been read: its place is free
    float* products = reinterpret_cast<float*>(shared_memory());
    store_products<SquareProducts>(products, sums, row0, column0);
    __syncthreads();
    if constexpr (with_squares) {
        const index_t left = long_size - long0;
        if (sums_squares && threadIdx.x < kTileEdge && static_cast<index_t>(threadIdx.x) < left) {
            const float sum = SquareSums<kind, side>::total(square_sums, threadIdx.x);
            bad = !squares_are_finite(sum);
            squares[(split * batch.count + tensor) * long_size + long0 + threadIdx.x] = sum;
        }
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileEdge * kTileEdge / kEight; i += kTileThreads) {
        const int r = i / (kTileEdge / kEight), c = i % (kTileEdge / kEight) * kEight;
        const int there = batch.rank - (rank0 + c);
        if (long0 + r >= long_size || there <= 0) continue;
        float x[kEight];
        load_products8<SquareProducts>(x, products, r, c);
        if constexpr (coded) multiply8(x, row.basis_scale, rank0 + c, there, vector);
#pragma unroll
        for (int k = 0; k < kEight; ++k) {
            if constexpr (with_squares) x[k] *= factor;
            x[k] *= scale;
            bad = bad || !(k >= there || gradient_is_representable(x[k]));
        }
        store8(own_out, x, (long0 + r) * batch.rank + rank0 + c, there, DType::float32, vector);
    }
    if (__syncthreads_or(scaled && bad) && threadIdx.x == 0) atomicOr(&control[tensor].skip, kSkipGradient);
}

template <DType kind, Side side, bool coded>
__global__ void __launch_bounds__(kTileThreads, Operand<kind>::kBlocksAtOnce)
    project_kernel(Batch batch, Control* control, float* out, bool final, int splits, float*) {
    project_tile<kind, side, coded, false>(batch, control, out, final, splits, nullptr);
}

template <DType kind, Side side>
__global__ void __launch_bounds__(kTileThreads, Operand<kind>::kBlocksAtOnce)
    project_with_squares_kernel(Batch batch, Control* control, float* out, bool final, int splits, float* squares) {
    project_tile<kind, side, false, true>(batch, control, out, final, splits, squares);
}

template <DType kind, Side side>
auto kernel_for(bool coded, bool with_squares) {
    if (with_squares) return project_with_squares_kernel<kind, side>;
    return coded ? project_kernel<kind, side, true> : project_kernel<kind, side, false>;
}

template <DType kind>
auto kernel_for(const Batch& batch, bool with_squares) {
    const bool coded = is_coded(batch.basis_dtype);
    return batch.side == Side::left ? kernel_for<kind, Side::left>(coded, with_squares)
                                    : kernel_for<kind, Side::right>(coded, with_squares);
}

// Entries that are drawn are exact in every dtype, like codes.
DType kind_of(const Batch& batch) {
    return batch.magnitudes != nullptr ? batch.grad_dtype : product_kind(batch.grad_dtype, batch.basis_dtype);
}

index_t tiles_of(const Batch& batch) { return batch.count * tiles_along(batch.long_size()) * tiles_along(batch.rank); }

}  // namespace

const LaunchShape kProjectShape{"project", kTileThreads, Tiles<false>::kSharedBytes};
const LaunchShape kProjectWithSquaresShape{"project_with_squares", kTileThreads, Tiles<true>::kSharedBytes};

DType product_kind(DType dtype, DType basis_dtype) {
    return dtype == basis_dtype || is_coded(basis_dtype) ? dtype : DType::float32;
}

int project_splits(const Batch& batch, int device) {
    const index_t wanted = 2 * device_attribute(device, cudaDevAttrMultiProcessorCount);
    const index_t depth =
        kind_of(batch) == DType::float32 ? Operand<DType::float32>::kDepth : Operand<DType::bfloat16>::kDepth;
    const index_t most = batch.short_size() / (depth * kLeastTilesInSplit);
    const index_t tiles = tiles_of(batch);
    const index_t splits = tiles > 0 ? wanted / tiles : 1;
    return static_cast<int>(splits < 1 || most < 1 ? 1 : (splits < most ? splits : most));
}

cudaError_t project(const Batch& batch, Control* control, const Projected& to, bool final, int splits,
                    const Projected& partial, const Queue& queue) {
    const DType kind = kind_of(batch);
    const bool with_squares = to.squares != nullptr || batch.magnitudes != nullptr;
    if (with_squares && is_coded(batch.basis_dtype)) return cudaErrorInvalidValue;
    const auto kernel = kind == DType::bfloat16  ? kernel_for<DType::bfloat16>(batch, with_squares)
                        : kind == DType::float16 ? kernel_for<DType::float16>(batch, with_squares)
                                                 : kernel_for<DType::float32>(batch, with_squares);
    const int shared_bytes = with_squares ? Tiles<true>::kSharedBytes : Tiles<false>::kSharedBytes;
    const Grid grid{tiles_of(batch) * splits, kTileThreads, static_cast<std::size_t>(shared_bytes)};
    if (grid.blocks == 0) return cudaSuccess;
    const Projected& first = splits > 1 ? partial : to;
    const cudaError_t launched =
        launch(kernel, grid, queue, batch, control, first.lowrank, final, splits, first.squares);
    if (launched != cudaSuccess || splits == 1) return launched;
    const index_t elements = batch.long_size() * batch.rank;
    const cudaError_t summed = scale_and_check(partial.lowrank, DType::float32, splits, batch.count, elements,
                                               final ? SumOf::gradients : SumOf::parts, control, to.lowrank, queue);
    if (summed != cudaSuccess || to.squares == nullptr) return summed;
    return scale_and_check(partial.squares, DType::float32, splits, batch.count, batch.long_size(), SumOf::squares,
                           control, to.squares, queue);
}

}  // namespace gk::cuda
