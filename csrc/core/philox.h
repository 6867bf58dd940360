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

GK_HOST_DEVICE Philox4x32 philox4x32_10(const Philox4x32& counter, std::uint32_t key0, std::uint32_t key1) {
    std::uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = static_cast<std::uint64_t>(0xD2511F53u) * c0;
        const std::uint64_t product1 = static_cast<std::uint64_t>(0xCD9E8D57u) * c2;
        const std::uint32_t next0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
        const std::uint32_t next2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
        c1 = static_cast<std::uint32_t>(product1);
        c3 = static_cast<std::uint32_t>(product0);
        c0 = next0;
        c2 = next2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return Philox4x32{{c0, c1, c2, c3}};
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
