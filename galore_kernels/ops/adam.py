"""What the three update operations share: Adam's state, Adam's options, their schema and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_kernels.quantizers import SIGNED_ZERO_CODE, UNSIGNED_ZERO_CODE, block_count

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Largest float32 whose square is finite. A gradient beyond it (NaN and Inf included) has no second moment.
LARGEST_GRADIENT = 1.8446743e19

#: Schema of the arguments behind the operation's own tensors; mutated ones carry an alias mark.
STATE_SCHEMA = (
    "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? exp_avg_absmax, Tensor(e!)? exp_avg_sq_absmax, "
    "Tensor(f!) step, Tensor(g!) skipped, Tensor lr"
)
OPTIONS_SCHEMA = (
    "float beta1, float beta2, float eps, float weight_decay, bool maximize=False, "
    'Tensor? grad_scale=None, Tensor? found_inf=None, int? rounding_seed=None, str backend="auto"'
)


@dataclass(frozen=True)
class AdamState:
    """Adam's state of one tensor of N elements; every tensor is updated in place.

    Attributes:
        exp_avg, exp_avg_sq: first and second moment: float32, or uint8 codes of the block-wise 8-bit format.
        exp_avg_absmax, exp_avg_sq_absmax: float32 of shape (ceil(N / 256),) for 8-bit moments, None for float32 ones.
        step: 0-d float32, the number of updates applied so far.
        skipped: 0-d int64, the number of updates skipped because the gradient could not be represented.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None
    exp_avg_sq_absmax: Tensor | None
    step: Tensor
    skipped: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...], *, eight_bit: bool, device: torch.device | str = "cpu") -> AdamState:
        """The state before the first step: zero moments of ``shape`` (8-bit or float32), no step taken."""

        def moment(zero_code: int) -> tuple[Tensor, Tensor | None]:
            if not eight_bit:
                return torch.zeros(shape, dtype=torch.float32, device=device), None
            codes = torch.full(shape, zero_code, dtype=torch.uint8, device=device)
            return codes, torch.zeros(block_count(codes.numel()), dtype=torch.float32, device=device)

        exp_avg, exp_avg_absmax = moment(SIGNED_ZERO_CODE)
        exp_avg_sq, exp_avg_sq_absmax = moment(UNSIGNED_ZERO_CODE)
        step = torch.zeros((), dtype=torch.float32, device=device)
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        return cls(exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, step, skipped)


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The scalars that every update has.

    Attributes:
        weight_decay: decoupled from the gradient.
        maximize: ascend instead of descend.
        grad_scale: 0-d tensor the gradient is divided by (GradScaler's), or None.
        found_inf: 0-d tensor; anything but 0 makes the update change nothing at all, or None.
        rounding_seed: seed for stochastic rounding of bfloat16 and int8 weights, or None for rounding to nearest.
    """

    weight_decay: float = 0.0
    maximize: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    rounding_seed: int | None = None


@dataclass(frozen=True)
class AdamOptions(StepOptions):
    """The scalars of one update; ``weight_decay`` follows the update.

    Attributes:
        lr: 0-d float tensor, so that a schedule needs no recompilation, and a device kernel no host synchronisation.
        beta1, beta2, eps: Adam's.
        weight_decay, maximize, grad_scale, found_inf, rounding_seed: every update's.
    """

    lr: Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


def fail(op: str, argument: str, expected: str, got: object, remedy: str) -> None:
    """Raises the ValueError of an argument that doesn't fit."""
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}; {remedy}")


def check_tensor(
    op: str,
    argument: str,
    tensor: Tensor,
    *,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
    contiguous: bool = False,
) -> None:
    """Raises ValueError naming the argument unless it is a dense tensor of the wanted device, dtype and shape."""
    if tensor.layout != torch.strided:
        fail(op, argument, "a dense tensor", tensor.layout, "call .to_dense()")
    if tensor.device != device:
        fail(op, argument, f"on {device}, where the weight is", tensor.device, "move it there")
    if tensor.dtype not in dtypes:
        fail(op, argument, " or ".join(map(str, dtypes)), tensor.dtype, "convert it")
    if shape is not None and tuple(tensor.shape) != shape:
        fail(
            op,
            argument,
            f"of shape {shape}",
            tuple(tensor.shape),
            "pass the tensor that belongs to this weight",
        )
    if contiguous and not tensor.is_contiguous():
        fail(op, argument, "contiguous", f"strides {tensor.stride()}", "call .contiguous()")


def check_weight(op: str, param: Tensor) -> None:
    """Raises ValueError unless ``param`` can be updated in place."""
    check_tensor(op, "param", param, device=param.device, dtypes=WEIGHT_DTYPES)
    if overlaps(param):
        fail(op, "param", "without overlapping elements", f"strides {param.stride()}", "clone it")


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory (expanded tensors, sliding windows), so that an update would hit them twice."""
    if tensor.is_contiguous():
        return False
    extent = 1  # elements that the dimensions of smaller stride reach over
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def check_moments(op: str, device: torch.device, numel: int, state: AdamState) -> None:
    """Raises ValueError unless the moments are ``numel`` elements in one of the two formats."""
    eight_bit = state.exp_avg_absmax is not None
    if eight_bit != (state.exp_avg_sq_absmax is not None):
        fail(op, "exp_avg_absmax, exp_avg_sq_absmax", "both tensors or both None", "one of each", "pass both")
    moment = (torch.uint8,) if eight_bit else (torch.float32,)
    for name, tensor in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
        check_tensor(op, name, tensor, device=device, dtypes=moment, contiguous=True)
        if tensor.numel() != numel:
            fail(op, name, f"of {numel} elements", tensor.numel(), "pass the state that belongs to this weight")
    for name, absmax in (
        ("exp_avg_absmax", state.exp_avg_absmax),
        ("exp_avg_sq_absmax", state.exp_avg_sq_absmax),
    ):
        if absmax is not None:
            shape = (block_count(numel),)
            check_tensor(op, name, absmax, device=device, dtypes=(torch.float32,), shape=shape, contiguous=True)


def check_adam(op: str, param: Tensor, numel: int, state: AdamState, options: AdamOptions) -> None:
    """Checks state and options of an update whose moments have ``numel`` elements. Changes nothing."""
    check_moments(op, param.device, numel, state)
    check_counters(op, param.device, state.step, state.skipped)
    for name, value in (("beta1", options.beta1), ("beta2", options.beta2)):
        if not 0.0 <= value < 1.0:
            fail(op, name, "in [0, 1)", value, "0.9 and 0.999 are usual")
    check_not_negative(op, "eps", options.eps)
    check_step_options(op, param, options.lr, options)


def check_counters(op: str, device: torch.device, step: Tensor, skipped: Tensor) -> None:
    """Raises ValueError unless these can count steps."""
    check_tensor(op, "step", step, device=device, dtypes=(torch.float32,), shape=())
    check_tensor(op, "skipped", skipped, device=device, dtypes=(torch.int64,), shape=())


def check_not_negative(op: str, name: str, value: float) -> None:
    """Raises ValueError unless an option is a finite number, and not negative."""
    if not (value >= 0.0 and math.isfinite(value)):
        fail(op, name, "finite and >= 0", value, "pass 0 to turn it off")


def check_step_options(op: str, param: Tensor, lr: Tensor | None, options: StepOptions) -> None:
    """Raises ValueError unless a learning rate, if there is one, and the scalars of every update fit the weight."""
    floats = (torch.float32, torch.float64)
    if lr is not None:
        check_tensor(op, "lr", lr, device=param.device, dtypes=floats, shape=())
    check_not_negative(op, "weight_decay", options.weight_decay)
    for name, tensor in (("grad_scale", options.grad_scale), ("found_inf", options.found_inf)):
        if tensor is not None:
            check_tensor(op, name, tensor, device=param.device, dtypes=floats)
            if tensor.numel() != 1:
                fail(op, name, "a single number", f"shape {tuple(tensor.shape)}", "pass a 0-d tensor")
    if options.rounding_seed is not None and param.dtype not in (torch.bfloat16, torch.int8):
        fail(op, "rounding_seed", "None unless the weight is bfloat16 or int8", options.rounding_seed, "pass None")
    if options.rounding_seed is not None and options.rounding_seed < 0:
        fail(op, "rounding_seed", "in [0, 2^63)", options.rounding_seed, "take it modulo 2^63")


def flat_state(state: AdamState, options: AdamOptions) -> tuple[Tensor | None, ...]:
    """The positional arguments of ``STATE_SCHEMA``."""
    return (
        state.exp_avg,
        state.exp_avg_sq,
        state.exp_avg_absmax,
        state.exp_avg_sq_absmax,
        state.step,
        state.skipped,
        options.lr,
    )


def flat_options(options: AdamOptions, backend: str) -> dict[str, object]:
    """The keyword arguments of ``OPTIONS_SCHEMA``."""
    return {
        "beta1": options.beta1,
        "beta2": options.beta2,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
        "maximize": options.maximize,
        "grad_scale": options.grad_scale,
        "found_inf": options.found_inf,
        "rounding_seed": options.rounding_seed,
        "backend": backend,
    }


def bundle(*state_tensors: Any, **options: Any) -> tuple[AdamState, AdamOptions]:
    """The inverse of ``flat_state`` and ``flat_options``: the schema's arguments as the two dataclasses."""
    *tensors, lr = state_tensors
    return AdamState(*tensors), AdamOptions(lr, **options)
