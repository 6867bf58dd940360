// In place of csrc/cuda/instructions.h: the same functions, executed by the fibers of execution.h.
#pragma once

#include <cuda_runtime.h>

#include "core/platform.h"

namespace gk::cuda {

inline unsigned char* shared_memory() { return simt::shared_memory(); }

inline void copy_async16(void* shared, const void* global, bool valid) { simt::copy_async16(shared, global, valid); }
inline void commit_copies() { simt::commit_copies(); }

template <int kPending>
void wait_copies() {
    simt::wait_copies(kPending);
}

inline void load_matrices(std::uint32_t (&r)[4], const void* row) { simt::load_matrices(r, row, false); }
inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) { simt::load_matrices(r, row, true); }

template <DType dtype>
void multiply_accumulate(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    static_assert(dtype == DType::bfloat16 || dtype == DType::float16);
    simt::multiply_accumulate(c, a, b0, b1, dtype == DType::bfloat16);
}

inline void publish_add(std::uint32_t* counter, std::uint32_t value) {
    simt::yield();
    *counter += value;
    simt::note_progress();
}

inline std::uint32_t observe(const std::uint32_t* counter) {
    simt::yield();
    return *counter;
}

// Of the compiler's concern alone.
inline std::uint64_t not_known_before(std::uint64_t x) { return x; }

inline void pause() { simt::pause(); }

}  // namespace gk::cuda
