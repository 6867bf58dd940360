// What a launch is told: N tensors of one shape, and a control row for each of them. The Python side of both is
// galore_kernels/backends/batch.py.
#pragma once

#include "core/adam.h"
#include "core/platform.h"
#include "core/tensor_row.h"

namespace gk::cuda {

// Whether a basis of that dtype is quantized.
GK_HOST_DEVICE bool is_coded(DType basis_dtype) { return basis_dtype == DType::int8 || basis_dtype == DType::int4; }

struct Batch {
    const TensorRow* table;  // on the device; null: the one row travels with the launch
    TensorRow single;
    index_t count;
    index_t rows, cols;  // at full rank: the elements, and 1
    index_t moments;     // elements of each moment
    int rank;            // 0 at full rank
    Side side;
    DType weight_dtype, grad_dtype, basis_dtype;
    const std::uint16_t* magnitudes;  // of the entries of drawn bases (core/random_basis.h); null for bases in memory
    bool eight_bit;
    bool stochastic;
    bool aligned;  // every address and every row: a multiple of 16 bytes

    GK_HOST_DEVICE_MEMBER index_t long_size() const { return side == Side::right ? rows : cols; }
    GK_HOST_DEVICE_MEMBER index_t short_size() const { return side == Side::right ? cols : rows; }
    // By value: a reference to a kernel's parameter would put all of it into local memory.
    GK_HOST_DEVICE_MEMBER TensorRow row(index_t i) const { return table != nullptr ? table[i] : single; }
};

// Why a tensor is left alone. Bits, because projections of many blocks set the first.
constexpr std::int32_t kSkipGradient = 1;  // not representable; counted
constexpr std::int32_t kSkipFoundInf = 2;  // the caller's, who counts it

struct Control {
    AdamCoefficients coefficients;
    std::int32_t skip;
    std::uint32_t arrived;  // panels whose gradients have been looked at, and from bit 16 on those found wanting
    std::uint64_t step;     // the number of the step being taken
    double step_size;       // coefficients.step_size, not rounded
    std::uint32_t unused[2];
};
static_assert(sizeof(Control) == 64, "the pipeline allocates sixteen words for each tensor");

}  // namespace gk::cuda
