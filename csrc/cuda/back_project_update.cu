// back_project_update: W <- (W - step_size * X) * decay with X = U @ P.T (right) or P @ U.T (left), in tiles of
// 128 x 128 weights. Both operands are summed along their rows, so the side only says which of them comes first.
#include "cuda/adam_block.h"
#include "cuda/kernels.h"
#include "cuda/tile.h"

namespace gk::cuda {
namespace {

constexpr int kStages = 3;
constexpr int kSharedBytes = kStages * 2 * kOperandBytes;
static_assert(kProductBytes <= kSharedBytes);

template <DType kind, bool coded>
__global__ void __launch_bounds__(kTileThreads, Operand<kind>::kBlocksAtOnce)
    back_project_update_kernel(Batch batch, const Control* control, const void* direction, DType direction_dtype) {
    using O = Operand<kind>;
    const unsigned column_tiles = tiles_along(batch.cols), row_tiles = tiles_along(batch.rows);
    unsigned tile = blockIdx.x;
    const index_t weight_column0 = static_cast<index_t>(tile % column_tiles) * kTileEdge;
    tile /= column_tiles;
    const index_t weight_row0 = static_cast<index_t>(tile % row_tiles) * kTileEdge;
    const int tensor = static_cast<int>(tile / row_tiles);
    const TensorRow row = batch.row(tensor);
    const Control own = control[tensor];
    if (own.skip != 0) return;

    const index_t elements = batch.long_size() * batch.rank;
    const index_t element_bytes = direction_dtype == DType::float32 ? 4 : 2;
    const void* own_direction = static_cast<const unsigned char*>(direction) + tensor * elements * element_bytes;
    const bool right = batch.side == Side::right;
    const MatrixView first{right ? own_direction : row.basis, right ? direction_dtype : batch.basis_dtype, batch.rows,
                           batch.rank, batch.aligned};
    const MatrixView second{right ? row.basis : own_direction, right ? batch.basis_dtype : direction_dtype, batch.cols,
                            batch.rank, batch.aligned};

    const int count = static_cast<int>(divide_up(batch.rank, O::kDepth));
    const auto load = [&](int i) {
        if (i < count) {
            unsigned char* stage = shared_memory() + i % kStages * 2 * kOperandBytes;
            const index_t rank0 = i * O::kDepth;
            if constexpr (coded) {  // one copy of the conversion, whichever operand it fills
                const MatrixView factor{own_direction, direction_dtype, batch.long_size(), batch.rank, batch.aligned};
                const MatrixView basis{row.basis, batch.basis_dtype, batch.short_size(), batch.rank, batch.aligned};
                const int basis_place = right ? kOperandBytes : 0;
                load_tile<kind, kTileEdge, O::kRowChunks>(stage + (kOperandBytes - basis_place), factor,
                                                          right ? weight_row0 : weight_column0, rank0);
                load_basis_tile<kind, true, kTileEdge, O::kRowChunks>(stage + basis_place, basis,
                                                                      right ? weight_column0 : weight_row0, rank0);
            } else {
                load_tile<kind, kTileEdge, O::kRowChunks>(stage, first, weight_row0, rank0);
                load_tile<kind, kTileEdge, O::kRowChunks>(stage + kOperandBytes, second, weight_column0, rank0);
            }
        }
        commit_copies();
    };

    const int warp = threadIdx.x / kWarp;
    const int row0 = warp / 4 * 64, column0 = warp % 4 * 32;
    Accumulators<4, 4> products;
    clear(products);
    for (int i = 0; i < kStages - 1; ++i) load(i);
    for (int i = 0; i < count; ++i) {
        wait_copies<kStages - 2>();
        __syncthreads();
        load(i + kStages - 1);
        const unsigned char* stage = shared_memory() + i % kStages * 2 * kOperandBytes;
        using Rows = Layout<false, O::kRowChunks>;
        multiply_tiles<kind, Rows, Rows, O::kDepth / 16>(products, stage, stage + kOperandBytes, row0, column0);
    }

    __syncthreads();
    float* change = reinterpret_cast<float*>(shared_memory());
    store_products(change, products, row0, column0);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileEdge * kTileEdge / kEight; i += kTileThreads) {
        const int r = i / (kTileEdge / kEight), c = i % (kTileEdge / kEight) * kEight;
        const index_t there = batch.cols - (weight_column0 + c);
        if (weight_row0 + r >= batch.rows || there <= 0) continue;
        float x[kEight];
        load_products8(x, change, r, c);
        update_weights(batch, row, own, x, (weight_row0 + r) * batch.cols + weight_column0 + c, there, batch.aligned);
    }
}

template <DType kind>
auto kernel_for(DType basis_dtype) {
    return is_coded(basis_dtype) ? back_project_update_kernel<kind, true> : back_project_update_kernel<kind, false>;
}

}  // namespace

const LaunchShape kBackProjectUpdateShape{"back_project_update", kTileThreads, kSharedBytes};

cudaError_t back_project_update(const Batch& batch, const Control* control, const void* direction,
                                DType direction_dtype, const Queue& queue) {
    const DType kind = product_kind(direction_dtype, batch.basis_dtype);
    const auto kernel = kind == DType::bfloat16  ? kernel_for<DType::bfloat16>(batch.basis_dtype)
                        : kind == DType::float16 ? kernel_for<DType::float16>(batch.basis_dtype)
                                                 : kernel_for<DType::float32>(batch.basis_dtype);
    const index_t tiles = batch.count * tiles_along(batch.rows) * tiles_along(batch.cols);
    if (tiles == 0) return cudaSuccess;
    return launch(kernel, Grid{tiles, kTileThreads, kSharedBytes}, queue, batch, control, direction, direction_dtype);
}

}  // namespace gk::cuda
