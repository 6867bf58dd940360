"""csrc/cpu/project.h, back_project_update.h, rotate_moments.h: the products against float64, and what is fused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from native_calls import DTYPE_CODES, Scalars, back_project_update, project, random_state, rotate_moments
from torch import Tensor

SIDES = pytest.mark.parametrize("side", ["right", "left"])
FLOAT32_ULP = 2.0**-23

# Tiles are 4, 6 or 14 rows by 8, 16 or 32 columns; sums run in blocks of 256 units (512 bf16 elements); tasks are 8 or
# 16 tiles long; a weight's columns are walked 512 at a time.
SHAPES = [
    (1, 1, 1),  # the smallest
    (1, 7, 1),  # one row
    (7, 1, 1),  # one column
    (14, 32, 32),  # exactly one AVX-512 tile
    (13, 31, 15),  # one less
    (15, 33, 33),  # one more
    (113, 257, 17),  # one row more than a task, one step more than a block of the sum
    (256, 255, 48),  # a rank of one and a half tiles
    (40, 1030, 5),  # two blocks of the sum and a tail; odd depth of the back-projection
    (1030, 530, 130),  # every loop runs more than once, with tails
    (20, 1026, 7),  # bf16 pairs: an odd number of elements in the last block
    (33, 513, 33),
    (300, 70, 70),  # rank = the short dimension
]


def random_matrix(rows: int, cols: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_basis(short: int, rank: int, dtype: torch.dtype) -> Tensor:
    return (random_matrix(short, rank, 2) / math.sqrt(short)).to(dtype)


def short_and_long(rows: int, cols: int, side: str) -> tuple[int, int]:
    return (cols, rows) if side == "right" else (rows, cols)


def exact_project(grad: Tensor, basis: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """The float64 product, and the sum of the magnitudes of its terms, which bounds the error of any order."""
    g, p = grad.double(), basis.double()
    g = g if side == "right" else g.T
    return g @ p, g.abs() @ p.abs()


def check_project(grad: Tensor, basis: Tensor, side: str, inv_grad_scale: float = 1.0) -> None:
    lowrank, representable = project(grad, basis, side, inv_grad_scale=inv_grad_scale)
    exact, magnitude = exact_project(grad, basis, side)
    assert representable
    # Rounding errors of n additions are like a random walk: sqrt(n) of them, times 4, plus the final scaling.
    bound = (4 * math.sqrt(basis.shape[0]) + 2) * FLOAT32_ULP / 2 * magnitude * inv_grad_scale
    assert ((lowrank.double() - exact * inv_grad_scale).abs() <= bound).all()


@SIDES
@pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project(shape: tuple[int, int, int], dtype: torch.dtype, side: str) -> None:
    rows, cols, rank = shape
    short, _ = short_and_long(rows, cols, side)
    check_project(random_matrix(rows, cols, 1, dtype), random_basis(short, rank, dtype), side)


@SIDES
@pytest.mark.parametrize("grad_dtype", list(DTYPE_CODES), ids=str)
@pytest.mark.parametrize("basis_dtype", list(DTYPE_CODES), ids=str)
def test_project_mixed_dtypes(grad_dtype: torch.dtype, basis_dtype: torch.dtype, side: str) -> None:
    short, _ = short_and_long(45, 67, side)
    check_project(random_matrix(45, 67, 1, grad_dtype), random_basis(short, 19, basis_dtype), side)


@SIDES
def test_project_scales_by_the_inverse_gradient_scale(side: str) -> None:
    short, _ = short_and_long(300, 290, side)
    check_project(random_matrix(300, 290, 1), random_basis(short, 20, torch.float32), side, inv_grad_scale=0.3)


@SIDES
def test_project_is_exact_where_the_sums_are(side: str) -> None:
    """Small integers: every product and partial sum is exact, so each element must be right to the last bit."""
    short, _ = short_and_long(50, 531, side)
    grad = random_matrix(50, 531, 3).mul(4).round().bfloat16()
    basis = random_matrix(short, 37, 4).mul(4).round().bfloat16()
    lowrank, _ = project(grad, basis, side)
    assert torch.equal(lowrank.double(), exact_project(grad, basis, side)[0])


@SIDES
@pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [(0, 0), (29, 530), (14, 300)])  # corners: the last tile; the second block
def test_project_reports_what_is_not_representable(
    position: tuple[int, int], bad: float, dtype: torch.dtype, side: str
) -> None:
    grad = random_matrix(30, 531, 1, dtype)
    grad[position] = bad
    short, _ = short_and_long(30, 531, side)
    assert not project(grad, random_basis(short, 8, dtype), side)[1]


def test_project_judges_the_scaled_sum() -> None:
    basis = torch.ones(4, 1)
    grad = torch.full((3, 4), 1e19)  # each is representable, their sum is not
    assert not project(grad, basis, "right")[1]
    assert project(grad, basis, "right", inv_grad_scale=0.25)[1]
    assert not project(grad, basis, "right", inv_grad_scale=float("nan"))[1]


def exact_update(
    weight: Tensor, update: Tensor, basis: Tensor, side: str, scalars: Scalars, scale: float
) -> tuple[Tensor, Tensor]:
    """The new weight in float64, and the bound on the error of its float32 arithmetic."""
    rounded = update.to(basis.dtype).double()
    p = basis.double()
    x, magnitude = rounded @ p.T, rounded.abs() @ p.abs().T
    if side == "left":
        x, magnitude = x.T, magnitude.T
    t = scalars.step + 1
    coefficient = scalars.lr * math.sqrt(1 - scalars.beta2**t) / (1 - scalars.beta1**t) * scale
    decay = 1 - scalars.lr * scalars.weight_decay
    exact = (weight.double() - coefficient * x) * decay
    product_error = (4 * math.sqrt(basis.shape[1]) + 2) * coefficient * magnitude
    return exact, (product_error + 4 * (weight.double().abs() + exact.abs())) * FLOAT32_ULP / 2


def check_back_project(
    rows: int,
    cols: int,
    rank: int,
    side: str,
    *,
    param_dtype: torch.dtype,
    basis_dtype: torch.dtype,
    scalars: Scalars | None = None,
    scale: float = 0.25,
) -> None:
    scalars = scalars or Scalars(lr=0.5)  # large steps: a wrong update is far outside the rounding of the weight
    short, long = short_and_long(rows, cols, side)
    basis = random_basis(short, rank, basis_dtype)
    update = random_matrix(long, rank, 5)
    weight = random_matrix(rows, cols, 6, param_dtype)
    exact, bound = exact_update(weight, update, basis, side, scalars, scale)
    back_project_update(weight, update, basis, side, scalars, scale=scale)
    if param_dtype != torch.float32:
        bound = bound + exact.abs() * torch.finfo(param_dtype).eps / 2 + torch.finfo(param_dtype).smallest_normal
    assert ((weight.double() - exact).abs() <= bound).all()


@SIDES
@pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back_project_update(shape: tuple[int, int, int], dtype: torch.dtype, side: str) -> None:
    check_back_project(*shape, side, param_dtype=dtype, basis_dtype=dtype)


@SIDES
@pytest.mark.parametrize("param_dtype", list(DTYPE_CODES), ids=str)
@pytest.mark.parametrize("basis_dtype", list(DTYPE_CODES), ids=str)
def test_back_project_update_mixed_dtypes(param_dtype: torch.dtype, basis_dtype: torch.dtype, side: str) -> None:
    check_back_project(45, 67, 19, side, param_dtype=param_dtype, basis_dtype=basis_dtype)


@SIDES
@pytest.mark.parametrize("rank", [300, 1100])  # longer than a chunk of packing; few long indices fit a task
def test_back_project_update_large_rank(rank: int, side: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_back_project(130, 90, rank, side, param_dtype=dtype, basis_dtype=dtype)


@SIDES
@pytest.mark.parametrize("threads", [1, 2, 8])  # each has a panel of its own in the workspace
@pytest.mark.parametrize("rank", [300, 384, 448, 737, 768])  # what fits, rounded to tiles, differs between the tiles
def test_a_panel_of_many_ranks_fits_the_workspace(rank: int, threads: int, side: str) -> None:
    """Sized by the larger tile, it was too small on the right side; ``native_calls`` checks what lies behind it."""
    rows, cols = (2048, 64) if side == "right" else (64, 2048)
    short, long = short_and_long(rows, cols, side)
    weight, basis, update = torch.zeros(rows, cols), random_matrix(short, rank, 1), random_matrix(long, rank, 2)
    back_project_update(weight, update, basis, side, Scalars(), threads=threads)
    project(random_matrix(rows, cols, 3), basis, side, threads=threads)
    # int8 weights, whose panels of columns are whole groups.
    codes, weight_scale = torch.zeros(rows, cols, dtype=torch.int8), torch.ones(rows, -(-cols // 256))
    back_project_update(
        codes, update, basis, side, Scalars(), rounding_seed=1, weight_scale=weight_scale, threads=threads
    )


@SIDES
@pytest.mark.parametrize(
    "scalars", [Scalars(lr=0.5, weight_decay=0.0), Scalars(lr=0.5, step=0), Scalars(lr=0.0)], ids=str
)
@pytest.mark.parametrize("scale", [0.25, 1.0, 0.0])
def test_back_project_update_scalars(scalars: Scalars, scale: float, side: str) -> None:
    check_back_project(
        20, 40, 6, side, param_dtype=torch.float32, basis_dtype=torch.float32, scalars=scalars, scale=scale
    )


@SIDES
def test_back_projection_is_exact_where_the_sums_are(side: str) -> None:
    """Integers: the product is exact, and what is left is the element-wise formula, checked to the last bit."""
    rows, cols, rank = 45, 70, 21
    short, long = short_and_long(rows, cols, side)
    basis = random_matrix(short, rank, 3).mul(4).round().bfloat16()
    update = random_matrix(long, rank, 4).mul(4).round()
    weight = random_matrix(rows, cols, 6)
    product = (update @ basis.float().T).numpy()
    product = product if side == "right" else product.T
    scalars = Scalars()
    t = scalars.step + 1
    step_size = scalars.lr * math.sqrt(1 - scalars.beta2**t) / (1 - scalars.beta1**t) * 0.25
    decay = np.float32(1 - scalars.lr * scalars.weight_decay)
    expected = (weight.numpy() - np.float32(step_size) * product) * decay
    back_project_update(weight, update, basis, side, scalars)
    np.testing.assert_array_equal(weight.numpy(), expected)


@SIDES
@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float16])
def test_update_is_rounded_to_the_basis_dtype(basis_dtype: torch.dtype, side: str) -> None:
    """Nearest even, and ties: the same result as from an update that had been rounded beforehand."""
    short, long = short_and_long(30, 50, side)
    basis = random_basis(short, 9, basis_dtype)
    update = random_matrix(long, 9, 4)
    update[0] = 1 + 2.0**-8  # halfway between two bf16 numbers; 1 + 2^-11 is between two of fp16
    update[1] = 1 + 3 * 2.0**-8
    update[2] = 1 + 2.0**-11
    weights = [random_matrix(30, 50, 6) for _ in range(3)]
    back_project_update(weights[0], update, basis, side, Scalars(lr=0.5))
    back_project_update(weights[1], update.to(basis_dtype).float(), basis, side, Scalars(lr=0.5))
    back_project_update(weights[2], update, basis.float(), side, Scalars(lr=0.5))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@SIDES
@pytest.mark.parametrize(
    "shape", [(28, 64, 8), (37, 71, 5)], ids=str
)  # whole tiles; rows that start inside a block of 8
def test_stochastic_rounding_uses_the_bits_of_the_flat_index(shape: tuple[int, int, int], side: str) -> None:
    from galore_kernels import _native

    rows, cols, rank = shape
    short, long = short_and_long(rows, cols, side)
    basis = random_basis(short, rank, torch.bfloat16)
    update = random_matrix(long, rank, 4)
    start = random_matrix(rows, cols, 6, torch.bfloat16)
    exact = start.float()
    back_project_update(exact, update, basis, side, Scalars(lr=0.5))
    rounded = start.clone()
    back_project_update(rounded, update, basis, side, Scalars(lr=0.5), rounding_seed=77)
    random = np.frombuffer(_native.philox(77, Scalars().step + 1, rows * cols), dtype="<u2").astype(np.int64)
    expected = (exact.view(torch.int32).numpy().astype(np.int64).ravel() + random) >> 16
    actual = rounded.view(torch.int16).numpy().astype(np.int64).ravel()
    np.testing.assert_array_equal(actual & 0xFFFF, expected & 0xFFFF)


@SIDES
def test_tiny_and_huge_gradients(side: str) -> None:
    short, _ = short_and_long(70, 40, side)
    for scale in (1e-30, 1e18):
        check_project(random_matrix(70, 40, 1) * scale, random_basis(short, 5, torch.float32), side)


@SIDES
def test_empty_matrices(side: str) -> None:
    for rows, cols in ((0, 5), (5, 0), (0, 0)):
        short, long = short_and_long(rows, cols, side)
        basis = torch.ones(short, 2)
        lowrank, representable = project(torch.empty(rows, cols), basis, side)
        assert representable
        assert lowrank.eq(0).all()  # a sum of nothing
        back_project_update(torch.empty(rows, cols), torch.ones(long, 2), basis, side, Scalars())


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 5, 7), (257, 33, 130), (100, 256, 128)], ids=str)
def test_rotate_moments_stays_inside_its_memory(shape: tuple[int, int, int], eight_bit: bool) -> None:
    rows, rank, new_rank = shape
    state = random_state(rows * rank, eight_bit=eight_bit, generator=torch.Generator().manual_seed(1))
    rotation = random_matrix(rank, new_rank, 2)
    expected = rotate_moments(state, rotation, step=5)
    for threads in (2, 5):
        got = rotate_moments(state, rotation, step=5, threads=threads)
        for tensor, other in zip(got.tensors(), expected.tensors(), strict=True):
            assert torch.equal(tensor, other)  # NaN, which the scratch memory was full of, equals nothing
