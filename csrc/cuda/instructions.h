// What C++ has no words for: the block's shared memory, PTX's asynchronous copies and matrix instructions, and a
// flag between blocks. Everything here runs from sm_80 on. The tests that execute the kernels on a CPU bring a file of
// the same name, which comes first on their include path.
#pragma once

#include <cuda_runtime.h>

#include "core/platform.h"

namespace gk::cuda {

// The dynamic shared memory of the block: the only kind that the kernels use.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char block_memory[];
    return block_memory;
}

namespace detail {
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
}  // namespace detail

// Starts a copy of 16 bytes to shared memory past the registers and the first-level cache; if !valid, of 16 zeros.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(detail::shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are still under way. Others' need a barrier as well.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8 and gets, of each
// matrix, elements 2 * (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(row))
                 : "memory");
}

// The same, of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(row))
                 : "memory");
}

// c (16 x 8, fp32) += a (16 x 16) @ b (16 x 8), of bf16 or fp16. Lane l holds, with g = l / 4 and t = 2 * (l % 4):
// a[0..3]: rows g, g + 8, g, g + 8, columns t and t + 1, in the last two 8 further; b: rows t and t + 1, in b1 8
// further, column g; c[0], c[1]: row g, columns t and t + 1; c[2], c[3]: row g + 8.
template <DType dtype>
__device__ __forceinline__ void multiply_accumulate(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                                    std::uint32_t b1) {
    static_assert(dtype == DType::bfloat16 || dtype == DType::float16, "the matrix units' 16-bit formats");
    if constexpr (dtype == DType::bfloat16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Adds to a counter that other blocks observe; what this thread wrote before is visible to whoever observes the sum.
__device__ __forceinline__ void publish_add(std::uint32_t* counter, std::uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;\n" ::"l"(counter), "r"(value) : "memory");
}

__device__ __forceinline__ std::uint32_t observe(const std::uint32_t* counter) {
    std::uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// The same number, which the compiler takes for a new one: what depends on it is computed here, not kept from before.
__device__ __forceinline__ std::uint64_t not_known_before(std::uint64_t x) {
    asm volatile("" : "+l"(x));
    return x;
}

// Once in every round of a loop that waits for other blocks.
__device__ __forceinline__ void pause() { __nanosleep(64); }

}  // namespace gk::cuda
