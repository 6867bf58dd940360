// A group of 256 int8 weights of one row, by one warp: eight consecutive codes to a lane.
#pragma once

#include "core/quantized_weight.h"
#include "cuda/adam_block.h"

namespace gk::cuda {

static_assert(kWeightGroup == kLanes * kEight, "a group is a warp's work");

// The new codes and scale of group `group` of row `weight_row`. x moves the lane's eight weights, and is 0 beyond the
// row's end. All lanes of the warp call it.
__device__ __forceinline__ void update_weight_group(const Batch& batch, const TensorRow& row, const Control& control,
                                                    const float (&x)[kEight], index_t weight_row, index_t group) {
    const int lane = threadIdx.x % kLanes;
    const index_t column = group * kWeightGroup + lane * kEight;
    const index_t first = weight_row * batch.cols + column, count = batch.cols - column;
    float* scale = row.weight_scale + weight_row * weight_groups(batch.cols) + group;
    const float old_scale = *scale;
    std::uint32_t code[kEight];
    detail::load_codes8(code, row.param, first, count, batch.aligned);
    float w[kEight];
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
        w[k] = adam_weight(whole_number<8>(code[k], 0) * old_scale, x[k], control.coefficients);
    }
    const float absmax = block_absmax(w);  // also tells that every lane has read the old scale
    const float new_scale = gk::weight_scale(absmax, old_scale);
    const RandomBits8 random(row.seed, control.step, first);
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
        code[k] = static_cast<std::uint8_t>(weight_code(w[k], new_scale, random[k]));
    }
    detail::store_codes8(row.param, code, first, count, batch.aligned);
    if (lane == 0) *scale = new_scale;
}

}  // namespace gk::cuda
