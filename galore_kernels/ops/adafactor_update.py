"""``adafactor_update``, ``galore_adafactor_update`` and ``lowrank_adafactor_update``: the steps of Adafactor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from galore_kernels.ops import registry
from galore_kernels.ops.adam import (
    WEIGHT_DTYPES,
    StepOptions,
    check_counters,
    check_not_negative,
    check_step_options,
    check_tensor,
    check_weight,
    fail,
)
from galore_kernels.ops.library import define
from galore_kernels.ops.projection import check_projected_weight, check_projection


@dataclass(frozen=True)
class AdafactorState:
    """Adafactor's state of one tensor, all float32; every tensor is updated in place.

    Of a gradient (..., m, n) the second moment is kept as means over rows and columns, of one with fewer dimensions
    element by element.

    Attributes:
        exp_avg: first moment of the update, of the gradient's shape, or None without ``beta1``.
        exp_avg_sq: second moment of a gradient with fewer than two dimensions, else None.
        exp_avg_sq_row: (..., m), the second moment's mean over each row, or None.
        exp_avg_sq_col: (..., n), its mean over each column, or None.
        step: 0-d, the number of updates applied so far.
        skipped: 0-d int64, the number of updates skipped because the gradient could not be represented.
    """

    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    exp_avg_sq_row: Tensor | None
    exp_avg_sq_col: Tensor | None
    step: Tensor
    skipped: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...], *, first_moment: bool, device: torch.device | str = "cpu") -> AdafactorState:
        """The state before the first step of a gradient of ``shape``."""
        shapes = moment_shapes(shape, first_moment=first_moment)
        moments = {name: torch.zeros(of, dtype=torch.float32, device=device) for name, of in shapes.items()}
        step = torch.zeros((), dtype=torch.float32, device=device)
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        return cls.of({**moments, "step": step, "skipped": skipped})

    @classmethod
    def of(cls, tensors: Mapping[str, Any]) -> AdafactorState:
        """The state whose tensors have these names; ``tensors`` may hold others."""
        first, whole, row, col = map(tensors.get, MOMENTS)
        return cls(first, whole, row, col, tensors["step"], tensors["skipped"])


#: The names of the moments.
MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")


def moment_shapes(shape: tuple[int, ...], *, first_moment: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of the moments of a gradient of ``shape``."""
    first = {"exp_avg": shape} if first_moment else {}
    if len(shape) < 2:
        return {**first, "exp_avg_sq": shape}
    return {**first, "exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}


@dataclass(frozen=True)
class AdafactorOptions(StepOptions):
    """The scalars of one update.

    Attributes:
        lr: 0-d float tensor, or None with ``relative_step``.
        eps1: added to squared gradients. eps2: the least root mean square that ``scale_parameter`` multiplies by.
        clip_threshold: the largest root mean square of an update, before the step size; infinity is possible.
        decay_rate: c <= 0 of the second moment's decay 1 - t^c.
        beta1: the first moment's decay, or None for none.
        scale_parameter: the step size is multiplied by the root mean square of the weight.
        relative_step: the step size is min(1e-2, 1 / sqrt(t)) instead of ``lr``.
        warmup_init: with ``relative_step``, min(1e-6 t, 1 / sqrt(t)).
        weight_decay: multiplied by the step size; before the update.
        maximize, grad_scale, found_inf, rounding_seed: every update's.
    """

    lr: Tensor | None = None
    eps1: float = 1e-30
    eps2: float = 1e-3
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    scale_parameter: bool = True
    relative_step: bool = True
    warmup_init: bool = False


def adafactor_update(
    param: Tensor, grad: Tensor, state: AdafactorState, options: AdafactorOptions, *, backend: str = "auto"
) -> None:
    """Updates ``param`` and ``state`` in place by one step of Adafactor (Shazeer and Stern, arXiv 1804.04235).

    With t = step + 1, RMS the root of a mean of squares, and g = grad / grad_scale (negated if ``maximize``):

        beta2 = 1 - t^decay_rate
        row = beta2 row + (1 - beta2) mean(g^2 + eps1, -1);   col = beta2 col + (1 - beta2) mean(g^2 + eps1, -2)
        u = g / sqrt(row col / mean(row, -1))                              (algorithm 4)
        u = u / max(1, RMS(u) / clip_threshold)
        alpha = (lr, or the relative step) * (max(eps2, RMS(param)) with scale_parameter, else 1)      (algorithm 5)
        m = beta1 m + (1 - beta1) alpha u with beta1, else alpha u
        param = param (1 - alpha weight_decay) - m

    as galore_torch and transformers compute it. Of a gradient with fewer than two dimensions the second moment v is
    kept whole, u = g / sqrt(v); of one with more, rows and columns are the last two. Where a row or column has been
    zero throughout and eps1 is 0, u is 0. Moments and weight are float32 sums and products, scalars and RMS double;
    the weight is rounded once.

    If a moment, or RMS(u), is not finite (as where an element of g is NaN, infinite or beyond 1.8446743e19, whose
    square overflows), nothing changes but ``state.skipped``, which grows by one.

    Args:
        param: any shape and strides; float32, bfloat16 or float16.
        grad: the same shape; float32, bfloat16 or float16.
        state: of a gradient of this shape.
        options: the scalars.
        backend: "auto" or a name from ``backend_info()``.

    Raises:
        ValueError: an argument doesn't fit; the message names it. Nothing has changed.
        RuntimeError: the backend can't serve the device.
    """
    torch.ops.galore_kernels.adafactor_update(param, grad, *_flat_state(state, options), **_flat(options, backend))


def galore_adafactor_update(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    state: AdafactorState,
    options: AdafactorOptions,
    *,
    side: str,
    scale: float,
    long_basis: Tensor | None = None,
    basis_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Updates ``param`` and ``state`` in place by one step of GaLore with Adafactor.

        R = grad @ basis (right)  or  grad.T @ basis (left)          projected gradient, (L, r), float32 sums
        m: ``adafactor_update``'s, of g = R / grad_scale; alpha is by RMS(param), the whole weight's
        param = param (1 - alpha weight_decay) - scale (m @ basis.T)[.T]

    R is long-major on both sides: what galore_torch calls rows are columns here on the left, which the second moment's
    approximation is symmetric in. If the basis is a 16-bit tensor, m / RMS(m) is rounded to its dtype before the
    back-projection; of a quantized basis as in ``galore_update``.

    Args:
        param: (m, n), any strides; float32, bfloat16 or float16, or with ``weight_scale`` int8 codes as in
            ``galore_update``.
        grad: (m, n); float32, bfloat16 or float16.
        state: of a gradient of shape (L, r), or (r_long, r) with ``long_basis``.
        options: the scalars.
        basis, side, scale, long_basis, basis_scale, weight_scale, backend: as in ``galore_update``.

    Raises:
        ValueError: an argument doesn't fit; the message names it. Nothing has changed.
        RuntimeError: the backend can't serve the device.
    """
    torch.ops.galore_kernels.galore_adafactor_update(
        param,
        grad,
        basis,
        long_basis,
        basis_scale,
        *_flat_state(state, options),
        side=side,
        scale=scale,
        weight_scale=weight_scale,
        **_flat(options, backend),
    )


def lowrank_adafactor_update(
    param: Tensor,
    lowrank_grad: Tensor,
    basis: Tensor,
    state: AdafactorState,
    options: AdafactorOptions,
    *,
    side: str,
    scale: float,
    long_basis: Tensor | None = None,
    basis_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """``galore_adafactor_update`` for a gradient that is projected already: everything after its first line.

    Args:
        lowrank_grad: R of shape (L, r), or (r_long, r) with ``long_basis``; float32, bfloat16 or float16.
        param, basis, state, options, side, scale, long_basis, basis_scale, weight_scale, backend: as there.

    Raises:
        ValueError: an argument doesn't fit; the message names it. Nothing has changed.
        RuntimeError: the backend can't serve the device.
    """
    torch.ops.galore_kernels.lowrank_adafactor_update(
        param,
        lowrank_grad,
        basis,
        long_basis,
        basis_scale,
        *_flat_state(state, options),
        side=side,
        scale=scale,
        weight_scale=weight_scale,
        **_flat(options, backend),
    )


_STATE_SCHEMA = (
    "Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq, Tensor(d!)? exp_avg_sq_row, Tensor(e!)? exp_avg_sq_col, "
    "Tensor(f!) step, Tensor(g!) skipped, Tensor? lr"
)
_OPTIONS_SCHEMA = (
    "float eps1, float eps2, float clip_threshold, float decay_rate, float? beta1, float weight_decay, "
    "bool scale_parameter, bool relative_step, bool warmup_init, bool maximize=False, Tensor? grad_scale=None, "
    'Tensor? found_inf=None, int? rounding_seed=None, str backend="auto"'
)


def _flat_state(state: AdafactorState, options: AdafactorOptions) -> tuple[Tensor | None, ...]:
    """The positional arguments of ``_STATE_SCHEMA``."""
    return (*(getattr(state, field.name) for field in fields(state)), options.lr)


def _flat(options: AdafactorOptions, backend: str) -> dict[str, Any]:
    """The keyword arguments of ``_OPTIONS_SCHEMA``."""
    named = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "lr"}
    return {**named, "backend": backend}


def _bundle(*state_tensors: Any, **options: Any) -> tuple[AdafactorState, AdafactorOptions]:
    """The inverse of ``_flat_state`` and ``_flat``."""
    *tensors, lr = state_tensors
    return AdafactorState(*tensors), AdafactorOptions(lr, **options)


def check_adafactor(
    op: str, param: Tensor, shape: tuple[int, ...], state: AdafactorState, options: AdafactorOptions
) -> None:
    """Checks state and options of an update by a gradient of ``shape``. Changes nothing."""
    device, expected = param.device, moment_shapes(shape, first_moment=options.beta1 is not None)
    for name in MOMENTS:
        tensor, wanted = getattr(state, name), expected.get(name)
        if tensor is None or wanted is None:
            if tensor is not wanted:
                got = "None" if tensor is None else f"shape {tuple(tensor.shape)}"
                what = "None" if wanted is None else f"of shape {wanted}"
                fail(op, name, what, got, "pass the state that belongs to this weight, and to whether there is a beta1")
            continue
        check_tensor(op, name, tensor, device=device, dtypes=(torch.float32,), shape=wanted, contiguous=True)
    check_counters(op, device, state.step, state.skipped)
    if (options.lr is None) != options.relative_step:
        fail(op, "lr", "None with relative_step, and only with it", options.lr, "pass one of both")
    if options.warmup_init and not options.relative_step:
        fail(op, "warmup_init", "False without relative_step", True, "warm lr up, or pass relative_step=True")
    if options.beta1 is not None and not 0.0 <= options.beta1 < 1.0:
        fail(op, "beta1", "in [0, 1), or None", options.beta1, "None is usual")
    if not options.clip_threshold > 0.0:
        fail(op, "clip_threshold", "> 0", options.clip_threshold, "1.0 is usual")
    if not (options.decay_rate <= 0.0 and math.isfinite(options.decay_rate)):
        fail(op, "decay_rate", "finite and <= 0", options.decay_rate, "-0.8 is usual")
    check_not_negative(op, "eps1", options.eps1)
    check_not_negative(op, "eps2", options.eps2)
    check_step_options(op, param, options.lr, options)


def _checked_full_rank(
    param: Tensor, grad: Tensor, *state_tensors: Any, backend: str = "auto", **options: Any
) -> tuple[Any, ...]:
    """The arguments of a backend's kernel, checked."""
    state, bundled = _bundle(*state_tensors, **options)
    check_weight("adafactor_update", param)
    shape = tuple(param.shape)
    check_tensor("adafactor_update", "grad", grad, device=param.device, dtypes=WEIGHT_DTYPES, shape=shape)
    check_adafactor("adafactor_update", param, shape, state, bundled)
    return param, grad, state, bundled


def _define_full_rank() -> None:
    name = "adafactor_update"

    def run(param: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        checked = _checked_full_rank(param, *args, **kwargs)
        registry.kernel(name, backend, param.device)(*checked)
        torch.autograd.graph.increment_version(param)

    def fake(*args: Any, **kwargs: Any) -> None:
        _checked_full_rank(*args, **kwargs)

    define(name, f"(Tensor(a!) param, Tensor grad, {_STATE_SCHEMA}, *, {_OPTIONS_SCHEMA}) -> ()", run, fake)


def _define_projected(name: str, grad_argument: str) -> None:
    """Registers ``galore_kernels::name``, whose gradient is (m, n) if called ``grad``, else (L, r)."""

    def checked(
        param: Tensor,
        grad: Tensor,
        basis: Tensor,
        long_basis: Tensor | None,
        basis_scale: Tensor | None,
        *state_tensors: Any,
        side: str,
        scale: float,
        weight_scale: Tensor | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> tuple[Any, ...]:
        state, bundled = _bundle(*state_tensors, **options)
        check_projected_weight(name, param, weight_scale, bundled)
        lowrank_shape = check_projection(name, param, basis, long_basis, basis_scale, side, scale)
        shape = tuple(param.shape) if grad_argument == "grad" else lowrank_shape
        check_tensor(name, grad_argument, grad, device=param.device, dtypes=WEIGHT_DTYPES, shape=shape)
        check_adafactor(name, param, lowrank_shape, state, bundled)
        return param, grad, basis, long_basis, basis_scale, state, bundled, side, scale, weight_scale

    def run(param: Tensor, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        arguments = checked(param, *args, **kwargs)
        registry.kernel(name, backend, param.device)(*arguments)
        torch.autograd.graph.increment_version(param)

    def fake(*args: Any, **kwargs: Any) -> None:
        checked(*args, **kwargs)

    schema = (
        f"(Tensor(a!) param, Tensor {grad_argument}, Tensor basis, Tensor? long_basis, Tensor? basis_scale, "
        f"{_STATE_SCHEMA}, *, str side, float scale, Tensor(h!)? weight_scale=None, {_OPTIONS_SCHEMA}) -> ()"
    )
    define(name, schema, run, fake)


_define_full_rank()
_define_projected("galore_adafactor_update", "grad")
_define_projected("lowrank_adafactor_update", "lowrank_grad")
