// Where the tensors of one update lie: a row of the table that galore_kernels/backends/batch.py makes.
#pragma once

#include "platform.h"

namespace gk {

struct TensorRow {
    void* param;
    const void* basis;
    void* m;                   // Adam's moments; or Adafactor's first one, its second one if it is kept whole,
    void* v;                   //
    float* m_absmax;           // and else its means over rows
    float* v_absmax;           // and over columns
    const float* basis_scale;  // of the columns; null unless the basis is quantized
    float* weight_scale;       // of a row's groups of 256; null unless the weight is int8
    float* step;
    index_t* skipped;
    std::uint64_t seed;
    float* scaled_norm;        // null but for apollo_update
    std::uint64_t basis_seed;  // of a drawn basis
    const void* grad;
};
constexpr int kTableColumns = 14;
static_assert(sizeof(TensorRow) == kTableColumns * sizeof(std::int64_t), "a row of the table is int64 numbers");

// A row from its kTableColumns numbers.
inline TensorRow tensor_row(const std::uintptr_t* numbers) {
    static_assert(sizeof(std::uintptr_t) == sizeof(std::int64_t), "addresses have 64 bits");
    TensorRow row;
    std::memcpy(&row, numbers, sizeof row);
    return row;
}

}  // namespace gk
