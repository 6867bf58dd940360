// random_basis: the entries of a random basis, to look at. A thread draws eight columns of a row.
#include "cuda/random_basis.h"

#include "cuda/kernels.h"

namespace gk::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) random_basis_kernel(std::uint16_t* entries, index_t rows, index_t rank,
                                                                std::uint64_t seed, const std::uint16_t* magnitudes) {
    const index_t block = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x;
    const index_t in_row = basis_blocks(rank);
    if (block >= rows * in_row) return;
    const index_t row = block / in_row, column = (block - row * in_row) * kEight;
    std::uint32_t bits[kEight];
    draw_entries8(bits, seed, block, magnitudes);
    store_bits8(entries, bits, row * rank + column, rank - column, rank % kEight == 0);
}

}  // namespace

const LaunchShape kRandomBasisShape{"random_basis", kThreads, 0};

cudaError_t random_basis(std::uint16_t* entries, index_t rows, index_t rank, std::uint64_t seed,
                         const std::uint16_t* magnitudes, const Queue& queue) {
    const index_t blocks = divide_up(rows * basis_blocks(rank), kThreads);
    if (blocks == 0) return cudaSuccess;
    return launch(random_basis_kernel, Grid{blocks, kThreads}, queue, entries, rows, rank, seed, magnitudes);
}

}  // namespace gk::cuda
