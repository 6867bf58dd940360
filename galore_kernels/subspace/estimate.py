"""The norm of a gradient that no process has: estimated, after a search, from what was found and from its sketch."""

from __future__ import annotations

import torch
from torch import Tensor


class NormEstimate:
    """|G|^2 as the squares of the singular values that were found, and the sketch's square in what is left.

    Signs at random make the expectation of |sketch|^2 |G|^2, with a deviation of sqrt(2 / its rows) at most. Of a
    gradient whose energy was found little is left to estimate.
    """

    def __init__(self) -> None:
        self._sketch: Tensor | None = None
        self._whole: Tensor | None = None

    def see_product(self, product: Tensor) -> None:
        """(b, S) = A @ G. A search begins with its sketch, so that the first one is kept."""
        if self._sketch is None:
            self._sketch = product.clone()

    def see_whole(self, gradient: Tensor) -> None:
        """An exact decomposition has the gradient itself."""
        self._whole = torch.linalg.vector_norm(gradient)

    def norm(self, vectors: Tensor, sigma: Tensor, long: int) -> Tensor:
        """0-d float32, of vectors (S, r) and singular values (r,) that were found in a gradient (long, S)."""
        if self._whole is not None:
            return self._whole
        if self._sketch is None:
            raise RuntimeError("there was no search yet")
        # Vectors whose singular values are rounding aren't orthogonal to the others.
        rounding = sigma[0] * torch.finfo(torch.float32).eps * max(long, len(vectors)) ** 0.5
        vectors = vectors * (sigma > rounding)
        rest = self._sketch - (self._sketch @ vectors) @ vectors.T
        return (sigma.double().square().sum() + rest.double().square().sum()).sqrt().float()
