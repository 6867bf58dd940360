// Vectors of kLanes floats. The compiler's own vector types do the arithmetic, so that core's templates run on them as
// on a float; here is what those types lack.
#pragma once

#include <cmath>

#include "../core/rounding.h"
#include "thread_pool.h"

#if defined(__AVX2__)
// The intrinsics' own undefined values (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace gk::cpu::GK_ISA {

// A register tile is kTileRows x (kTileVectors * kLanes) accumulators; with a broadcast and the vectors of one
// step they fill the registers (32 with AVX-512, 16 without).
#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kLanes = 16;
constexpr int kTileRows = 14;
#elif defined(__AVX2__)
using Vector = __m256;
constexpr int kLanes = 8;
constexpr int kTileRows = 6;
#else
typedef float Vector __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;

// The same lanes as bits.
typedef std::uint32_t VectorBits __attribute__((vector_size(4 * kLanes)));

typedef std::int32_t VectorIntegers __attribute__((vector_size(4 * kLanes)));

// Half as many lanes of 64 bits, and the products of their lower halves.
typedef std::uint64_t WideVector __attribute__((vector_size(4 * kLanes)));
constexpr int kWideLanes = kLanes / 2;
static inline WideVector multiply_halves(WideVector a, std::uint32_t factor) {
#if defined(__AVX512F__)
    const __m512i product = _mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(factor));
    return reinterpret_cast<WideVector>(product);
#elif defined(__AVX2__)
    const __m256i product = _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(factor));
    return reinterpret_cast<WideVector>(product);
#else
    return (a & 0xFFFFFFFFu) * static_cast<std::uint64_t>(factor);
#endif
}

static inline Vector load(const float* p) {
    Vector x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
static inline void store(float* p, Vector x) { std::memcpy(p, &x, sizeof x); }

#if defined(__AVX512F__)

static inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
static inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vector square_root(Vector x) { return _mm512_sqrt_ps(x); }
static inline VectorBits load_halves(const std::uint16_t* p) {
    return reinterpret_cast<VectorBits>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
static inline void store_halves(std::uint16_t* p, VectorBits x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
}
static inline Vector load_fp16(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store_fp16(std::uint16_t* p, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX2__)

static inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
static inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vector square_root(Vector x) { return _mm256_sqrt_ps(x); }
static inline VectorBits load_halves(const std::uint16_t* p) {
    return reinterpret_cast<VectorBits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline void store_halves(std::uint16_t* p, VectorBits x) {
    const __m256i words = _mm256_packus_epi32(reinterpret_cast<__m256i>(x), _mm256_setzero_si256());
    const __m256i in_order = _mm256_permute4x64_epi64(words, 0x08);  // packing works within 128-bit halves
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(in_order));
}
static inline Vector load_fp16(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store_fp16(std::uint16_t* p, Vector x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else

static inline Vector broadcast(float x) { return Vector{} + x; }
static inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
static inline Vector square_root(Vector x) {
    for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
    return x;
}
static inline VectorBits load_halves(const std::uint16_t* p) {
    VectorBits x{};
    for (int i = 0; i < kLanes; ++i) x[i] = p[i];
    return x;
}
static inline void store_halves(std::uint16_t* p, VectorBits x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::uint16_t>(x[i]);
}
static inline Vector load_fp16(const std::uint16_t* p) {
    Vector x{};
    for (int i = 0; i < kLanes; ++i) x[i] = fp16_to_float(p[i]);
    return x;
}
static inline void store_fp16(std::uint16_t* p, Vector x) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_fp16(x[i]);
}

#endif

static inline float square_root(float x) { return std::sqrt(x); }

// The largest integer not above x, for magnitudes below 2^31; the instructions for all come after SSE2.
static inline Vector floor_of_small(Vector x) {
    const Vector truncated = __builtin_convertvector(__builtin_convertvector(x, VectorIntegers), Vector);
    return truncated > x ? truncated - 1.0f : truncated;
}
static inline float floor_of_small(float x) { return std::floor(x); }

static inline index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }
static inline index_t at_most(index_t a, index_t b) { return a < b ? a : b; }

// f(i, F{}) over 0 <= i < n: F is Vector while kLanes elements are left, then float, one by one.
template <class F>
[[gnu::always_inline]] static inline void for_lanes(index_t n, const F& f) {
    index_t i = 0;
    for (; i + kLanes <= n; i += kLanes) f(i, Vector{});
    for (; i < n; ++i) f(i, float{});
}

// parallel_for over a lambda (index, slot).
template <class F>
static void for_each_task(index_t tasks, int threads, const F& f) {
    parallel_for(
        tasks, threads, [](void* context, index_t index, int slot) { (*static_cast<const F*>(context))(index, slot); },
        const_cast<F*>(&f));
}

}  // namespace gk::cpu::GK_ISA
