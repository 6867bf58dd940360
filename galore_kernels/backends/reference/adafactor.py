"""Adafactor's mathematics, for every backend: what a gradient, projected or not, makes of the moments and the weight.

It runs on the projected gradient, a small tensor, so that it is torch's own operations everywhere, and nothing of it
is read back from a device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from galore_kernels.ops.adafactor_update import MOMENTS, AdafactorOptions, AdafactorState
from galore_kernels.quantizers import dequantize_weight

#: Elements whose squares are summed in one operation, which holds them in double.
_ELEMENTS_AT_ONCE = 2**20

#: The smallest normal float32: what a root mean square that divides is at least.
_TINY = 2.0**-126


@dataclass(frozen=True)
class AdafactorStep:
    """A step that has not been written: the weight becomes ``decay`` * weight - ``coefficient`` * ``direction``.

    Attributes:
        direction: float32, of the gradient's shape and, unless it is 0, of root mean square 1, which every dtype holds.
        coefficient, decay: 0-d float64.
        moments: (tensor of the state, what it becomes).
        finite: 0-d bool; if it is False, none of this may be used.
    """

    direction: Tensor
    coefficient: Tensor
    decay: Tensor
    moments: list[tuple[Tensor, Tensor]]
    finite: Tensor

    def decayed_last(self, scale: float) -> tuple[Tensor, Tensor]:
        """(size, decay) of the same step as the kernels take it: weight = (weight - size * direction) * decay.

        Of no weight at all, ``decay`` = 0, they leave 1e-15 of it, less than a rounding.
        """
        decay = self.decay.masked_fill(self.decay == 0, 2.0**-50)
        return self.coefficient * scale / decay, decay


def adafactor_step(
    g: Tensor, param: Tensor, weight_scale: Tensor | None, state: AdafactorState, options: AdafactorOptions
) -> AdafactorStep:
    """The step that float32 ``g``, scaled and signed, makes of a weight. Changes nothing.

    Contract: ``galore_kernels.ops.adafactor_update``. ``weight_scale``: of an int8 weight, else None.
    """
    step = state.step.double() + 1
    beta2 = 1 - step**options.decay_rate
    alpha = _step_size(param, weight_scale, step, options)
    new, u = _second_moment(g, state, beta2.float(), (1 - beta2).float(), options.eps1)
    size = root_mean_square([u])
    finite = size.isfinite()
    for moment in new.values():
        finite = finite & moment.isfinite().all()
    clipped = alpha * size.clamp(max=options.clip_threshold)
    if state.exp_avg is None or options.beta1 is None:
        coefficient = clipped
    else:
        weight = (1 - options.beta1) * clipped / size.clamp(min=_TINY)
        u = state.exp_avg * options.beta1 + u * weight.float()
        new["exp_avg"] = u
        size = coefficient = root_mean_square([u])
    direction = u / size.clamp(min=_TINY).float()
    moments = [(old, new[name]) for name in MOMENTS if (old := getattr(state, name)) is not None]
    return AdafactorStep(direction, coefficient, 1 - alpha * options.weight_decay, moments, finite)


def allowed(options: AdafactorOptions, device: torch.device) -> Tensor:
    """0-d bool: whether ``found_inf`` lets the step happen."""
    if options.found_inf is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return options.found_inf.reshape(()) == 0


def commit(writes: list[tuple[Tensor, Tensor]], state: AdafactorState, taken: Tensor, refused: Tensor) -> None:
    """Writes, and counts the step, where it is ``taken``; counts it as skipped where ``refused``. Both are 0-d bool.

    ``writes``: (tensor, what it becomes). Everything that allocates comes before the first write.
    """
    chosen = [(target, torch.where(taken, value.view(target.shape), target)) for target, value in writes]
    for target, value in chosen:
        target.copy_(value)
    state.step.add_(taken)
    state.skipped.add_(refused)


def _step_size(param: Tensor, weight_scale: Tensor | None, step: Tensor, options: AdafactorOptions) -> Tensor:
    """Algorithm 5's alpha, in double."""
    if options.lr is not None:
        alpha = options.lr.double()
    else:
        alpha = step.rsqrt().clamp(max=1e-2) if not options.warmup_init else torch.minimum(1e-6 * step, step.rsqrt())
    if not options.scale_parameter:
        return alpha
    return alpha * root_mean_square(_parts(param, weight_scale)).clamp(min=options.eps2)


def _parts(param: Tensor, weight_scale: Tensor | None) -> Iterable[Tensor]:
    """The weight in blocks of rows."""
    if weight_scale is None:
        return (param,)
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, param.shape[1]))
    blocks = zip(param.split(rows), weight_scale.split(rows), strict=True)
    return (dequantize_weight(codes, scale, torch.float32) for codes, scale in blocks)


def root_mean_square(parts: Iterable[Tensor]) -> Tensor:
    """Of the elements of all ``parts``, 0-d float64; 0 of none. In float32 torch's own norm of 2^26 is 0.5 % off."""
    count, norms = 0, []
    for part in parts:
        count += part.numel()
        norms += _norms(part) if part.device.type == "cpu" else [norm_by_rows(part)]
    return torch.linalg.vector_norm(torch.stack(norms)) / max(1, count) ** 0.5


def _norms(part: Tensor) -> list[Tensor]:
    return [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in part.reshape(-1).split(_ELEMENTS_AT_ONCE)]


def norm_by_rows(part: Tensor) -> Tensor:
    """0-d float64. What a GPU takes: it sums a row in float32 as a tree, in one launch that reads 16-bit elements."""
    if part.dim() == 0 or part.numel() == 0:
        return torch.linalg.vector_norm(part, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32), dtype=torch.float64)


def _second_moment(
    g: Tensor, state: AdafactorState, beta2: Tensor, rest: Tensor, eps: float
) -> tuple[dict[str, Tensor], Tensor]:
    """The new second moment, by the names in the state, and the gradient over its root."""
    squares = g.square().add_(eps)
    whole, row, col = state.exp_avg_sq, state.exp_avg_sq_row, state.exp_avg_sq_col
    if whole is not None:
        whole = whole * beta2 + squares * rest
        return {"exp_avg_sq": whole}, g * _inverse_root(whole)
    if row is None or col is None:
        raise ValueError("neither a second moment nor its means")
    row = row * beta2 + squares.mean(-1) * rest
    col = col * beta2 + squares.mean(-2) * rest
    del squares
    u = g * _inverse_root(row / row.mean(-1, keepdim=True)).unsqueeze(-1)
    u *= _inverse_root(col).unsqueeze(-2)
    return {"exp_avg_sq_row": row, "exp_avg_sq_col": col}, u


def _inverse_root(x: Tensor) -> Tensor:
    """1 / sqrt(x), and 0 where x is 0 (no gradient yet and eps1 = 0) or 0 / 0."""
    return torch.where(x > 0, x.rsqrt(), torch.zeros_like(x))
