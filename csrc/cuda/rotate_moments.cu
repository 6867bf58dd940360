// rotate_moments: m' = m @ T and v' = |(v - c m*m) @ (T*T) + c m'*m'|, of 8-bit or fp32 moments.
//
// A thread block makes eight quantization blocks of the result, a thread one element of each: quantization blocks that
// begin in the same column, so that a number of T serves all eight. The rows of m and v that they need pass through
// shared memory, decoded once, as many columns at a time as fit; then the result does, for a warp to encode a block.
#include "core/rotate_moments.h"
#include "cuda/adam_block.h"
#include "cuda/kernels.h"

namespace gk::cuda {
namespace {

constexpr int kThreads = kQuantBlock;
constexpr int kBlocksEach = kThreads / kLanes;
constexpr int kMostRows = kBlocksEach * kQuantBlock;  // where a row has one element
constexpr int kStaged = 2 * kMostRows;                // pairs of m and variance
constexpr std::size_t kStagedBytes = kStaged * sizeof(float2);
constexpr std::size_t kSharedBytes = kStagedBytes + sizeof(CodeTables);
static_assert(2 * kMostRows * sizeof(float) <= kStagedBytes, "m' and v' take the place of what they were made of");
static_assert(kSharedBytes <= kSharedBytesWithoutAsking);

// How the quantization blocks of an (L, r') result lie in its rows.
struct Blocks {
    index_t count;
    int period;   // this many blocks further, one begins in the same column
    int rows;     // that a block has elements of, at most
    int columns;  // of m and v at a time
};

Blocks blocks_of(index_t long_size, int rank) {
    int common = 1;  // of rank and kQuantBlock, a power of two
    while (common < kQuantBlock && rank % (2 * common) == 0) common *= 2;
    const int rows = (rank - common + kQuantBlock - 1) / rank + 1;
    return Blocks{quant_blocks(long_size * rank), rank / common, rows, kStaged / (kBlocksEach * rows)};
}

__device__ __forceinline__ float moment_at(const void* moment, const float* absmax, const DynamicMap& map, index_t i) {
    if (absmax == nullptr) return static_cast<const float*>(moment)[i];
    return decode(static_cast<const std::uint8_t*>(moment)[i], absmax[i / kQuantBlock], map.values);
}

__global__ void __launch_bounds__(kThreads)
    rotate_moments_kernel(MomentMatrix source, MomentMatrix target, Blocks blocks, const float* rotation,
                          const float* step, double beta1, double beta2, bool vector) {
    auto* staged = reinterpret_cast<float2*>(shared_memory());
    auto* tables = reinterpret_cast<CodeTables*>(shared_memory() + kStagedBytes);
    load_code_tables(tables);
    const float c = squared_mean_factor(beta1, beta2, static_cast<index_t>(*step));
    const unsigned period = static_cast<unsigned>(blocks.period);
    const index_t block0 = static_cast<index_t>(blockIdx.x / period) * kBlocksEach * period + blockIdx.x % period;
    const index_t first = block0 * kQuantBlock, row0 = first / target.rank;
    const int offset = static_cast<int>(first - row0 * target.rank);
    const int rows_apart = static_cast<int>(static_cast<index_t>(period) * kQuantBlock / target.rank);
    const int own_row = (offset + static_cast<int>(threadIdx.x)) / target.rank;
    const float* factor = rotation + (offset + static_cast<int>(threadIdx.x)) % target.rank;

    float m[kBlocksEach] = {}, v[kBlocksEach] = {};
    for (int column0 = 0; column0 < source.rank; column0 += blocks.columns) {
        const int columns = source.rank - column0 < blocks.columns ? source.rank - column0 : blocks.columns;
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < kBlocksEach * blocks.rows * columns; i += kThreads) {
            const int r = i / columns, column = i % columns;
            const index_t row = row0 + static_cast<index_t>(r / blocks.rows) * rows_apart + r % blocks.rows;
            float2 pair = make_float2(0.0f, 0.0f);
            if (row < target.rows) {
                const index_t at = row * source.rank + column0 + column;
                pair.x = moment_at(source.m, source.m_absmax, tables->first, at);
                pair.y = variance_of_moments(pair.x, moment_at(source.v, source.v_absmax, tables->second, at), c);
            }
            staged[i] = pair;
        }
        __syncthreads();
#pragma unroll 2
        for (int column = 0; column < columns; ++column) {
            const float t = *factor;
            factor += target.rank;
#pragma unroll
            for (int i = 0; i < kBlocksEach; ++i) {
                const float2 pair = staged[(i * blocks.rows + own_row) * columns + column];
                m[i] = fmaf(pair.x, t, m[i]);
                v[i] = fmaf(pair.y, t * t, v[i]);
            }
        }
    }

    __syncthreads();
    auto* rotated_m = reinterpret_cast<float*>(shared_memory());
    float* rotated_v = rotated_m + kMostRows;
#pragma unroll
    for (int i = 0; i < kBlocksEach; ++i) {
        rotated_m[i * kQuantBlock + threadIdx.x] = m[i];
        rotated_v[i * kQuantBlock + threadIdx.x] = second_moment_of_variance(v[i], m[i], c);
    }
    __syncthreads();
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const index_t block = block0 + static_cast<index_t>(warp) * period;
    if (block >= blocks.count) return;
    const index_t own_first = block * kQuantBlock + lane * kEight;
    const index_t count = target.rows * target.rank - own_first;
    float own_m[kEight], own_v[kEight];
    load8(own_m, rotated_m, warp * kQuantBlock + lane * kEight, count, DType::float32, true);
    load8(own_v, rotated_v, warp * kQuantBlock + lane * kEight, count, DType::float32, true);
    const CodedMoment coded_m{target.m, target.m_absmax, &tables->first, true};
    const CodedMoment coded_v{target.v, target.v_absmax, &tables->second, false};
    store_moments(own_m, own_v, coded_m, coded_v, target.m_absmax != nullptr, block, own_first, count, vector, lane);
}

}  // namespace

const LaunchShape kRotateMomentsShape{"rotate_moments", kThreads, kSharedBytes};

cudaError_t rotate_moments(const MomentMatrix& source, const MomentMatrix& target, const float* rotation,
                           const float* step, double beta1, double beta2, const Queue& queue) {
    const Blocks blocks = blocks_of(target.rows, target.rank);
    if (blocks.count == 0) return cudaSuccess;
    const index_t grid = divide_up(divide_up(blocks.count, blocks.period), kBlocksEach) * blocks.period;
    return launch(rotate_moments_kernel, Grid{grid, kThreads, kSharedBytes}, queue, source, target, blocks, rotation,
                  step, beta1, beta2, is_aligned(target.m) && is_aligned(target.v));
}

}  // namespace gk::cuda
