// The few vector operations that the matrix products need; everything element-wise is left to the compiler.
#pragma once

#include "../core/platform.h"
#include "thread_pool.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace gk::cpu::GK_ISA {

// A register tile is kTileRows x (kTileVectors * kLanes) accumulators; with a broadcast and the vectors of one
// step they fill the registers (32 with AVX-512, 16 without).
#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kLanes = 16;
constexpr int kTileRows = 14;
static inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
static inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
static inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
using Vector = __m256;
constexpr int kLanes = 8;
constexpr int kTileRows = 6;
static inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
static inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
static inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Vector __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
static inline Vector load(const float* p) {
    Vector x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
static inline void store(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }
static inline Vector broadcast(float x) { return Vector{x, x, x, x}; }
static inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
#endif
constexpr int kTileVectors = 2;

// The same lanes as bits, and as 16-bit halves in memory. With these the compiler's vector types run core's templates.
typedef std::uint32_t VectorBits __attribute__((vector_size(4 * kLanes)));
#if defined(__AVX512F__)
static inline VectorBits load_halves(const std::uint16_t* p) {
    return reinterpret_cast<VectorBits>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
static inline void store_halves(std::uint16_t* p, VectorBits x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
}
#else
typedef std::uint16_t HalfVector __attribute__((vector_size(2 * kLanes)));
static inline VectorBits load_halves(const std::uint16_t* p) {
    HalfVector halves;
    std::memcpy(&halves, p, sizeof halves);
    return __builtin_convertvector(halves, VectorBits);
}
static inline void store_halves(std::uint16_t* p, VectorBits x) {
    const HalfVector halves = __builtin_convertvector(x, HalfVector);
    std::memcpy(p, &halves, sizeof halves);
}
#endif
constexpr int kTileColumns = kTileVectors * kLanes;

static inline index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }
static inline index_t at_most(index_t a, index_t b) { return a < b ? a : b; }

// parallel_for over a lambda (index, slot).
template <class F>
static void for_each_task(index_t tasks, int threads, const F& f) {
    parallel_for(
        tasks, threads,
        [](void* context, index_t index, int slot) { (*static_cast<const F*>(context))(index, slot); },
        const_cast<F*>(&f));
}

}  // namespace gk::cpu::GK_ISA
