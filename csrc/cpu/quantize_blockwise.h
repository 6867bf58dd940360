// quantize_blockwise, dequantize_blockwise: tensors to and from 8-bit codes with one absmax per block of 256.
#pragma once

#include "elements.h"
#include "encode_block.h"
#include "kernels.h"

namespace gk::cpu::GK_ISA {

// Consecutive blocks that one thread takes at a time: enough work to be worth the hand-over.
constexpr index_t kBlocksPerTask = 64;

// Calls f(block, first element, elements) for every block.
template <class F>
static void for_each_block(index_t n, int threads, const F& f) {
    const index_t blocks = quant_blocks(n);
    for_each_task(ceil_div(blocks, kBlocksPerTask), threads, [&](index_t task, int) {
        const index_t end = at_most((task + 1) * kBlocksPerTask, blocks);
        for (index_t block = task * kBlocksPerTask; block < end; ++block) {
            const index_t first = block * kQuantBlock;
            f(block, first, at_most(kQuantBlock, n - first));
        }
    });
}

static void quantize_blockwise(const void* x, DType dtype, index_t n, bool is_signed, std::uint8_t* codes,
                               float* absmax, int threads) {
    with_dtype(dtype, [&](auto element) {
        const auto* source = static_cast<const decltype(element)*>(x);
        for_each_block(n, threads, [&](index_t block, index_t first, index_t count) {
            float values[kQuantBlock];
            load_row(source + first, count, values);
            absmax[block] = is_signed ? encode_block<true>(values, count, codes + first)
                                      : encode_block<false>(values, count, codes + first);
        });
    });
}

template <bool kSigned>
static void dequantize_as(const std::uint8_t* codes, const float* absmax, index_t n, float* out, int threads) {
    for_each_block(n, threads, [&](index_t block, index_t first, index_t count) {
        float values[kQuantBlock];
        decode_block<kSigned>(codes + first, count, values);
        for_lanes(count, [&](index_t i, auto lanes) {
            store_as(out + first + i, load_as<decltype(lanes)>(values + i) * absmax[block]);
        });
    });
}

static void dequantize_blockwise(const std::uint8_t* codes, const float* absmax, index_t n, bool is_signed, float* out,
                                 int threads) {
    const auto run = is_signed ? dequantize_as<true> : dequantize_as<false>;
    run(codes, absmax, n, out, threads);
}

}  // namespace gk::cpu::GK_ISA
