"""The benchmark's counts of bytes and operations, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Where kernel_bench.py, run as a script, finds its modules.
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from floor import (
    Limits,
    Work,
    adafactor_work,
    adam_work,
    apollo_work,
    floor_seconds,
    galore_work,
    lowrank_work,
    moments_bytes,
    orient,
    products_work,
)

LIMITS = Limits(bandwidth=10e9, copy=10e9, read=8e9, add=9e9, scale=7e9, rate={"fp32": 1e12, "bf16": 2e12})


def test_orient_is_galore_torchs_std() -> None:
    assert orient((1024, 4096)) == (4096, 1024, "left")
    assert orient((4096, 1024)) == (4096, 1024, "right")
    assert orient((512, 512)) == (512, 512, "right")


@pytest.mark.parametrize(
    ("state", "expected"),
    # 257 elements are two blocks: two moments of 257 codes and 2 absmax of 4 bytes
    [("8bit", 2 * (257 + 8)), ("fp32", 2 * 4 * 257), ("param", 2 * 2 * 257), ("none", 0)],
)
def test_moments_bytes(state: str, expected: int) -> None:
    assert moments_bytes(257, state, itemsize=2) == expected


def test_moments_bytes_refuses_an_unknown_format() -> None:
    with pytest.raises(ValueError, match="8bit, fp32, param, none"):
        moments_bytes(1, "int4", itemsize=2)


def test_adam_work_by_hand() -> None:
    # 2 x 128 fp32: W and G read, W written (1024 B each); moments 2 * (256 + 4) read and written
    assert adam_work((2, 128), 4, "8bit") == Work(2 * 1024 + 520, 1024 + 520, 0)


def test_galore_work_by_hand() -> None:
    # 1024 x 4096 bf16, r = 128: L = 4096, S = 1024. Moments: 524,288 codes and 2,048 absmax, twice.
    moments = 2 * (524_288 + 8_192)
    read = 2 * 8_388_608 + 262_144 + moments
    assert galore_work((1024, 4096), 128, 2, "8bit") == Work(read, 8_388_608 + moments, 2_147_483_648)


def test_lowrank_work_reads_r_instead_of_g_and_halves_the_products() -> None:
    full, low = galore_work((64, 96), 8, 4, "8bit"), lowrank_work((64, 96), 8, 4, "8bit")
    assert full.bytes_read - low.bytes_read == (96 * 64 - 96 * 8) * 4
    assert low.bytes_written == full.bytes_written
    assert low.operations * 2 == full.operations


def test_apollo_work_by_hand() -> None:
    # 1024 x 4096 bf16, r = 1: G twice, W both ways, 8,388,608 B each. Moments: 4,096 codes and 16 absmax, twice.
    moments = 2 * (4_096 + 64)
    assert apollo_work((1024, 4096), 1, 2, "8bit") == Work(3 * 8_388_608 + moments, 8_388_608 + moments, 8_388_608)
    assert apollo_work((4096, 1024), 128, 4, "fp32").operations == 2 * 4096 * 1024 * 128


def test_adafactor_work_by_hand() -> None:
    # 1024 x 4096 bf16: G and W of 8,388,608 B, P of 1024 x 128, means of 4096 rows and 128 columns in float32.
    means = 4 * (4096 + 128)
    read = 2 * 8_388_608 + 262_144 + means
    assert adafactor_work((1024, 4096), 128, 2) == Work(read, 8_388_608 + means, 2_147_483_648)
    means = 4 * (4096 + 1024)  # at full rank
    assert adafactor_work((1024, 4096), None, 2) == Work(2 * 8_388_608 + means, 8_388_608 + means, 0)


def test_products_work_by_hand() -> None:
    # R = G @ P: reads 96 x 64 and 64 x 8, writes 96 x 8; R @ P.T: reads R, writes 96 x 64 (P was counted)
    both = products_work((96, 64), 8, 4, count=2)
    assert both == Work(4 * (6144 + 512 + 768), 4 * (768 + 6144), 2 * 2 * 96 * 64 * 8)
    assert products_work((96, 64), 8, 4, count=1) == Work(4 * (768 + 512), 4 * 6144, 2 * 96 * 64 * 8)


def test_floor_is_the_slower_of_memory_and_products() -> None:
    assert floor_seconds(Work(6_000_000_000, 4_000_000_000, 10), LIMITS, "fp32") == pytest.approx(1.0)
    assert floor_seconds(Work(10, 10, 3_000_000_000_000), LIMITS, "fp32") == pytest.approx(3.0)
    assert floor_seconds(Work(10, 10, 3_000_000_000_000), LIMITS, "bf16") == pytest.approx(1.5)
