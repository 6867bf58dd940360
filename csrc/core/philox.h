// Counter-based random bits: Philox4x32-10 of Salmon et al. (Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
//
// An element's bits depend on the seed, the step and its index alone, so every backend, thread count and
// grid draws the same ones and nothing has to be stored.
#pragma once

#include "platform.h"

namespace gk {

struct Philox4x32 {
    std::uint32_t word[4];
};

// Sixteen bits serve one bf16 rounding, so one counter value serves eight consecutive elements.
constexpr int kRandomsPerBlock = 8;

// The ten rounds on 64-bit lanes that hold 32-bit words: W is std::uint64_t, or a CPU kernel's vector of them, and
// multiply(a, factor) the 64-bit product of a's lower half. Upper halves may be left with anything in between.
template <class W, class Multiply>
GK_HOST_DEVICE void philox_rounds(W (&c)[4], std::uint32_t key0, std::uint32_t key1, const Multiply& multiply) {
    for (int round = 0; round < 10; ++round) {
        const W product0 = multiply(c[0], 0xD2511F53u);
        const W product1 = multiply(c[2], 0xCD9E8D57u);
        c[0] = (product1 >> 32) ^ c[1] ^ static_cast<std::uint64_t>(key0);
        c[2] = (product0 >> 32) ^ c[3] ^ static_cast<std::uint64_t>(key1);
        c[1] = product1;
        c[3] = product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

GK_HOST_DEVICE Philox4x32 philox4x32_10(const Philox4x32& counter, std::uint32_t key0, std::uint32_t key1) {
    std::uint64_t c[4] = {counter.word[0], counter.word[1], counter.word[2], counter.word[3]};
    philox_rounds(c, key0, key1, [](std::uint64_t a, std::uint32_t factor) { return (a & 0xFFFFFFFFu) * factor; });
    return Philox4x32{{static_cast<std::uint32_t>(c[0]), static_cast<std::uint32_t>(c[1]),
                       static_cast<std::uint32_t>(c[2]), static_cast<std::uint32_t>(c[3])}};
}

// The four words for elements 8 * block .. 8 * block + 7; stream is the number of the step being taken.
GK_HOST_DEVICE Philox4x32 random_block(std::uint64_t seed, std::uint64_t stream, std::uint64_t block) {
    const Philox4x32 counter{{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                              static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)}};
    return philox4x32_10(counter, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

// Element i of its block of eight: word i / 2, low half for even i.
GK_HOST_DEVICE std::uint32_t random_bits16(const Philox4x32& random, int i) {
    return (random.word[i / 2] >> (16 * (i % 2))) & 0xFFFFu;
}

}  // namespace gk
