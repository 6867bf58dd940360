"""Prepared linear layers: what they compute and keep, what prepare refuses, and that to others they are plain ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from failing_allocations import allocates
from tolerances import U32
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from update_cases import assert_same_bits

from galore_kernels import GaLoreFusedAdamW, galore_param_groups, prepare, unprepare
from galore_kernels.nn import FactoredLinear, LowRankGradient, lowrank_gradient
from galore_kernels.quantizers import dequantize_basis
from galore_kernels.subspace import factors

M, N = 72, 104  # large enough for a search that isn't exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layers(
    side: str, *, bias: bool = True, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[FactoredLinear, nn.Linear, GaLoreFusedAdamW]:
    """A prepared layer, its plain twin, and the first's optimizer."""
    torch.manual_seed(0)
    plain = nn.Linear(N, M, bias=bias, dtype=dtype)
    model = prepare(nn.ModuleDict({"layer": copy.deepcopy(plain)}), ["layer"], rank=5, proj_type=side)
    optimizer = GaLoreFusedAdamW(galore_param_groups(model, ["layer"], proj_type=side, **options), lr=1e-3)
    layer = model["layer"]
    assert isinstance(layer, FactoredLinear)
    # Somebody has to keep the optimizer.
    return layer, plain, optimizer


def rounded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient_of(layer: FactoredLinear) -> LowRankGradient:
    assert isinstance(layer.gradient, LowRankGradient)
    return layer.gradient


def basis_of(layer: FactoredLinear) -> Tensor:
    gradient = gradient_of(layer)
    assert gradient.basis is not None
    if gradient.basis_scale is None:
        return gradient.basis
    return dequantize_basis(gradient.basis, gradient.basis_scale)


def begin(layer: FactoredLinear, optimizer: GaLoreFusedAdamW, dtype: torch.dtype = torch.float32) -> None:
    """The first step, after which there is a basis."""
    layer(rounded(7, N, seed=9, dtype=dtype)).float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_is_lowrank(layer: FactoredLinear, inputs: Tensor, grad_output: Tensor) -> None:
    """Fails unless the carrier's gradient is G @ P, or G.T @ P, up to the rounding of products in the inputs' dtype."""
    x, dy, p = (t.detach().double() for t in (inputs.reshape(-1, N), grad_output.reshape(-1, M), basis_of(layer)))
    exact = dy.T @ x @ p if gradient_of(layer).side == "right" else x.T @ dy @ p
    absolute = dy.abs().T @ x.abs() @ p.abs() if gradient_of(layer).side == "right" else x.abs().T @ dy.abs() @ p.abs()
    # A basis of codes is scaled after the product; both products are rounded to the dtype, as the basis and R are.
    bound = ((len(x) + M + N) * U32 + 5 * torch.finfo(inputs.dtype).eps) * absolute
    grad = layer.lowrank.grad
    assert grad is not None
    assert grad.dtype == layer.weight.dtype
    assert grad.shape == exact.shape
    assert bool(((grad.double() - exact).abs() <= bound).all())


SHAPES = [(7, N), (1, N), (2, 3, N), (N,)]  # tokens; one; a batch of sequences; a vector, as nn.Linear takes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_layer_computes_what_a_linear_layer_does(side: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, plain, optimizer = layers(side, dtype=dtype)
    for step in range(2):  # from X, and on the right side from X @ P
        if step:
            begin(layer, optimizer, dtype)
            plain.load_state_dict(layer.state_dict())
        own, other = (rounded(*shape, dtype=dtype).requires_grad_() for _ in range(2))
        output, expected = layer(own), plain(other)
        assert_same_bits(output, expected, "output")
        dy = rounded(*output.shape, seed=1, dtype=dtype)
        output.backward(dy)
        expected.backward(dy)
        assert own.grad is not None
        assert other.grad is not None
        assert plain.bias.grad is not None
        assert layer.bias.grad is not None
        assert_same_bits(own.grad, other.grad, "dX")
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)  # a sum in another order
        assert layer.weight.grad is None
        assert_is_lowrank(layer, own, dy)
        optimizer.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("basis_format", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_basis_may_be_quantized(side: str, dtype: torch.dtype, basis_format: str) -> None:
    layer, _, optimizer = layers(side, dtype=dtype, basis_format=basis_format)
    begin(layer, optimizer, dtype)
    inputs = rounded(9, N, dtype=dtype)
    output = layer(inputs)
    dy = rounded(9, M, seed=1, dtype=dtype)
    output.backward(dy)
    assert_is_lowrank(layer, inputs, dy)


def test_codes_do_not_overflow_in_float16() -> None:
    layer, _, optimizer = layers("right", dtype=torch.float16, basis_format="int8")
    begin(layer, optimizer, torch.float16)
    # With codes of 127 and more than one column of such entries, X @ codes passes 65504; X @ P doesn't.
    layer(torch.full((2, N), 400.0).half() * basis_of(layer)[:, 0].sign().half()).backward(torch.ones(2, M).half() / 64)
    assert layer.lowrank.grad is not None
    assert bool(layer.lowrank.grad.isfinite().all())


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_empty_batch_has_a_gradient_of_zeros(side: str) -> None:
    layer, _, optimizer = layers(side)
    for step in range(2):
        layer(torch.empty(0, N)).sum().backward()
        assert layer.lowrank.grad is not None
        assert not bool(layer.lowrank.grad.any())
        optimizer.zero_grad()
        if not step:
            assert gradient_of(layer).basis is None  # it is found where there are tokens
            begin(layer, optimizer)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["inputs", "gradient"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("begun", [False, True])
def test_what_is_not_finite_reaches_the_gradient(begun: bool, side: str, where: str, bad: float) -> None:
    layer, _, optimizer = layers(side)
    if begun:
        begin(layer, optimizer)
    inputs, dy = rounded(7, N), rounded(7, M)
    (inputs if where == "inputs" else dy)[2, 3] = bad
    layer(inputs).backward(dy)
    assert layer.lowrank.grad is not None
    assert not bool(layer.lowrank.grad.isfinite().all())
    assert (gradient_of(layer).basis is not None) == begun


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_zero_is_finite_whatever_the_inputs_sum_to(dtype: torch.dtype) -> None:
    layer, _, _optimizer = layers("right", dtype=dtype)
    layer(torch.full((9, N), 3e4, dtype=dtype)).backward(torch.zeros(9, M, dtype=dtype))
    assert layer.lowrank.grad is not None
    assert not bool(layer.lowrank.grad.any())


# ---------------------------------------------------------------------- what is kept


def saved_shapes(run: Callable[[], Any]) -> tuple[list[tuple[int, ...]], Any]:
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return shapes, run()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_right_side_keeps_the_projected_inputs_alone(side: str) -> None:
    layer, _, optimizer = layers(side, update_proj_gap=3)
    inputs = rounded(7, N)
    for step in range(8):
        shapes, output = saved_shapes(lambda: layer(inputs))
        # Before the first basis, and in steps 3 and 6, in which the next ones are found.
        kept = (7, 5) if side == "right" and step % 3 else (7, N)
        assert sorted(shapes) == sorted([(), kept, (M, N)])  # the first tells compiled layers apart
        output.square().sum().backward()
        assert len(gradient_of(layer).factors) == (step in (3, 6))
        optimizer.step()
        optimizer.zero_grad()
        assert not gradient_of(layer).factors


class Allocated(TorchDispatchMode):
    """Notes the shapes of new tensors, within the operation of the low-rank gradient as well."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.galore_kernels_nn.lowrank_gradient.default:
            with self:
                return lowrank_gradient._run(*args)
        out = func(*args, **(kwargs or {}))
        if allocates(func):
            tensors = out if isinstance(out, (tuple, list)) else [out]
            self.shapes |= {tuple(x.shape) for x in tensors if isinstance(x, Tensor)}
        return out


@pytest.mark.parametrize("tokens", [1, 7, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_tensor_has_the_gradients_shape(side: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "PANEL_ROWS", 8)
    layer, plain, optimizer = layers(side, update_proj_gap=2)
    inputs = rounded(tokens, N).requires_grad_()
    for _ in range(4):  # the first search, one between, a step of a refresh, one more
        with Allocated() as seen:
            layer(inputs).square().sum().backward()
            optimizer.step()
        assert tuple(layer.lowrank.shape) in seen.shapes
        assert not {(M, N), (N, M)} & seen.shapes
        optimizer.zero_grad()
    with Allocated() as seen:
        plain(inputs).square().sum().backward()
    assert (M, N) in seen.shapes  # the test would see it


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_a_linear_layer(context: Callable[[], Any]) -> None:
    layer, plain, _optimizer = layers("right")
    with context():
        shapes, output = saved_shapes(lambda: layer(rounded(3, N)))
        assert_same_bits(output, plain(rounded(3, N)), "output")
    assert not shapes
    layer.eval()
    assert layer(rounded(3, N)).requires_grad


def test_a_frozen_carrier_passes_gradients_on() -> None:
    layer, plain, _optimizer = layers("right")
    layer.lowrank.requires_grad_(False)
    own, other = rounded(3, N).requires_grad_(), rounded(3, N).requires_grad_()
    layer(own).sum().backward()
    plain(other).sum().backward()
    assert own.grad is not None
    assert other.grad is not None
    assert_same_bits(own.grad, other.grad, "dX")
    assert layer.lowrank.grad is None


def test_a_second_derivative_is_refused() -> None:
    layer, _, _optimizer = layers("right")
    inputs = rounded(3, N).requires_grad_()
    (first,) = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_inputs_of_another_dtype_are_refused_as_by_a_linear_layer() -> None:
    layer, plain, _optimizer = layers("right")
    for either in (layer, plain):
        with pytest.raises(RuntimeError, match="dtype"):
            either(rounded(3, N).bfloat16())


def test_inputs_changed_after_the_forward_pass_are_noticed() -> None:
    layer, _, _optimizer = layers("left")
    inputs = rounded(3, N)
    output = layer(inputs)
    inputs.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# ---------------------------------------------------------------------- tied layers


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, N)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


def test_layers_that_share_a_weight_share_its_gradient() -> None:
    torch.manual_seed(0)
    plain = Tied()
    model = prepare(copy.deepcopy(plain), ["first", "second"], rank=5)
    assert model.first.lowrank is model.second.lowrank
    optimizer = GaLoreFusedAdamW(galore_param_groups(model, ["first", "second"], update_proj_gap=2), lr=1e-2)
    for step in range(4):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        for either in (model, plain):
            either(rounded(9, N, seed=step)).square().sum().backward()
        gradient = model.first.gradient
        assert isinstance(gradient, lowrank_gradient.LowRankGradient)
        assert gradient.basis is not None
        assert len(gradient.factors) == 2 * (step == 2)  # of both layers
        assert plain.first.weight.grad is not None
        expected = plain.first.weight.grad @ gradient.basis
        torch.testing.assert_close(model.first.lowrank.grad, expected, rtol=1e-4, atol=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    other = copy.deepcopy(model)
    assert other.first.weight is other.second.weight
    assert other.first.lowrank is other.second.lowrank
    carrier = other.get_parameter("first.lowrank")
    assert len(carrier._post_accumulate_grad_hooks) == 1
    unprepare(model)
    assert model.first.weight is model.second.weight
    assert type(model.second) is nn.Linear
