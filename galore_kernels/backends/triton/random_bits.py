"""Stochastic rounding of bfloat16 weights with the bits of csrc/core/philox.h.

``tl.philox`` of 32-bit counters and a 64-bit seed is Philox4x32-10 with the seed's low and high word as the key: the
bits of ``random_block``, word for word.
"""

from __future__ import annotations

import triton
from triton import language as tl

from galore_kernels.backends.triton.elements import CONTROL_WORDS, STEP_NUMBER, bfloat16_nearest

# Sixteen bits serve one rounding, so one counter value serves eight consecutive elements.
PER_BLOCK = tl.constexpr(8)


@triton.jit
def step_number(control: tl.tensor, tensor: tl.tensor) -> tl.tensor:
    """The number of the step being taken: the stream that its random bits come from."""
    words = control + tensor.to(tl.int64) * CONTROL_WORDS + STEP_NUMBER
    return tl.load(words.to(tl.pointer_type(tl.int64)))


@triton.jit
def _random_words(
    seed: tl.tensor, step: tl.tensor, block: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    # The step's words in the blocks' shape: all of a counter must have one.
    zero = low & 0
    step_low, step_high = zero | (step & 0xFFFFFFFF).to(tl.uint32), zero | (step >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, step_low, step_high)


@triton.jit
def random_of_elements(seed: tl.tensor, step: tl.tensor, element: tl.tensor) -> tl.tensor:
    """The 16 bits of each element, given its index in the weight: eight times the work of random_of_groups."""
    word0, word1, word2, word3 = _random_words(seed, step, element // PER_BLOCK)
    place = (element % PER_BLOCK).to(tl.int32)
    low = tl.where(place < 2, word0, word1)
    high = tl.where(place < 6, word2, word3)
    return (tl.where(place < 4, low, high) >> (16 * (place % 2)).to(tl.uint32)) & 0xFFFF


@triton.jit
def random_of_groups(seed: tl.tensor, step: tl.tensor, block: tl.tensor) -> tl.tensor:
    """The 16 bits of eight elements for each of (rows, n) blocks: (rows, 8 n)."""
    word0, word1, word2, word3 = _random_words(seed, step, block)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def stochastic_bfloat16(x: tl.tensor, random16: tl.tensor) -> tl.tensor:
    """bf16_stochastic of csrc/core/rounding.h: infinities and NaN are rounded to nearest."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = tl.where((bits & 0x7F800000) == 0x7F800000, bfloat16_nearest(bits), (bits + random16) >> 16)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
