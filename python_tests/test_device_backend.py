"""The proxy by which the operations' own tests run on a GPU, here copying from the CPU to the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_backend import on_device
from test_galore_update import SIDES, make_problem, strided_views
from torch import Tensor
from update_cases import assert_same_bits, assert_same_state, options

from galore_kernels.ops import AdamOptions, AdamState, quantize_blockwise, registry
from galore_kernels.ops.group import UpdateGroup


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference behind a copy of everything it is given, under the name "triton"."""
    real = replace(registry._backends["reference"], name="triton")
    monkeypatch.setitem(registry._backends, "triton", on_device(real, torch.device("cpu")))
    return "triton"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("long_rank", [None, 4])
def test_the_proxy_changes_nothing(proxied: str, side: str, eight_bit: bool, long_rank: int | None) -> None:
    p = make_problem(37, 53, 5, side, eight_bit=eight_bit, long_rank=long_rank, weight_decay=0.1, grad_scale=3.0)
    got, got_state = p.solved(proxied)
    expected, expected_state = p.solved("reference")
    assert_same_bits(got, expected, "param")
    assert_same_state(got_state, expected_state)
    assert not torch.equal(got, p.param)


def test_the_proxy_returns_results(proxied: str) -> None:
    x = torch.randn(3, 257)
    for got, expected in zip(quantize_blockwise(x, True, backend=proxied), quantize_blockwise(x, True), strict=True):
        assert_same_bits(got, expected, "codes, absmax")


@pytest.mark.parametrize("name_of_view", strided_views(2, 2))
def test_the_proxy_keeps_strides_and_offsets(name_of_view: str) -> None:
    seen: list[tuple[Any, ...]] = []

    def kernel(param: Tensor, grad: Tensor, state: AdamState, o: AdamOptions) -> None:
        seen.append((param.stride(), param.storage_offset(), grad.stride(), param.data_ptr(), grad.data_ptr()))
        assert grad.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()
        param.add_(1)

    reference = registry._backends["reference"]
    served = on_device(replace(reference, kernels={"adam8bit_update": kernel}), torch.device("cpu"))
    buffer, view = strided_views(12, 40)[name_of_view]
    before, expected = buffer.clone(), view + 1
    flat = buffer.view(-1)
    served.kernels["adam8bit_update"](view, flat, AdamState.zeros((480,), eight_bit=False), options())
    ((stride, offset, grad_stride, address, grad_address),) = seen
    assert (stride, offset, grad_stride) == (view.stride(), view.storage_offset(), (1,))
    assert (address, grad_address) != (view.data_ptr(), flat.data_ptr())
    assert_same_bits(view, expected, "param")
    assert int((buffer != before).sum()) == view.numel()


def test_the_proxy_serves_groups() -> None:
    def group(made: UpdateGroup) -> Callable[..., None]:
        def update(grads: Any, o: AdamOptions) -> None:
            for param, grad, state in zip(made.params, grads, made.states, strict=True):
                assert param.data_ptr() not in addresses
                param.sub_(grad * o.lr)
                state.step.add_(1)

        return update

    params = tuple(torch.randn(5) for _ in range(3))
    grads = [torch.randn(5) for _ in range(3)]
    addresses = [param.data_ptr() for param in params]
    states = tuple(AdamState.zeros((5,), eight_bit=False) for _ in range(3))
    expected = [param - grad * 0.5 for param, grad in zip(params, grads, strict=True)]
    served = on_device(replace(registry._backends["reference"], group=group), torch.device("cpu"))
    assert served.group is not None
    served.group(UpdateGroup("adam8bit_update", params, states))(grads, options(lr=0.5))
    assert torch.equal(torch.stack(params), torch.stack(expected))
    assert [int(state.step) for state in states] == [1, 1, 1]
