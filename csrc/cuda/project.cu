// project: R = G @ P (right) or G.T @ P (left), in tiles of 128 long rows x 128 columns of the basis. Where a batch has
// too few tiles to fill the device, the short dimension is split, and the parts are summed by scale_and_check.
#include "cuda/kernels.h"
#include "cuda/tile.h"

namespace gk::cuda {
namespace {

constexpr int kStages = 3;
constexpr int kSharedBytes = kStages * 2 * kOperandBytes;
using SquareProducts = Products<kTileEdge, kTileEdge>;
static_assert(SquareProducts::kBytes <= kSharedBytes);
// A split that sums less than this many bytes of a gradient's row is not worth its partial result.
constexpr int kLeastTilesInSplit = 8;

template <DType kind, Side side, bool coded>
__global__ void __launch_bounds__(kTileThreads, Operand<kind>::kBlocksAtOnce)
    project_kernel(Batch batch, Control* control, float* out, bool final, int splits) {
    using O = Operand<kind>;
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

    const auto load = [&](int i) {
        if (i < count) {
            unsigned char* stage = shared_memory() + i % kStages * 2 * kOperandBytes;
            const index_t short0 = static_cast<index_t>(begin + i) * O::kDepth;
            if constexpr (kLeft) {
                load_tile<kind, O::kDepth, O::kTransposedChunks>(stage, grad, short0, long0);
            } else {
                load_tile<kind, kTileEdge, O::kRowChunks>(stage, grad, long0, short0);
            }
            load_basis_tile<kind, coded, O::kDepth, O::kTransposedChunks>(stage + kOperandBytes, basis, short0, rank0);
        }
        commit_copies();  // also where there was nothing: waiting counts groups
    };

    const int warp = threadIdx.x / kWarp;
    const int row0 = warp / 4 * 64, column0 = warp % 4 * 32;
    Accumulators<4, 4> sums;
    clear(sums);
    for (int i = 0; i < kStages - 1; ++i) load(i);
    for (int i = 0; i < count; ++i) {
        wait_copies<kStages - 2>();
        __syncthreads();  // tile i is there, and tile i - 1 has been read by all
        load(i + kStages - 1);
        if (rank0 + column0 < batch.rank) {
            const unsigned char* stage = shared_memory() + i % kStages * 2 * kOperandBytes;
            using First = Layout<kLeft, kLeft ? O::kTransposedChunks : O::kRowChunks>;
            multiply_tiles<kind, First, Layout<true, O::kTransposedChunks>, O::kDepth / 16>(
                sums, stage, stage + kOperandBytes, row0, column0);
        }
    }

    const bool scaled = final && splits == 1;
    const float scale = scaled ? control[tensor].coefficients.gradient_scale : 1.0f;
    float* own_out = out + (split * batch.count + tensor) * (long_size * batch.rank);
    const bool vector = batch.aligned && batch.rank % kEight == 0;
    bool bad = false;
    __syncthreads();  // the last tile has been read: its place is free
    float* products = reinterpret_cast<float*>(shared_memory());
    store_products<SquareProducts>(products, sums, row0, column0);
    __syncthreads();
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
            x[k] *= scale;
            bad = bad || !(k >= there || gradient_is_representable(x[k]));
        }
        store8(own_out, x, (long0 + r) * batch.rank + rank0 + c, there, DType::float32, vector);
    }
    if (__syncthreads_or(scaled && bad) && threadIdx.x == 0) atomicOr(&control[tensor].skip, kSkipGradient);
}

template <DType kind, bool coded>
auto kernel_for(Side side) {
    return side == Side::left ? project_kernel<kind, Side::left, coded> : project_kernel<kind, Side::right, coded>;
}

template <DType kind>
auto kernel_for(const Batch& batch) {
    return is_coded(batch.basis_dtype) ? kernel_for<kind, true>(batch.side) : kernel_for<kind, false>(batch.side);
}

index_t tiles_of(const Batch& batch) { return batch.count * tiles_along(batch.long_size()) * tiles_along(batch.rank); }

}  // namespace

const LaunchShape kProjectShape{"project", kTileThreads, kSharedBytes};

DType product_kind(DType dtype, DType basis_dtype) {
    return dtype == basis_dtype || is_coded(basis_dtype) ? dtype : DType::float32;
}

int project_splits(const Batch& batch, int device) {
    const index_t wanted = 2 * device_attribute(device, cudaDevAttrMultiProcessorCount);
    const DType kind = product_kind(batch.grad_dtype, batch.basis_dtype);
    const index_t depth = kind == DType::float32 ? Operand<DType::float32>::kDepth : Operand<DType::bfloat16>::kDepth;
    const index_t most = batch.short_size() / (depth * kLeastTilesInSplit);
    const index_t tiles = tiles_of(batch);
    const index_t splits = tiles > 0 ? wanted / tiles : 1;
    return static_cast<int>(splits < 1 || most < 1 ? 1 : (splits < most ? splits : most));
}

cudaError_t project(const Batch& batch, Control* control, float* lowrank, bool final, int splits, float* partial,
                    const Queue& queue) {
    const DType kind = product_kind(batch.grad_dtype, batch.basis_dtype);
    const auto kernel = kind == DType::bfloat16  ? kernel_for<DType::bfloat16>(batch)
                        : kind == DType::float16 ? kernel_for<DType::float16>(batch)
                                                 : kernel_for<DType::float32>(batch);
    const Grid grid{tiles_of(batch) * splits, kTileThreads, kSharedBytes};
    if (grid.blocks == 0) return cudaSuccess;
    const cudaError_t launched =
        launch(kernel, grid, queue, batch, control, splits > 1 ? partial : lowrank, final, splits);
    if (launched != cudaSuccess || splits == 1) return launched;
    return scale_and_check(partial, DType::float32, splits, batch.count, batch.long_size() * batch.rank, final, control,
                           lowrank, queue);
}

}  // namespace gk::cuda
