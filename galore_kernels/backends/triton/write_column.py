"""``write_column``: addresses into a table on the device, as arguments of launches: nothing has to be copied there."""

from __future__ import annotations

from collections.abc import Sequence

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.triton.launch import launch

_VALUES = 16  # in one launch


@triton.jit(do_not_specialize=["first", "stride", "count", *(f"value{i}" for i in range(_VALUES))])
def write_column_kernel(
    table: tl.tensor,
    first: tl.int64,
    stride: tl.int64,
    count: tl.int32,
    value0: tl.int64,
    value1: tl.int64,
    value2: tl.int64,
    value3: tl.int64,
    value4: tl.int64,
    value5: tl.int64,
    value6: tl.int64,
    value7: tl.int64,
    value8: tl.int64,
    value9: tl.int64,
    value10: tl.int64,
    value11: tl.int64,
    value12: tl.int64,
    value13: tl.int64,
    value14: tl.int64,
    value15: tl.int64,
) -> None:
    # By way of uint64: the interpreter holds some numbers in fewer bits than it says.
    target = table + first
    tl.store(target, value0.to(tl.uint64), count > 0)
    tl.store(target + stride, value1.to(tl.uint64), count > 1)
    tl.store(target + 2 * stride, value2.to(tl.uint64), count > 2)
    tl.store(target + 3 * stride, value3.to(tl.uint64), count > 3)
    tl.store(target + 4 * stride, value4.to(tl.uint64), count > 4)
    tl.store(target + 5 * stride, value5.to(tl.uint64), count > 5)
    tl.store(target + 6 * stride, value6.to(tl.uint64), count > 6)
    tl.store(target + 7 * stride, value7.to(tl.uint64), count > 7)
    tl.store(target + 8 * stride, value8.to(tl.uint64), count > 8)
    tl.store(target + 9 * stride, value9.to(tl.uint64), count > 9)
    tl.store(target + 10 * stride, value10.to(tl.uint64), count > 10)
    tl.store(target + 11 * stride, value11.to(tl.uint64), count > 11)
    tl.store(target + 12 * stride, value12.to(tl.uint64), count > 12)
    tl.store(target + 13 * stride, value13.to(tl.uint64), count > 13)
    tl.store(target + 14 * stride, value14.to(tl.uint64), count > 14)
    tl.store(target + 15 * stride, value15.to(tl.uint64), count > 15)


def _write(table: Tensor, first: int, stride: int, values: Sequence[int]) -> None:
    for done in range(0, len(values), _VALUES):
        some = [*values[done : done + _VALUES]]
        padded = some + [0] * (_VALUES - len(some))
        launch(write_column_kernel, 1, table.device, table, first + done * stride, stride, len(some), *padded, warps=1)


def write_column(table: Tensor, column: int, values: Sequence[int]) -> None:
    """table[:, column] = values."""
    _write(table, column, table.shape[1], values)


def write_row(table: Tensor, values: Sequence[int]) -> None:
    """table[0] = values."""
    _write(table, 0, 1, values)
