// One build of the kernels, for the instruction set GK_ISA.
#if defined(__AVX512BF16__)
// The byte permutations of the 8-bit code: all processors with bf16 products have them except Cooper Lake, which takes
// the kernels below these.
#pragma GCC target("avx512vbmi")
#define GK_BYTE_PERMUTES
#endif

#include "kernels.h"

#include "adafactor.h"
#include "adam_update.h"
#include "back_project_update.h"
#include "project.h"
#include "random_basis.h"
#include "rotate_moments.h"
#include "scaled_gradient_update.h"

#define GK_STRING_OF(name) #name
#define GK_STRING(name) GK_STRING_OF(name)

namespace gk::cpu::GK_ISA {

static index_t workspace_bytes(index_t short_size, index_t rank, DType weight_dtype, int threads) {
    const index_t project_floats = project_workspace_floats(short_size, rank, threads);
    const index_t back_floats = back_project_workspace_floats(short_size, rank, weight_dtype, threads);
    // The last term: the workspace need not begin at a cache line.
    return static_cast<index_t>(sizeof(float)) *
           ((project_floats > back_floats ? project_floats : back_floats) + kLineFloats);
}

static void random_bits(std::uint64_t seed, std::uint64_t stream, index_t n, std::uint16_t* out) {
    for (index_t first = 0; first < n; first += kQuantBlock) {
        const index_t count = at_most(kQuantBlock, n - first);
        RandomBuffer<kQuantBlock> buffer;
        const std::uint16_t* bits = random_row(WeightRounding{true, seed, stream}, first, count, buffer);
        std::memcpy(out + first, bits, static_cast<std::size_t>(count) * sizeof *bits);
    }
}

extern const Kernels kernels;
const Kernels kernels = {GK_STRING(GK_ISA),
                         quantize_blockwise,
                         dequantize_blockwise,
                         scale_and_check,
                         adam_update,
                         project,
                         lowrank_adam,
                         back_project_update,
                         workspace_bytes,
                         rotate_moments,
                         rotate_workspace_bytes,
                         random_basis,
                         row_squares,
                         gradient_factors,
                         scaled_gradient_update,
                         sum_of_squares,
                         adafactor_direction,
                         random_bits};

}  // namespace gk::cpu::GK_ISA
