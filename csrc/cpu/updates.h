// Whole updates of tensors of one shape, one tensor after another, each by the stages of Kernels.
//
// A tensor whose gradient is not representable keeps weight and moments, and counts a skipped step; else it counts a
// step. Nothing is allocated here and nothing throws: what the stages pass to one another lies in `scratch`, which
// serves one tensor after another.
#pragma once

#include <vector>

#include "../core/tensor_row.h"
#include "kernels.h"

namespace gk::cpu {

struct Batch {
    std::vector<TensorRow> tensors;
    index_t rows, cols;  // at full rank: the elements, and 1
    index_t moments;     // elements of each moment
    index_t rank;        // 0 at full rank
    Side side;
    DType weight_dtype, basis_dtype;
    const std::uint16_t* magnitudes;  // of the entries of drawn bases (core/random_basis.h); null for bases in memory
    bool stochastic;
    // The second basis (long, kept) of a single matrix both of whose sides are projected, else null.
    const void* long_basis;
    DType long_basis_dtype;
    index_t kept;
    Matrices gradient;  // Adafactor's, as its second moment sees it; of the other updates empty

    index_t long_size() const { return side == Side::right ? rows : cols; }
    index_t short_size() const { return side == Side::right ? cols : rows; }
};

// One of each tensor, all of a dtype.
struct Gradients {
    std::vector<const void*> data;
    DType dtype;
};

// The size of the scratch memory of the batch's update, which may begin at any multiple of 8.
index_t scratch_bytes(const Batch& batch, int threads);

// The step in the scalars is not read: each tensor has its own. scale: GaLore's alpha.
void adam_update(const Batch& batch, const Gradients& gradients, const AdamScalars& scalars, int threads);
void galore_update(const Batch& batch, const Gradients& gradients, const AdamScalars& scalars, double scale,
                   void* scratch, int threads);
// The gradients are projected already.
void lowrank_update(const Batch& batch, const Gradients& gradients, const AdamScalars& scalars, double scale,
                    void* scratch, int threads);
// The previous norm is each tensor's own.
void apollo_update(const Batch& batch, const Gradients& gradients, const AdamScalars& scalars, const FactorScalars& how,
                   void* scratch, int threads);
// Of rank 0: at full rank. is_projected: the gradients are projected already.
void adafactor_update(const Batch& batch, const Gradients& gradients, const AdafactorScalars& scalars, double scale,
                      bool is_projected, void* scratch, int threads);

}  // namespace gk::cpu
