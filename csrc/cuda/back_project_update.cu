// back_project_update: W <- (W - step_size * X) * decay with X = U @ P.T (right) or P @ U.T (left), in tiles of
// weights: 128 x 128, of int8 ones 64 x 256, which are whole groups of those that share a scale. Both operands are
// summed along their rows, so the side only says which of them comes first.
#include "cuda/adam_block.h"
#include "cuda/kernels.h"
#include "cuda/tile.h"
#include "cuda/weight_group.h"

namespace gk::cuda {
namespace {

// A warp has 64 x 32 of the products.
constexpr int kWarpRows = 64, kWarpColumns = 32;

// What a block computes, and the stages of its operands that are under way.
template <int rows, int columns, int stages>
struct WeightTile {
    static constexpr int kRows = rows, kColumns = columns, kStages = stages;
    static constexpr int kWarpsAcross = kColumns / kWarpColumns;
    static constexpr int kFirstBytes = kRows * kRowBytes, kSecondBytes = kColumns * kRowBytes;
    static constexpr int kStageBytes = kFirstBytes + kSecondBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    using Change = Products<kRows, kColumns>;
    static_assert(kRows / kWarpRows * kWarpsAcross * kWarp == kTileThreads);
    static_assert(kColumns <= kLongestTile && Change::kBytes <= kSharedBytes);
};

using FloatTile = WeightTile<kTileEdge, kTileEdge, 3>;
// Two stages leave room for a second block on sm_80 and sm_90; a third would be too much for sm_89.
using Int8Tile = WeightTile<64, kWeightGroup, 2>;

// Of a block's tile: its tensor, and its first weight.
struct Place {
    int tensor;
    index_t row0, column0;
};

template <class Tile>
__device__ __forceinline__ Place place_of(const Batch& batch) {
    const unsigned column_tiles = tiles_along(batch.cols, Tile::kColumns);
    const unsigned row_tiles = tiles_along(batch.rows, Tile::kRows);
    unsigned tile = blockIdx.x;
    Place place;
    place.column0 = static_cast<index_t>(tile % column_tiles) * Tile::kColumns;
    tile /= column_tiles;
    place.row0 = static_cast<index_t>(tile % row_tiles) * Tile::kRows;
    place.tensor = static_cast<int>(tile / row_tiles);
    return place;
}

// The tile of X, in shared memory as Tile::Change.
template <DType kind, bool coded, class Tile>
__device__ __forceinline__ const float* back_projected(const Batch& batch, const TensorRow& row, const Place& place,
                                                       const void* direction, DType direction_dtype) {
    using O = Operand<kind>;
    const index_t elements = batch.long_size() * batch.rank;
    const index_t element_bytes = direction_dtype == DType::float32 ? 4 : 2;
    const void* own_direction = static_cast<const unsigned char*>(direction) + place.tensor * elements * element_bytes;
    const bool right = batch.side == Side::right;
    const MatrixView first{right ? own_direction : row.basis, right ? direction_dtype : batch.basis_dtype, batch.rows,
                           batch.rank, batch.aligned};
    const MatrixView second{right ? row.basis : own_direction, right ? batch.basis_dtype : direction_dtype, batch.cols,
                            batch.rank, batch.aligned};

    const int count = static_cast<int>(divide_up(batch.rank, O::kDepth));
    const auto load = [&](int i) {
        if (i < count) {
            unsigned char* stage = shared_memory() + i % Tile::kStages * Tile::kStageBytes;
            const index_t rank0 = i * O::kDepth;
            if constexpr (coded) {  // one copy of the conversion, whichever operand it fills
                constexpr int kPart = Tile::kRows < Tile::kColumns ? Tile::kRows : Tile::kColumns;
                const MatrixView factor{own_direction, direction_dtype, batch.long_size(), batch.rank, batch.aligned};
                const MatrixView basis{row.basis, batch.basis_dtype, batch.short_size(), batch.rank, batch.aligned};
                const int basis_place = right ? Tile::kFirstBytes : 0;
                const int basis_rows = right ? Tile::kColumns : Tile::kRows;
                const int factor_rows = right ? Tile::kRows : Tile::kColumns;
#pragma unroll 1
                for (int part = 0; part < factor_rows; part += kPart) {
                    load_tile<kind, kPart, O::kRowChunks>(stage + (Tile::kFirstBytes - basis_place) + part * kRowBytes,
                                                          factor, (right ? place.row0 : place.column0) + part, rank0);
                }
#pragma unroll 1
                for (int part = 0; part < basis_rows; part += kPart) {
                    load_basis_tile<kind, true, kPart, O::kRowChunks>(stage + basis_place + part * kRowBytes, basis,
                                                                      (right ? place.column0 : place.row0) + part,
                                                                      rank0);
                }
            } else {
                load_tile<kind, Tile::kRows, O::kRowChunks>(stage, first, place.row0, rank0);
                load_tile<kind, Tile::kColumns, O::kRowChunks>(stage + Tile::kFirstBytes, second, place.column0, rank0);
            }
        }
        commit_copies();
    };

    const int warp = threadIdx.x / kWarp;
    const int row0 = warp / Tile::kWarpsAcross * kWarpRows, column0 = warp % Tile::kWarpsAcross * kWarpColumns;
    Accumulators<kWarpRows / 16, kWarpColumns / 8> products;
    clear(products);
    for (int i = 0; i < Tile::kStages - 1; ++i) load(i);
    for (int i = 0; i < count; ++i) {
        wait_copies<Tile::kStages - 2>();
        __syncthreads();
        load(i + Tile::kStages - 1);
        const unsigned char* stage = shared_memory() + i % Tile::kStages * Tile::kStageBytes;
        using Rows = Layout<false, O::kRowChunks>;
        multiply_tiles<kind, Rows, Rows, O::kDepth / 16>(products, stage, stage + Tile::kFirstBytes, row0, column0);
    }

    __syncthreads();
    float* change = reinterpret_cast<float*>(shared_memory());
    store_products<typename Tile::Change>(change, products, row0, column0);
    __syncthreads();
    return change;
}

template <DType kind, bool coded>
__global__ void __launch_bounds__(kTileThreads, Operand<kind>::kBlocksAtOnce)
    back_project_update_kernel(Batch batch, const Control* control, const void* direction, DType direction_dtype) {
    const Place place = place_of<FloatTile>(batch);
    const TensorRow row = batch.row(place.tensor);
    const Control own = control[place.tensor];
    if (own.skip != 0) return;
    const float* change = back_projected<kind, coded, FloatTile>(batch, row, place, direction, direction_dtype);
    constexpr int kInRow = FloatTile::kColumns / kEight;
#pragma unroll 1
    for (int i = threadIdx.x; i < FloatTile::kRows * kInRow; i += kTileThreads) {
        const int r = i / kInRow, c = i % kInRow * kEight;
        const index_t there = batch.cols - (place.column0 + c);
        if (place.row0 + r >= batch.rows || there <= 0) continue;
        float x[kEight];
        load_products8<FloatTile::Change>(x, change, r, c);
        update_weights(batch, row, own, x, (place.row0 + r) * batch.cols + place.column0 + c, there, batch.aligned);
    }
}

template <DType kind, bool coded>
__global__ void __launch_bounds__(kTileThreads, Operand<kind>::kBlocksAtOnce)
    back_project_update_int8_kernel(Batch batch, const Control* control, const void* direction, DType direction_dtype) {
    const Place place = place_of<Int8Tile>(batch);
    const TensorRow row = batch.row(place.tensor);
    const Control own = control[place.tensor];
    if (own.skip != 0) return;
    const float* change = back_projected<kind, coded, Int8Tile>(batch, row, place, direction, direction_dtype);
    const int c = threadIdx.x % kLanes * kEight;
#pragma unroll 1
    for (int r = threadIdx.x / kLanes; r < Int8Tile::kRows && place.row0 + r < batch.rows; r += kTileThreads / kLanes) {
        float x[kEight];
        load_products8<Int8Tile::Change>(x, change, r, c);
        update_weight_group(batch, row, own, x, place.row0 + r, place.column0 / kWeightGroup);
    }
}

template <DType kind>
auto kernel_for(const Batch& batch) {
    const bool coded = is_coded(batch.basis_dtype);
    if (batch.weight_dtype == DType::int8) {
        return coded ? back_project_update_int8_kernel<kind, true> : back_project_update_int8_kernel<kind, false>;
    }
    return coded ? back_project_update_kernel<kind, true> : back_project_update_kernel<kind, false>;
}

template <class Tile>
Grid grid_of(const Batch& batch) {
    const index_t tiles = batch.count * tiles_along(batch.rows, Tile::kRows) * tiles_along(batch.cols, Tile::kColumns);
    return Grid{tiles, kTileThreads, Tile::kSharedBytes};
}

}  // namespace

const LaunchShape kBackProjectUpdateShape{"back_project_update", kTileThreads, FloatTile::kSharedBytes};
const LaunchShape kBackProjectUpdateInt8Shape{"back_project_update_int8", kTileThreads, Int8Tile::kSharedBytes};

cudaError_t back_project_update(const Batch& batch, const Control* control, const void* direction,
                                DType direction_dtype, const Queue& queue) {
    const DType kind = product_kind(direction_dtype, batch.basis_dtype);
    const auto kernel = kind == DType::bfloat16  ? kernel_for<DType::bfloat16>(batch)
                        : kind == DType::float16 ? kernel_for<DType::float16>(batch)
                                                 : kernel_for<DType::float32>(batch);
    const Grid grid = batch.weight_dtype == DType::int8 ? grid_of<Int8Tile>(batch) : grid_of<FloatTile>(batch);
    if (grid.blocks == 0) return cudaSuccess;
    return launch(kernel, grid, queue, batch, control, direction, direction_dtype);
}

}  // namespace gk::cuda
