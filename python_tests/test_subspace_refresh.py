"""The contract of refresh_basis: what it accepts, returns, keeps and refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from galore_kernels.subspace import REFRESH_METHODS, refresh_basis
from galore_kernels.subspace.precision import full_precision

# Householder QR in fp32 leaves ~2e-6 at these sizes; the issue asks for 1e-5.
ORTHONORMALITY = 1e-5
# Columns of one matrix computed along two paths: ~10 eps(fp32) * sigma_1 / gap, the gap being 0.5^6 at the sixth.
SAME_COLUMNS = 1e-4
# Relative loss of the exact top-r energy in an fp32 decomposition of at most 48 x 48.
EXACT_SHARE = 1.0 - 1e-5


def _halving(rows: int, columns: int) -> Tensor:
    """fp32 (rows, columns) with singular values 0.5^i: every leading vector is well determined."""
    generator = torch.Generator().manual_seed(11)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64)).Q
    return ((left * 0.5 ** torch.arange(size, dtype=torch.float64)) @ right.T).float()


def _noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 48),
    columns=st.integers(1, 48),
    rank=st.integers(1, 60),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    method=st.sampled_from(REFRESH_METHODS),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_shape(
    rows: int, columns: int, rank: int, transposed: bool, dtype: torch.dtype, method: str, seed: int
) -> None:
    grad = _noise(rows, columns, seed % 2**32).to(dtype)
    if transposed:
        grad = grad.T.contiguous().T
    basis = refresh_basis(grad, rank, method=method, seed=seed)
    assert basis.shape == (columns, min(rank, rows, columns))
    assert basis.dtype == torch.float32
    assert basis.is_contiguous()
    assert not basis.requires_grad
    active = basis[:, basis.any(dim=0)].double()
    assert active.shape[1] >= 1
    error = active.T @ active - torch.eye(active.shape[1], dtype=torch.float64)
    assert error.abs().max().item() <= ORTHONORMALITY
    assert (active.gather(0, active.abs().argmax(0, keepdim=True)) > 0).all()
    captured = (grad.double() @ basis.double()).square().sum(0)
    if method == "svd":
        exact = torch.linalg.svdvals(grad.double())[: basis.shape[1]].square()
        # What is zeroed is below 2.5 * 2^-7 * (1 + 1) of the norm in bf16, and nothing in the wider types.
        share = 0.99 if dtype == torch.bfloat16 else EXACT_SHARE
        assert captured.sum() >= share * exact.sum()
    assert (captured[:-1] >= captured[1:] * (1 - 1e-4)).all() or method == "randomized"


EDGES = [
    (1, 1, 1),
    (1, 40, 4),  # one row: one direction, rank clamped
    (40, 1, 4),
    (2, 40, 2),  # rank == min
    (40, 40, 40),
    (40, 24, 24),
    (64, 64, 16),  # 24 columns: the last that is sketched
    (64, 64, 17),  # 32 columns: the first that is exact
]


@pytest.mark.parametrize("method", REFRESH_METHODS)
@pytest.mark.parametrize(("rows", "columns", "rank"), EDGES)
def test_edges(rows: int, columns: int, rank: int, method: str) -> None:
    grad = _noise(rows, columns)
    basis = refresh_basis(grad, rank, method=method)
    assert basis.shape == (columns, min(rank, rows, columns))
    if basis.shape[1] == min(rows, columns):  # the whole row space: nothing may be lost
        torch.testing.assert_close(grad @ basis @ basis.T, grad, rtol=0, atol=1e-5 * grad.norm().item())


def test_randomized_takes_the_exact_path_where_it_is_cheaper() -> None:
    grad = _noise(64, 64)
    exact = {rank: refresh_basis(grad, rank, method="svd") for rank in (16, 17)}
    assert torch.equal(refresh_basis(grad, 17), exact[17])
    assert not torch.equal(refresh_basis(grad, 16), exact[16])


def _with_offset(grad: Tensor) -> Tensor:
    storage = torch.zeros(grad.numel() + 3)
    storage[3:] = grad.flatten()
    return storage[3:].view(grad.shape)


def _every_third(grad: Tensor) -> Tensor:
    storage = torch.full((2 * grad.shape[0], 3 * grad.shape[1]), float("nan"))
    storage[::2, ::3] = grad
    return storage[::2, ::3]


def _padded_rows(grad: Tensor) -> Tensor:
    storage = torch.full((grad.shape[0], grad.shape[1] + 5), float("nan"))
    storage[:, :-5] = grad
    return storage[:, :-5]


@pytest.mark.parametrize("method", REFRESH_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # used in place, and copied
@pytest.mark.parametrize("view", [lambda g: g.T.contiguous().T, _with_offset, _every_third, _padded_rows])
def test_strides_do_not_matter(view: Callable[[Tensor], Tensor], dtype: torch.dtype, method: str) -> None:
    for shape in ((60, 90), (90, 60)):
        grad = _halving(*shape).to(dtype).float()
        before = grad.clone()
        strided = view(grad).to(dtype) if dtype == torch.float32 else view(grad.float()).to(dtype)
        expected = refresh_basis(grad.to(dtype), 6, method=method)
        torch.testing.assert_close(refresh_basis(strided, 6, method=method), expected, rtol=0, atol=SAME_COLUMNS)
        assert torch.equal(grad, before)


def test_expanded_gradient() -> None:
    # What a plain sum's backward gives: every stride 0.
    basis = refresh_basis(torch.ones(()).expand(20, 30), 4)
    torch.testing.assert_close(basis[:, 0], torch.full((30,), 30**-0.5))
    assert not basis[:, 1:].any()


def test_gradient_is_not_copied_nor_changed() -> None:
    grad = _noise(64, 64).requires_grad_()
    before = grad.detach().clone()
    refresh_basis(grad, 8)
    assert torch.equal(grad, before)


UNUSABLE = {
    "zero": torch.zeros(12, 9),
    "negative zero": -torch.zeros(12, 9),
    "NaN": torch.ones(12, 9).index_put((torch.tensor(5), torch.tensor(5)), torch.tensor(float("nan"))),
    "Inf": torch.ones(12, 9).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("inf"))),
    "-Inf": torch.ones(12, 9).index_put((torch.tensor(11), torch.tensor(8)), torch.tensor(float("-inf"))),
}


@pytest.mark.parametrize("method", REFRESH_METHODS)
@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_unusable_gradient_keeps_the_previous_basis(name: str, dtype: torch.dtype, method: str) -> None:
    grad = UNUSABLE[name].to(dtype)
    previous = _noise(9, 4).to(torch.bfloat16)  # whatever type the caller keeps it in
    kept = previous.clone()
    assert refresh_basis(grad, 4, previous=previous, method=method) is previous
    assert torch.equal(previous, kept)
    empty = refresh_basis(grad, 4, method=method)
    assert empty.shape == (9, 4)
    assert empty.dtype == torch.float32
    assert not empty.any()


def test_unusable_gradient_clamps_the_rank_as_a_usable_one_does() -> None:
    # Else the first basis that is found would have another shape than the one it replaces.
    assert refresh_basis(torch.zeros(3, 9), 4).shape == refresh_basis(torch.ones(3, 9), 4).shape == (9, 3)


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_gradient_reaches_no_decomposition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # LAPACK happens to raise on such input; cuSOLVER may return garbage, or not return.
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("called")

    for function in ("qr", "svd", "eigh"):
        monkeypatch.setattr(torch.linalg, function, fail)
    assert not refresh_basis(UNUSABLE[name], 4).any()


def test_usable_gradient_ignores_the_previous_basis() -> None:
    grad = _noise(12, 40)
    previous = torch.ones(40, 4)
    assert torch.equal(refresh_basis(grad, 4, previous=previous), refresh_basis(grad, 4))
    assert torch.equal(previous, torch.ones(40, 4))


def test_deterministic_under_a_seed() -> None:
    grad = _noise(128, 96)
    first = refresh_basis(grad, 8, seed=7)
    assert torch.equal(refresh_basis(grad, 8, seed=7), first)
    assert torch.equal(refresh_basis(grad, 8, generator=torch.Generator().manual_seed(7)), first)
    assert torch.equal(refresh_basis(grad, 8), refresh_basis(grad, 8, seed=0))
    assert not torch.equal(refresh_basis(grad, 8, seed=8), first)


def test_generator_advances() -> None:
    grad = _noise(128, 96)
    generator = torch.Generator().manual_seed(7)
    assert not torch.equal(refresh_basis(grad, 8, generator=generator), refresh_basis(grad, 8, generator=generator))


@pytest.mark.parametrize("method", REFRESH_METHODS)
def test_global_random_state_is_neither_read_nor_changed(method: str) -> None:
    grad = _noise(128, 96)
    before = torch.random.get_rng_state()
    first = refresh_basis(grad, 8, method=method)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        assert torch.equal(refresh_basis(grad, 8, method=method), first)


@pytest.mark.parametrize("method", REFRESH_METHODS)
def test_surroundings_do_not_matter(method: str) -> None:
    # Each of these changes what plain torch calls would compute, and all are met in training scripts.
    grad = _noise(128, 96)
    expected = refresh_basis(grad, 8, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(refresh_basis(grad, 8, method=method), expected)
    with torch.inference_mode():
        assert torch.equal(refresh_basis(grad, 8, method=method), expected)
    with torch.device("meta"):  # a default device: nothing may be created there
        assert torch.equal(refresh_basis(grad, 8, method=method), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(refresh_basis(grad, 8, method=method), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (60, 60)], ids=str)
@pytest.mark.parametrize("method", REFRESH_METHODS)
def test_svd_that_does_not_converge(method: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    grad = _halving(*shape)
    expected = refresh_basis(grad, 6, method=method)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    torch.testing.assert_close(refresh_basis(grad, 6, method=method), expected, rtol=0, atol=SAME_COLUMNS)
    two_rows = torch.zeros(shape).index_copy(0, torch.tensor([3, 8]), _noise(2, shape[1]))
    assert refresh_basis(two_rows, 6, method=method).any(dim=0).sum() == 2  # eigenvalues that round below zero
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    previous = torch.ones(shape[1], 6)
    assert refresh_basis(grad, 6, method=method, previous=previous) is previous
    assert not refresh_basis(grad, 6, method=method).any()


MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def tf32() -> Any:
    """A script that asked for TF32; also where there is no GPU, since the setting is the same."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "tf32"
    yield
    MATMUL.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_products_are_true_fp32_and_the_setting_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for method, name in (("randomized", "eigh"), ("svd", "qr")):
        seen: list[str] = []
        original = getattr(torch.linalg, name)

        def spy(*args: Any, seen: list[str] = seen, original: Any = original, **kwargs: Any) -> Any:
            seen.append(MATMUL.fp32_precision)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, name, spy)
            refresh_basis(_noise(64, 64), 8, method=method)
        assert set(seen) == {"ieee"}
    assert MATMUL.fp32_precision == "tf32"


@pytest.mark.usefixtures("tf32")
def test_setting_is_restored_by_the_last_thread_out() -> None:
    other_in, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            other_in.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        assert other_in.wait(10)
    assert MATMUL.fp32_precision == "ieee"  # the other is still inside
    leave.set()
    thread.join()
    assert MATMUL.fp32_precision == "tf32"


@pytest.mark.usefixtures("tf32")
def test_setting_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert MATMUL.fp32_precision == "tf32"


def test_setting_before_torch_2_9(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = ["high"]
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", setting.append)
    with full_precision():
        assert setting == ["high", "highest"]
    assert setting == ["high", "highest", "high"]
    setting[:] = ["highest"]
    with full_precision():
        pass
    assert setting == ["highest"]


GRAD = torch.ones(6, 5)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grad": [[1.0]]}, TypeError, "grad: expected a torch.Tensor"),
    ({"grad": torch.ones(5)}, ValueError, r"grad: expected a matrix \(L, S\), got shape \(5,\)"),
    ({"grad": torch.ones(2, 3, 4)}, ValueError, r"got shape \(2, 3, 4\); reshape"),
    ({"grad": torch.ones(0, 4)}, ValueError, r"grad: expected at least one element, got shape \(0, 4\)"),
    ({"grad": torch.ones(4, 0)}, ValueError, "grad: expected at least one element"),
    ({"grad": GRAD.to(torch.complex64)}, ValueError, "grad: expected one of the dtypes float32, .*complex64"),
    ({"grad": GRAD.long()}, ValueError, "got torch.int64; convert it first"),
    ({"grad": GRAD.to_sparse()}, ValueError, "grad: expected a dense tensor, got layout torch.sparse_coo"),
    ({"rank": 0}, ValueError, "rank=0: expected an integer >= 1"),
    ({"rank": -3}, ValueError, "rank=-3"),
    ({"rank": 2.0}, TypeError, "rank: expected an integer, got 2.0"),
    ({"rank": True}, TypeError, "rank: expected an integer, got True"),
    ({"method": "SVD"}, ValueError, 'method="SVD": expected one of randomized, svd; did you mean "svd"'),
    ({"previous": torch.ones(5, 3)}, ValueError, r"previous: expected shape \(S, r\) = \(5, 2\), got \(5, 3\)"),
    ({"previous": torch.ones(6, 2)}, ValueError, "previous: expected shape"),  # of the other side
    ({"previous": torch.ones(5, 9), "rank": 9}, ValueError, r"= \(5, 5\)"),  # the rank is clamped first
    ({"previous": "old"}, TypeError, "previous: expected a torch.Tensor or None, got str"),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator: .* got both"),
    ({"generator": 3}, TypeError, "generator: expected a torch.Generator, got int"),
    ({"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
    ({"seed": -1}, ValueError, "seed=-1: expected 0 <= seed"),
    ({"seed": 2**64}, ValueError, "expected 0 <= seed"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    # Also with a zero gradient, which needs no basis: bad arguments surface at the first call, whatever it sees.
    for grad in (GRAD, torch.zeros(6, 5)):
        with pytest.raises(error, match=message):
            refresh_basis(**{"grad": grad, "rank": 2, **arguments})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", REFRESH_METHODS)
def test_cuda_agrees_with_cpu(method: str) -> None:
    grad = _halving(90, 60)
    basis = refresh_basis(grad.cuda(), 6, method=method)
    assert basis.is_cuda
    torch.testing.assert_close(basis.cpu(), refresh_basis(grad, 6, method=method), rtol=0, atol=SAME_COLUMNS)
