"""What one layer of a Llama keeps for backward: the tensors that autograd saves, by name.

In Hugging Face's ``LlamaForCausalLM`` with ``attn_implementation="sdpa"``. T tokens, H hidden, I intermediate, Q and K
columns of the queries and of the keys, "own" the dtype of computation (bfloat16 or float32).

    input norm       x = float32(h), (T, H) float32; where own is float32, h itself
                     normed = own(x / rms), (T, H) own; 1 / rms, (T, 1) float32
                     attention.input = weight * normed, (T, H) own: the input of q, k and v
    attention        rotated queries, (T, Q), rotated keys, (T, K), values, (T, K), own
                     log of the sum of the exponentials, (T, heads) float32
                     attention.output, (T, Q) own: also the input of o
    post norm        as the input norm: mlp.x, mlp.normed, mlp.input
    MLP              gate, up, silu = silu(gate), product = silu * up: (T, I) own; the product is the input of down

With factored gradients a matrix on the right side keeps X @ P, (T, r) own, in the place of its input X; one on the left
side keeps X. What another operation saves anyway (attention.output, product) stays in either case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from galore_kernels.plan.settings import Settings

__all__ = ["Saved", "norm_saved", "saved_bytes", "saved_tensors"]


@dataclass(frozen=True)
class Saved:
    """A tensor kept from forward to backward."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def norm_saved(settings: Settings, name: str) -> list[Saved]:
    """Of a norm: ``name`` is of the block that takes its result."""
    size, own = (settings.tokens, settings.shape.hidden), settings.dtype
    return [
        Saved(f"{name}.x", size, torch.float32),
        Saved(f"{name}.normed", size, own),
        Saved(f"{name}.rms", (settings.tokens, 1), torch.float32),
        Saved(f"{name}.input", size, own),
    ]


def saved_tensors(settings: Settings, *, keeps_inputs: bool = False) -> list[Saved]:
    """Of one layer, without checkpointing or once it is computed again.

    Args:
        keeps_inputs: with factored gradients, of a layer whose bases are found in this step, from the inputs: it keeps
            those, and not X @ P.
    """
    shape, tokens, own = settings.shape, settings.tokens, settings.dtype
    wide, narrow, inner = (tokens, shape.query_width), (tokens, shape.kv_width), (tokens, shape.intermediate)
    saved = [
        *norm_saved(settings, "attention"),
        Saved("queries", wide, own),
        Saved("keys", narrow, own),
        Saved("values", narrow, own),
        Saved("log-sum-exp", (tokens, shape.heads), torch.float32),
        Saved("attention.output", wide, own),
        *norm_saved(settings, "mlp"),
        Saved("gate", inner, own),
        Saved("up", inner, own),
        Saved("silu", inner, own),
        Saved("product", inner, own),
    ]
    if settings.gradients == "dense" or keeps_inputs:
        return saved
    linears = shape.linears()
    factored = [matrix for matrix in linears if settings.side(matrix) == "right"]
    # Saved by linear layers alone; the other inputs are saved by attention's kernel, and by nobody else but down.
    sole = {"attention.input", "mlp.input", "product"}
    unneeded = sole - {matrix.input for matrix in linears if matrix not in factored}
    saved = [tensor for tensor in saved if tensor.name not in unneeded]
    return saved + [Saved(f"{m.name}.projected input", (tokens, settings.rank_of(m)), own) for m in factored]


def saved_bytes(saved: list[Saved]) -> int:
    """Their sum."""
    return sum(tensor.bytes for tensor in saved)
