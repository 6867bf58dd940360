"""Products with the gradients of a batch, and of the thin tensors that they leave.

A gradient is large: each has a product of its own, in place, with its own strides. Thin tensors are of N matrices
together: (N, L, b), (N, S, b), (N, b, b).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from galore_kernels.subspace.exact import exact_right_vectors
from galore_kernels.subspace.factors import Factors
from galore_kernels.subspace.sharded import ShardedGradient

# Gradients whose largest magnitude is in this range are used where they lie; others are multiplied by a power
# of two, so that neither squares nor 2^-24 of the largest value leave fp32's normal range.
LARGEST_UNSCALED = 2.0**32

NARROW_DTYPES = (torch.bfloat16, torch.float16)

#: A gradient that this process doesn't have: only what it would be the product of, or a part of it.
Implicit = Factors | ShardedGradient

#: What a search takes.
Gradient = Tensor | Implicit


def in_batches(device: torch.device) -> bool:
    """Whether several matrices go through one call together, with nothing read back from the device within.

    On a CPU they don't: nothing waits there for a launch or for a branch, and one matrix at a time needs the memory of
    one, and has the bits that it has alone.
    """
    return device.type != "cpu"


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(N, ...): the tensors behind one another; of a single one a view."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def product(left: Tensor, right: Tensor) -> Tensor:
    """(N, n, m) of (N, n, k) and (N, k, m)."""
    # Of one matrix the plain product: a batched one rounds in another order.
    return torch.mm(left[0], right[0])[None] if len(left) == 1 else torch.bmm(left, right)


def subtract_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """``target -= left @ right``, in place."""
    if len(target) == 1:
        target[0].addmm_(left[0], right[0], alpha=-1.0)
    else:
        target.baddbmm_(left, right, alpha=-1.0)


class Matrices:
    """N gradients (L, S) of one shape, dtype and device, as products take them.

    In fp32, into which other dtypes are copied. But on CUDA 16-bit gradients stay as they are: tensor cores multiply
    them with the other operand rounded to their dtype, and sum in fp32. (Emulated on a CPU, on the spectra of
    ``bench/spectra.py``: bf16 operands lose at most 8e-4 of the exact energy, of 0.9994 on a spectrum with a step of
    1.1; elsewhere less than 1e-4.)

    Args:
        grads: N >= 1 of them, with any strides, or as many implicit ones.
        largest: the largest magnitude of each, finite and not 0.
    """

    def __init__(self, grads: Sequence[Gradient], largest: Sequence[float]) -> None:
        first = grads[0]
        self.shape, self.device, self.grad_dtype = first.shape, first.device, first.dtype
        self.dtype = first.dtype if _stays_narrow(first) else torch.float32
        pairs = zip(grads, largest, strict=True)
        self.items = [_scaled(g, size, self.dtype) if isinstance(g, Tensor) else g.near_one for g, size in pairs]

    def times(self, right: Tensor) -> Tensor:
        """G @ Z: (N, L, b) float32 of (N, S, b)."""
        found = right.new_empty(len(self.items), self.shape[0], right.shape[2])
        for matrix, operand, out in zip(self.items, right.to(self.dtype), found, strict=True):
            if isinstance(matrix, Tensor):
                _multiply(matrix, operand, out)
            else:
                matrix.times(operand, out)
        return found

    def multiplied_by(self, left: Tensor, out: Tensor) -> None:
        """A @ G, written to ``out``, (N, b, S) float32, of (N, b, L)."""
        for matrix, operand, result in zip(self.items, left.to(self.dtype), out, strict=True):
            if isinstance(matrix, Tensor):
                _multiply(operand, matrix, result)
            else:
                matrix.multiplied_by(operand, result)

    def norms(self, vectors: Tensor, sigma: Tensor) -> Tensor:
        """(N,) float32: Frobenius norms.

        Those of sums over processes are estimated from what was found, (N, S, r) right singular vectors and (N, r)
        singular values.
        """
        found = zip(self.items, vectors, sigma, strict=True)
        return torch.stack([_norm(item) if isinstance(item, Tensor) else item.norm(v, s) for item, v, s in found])

    def exact_right_vectors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(N, S, r) leading right singular vectors and (N, r) singular values, one matrix at a time."""
        found = [
            exact_right_vectors(matrix.float(), rank)
            if isinstance(matrix, Tensor)
            else matrix.exact_right_vectors(rank)
            for matrix in self.items
        ]
        return stacked([vectors for vectors, _ in found]), stacked([sigma for _, sigma in found])


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dtype=torch.float32)


def largest_magnitudes(grads: Sequence[Gradient]) -> list[float]:
    """Of each gradient; NaN where it has one. One reading back from the device; of implicit ones up to two for each.

    Of factors some other positive number where the gradient is not zero: see ``Factors.magnitude``.
    """
    implicit = [grad for grad in grads if not isinstance(grad, Tensor)]
    if implicit:
        return [grad.magnitude for grad in implicit]
    whole = [grad for grad in grads if isinstance(grad, Tensor)]
    # aminmax needs no temporary and is 20 times faster than the infinity norm, in memory's order above all.
    ends = [torch.aminmax(grad.mT if grad.stride(0) < grad.stride(1) else grad) for grad in whole]
    lowest, highest = torch.stack([low for low, _ in ends]), torch.stack([high for _, high in ends])
    return list(torch.maximum(-lowest, highest).tolist())


def _stays_narrow(grad: Gradient) -> bool:
    if not isinstance(grad, Tensor):
        return False
    # PyTorch has a product of 16-bit operands with an fp32 result from 2.8 on, and on CUDA only.
    return grad.dtype in NARROW_DTYPES and grad.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads()


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    else:
        _multiply_narrow(left, right, out)


def _multiply_narrow(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.mm(left, right, out_dtype=torch.float32, out=out)


def _scaled(grad: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """The gradient in ``dtype``, at its own scale or one near 1, with strides that matrix products take as is."""
    matrix = grad if grad.dtype == torch.float64 else grad.to(dtype)
    if not 1.0 / LARGEST_UNSCALED <= largest <= LARGEST_UNSCALED:
        # In two halves: a subnormal's 2^149 is itself out of fp32's range.
        exponent = math.frexp(largest)[1]
        half = exponent // 2
        matrix = matrix * 2.0**-half * 2.0 ** (half - exponent)
    matrix = matrix.to(dtype)
    return matrix if min(matrix.stride()) == 1 else matrix.contiguous()
