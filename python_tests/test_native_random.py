"""csrc/core/philox.h, csrc/core/rounding.h: counter-based bits and the rounding of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_calls import Scalars, adam_update, bits, random_state
from numpy.typing import NDArray
from torch import Tensor

from galore_kernels import _native


def random_words(seed: int, stream: int, n: int) -> list[int]:
    return [int(x) for x in np.frombuffer(_native.philox(seed, stream, n), dtype="<u4")]


def test_philox_known_answers() -> None:
    """Random123's vectors for philox4x32-10, those that a counter (block, stream) and a key (seed) can express."""
    assert random_words(0, 0, 8) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def philox_reference(seed: int, stream: int, block: int) -> list[int]:
    """Salmon et al. 2011, figure 2, in Python's integers."""
    counter = [block & 0xFFFFFFFF, block >> 32, stream & 0xFFFFFFFF, stream >> 32]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_reference_reproduces_random123() -> None:
    """The vector with the digits of pi exercises every word, which the module's own arguments cannot all reach."""
    assert philox_reference(0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]
    assert philox_reference(2**64 - 1, 2**64 - 1, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])  # low word, high word, both
@pytest.mark.parametrize("stream", [0, 1, 2**32 + 5])
def test_bits_of_many_elements(seed: int, stream: int) -> None:
    n = 1003  # not a multiple of 8: the last counter block is used in part
    expected = [word for block in range(126) for word in philox_reference(seed, stream, block)]
    halves = [half for word in expected for half in (word & 0xFFFF, word >> 16)]
    assert np.frombuffer(_native.philox(seed, stream, n), dtype="<u2").tolist() == halves[:n]


def as_u16(x: Tensor) -> NDArray[np.uint16]:
    return x.view(torch.int16).numpy().view(np.uint16)


# Without memory, a zero weight becomes -g / (|g| + 1): a smooth function of the gradient, whose exact value an update
# of fp32 weights shows.
MEMORYLESS = Scalars(lr=1.0, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.0, step=0)


def updated_zeros(
    gradient: Tensor, dtype: torch.dtype = torch.float32, seed: int | None = None, step: int = 0
) -> Tensor:
    state = random_state(gradient.numel(), eight_bit=False, generator=torch.Generator().manual_seed(0))
    param = torch.zeros(gradient.numel(), dtype=dtype)
    adam_update(param, gradient, state, MEMORYLESS.replace(step=step), rounding_seed=seed)
    return param


def rounded_weights(gradient: Tensor, seed: int, step: int = 0) -> Tensor:
    return updated_zeros(gradient, torch.bfloat16, seed, step)


def test_stochastic_rounding_adds_the_bits_of_its_element() -> None:
    gradient = torch.randn(1003, generator=torch.Generator().manual_seed(1))
    exact = updated_zeros(gradient)
    seed, step = 2**40 + 9, 6
    random = np.frombuffer(_native.philox(seed, step + 1, 1003), dtype="<u2").astype(np.uint64)
    expected = ((bits(exact).astype(np.uint64) + random) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(as_u16(rounded_weights(gradient, seed, step)), expected)


def test_stochastic_rounding_has_the_right_mean_and_distribution() -> None:
    n = 200_000
    gradient = torch.full((n,), 0.7)
    exact = updated_zeros(gradient[:1]).item()
    rounded = rounded_weights(gradient, seed=3).float()
    values = rounded.unique()
    assert values.numel() == 2  # the neighbours, nothing else
    spacing = (values[1] - values[0]).item()
    assert values[0].item() < exact < values[1].item()
    up = (exact - values[0].item()) / spacing
    # Of n draws with probability `up`, the share deviates by more than 5 sigma once in 1.7 million seeds.
    sigma = (up * (1 - up) / n) ** 0.5
    assert 0.05 < up < 0.95
    assert abs((rounded == values[1]).double().mean().item() - up) < 5 * sigma
    # Neighbouring elements draw independently: each half of a word, each word of a block has that share too.
    by_position = (rounded == values[1]).view(-1, 8).double().mean(0)
    assert by_position.sub(up).abs().max().item() < 5 * sigma * 8**0.5


def test_other_seed_and_other_step_draw_other_bits() -> None:
    gradient = torch.randn(4096, generator=torch.Generator().manual_seed(2))
    first = rounded_weights(gradient, seed=1)
    assert torch.equal(first, rounded_weights(gradient, seed=1))
    assert not torch.equal(first, rounded_weights(gradient, seed=2))
    assert not torch.equal(first, rounded_weights(gradient, seed=1, step=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    gradient = torch.randn(5003, generator=torch.Generator().manual_seed(4)) * 10.0 ** torch.linspace(-12, 3, 5003)
    rounded = updated_zeros(gradient, dtype)
    np.testing.assert_array_equal(as_u16(rounded), as_u16(updated_zeros(gradient).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_weight_survives_a_step_that_moves_nothing(dtype: torch.dtype) -> None:
    """lr 0: each pattern is read, goes through fp32 and comes back, infinities included."""
    param = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    before = param.clone()
    state = random_state(65536, eight_bit=False, generator=torch.Generator().manual_seed(0))
    adam_update(param, torch.zeros(65536), state, Scalars(lr=0.0))
    number = ~before.isnan()
    assert torch.equal(param[number], before[number])  # by value: -0.0 - (-0.0) is +0.0
    assert param[~number].isnan().all()


@pytest.mark.parametrize("seed", [None, 5])
def test_rounding_near_the_largest_bf16(seed: int | None) -> None:
    """A weight above the largest bf16 overflows to infinity; infinity and NaN stay what they are."""
    param = torch.tensor([3.3895e38, torch.inf, -torch.inf, torch.nan], dtype=torch.bfloat16)
    state = random_state(4, eight_bit=False, generator=torch.Generator().manual_seed(0))
    adam_update(param, torch.zeros(4), state, Scalars(lr=0.0), rounding_seed=seed)
    assert param[0].item() == torch.finfo(torch.bfloat16).max
    assert param[1].item() == torch.inf
    assert param[2].item() == -torch.inf
    assert param[3].isnan()


@pytest.mark.parametrize("seed", [None, 5])
def test_a_nan_whose_mantissa_is_all_ones_stays_nan(seed: int | None) -> None:
    """Rounding adds to the bits: without a special case this one would carry into the sign and become zero."""
    gradient = torch.full((40,), -1, dtype=torch.int32).view(torch.float32)
    assert gradient.isnan().all()
    param = torch.ones(40, dtype=torch.bfloat16)
    state = random_state(40, eight_bit=False, generator=torch.Generator().manual_seed(0))
    adam_update(param, gradient, state, Scalars(), rounding_seed=seed)
    assert param.isnan().all()
