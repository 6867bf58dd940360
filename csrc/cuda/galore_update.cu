// galore_update in one pass: project -> Adam -> back-project -> weight, with R, U and the moments of a panel of 128
// long rows never leaving the multiprocessor. Gradient and weight cross the memory bus once.
//
// Persistent blocks take the panels of all matrices in order. A gradient that is not representable must leave its whole
// matrix untouched, so before a panel writes anything it waits until every panel of its matrix has looked at its
// projected gradient. That can't block for ever: all blocks run at once (a cooperative launch), a matrix has no more
// panels than there are blocks, and a panel only waits for panels that come before it in the order or are its matrix's.
//
// Shared memory, 96 KB in three regions of 32 KB, which are the stages of the projection at first. Then
//     regions 0 and 1   R in fp32, half a panel in each      later the stages of the back-projection
//     region 2          U in 16 bits, until the panel's end
// The code tables lie where there is room: in U's second half while the first is made, then in R's first.
#include "cuda/adam_block.h"
#include "cuda/kernels.h"
#include "cuda/tile.h"

namespace gk::cuda {
namespace {

constexpr int kRegionBytes = 2 * kOperandBytes;
constexpr int kProjectionStages = 3, kUpdateStages = 2;
constexpr int kSharedBytes = kProjectionStages * kRegionBytes;
constexpr int kHalfPanel = kTileEdge / 2;
constexpr int kShortTile = 64;        // short indices in a stage of either product
constexpr int kDirectionChunks = 16;  // 128 ranks of 16 bits
constexpr int kRankMultiple = 8;  // whole chunks of the basis and of U; half a panel is then whole blocks of moments
static_assert(kHalfPanel * kRankMultiple % kQuantBlock == 0);
static_assert(kHalfPanel * kTileEdge * sizeof(float) <= kRegionBytes && sizeof(CodeTables) <= kRegionBytes / 2);

// What the stages of one panel share.
template <DType kind, Side side, bool coded>
struct Panel {
    static constexpr bool kLeft = side == Side::left;
    using O = Operand<kind>;
    static_assert(O::kIs16Bit && O::kDepth == kShortTile);

    const Batch& batch;
    std::uint32_t tensor;
    index_t long0;
    int warp;

    // Looked up by each stage anew: kept from stage to stage, the row would cost twenty registers.
    __device__ __forceinline__ TensorRow row() const { return batch.row(tensor); }
    __device__ __forceinline__ MatrixView matrix(const void* data) const {
        return {data, kind, batch.rows, batch.cols, true};
    }
    __device__ __forceinline__ MatrixView basis() const {
        return {row().basis, coded ? batch.basis_dtype : kind, batch.short_size(), batch.rank, true};
    }
    __device__ __forceinline__ int short_tiles() const {
        return static_cast<int>(divide_up(batch.short_size(), kShortTile));
    }
    __device__ __forceinline__ unsigned char* region(int i) const { return shared_memory() + i * kRegionBytes; }
    __device__ __forceinline__ unsigned char* direction() const { return region(2); }
    // A tile of G or W: 64 short indices and the panel's long ones.
    __device__ __forceinline__ void load_slab(unsigned char* tile, const MatrixView& matrix, int i) const {
        const index_t short0 = static_cast<index_t>(i) * kShortTile;
        if constexpr (kLeft) {
            load_tile<kind, kShortTile, O::kTransposedChunks>(tile, matrix, short0, long0);
        } else {
            load_tile<kind, kTileEdge, O::kRowChunks>(tile, matrix, long0, short0);
        }
    }
    __device__ __forceinline__ void load_basis(unsigned char* tile, const MatrixView& basis, int i) const {
        load_basis_tile<kind, coded, kShortTile, kDirectionChunks>(tile, basis, static_cast<index_t>(i) * kShortTile,
                                                                   0);
    }
};

// R of the panel, in the accumulators of eight warps: two by four parts of 64 x 32.
template <DType kind, Side side, bool coded>
__device__ __forceinline__ void project_panel(const Panel<kind, side, coded>& panel, Accumulators<4, 4>& sums) {
    using P = Panel<kind, side, coded>;
    const int count = panel.short_tiles(), column0 = panel.warp % 4 * 32;
    const MatrixView grad = panel.matrix(panel.row().grad), basis = panel.basis();
    const auto load = [&](int i) {
        if (i < count) {
            unsigned char* stage = panel.region(i % kProjectionStages);
            panel.load_slab(stage, grad, i);
            panel.load_basis(stage + kOperandBytes, basis, i);
        }
        commit_copies();
    };
    clear(sums);
    for (int i = 0; i < kProjectionStages - 1; ++i) load(i);
    for (int i = 0; i < count; ++i) {
        wait_copies<kProjectionStages - 2>();
        __syncthreads();
        load(i + kProjectionStages - 1);
        if (column0 >= panel.batch.rank) continue;
        const unsigned char* stage = panel.region(i % kProjectionStages);
        using First = Layout<P::kLeft, P::kLeft ? P::O::kTransposedChunks : P::O::kRowChunks>;
        multiply_tiles<kind, First, Layout<true, kDirectionChunks>, kShortTile / 16>(sums, stage, stage + kOperandBytes,
                                                                                     panel.warp / 4 * 64, column0);
    }
}

// Multiplies R by the scales of the columns that the basis has codes of.
template <DType kind, Side side>
__device__ __forceinline__ void scale_columns(const Panel<kind, side, true>& panel, Accumulators<4, 4>& sums) {
    const int column0 = panel.warp % 4 * 32, lane = threadIdx.x % kWarp;
    const float own = column0 + lane < panel.batch.rank ? panel.row().basis_scale[column0 + lane] : 0.0f;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float scale = __shfl_sync(0xFFFFFFFFu, own, n * 8 + lane % 4 * 2 + i);
#pragma unroll
            for (int m = 0; m < 4; ++m) sums[m][n][i] *= scale, sums[m][n][i + 2] *= scale;
        }
    }
}

// Scales R; waits for the matrix's other panels; whether the matrix is to be skipped. Its barriers also end the
// projection: shared memory is free.
__device__ __forceinline__ bool agree_to_skip(Accumulators<4, 4>& sums, Control* control, std::uint32_t panels) {
    const float scale = control->coefficients.gradient_scale;
    bool bad = false;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // what lies beyond the matrix is 0
                sums[m][n][i] *= scale;
                bad = bad || !gradient_is_representable(sums[m][n][i]);
            }
        }
    }
    bad = __syncthreads_or(bad);
    bool any = false;
    if (threadIdx.x == 0) {
        publish_add(&control->arrived, bad ? 0x10001u : 1u);
        std::uint32_t arrived = observe(&control->arrived);
        while ((arrived & 0xFFFFu) != panels) {
            pause();
            arrived = observe(&control->arrived);
        }
        any = arrived >> 16 != 0;
    }
    return __syncthreads_or(any);
}

// R to shared memory as it lies in the moments.
template <DType kind, Side side, bool coded>
__device__ __forceinline__ void store_lowrank(const Panel<kind, side, coded>& panel, const Accumulators<4, 4>& sums) {
    const int lane = threadIdx.x % kWarp, rank = panel.batch.rank;
    float* half = reinterpret_cast<float*>(panel.region(panel.warp / 4));
    const int column0 = panel.warp % 4 * 32 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int r = m * 16 + lane / 4, column = column0 + n * 8;
            if (column >= rank) continue;
            *reinterpret_cast<float2*>(half + r * rank + column) = make_float2(sums[m][n][0], sums[m][n][1]);
            *reinterpret_cast<float2*>(half + (r + 8) * rank + column) = make_float2(sums[m][n][2], sums[m][n][3]);
        }
    }
}

// Moments and direction of half a panel, a warp to a block.
template <DType kind, Side side, bool coded>
__device__ __forceinline__ void update_half_moments(const Panel<kind, side, coded>& panel, const Control* control,
                                                    int half) {
    const Batch& batch = panel.batch;
    const TensorRow row = panel.row();
    const AdamCoefficients c = control->coefficients;
    const int lane = threadIdx.x % kWarp, rank = batch.rank;
    const float* lowrank = reinterpret_cast<const float*>(panel.region(half));
    auto* tables = reinterpret_cast<CodeTables*>(half == 0 ? panel.direction() + kRegionBytes / 2 : panel.region(0));
    load_code_tables(tables);
    // The products sum whole sixteens of ranks: what U has no column for must be 0, not what was here before.
    if (rank % 16 != 0 && threadIdx.x < kHalfPanel) {
        const int r = half * kHalfPanel + static_cast<int>(threadIdx.x);
        *reinterpret_cast<uint4*>(panel.direction() + chunk_offset<kDirectionChunks>(r, rank / kEight)) =
            make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    const index_t first_block = (panel.long0 + half * kHalfPanel) * rank / kQuantBlock;
#pragma unroll 1
    for (int block = panel.warp; block < kHalfPanel * rank / kQuantBlock; block += kTileThreads / kWarp) {
        if ((first_block + block) * kQuantBlock >= batch.moments) break;  // beyond the last panel's end
        const int element = block * kQuantBlock + lane * kEight;
        float g[kEight], u[kEight];
        load8(g, lowrank, element, kEight, DType::float32, true);
        update_moments(u, g, row, batch, first_block + block, c, tables);
        if constexpr (coded) multiply8(u, row.basis_scale, element % rank, kEight, true);
        std::uint32_t bits[kEight];
#pragma unroll
        for (int k = 0; k < kEight; ++k) bits[k] = to_bits16(u[k], kind);
        const int r = half * kHalfPanel + element / rank;
        *reinterpret_cast<uint4*>(panel.direction() + chunk_offset<kDirectionChunks>(r, element % rank / kEight)) =
            pack8(bits);
    }
    __syncthreads();
}

// A warp's new weights in the tile in shared memory, for its products at (row0, column0) of it, which is at
// (matrix_row0, matrix_column0) of the matrix.
template <DType kind, int kChunks>
__device__ __forceinline__ void update_tile_weights(unsigned char* weights, const Accumulators<2, 4>& change,
                                                    const Batch& batch, const TensorRow& row, const Control& control,
                                                    int row0, int column0, index_t matrix_row0,
                                                    index_t matrix_column0) {
    const int lane = threadIdx.x % kWarp, quarter = lane % 4;
    const bool stochastic = kind == DType::bfloat16 && batch.stochastic;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = row0 + m * 16 + h * 8 + lane / 4;
            // Four lanes share the random bits of eight elements, at each of four places: each lane draws for one.
            Philox4x32 drawn{};
            if (stochastic) {
                const index_t element = (matrix_row0 + r) * batch.cols + matrix_column0 + column0 + quarter * 8;
                drawn = random_block(row.seed, control.step, static_cast<std::uint64_t>(element) / kRandomsPerBlock);
            }
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                auto* pair = reinterpret_cast<std::uint32_t*>(
                    weights + chunk_offset<kChunks>(r, (column0 + n * 8) / 8) + quarter * 4);
                const float w0 =
                    adam_weight(to_float(*pair & 0xFFFFu, kind), change[m][n][2 * h], control.coefficients);
                const float w1 =
                    adam_weight(to_float(*pair >> 16, kind), change[m][n][2 * h + 1], control.coefficients);
                if (!stochastic) {
                    *pair = to_bits16(w0, kind) | to_bits16(w1, kind) << 16;
                    continue;
                }
                std::uint32_t random = 0;
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    const std::uint32_t theirs = __shfl_sync(0xFFFFFFFFu, drawn.word[word], lane - quarter + n);
                    random = word == quarter ? theirs : random;
                }
                *pair = float_to_bf16_stochastic(w0, random & 0xFFFFu) |
                        static_cast<std::uint32_t>(float_to_bf16_stochastic(w1, random >> 16)) << 16;
            }
        }
    }
}

// The panel's slab of the weight, 64 short indices at a time: products in the accumulators of eight warps, each of a
// part of 32 x 32; weights changed in shared memory, and from there written in whole chunks.
template <DType kind, Side side, bool coded>
__device__ __forceinline__ void update_panel_weights(const Panel<kind, side, coded>& panel, const Control* control) {
    using P = Panel<kind, side, coded>;
    const Batch& batch = panel.batch;
    const int count = panel.short_tiles();
    const int rank_steps = (batch.rank + 15) / 16;
    const TensorRow row = panel.row();
    const Control own = *control;
    const MatrixView weight = panel.matrix(row.param), basis_matrix = panel.basis();
    // Rows of a tile are rows of W: long ones on the right side, short ones on the left.
    constexpr int kRows = P::kLeft ? kShortTile : kTileEdge;
    constexpr int kChunks = P::kLeft ? P::O::kTransposedChunks : P::O::kRowChunks;
    constexpr int kWarpColumns = P::kLeft ? 4 : 2;
    const int row0 = panel.warp / kWarpColumns * 32, column0 = panel.warp % kWarpColumns * 32;
    const auto load = [&](int i) {
        if (i < count) {
            unsigned char* stage = panel.region(i % kUpdateStages);
            panel.load_basis(stage, basis_matrix, i);
            panel.load_slab(stage + kOperandBytes, weight, i);
        }
        commit_copies();
    };
    load(0);
    for (int i = 0; i < count; ++i) {
        load(i + 1);
        wait_copies<1>();
        __syncthreads();
        const unsigned char* basis = panel.region(i % kUpdateStages);
        unsigned char* weights = panel.region(i % kUpdateStages) + kOperandBytes;
        const unsigned char* first = P::kLeft ? basis : panel.direction();
        const unsigned char* second = P::kLeft ? panel.direction() : basis;
        Accumulators<2, 4> change;
        clear(change);
        using Rows = Layout<false, kDirectionChunks>;
        for (int step = 0; step < rank_steps; ++step) {
            multiply_step<kind, Rows, Rows>(change, first, second, row0, column0, step * 16);
        }

        const index_t short0 = static_cast<index_t>(i) * kShortTile;
        const index_t matrix_row0 = P::kLeft ? short0 : panel.long0, matrix_column0 = P::kLeft ? panel.long0 : short0;
        update_tile_weights<kind, kChunks>(weights, change, batch, row, own, row0, column0, matrix_row0,
                                           matrix_column0);
        __syncthreads();
        auto* to = static_cast<unsigned char*>(row.param);
        for (int j = threadIdx.x; j < kRows * kChunks; j += kTileThreads) {
            const int r = j / kChunks, chunk = j % kChunks;
            const index_t column = matrix_column0 + chunk * kEight;
            if (matrix_row0 + r < batch.rows && column < batch.cols) {
                *reinterpret_cast<uint4*>(to + ((matrix_row0 + r) * batch.cols + column) * 2) =
                    *reinterpret_cast<const uint4*>(weights + chunk_offset<kChunks>(r, chunk));
            }
        }
        __syncthreads();  // the stage is free
    }
}

template <DType kind, Side side, bool coded>
__global__ void __launch_bounds__(kTileThreads, 2) galore_update_kernel(Batch batch, Control* control) {
    const auto panels = static_cast<std::uint32_t>(tiles_along(batch.long_size()));
    const std::uint32_t all = panels * static_cast<std::uint32_t>(batch.count);
    for (std::uint32_t item = blockIdx.x; item < all; item += gridDim.x) {
        const std::uint32_t tensor = item / panels, index = item % panels;
        if (control[tensor].skip != 0) continue;  // found_inf: all panels see it
        const Panel<kind, side, coded> panel{batch, tensor, static_cast<index_t>(index) * kTileEdge,
                                             static_cast<int>(threadIdx.x / kWarp)};
        Control* own = control + tensor;
        Accumulators<4, 4> sums;
        project_panel(panel, sums);
        if constexpr (coded) scale_columns(panel, sums);
        const bool skip = agree_to_skip(sums, own, panels);
        if (index == 0 && threadIdx.x == 0) count_step(panel.row(), skip ? kSkipGradient : 0);
        if (skip) continue;
        store_lowrank(panel, sums);
        update_half_moments(panel, own, 0);
        update_half_moments(panel, own, 1);
        update_panel_weights(panel, own);
    }
}

template <DType kind, bool coded>
auto kernel_for(Side side) {
    return side == Side::left ? galore_update_kernel<kind, Side::left, coded>
                              : galore_update_kernel<kind, Side::right, coded>;
}

template <bool coded>
auto kernel_for(const Batch& batch) {
    return batch.weight_dtype == DType::bfloat16 ? kernel_for<DType::bfloat16, coded>(batch.side)
                                                 : kernel_for<DType::float16, coded>(batch.side);
}

auto kernel_for(const Batch& batch) {
    return is_coded(batch.basis_dtype) ? kernel_for<true>(batch) : kernel_for<false>(batch);
}

// Blocks that the device runs at once; 0 if it can't say, or can't launch cooperatively.
index_t blocks_at_once(const Batch& batch, int device) {
    const DeviceGuard guard(device);
    const auto kernel = kernel_for(batch);
    int each = 0;
    if (guard.error() != cudaSuccess || allow_shared(kernel, kSharedBytes) != cudaSuccess ||
        device_attribute(device, cudaDevAttrCooperativeLaunch) == 0 ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kTileThreads, kSharedBytes) != cudaSuccess) {
        return 0;
    }
    return static_cast<index_t>(each) * device_attribute(device, cudaDevAttrMultiProcessorCount);
}

}  // namespace

const LaunchShape kGaloreUpdateShape{"galore_update", kTileThreads, kSharedBytes};

bool in_one_pass(const Batch& batch, int device) {
    const bool one_dtype = batch.weight_dtype == batch.grad_dtype &&
                           batch.weight_dtype == product_kind(batch.grad_dtype, batch.basis_dtype);
    if (!batch.aligned || !one_dtype || batch.weight_dtype == DType::float32) return false;
    if (batch.rank > kTileEdge || batch.rank % kRankMultiple != 0) return false;
    const index_t panels = tiles_along(batch.long_size()), at_once = blocks_at_once(batch, device);
    // Fewer panels than half the blocks leave multiprocessors idle, which the four launches would not.
    return panels > 0 && panels <= at_once && 2 * panels * batch.count >= at_once;
}

cudaError_t galore_update(const Batch& batch, Control* control, const Queue& queue) {
    const index_t panels = tiles_along(batch.long_size()) * batch.count;
    const index_t at_once = blocks_at_once(batch, queue.device);
    const Grid grid{panels < at_once ? panels : at_once, kTileThreads, kSharedBytes, true};
    return launch(kernel_for(batch), grid, queue, batch, control);
}

}  // namespace gk::cuda
