"""The issue's figures of correctness, at the sizes that are timed: codes, weights, and the same bits every time."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_plan import LAYER, Plan
from torch import Tensor

from galore_kernels.ops import AdamOptions, AdamState, registry
from galore_kernels.ops.group import UpdateGroup
from galore_kernels.quantizers import (
    BASIS_FORMATS,
    GROUP_SIZE,
    dequantize_basis,
    dequantize_weight,
    quantize_basis,
    quantize_weight,
)

# The float64 restatement of the mathematics that the tests compare with; it shares no code with the library.
sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))

import oracle
import tolerances
from update_cases import bits, clone, f64, moments, oracle_scalars, warm_state

#: Matrices in a group: enough that their panels fill a large device, so that the way taken is the one that is timed.
GROUP = 5
SCALE = 0.25
#: Long indices of which the weights are compared with float64: every so many, the last panel's tail among them.
SAMPLED = 512
RUNS = 4


@dataclass
class Matrix:
    """One matrix with everything that its update takes."""

    param: Tensor
    grad: Tensor
    basis: Tensor
    state: AdamState
    basis_scale: Tensor | None = None
    weight_scale: Tensor | None = None

    def weights(self) -> Tensor:
        """The (m, n) weights, float32 where they are int8."""
        if self.weight_scale is None:
            return self.param
        return dequantize_weight(self.param, self.weight_scale, torch.float32)


def _make(
    shape: tuple[int, int],
    state: AdamState,
    rank: int,
    side: str,
    basis_format: str | None,
    seed: int,
    device: torch.device,
    *,
    int8_weight: bool,
) -> Matrix:
    rng = torch.Generator(device).manual_seed(seed)
    short = shape[1] if side == "right" else shape[0]

    def normal(*size: int, std: float) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, std, generator=rng)

    there = {key: value.to(device, copy=True) for key, value in vars(state).items()}
    # Weights of the size that models have; basis columns of length 1.
    param, grad, basis = normal(*shape, std=0.02), normal(*shape, std=1.0), normal(short, rank, std=short**-0.5)
    scale = None
    if basis_format is not None:
        basis, scale = quantize_basis(basis.float(), basis_format)
    matrix = Matrix(param, grad, basis, replace(state, **there), scale)
    if int8_weight:
        matrix.param, matrix.weight_scale = quantize_weight(param)
    return matrix


def _updated(backend: registry.Backend, matrices: list[Matrix], side: str, o: AdamOptions) -> list[Matrix]:
    """The matrices after an update by ``backend``, together if it can; the given ones stay as they are."""
    new = [replace(x, param=x.param.clone(), state=clone(x.state)) for x in matrices]
    for x in new:
        x.weight_scale = None if x.weight_scale is None else x.weight_scale.clone()
    if backend.group is None:
        kernel = backend.kernels["galore_update"]
        for x in new:
            kernel(x.param, x.grad, x.basis, None, x.basis_scale, x.state, o, side, SCALE, x.weight_scale)
        return new
    group = UpdateGroup(
        "galore_update",
        tuple(x.param for x in new),
        tuple(x.state for x in new),
        tuple(x.basis for x in new),
        side,
        SCALE,
        None if o.rounding_seed is None else (o.rounding_seed,) * len(new),
        tuple(x.basis_scale for x in new if x.basis_scale is not None),
        tuple(x.weight_scale for x in new if x.weight_scale is not None),
    )
    backend.group(group)([x.grad for x in new], o)
    return new


def _same(a: Matrix, b: Matrix) -> bool:
    pairs = [(a.param, b.param), *zip(vars(a.state).values(), vars(b.state).values(), strict=True)]
    if a.weight_scale is not None and b.weight_scale is not None:
        pairs.append((a.weight_scale, b.weight_scale))
    return all(bool((bits(x) == bits(y)).all()) for x, y in pairs)


def _weights(old: Matrix, new: Matrix, side: str, o: AdamOptions) -> dict[str, Any]:
    """Distance to float64 of a sample of long indices: nothing in an update crosses them."""
    right = side == "right"
    long = old.param.shape[0 if right else 1]
    which = torch.arange(long - 1, -1, -max(1, long // SAMPLED), device=old.param.device)

    def part(matrix: Tensor) -> oracle.Array:
        return f64((matrix[which] if right else matrix[:, which]).cpu())

    a = oracle_scalars(o, int(old.state.step) + 1)
    cpu = {key: value.cpu() for key, value in vars(old.state).items()}
    m, v = (moment.reshape(long, -1)[which.cpu().numpy()] for moment in moments(replace(old.state, **cpu)))
    basis = f64((old.basis if old.basis_scale is None else dequantize_basis(old.basis, old.basis_scale)).cpu())
    lowrank = oracle.project(part(old.grad), basis, None, side)
    direction = oracle.adam_direction(*oracle.adam_moments(lowrank, m, v, a), a)
    change = oracle.back_project(direction, basis, None, side)
    before = part(old.weights())
    exact = oracle.descend(before, SCALE * change, a)
    off = np.abs(part(new.weights()) - exact)
    if new.weight_scale is None:
        ulp = tolerances.ulp(np.maximum(np.abs(exact), np.abs(before)), torch.bfloat16)
    else:  # the step of a code; stochastic rounding takes up to a whole one
        ulp = part(new.weight_scale.repeat_interleave(GROUP_SIZE, dim=1)[:, : new.param.shape[1]])
    # What rounding the direction to the basis' dtype, as the operation is to do, may move a weight by: beside a weight
    # near zero that can be more than its ulps.
    rounding = 2.0**-9 * a.lr * SCALE * oracle.back_project(np.abs(direction), np.abs(basis), None, side)
    return {
        "weights_compared": int(off.size),
        "weights_beyond_two_ulps": int((off > 2 * ulp).sum()),
        "weights_beyond_two_ulps_and_the_directions_rounding": int((off > 2 * ulp + rounding).sum()),
        "worst_ulps": float((off / ulp).max()),
        "weights_finite": bool(np.isfinite(off).all()),
    }


def _codes(new: Matrix, expected: Matrix) -> dict[str, Any]:
    pairs = [(getattr(new.state, key), getattr(expected.state, key)) for key in ("exp_avg", "exp_avg_sq")]
    if new.weight_scale is not None:
        pairs.append((new.param, expected.param))
    distances = [(a.int() - b.int()).abs() for a, b in pairs]
    return {
        "codes_equal": min(float((distance == 0).double().mean()) for distance in distances),
        "codes_apart": max(int(distance.max()) for distance in distances),
    }


def correctness(plan: Plan, name: str, device: torch.device) -> list[dict[str, Any]]:
    """The figures of one backend: each shape at the first rank, the first shape at the others; codes of all kinds."""
    backend, reference = (registry.select("galore_update", which, device) for which in (name, "reference"))
    plain = AdamOptions(torch.tensor(1e-2, device=device), weight_decay=0.1)
    shapes = [plan.scaled(shape) for shape in dict.fromkeys(LAYER)]
    first = plan.ranks[0]
    cases: list[tuple[tuple[int, int], int, str | None, bool]] = [(shape, first, None, False) for shape in shapes]
    cases += [(shapes[0], rank, None, False) for rank in plan.ranks[1:]]
    cases += [(shapes[0], first, basis_format, False) for basis_format in BASIS_FORMATS]
    cases += [(shapes[0], first, None, True), (shapes[-1], first, "int8", True)]  # either side's
    found = []
    for shape, rank, basis_format, int8_weight in cases:
        o = replace(plain, rounding_seed=7) if int8_weight else plain
        side = "right" if shape[0] >= shape[1] else "left"
        state = warm_state((max(shape), rank), eight_bit=True)
        matrices = [
            _make(shape, state, rank, side, basis_format, seed, device, int8_weight=int8_weight)
            for seed in range(GROUP)
        ]
        new = _updated(backend, matrices, side, o)
        again = [_updated(backend, matrices, side, o) for _ in range(RUNS - 1)]
        figures = {"backend": name, "shape": list(shape), "rank": rank, "side": side, "basis": basis_format}
        figures["int8_weight"] = int8_weight
        expected = _updated(reference, matrices[-1:], side, o)[0]
        figures |= _codes(new[-1], expected) | _weights(matrices[-1], new[-1], side, o)
        figures["weights_of_the_reference_beyond_two_ulps"] = _weights(matrices[-1], expected, side, o)[
            "weights_beyond_two_ulps"
        ]
        figures["bit_identical"] = all(_same(x, y) for run in again for x, y in zip(run, new, strict=True))
        found.append(figures)
    return found
