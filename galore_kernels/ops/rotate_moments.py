"""``rotate_moments``: Adam's moments of a projected gradient, carried from one basis to another."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_kernels.ops import registry
from galore_kernels.ops.adam import AdamState, check_moments, check_tensor, fail
from galore_kernels.ops.library import define

OP = "rotate_moments"


def rotate_moments(
    state: AdamState,
    rotation: Tensor,
    *,
    beta1: float,
    beta2: float,
    long_rotation: Tensor | None = None,
    backend: str = "auto",
) -> AdamState:
    """The moments as they would be in the new basis, as far as the old one holds them. Changes nothing.

        m' = m @ T        v' = |(v - c m*m) @ (T*T) + c m'*m'|,        c = (1 - beta2^t) / (1 - beta1^t)^2

    with T = P_old.T @ P_new: v - c m*m is the estimate of the variance, whose entries are carried over as if they were
    uncorrelated, and c m'*m' that of the squared mean; c, as v and m carry different bias corrections. At t = 0 both
    are zero. Source: Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics", arXiv
    2410.16103.

    With ``long_rotation`` T_L both sides turn: m' = T_L.T @ m @ T, v' = |(T_L*T_L).T @ (v - c m*m) @ (T*T) + c m'*m'|.

    Args:
        state: moments of shape (L, r), or (r_long, r); t is its ``step``.
        rotation: T, (r, r'), float32, contiguous; r' may differ from r.
        beta1, beta2: Adam's, in [0, 1).
        long_rotation: T_L, (r_long, r_long'), float32, contiguous, or None.
        backend: "auto" or a name from ``backend_info()``.

    Returns:
        A state with moments of shape (L, r') in new memory, 8-bit as those of ``state`` are (a positive v doesn't
        become zero), and with its very ``step`` and ``skipped``.

    Raises:
        ValueError: an argument doesn't fit; the message names it. RuntimeError: the backend can't serve the device.
    """
    moments = torch.ops.galore_kernels.rotate_moments(
        state.exp_avg,
        state.exp_avg_sq,
        state.exp_avg_absmax,
        state.exp_avg_sq_absmax,
        state.step,
        rotation,
        long_rotation,
        beta1=beta1,
        beta2=beta2,
        backend=backend,
    )
    absmax = moments[2:] if state.exp_avg_absmax is not None else (None, None)
    return AdamState(moments[0], moments[1], absmax[0], absmax[1], state.step, state.skipped)


def _rotated_shape(exp_avg: Tensor, rotation: Tensor, long_rotation: Tensor | None) -> tuple[int, int]:
    return exp_avg.shape[0] if long_rotation is None else long_rotation.shape[1], rotation.shape[1]


def _check(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor | None,
    exp_avg_sq_absmax: Tensor | None,
    step: Tensor,
    rotation: Tensor,
    long_rotation: Tensor | None,
    beta1: float,
    beta2: float,
) -> None:
    device = exp_avg.device
    if exp_avg.dim() != 2:
        fail(OP, "exp_avg", "a matrix (L, r)", f"{exp_avg.dim()} dimensions", "pass a projected weight's moments")
    state = AdamState(exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, step, step)
    check_moments(OP, device, exp_avg.numel(), state)
    check_tensor(OP, "step", step, device=device, dtypes=(torch.float32,), shape=())
    for name, turn, size in (
        ("rotation", rotation, exp_avg.shape[1]),
        ("long_rotation", long_rotation, exp_avg.shape[0]),
    ):
        if turn is not None:
            check_tensor(OP, name, turn, device=device, dtypes=(torch.float32,), contiguous=True)
            if turn.dim() != 2 or turn.shape[0] != size or turn.shape[1] < 1:
                fail(OP, name, f"of shape ({size}, new rank)", tuple(turn.shape), "pass P_old.T @ P_new")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= value < 1.0:
            fail(OP, name, "in [0, 1)", value, "0.9 and 0.999 are usual")


def _run(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor | None,
    exp_avg_sq_absmax: Tensor | None,
    step: Tensor,
    rotation: Tensor,
    long_rotation: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    backend: str = "auto",
) -> list[Tensor]:
    tensors = (exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, step)
    _check(*tensors, rotation, long_rotation, beta1, beta2)
    shape = _rotated_shape(exp_avg, rotation, long_rotation)
    target = AdamState.zeros(shape, eight_bit=exp_avg_absmax is not None, device=exp_avg.device)
    kernel = registry.kernel(OP, backend, exp_avg.device)
    kernel(AdamState(*tensors, step), target, rotation, long_rotation, beta1, beta2)
    return _moments(target)


def _fake(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor | None,
    exp_avg_sq_absmax: Tensor | None,
    step: Tensor,
    rotation: Tensor,
    long_rotation: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    backend: str = "auto",
) -> list[Tensor]:
    _check(exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, step, rotation, long_rotation, beta1, beta2)
    shape = _rotated_shape(exp_avg, rotation, long_rotation)
    return _moments(AdamState.zeros(shape, eight_bit=exp_avg_absmax is not None, device=exp_avg.device))


def _moments(state: AdamState) -> list[Tensor]:
    moments = (state.exp_avg, state.exp_avg_sq, state.exp_avg_absmax, state.exp_avg_sq_absmax)
    return [tensor for tensor in moments if tensor is not None]


define(
    OP,
    "(Tensor exp_avg, Tensor exp_avg_sq, Tensor? exp_avg_absmax, Tensor? exp_avg_sq_absmax, Tensor step, "
    'Tensor rotation, Tensor? long_rotation, *, float beta1, float beta2, str backend="auto") -> Tensor[]',
    _run,
    _fake,
)
