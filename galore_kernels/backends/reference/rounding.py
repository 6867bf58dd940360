"""Counter-based random bits (Philox4x32-10) and the one rounding at the weight's store."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps to the same bits as uint64."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: int, stream: int | Tensor, blocks: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words for each 64-bit counter in ``blocks``.

    Key = ``seed`` (64 bits), counter = (block, ``stream``), each as low and high 32 bits. Returns int64 (N, 4).
    ``stream``: a number, or an int64 tensor of one, which is then not read back from its device.
    """
    words = [
        blocks & _MASK,
        (blocks >> 32) & _MASK,
        torch.zeros_like(blocks) + (stream & _MASK),
        torch.zeros_like(blocks) + ((stream >> 32) & _MASK),
    ]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(words[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], _MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    return torch.stack(words, dim=1)


def random_bits16(seed: int, stream: int | Tensor, numel: int, device: torch.device) -> Tensor:
    """16 random bits for each of ``numel`` elements, int64: eight elements share a Philox block."""
    blocks = torch.arange(-(-numel // 8), dtype=torch.int64, device=device)
    words = philox(seed, stream, blocks)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2)
    return halves.flatten()[:numel]


def stochastic_bfloat16(x: Tensor, seed: int, stream: int | Tensor) -> Tensor:
    """Rounds float32 up or down to bfloat16 with the probability that keeps the mean; non-finite values as usual."""
    bits = x.flatten().view(torch.int32).to(torch.int64) & _MASK
    rounded = (bits + random_bits16(seed, stream, x.numel(), x.device)) & 0xFFFF0000
    signed = torch.where(rounded > 0x7FFFFFFF, rounded - (_MASK + 1), rounded).to(torch.int32)
    stochastic = signed.view(torch.float32).view(x.shape).to(torch.bfloat16)
    return torch.where(torch.isfinite(x), stochastic, x.to(torch.bfloat16))


def rounded(value: Tensor, dtype: torch.dtype, rounding_seed: int | None, step: int | Tensor) -> Tensor:
    """Float32 ``value`` in the weight's dtype, rounded once. ``step`` is the update's number, from 1."""
    return value.to(dtype) if rounding_seed is None else stochastic_bfloat16(value, rounding_seed, step)
