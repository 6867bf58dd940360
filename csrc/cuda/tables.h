// The 8-bit code's two maps in shared memory, where lanes may read different entries at once.
#pragma once

#include "core/dynamic_code.h"
#include "cuda/instructions.h"

namespace gk::cuda {

// Not __constant__: that memory serves a warp's lanes one address at a time.
static __device__ const DynamicMap global_signed_map = make_dynamic_map(true);
static __device__ const DynamicMap global_unsigned_map = make_dynamic_map(false);

struct CodeTables {
    DynamicMap first;   // signed: first moments
    DynamicMap second;  // unsigned: second moments
};

// By all threads of the block, in front of a barrier.
__device__ __forceinline__ void load_code_tables(CodeTables* tables) {
    for (int i = threadIdx.x; i < kCodes; i += blockDim.x) {
        tables->first.values[i] = global_signed_map.values[i];
        tables->second.values[i] = global_unsigned_map.values[i];
        if (i < kCodes - 1) {
            tables->first.thresholds[i] = global_signed_map.thresholds[i];
            tables->second.thresholds[i] = global_unsigned_map.thresholds[i];
        }
    }
}

}  // namespace gk::cuda
