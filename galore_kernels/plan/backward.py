"""The backward pass of a Llama on a timeline: what each operation makes, and what it was the last to need.

The order is autograd's, the reverse of the forward pass. Operations that never hold the most of their block are left
out (the rotations of queries and keys, sums over tokens). "d x" is the gradient of x; "d residual" that of the residual
stream, (T, H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from galore_kernels.plan.activations import saved_bytes, saved_tensors
from galore_kernels.plan.settings import Settings
from galore_kernels.plan.shapes import Matrix
from galore_kernels.plan.timeline import Timeline

__all__ = ["Backward", "gradient_bytes"]

_FLOAT = torch.float32.itemsize


def gradient_bytes(settings: Settings, matrix: Matrix, *, projected: bool) -> int:
    """Of a parameter's gradient in the dtype of computation: (m, n), or R, (L, r), of a factored one."""
    if projected and settings.gradients == "factored":
        return settings.long_short(matrix)[0] * settings.rank_of(matrix) * settings.dtype.itemsize
    return matrix.numel * settings.dtype.itemsize


class LayerwiseUpdates(Protocol):
    """The update of one parameter within backward, in two parts."""

    def refresh(self, matrix: Matrix) -> None:
        """The search for its basis, if that is due."""

    def update(self, matrix: Matrix, projected: bool) -> None:
        """The update itself."""


@dataclass
class Backward:
    """Walks from the loss to the embedding.

    Attributes:
        updates: where they are layerwise, what accounts for one of a parameter whose gradient is alive under the name
            "gradient"; else None.
        keeping: with factored gradients: layers, from the last, whose bases are found from X and dY in this step. These
            live until they are found, which is after backward unless updates are layerwise.
    """

    settings: Settings
    timeline: Timeline
    updates: LayerwiseUpdates | None
    keeping: int = 0

    @property
    def _stream(self) -> int:
        return self.settings.tokens * self.settings.shape.hidden

    def run(self) -> None:
        """The whole pass."""
        shape, line = self.settings.shape, self.timeline
        embedding, head = (Matrix(name, shape.vocabulary, shape.hidden) for name in ("embedding", "head"))
        self._loss()
        line.moment = "backward pass, output head"
        self._weight_gradient(head)
        self._gradient_of("output.input", self._stream)
        line.free("d logits", "output.input")
        if not shape.tied:
            self._weight_gradient_is_ready(head)
        elif self.updates is not None:
            line.rename("gradient", "gradient of the head")
        line.moment = "backward pass, last norm"
        self._norm("output")
        for index in range(shape.layers, 0, -1):
            keeps = shape.layers - index < self.keeping
            self._layer(f"backward pass, layer {index} of {shape.layers}", keeps)
        line.moment = "backward pass, embedding"
        self._weight_gradient(embedding)
        line.free("d residual")
        if shape.tied:
            table = gradient_bytes(self.settings, embedding, projected=False)
            with line.during("sum of both tables' gradients", "gradients", table):
                pass
            line.free("gradient of the head")
            if self.updates is None:
                line.shrink("gradients", table)
        self._weight_gradient_is_ready(embedding)

    def _gradient_of(self, name: str, elements: int) -> None:
        self.timeline.make(f"d {name}", "activations", elements * self.settings.dtype.itemsize)

    def _add(self, name: str, part: str, elements: int) -> None:
        """d name = d name + d part; both are freed. Without a "d name" yet, "d part" is that."""
        line = self.timeline
        if line.lives(f"d {name}"):
            self._gradient_of(f"{name}, sum", elements)
            line.free(f"d {name}", f"d {part}")
            line.rename(f"d {name}, sum", f"d {name}")
        else:
            line.rename(f"d {part}", f"d {name}")

    def _loss(self) -> None:
        """Cross entropy of float32 logits (T, V)."""
        line, settings = self.timeline, self.settings
        logits = settings.tokens * settings.shape.vocabulary
        line.moment = "backward pass, loss"
        line.make("d log-softmax", "logits", logits * _FLOAT)
        line.make("d float logits", "logits", logits * _FLOAT)
        line.free("log-softmax", "d log-softmax")
        if settings.dtype == torch.float32:
            line.rename("d float logits", "d logits")
        else:
            line.make("d logits", "logits", logits * settings.dtype.itemsize)
            line.free("d float logits")

    def _layer(self, moment: str, keeps: bool) -> None:
        settings, line, shape = self.settings, self.timeline, self.settings.shape
        q, k, v, o, gate, up, down = shape.linears()
        inner, wide, narrow = (settings.tokens * w for w in (shape.intermediate, shape.query_width, shape.kv_width))
        saved = saved_tensors(settings, keeps_inputs=keeps)
        line.moment = f"{moment}, MLP"
        if settings.checkpointing == "none":
            line.shrink("saved by layers", saved_bytes(saved))
        for tensor in saved:
            line.make(tensor.name, "activations", tensor.bytes)
        if settings.checkpointing == "layer" and settings.dtype == torch.float32:
            line.free("attention.x")  # it is the layer's input, which has been kept
        if keeps and self.updates is None:
            outputs = ("residual", "up", "gate", "values", "keys", "queries")
            for name in {matrix.input for matrix in shape.linears()} | {f"d {output}" for output in outputs}:
                line.keep(name, "kept for the refresh", "refresh workspace")

        self._linear(down, "residual", "product", inner, last_user_of=("product",))
        self._gradient_of("silu", inner)
        self._gradient_of("up", inner)
        line.free("d product", "silu", "up")
        self._linear(up, "up", "mlp.input", self._stream, last_user_of=("d up",))
        self._gradient_of("gate", inner)
        line.free("d silu", "gate")
        self._linear(gate, "gate", "mlp.input", self._stream, last_user_of=("d gate", "mlp.input"))
        self._norm("mlp")

        line.moment = f"{moment}, attention"
        if keeps and self.updates is None:
            line.keep("d residual", "kept for the refresh", "refresh workspace")  # the one that o is given
        self._linear(o, "residual", "attention.output", wide)
        for name, elements in (("queries", wide), ("keys", narrow), ("values", narrow)):
            self._gradient_of(name, elements)
        line.free("queries", "keys", "values", "log-sum-exp", "attention.output", "d attention.output")
        self._linear(v, "values", "attention.input", self._stream, last_user_of=("d values",))
        self._linear(k, "keys", "attention.input", self._stream, last_user_of=("d keys",))
        self._linear(q, "queries", "attention.input", self._stream, last_user_of=("d queries", "attention.input"))
        self._norm("attention")
        if settings.checkpointing == "layer":
            line.shrink("saved by layers", self._stream * settings.dtype.itemsize)

    def _linear(
        self, matrix: Matrix, output: str, name: str, elements: int, *, last_user_of: tuple[str, ...] = ()
    ) -> None:
        """y = x @ W.T, from "d ``output``" to an addition to "d ``name``" of so many elements, and to W's gradient."""
        line, settings = self.timeline, self.settings
        dequantized = matrix.numel * settings.dtype.itemsize if settings.weights == "int8" else 0
        with line.during("dequantized weight", "activations", dequantized):
            self._gradient_of(f"{name}, part", elements)
        self._weight_gradient(matrix, projected=True)
        if self.updates is not None and settings.gradients == "factored":
            self.updates.refresh(matrix)
        line.free(*last_user_of, f"{matrix.name}.projected input")
        if self.updates is not None and settings.gradients == "dense":
            self.updates.refresh(matrix)
        self._weight_gradient_is_ready(matrix, projected=True)
        self._add(name, f"{name}, part", elements)

    def _norm(self, name: str) -> None:
        """y = weight * own(x / rms(x)) with the mathematics in float32, and the addition to the residual stream."""
        line, wide, narrow = self.timeline, self._stream * _FLOAT, self.settings.dtype != torch.float32
        self._gradient_of(f"{name}.normed", self._stream)
        with line.during("d weight, by token", "activations", self._stream * self.settings.dtype.itemsize):
            pass
        line.free(f"d {name}.input", f"{name}.normed")
        weight = Matrix("norm", self.settings.shape.hidden, 1)
        self._weight_gradient(weight)
        self._weight_gradient_is_ready(weight)
        if narrow:
            line.make(f"d {name}.normed, float", "activations", wide)
            line.free(f"d {name}.normed")
        else:
            line.rename(f"d {name}.normed", f"d {name}.normed, float")
        line.make(f"d {name}.x", "activations", wide)
        with line.during("d rms, by element", "activations", wide):
            line.free(f"d {name}.normed, float")
        # Of the mean square: d x = d mean / H * (2 * x ** 1), every factor and product a tensor of its own.
        with line.during("d mean square: expanded, power, twice the power, product", "activations", 4 * wide):
            line.free(f"{name}.x")
        line.free(f"{name}.rms")
        line.make(f"d {name}.x, sum", "activations", wide)
        line.free(f"d {name}.x")
        if narrow:
            self._gradient_of(f"{name}.x, own", self._stream)
            line.free(f"d {name}.x, sum")
            line.rename(f"d {name}.x, own", f"d {name}.x, sum")
        self._add("residual", f"{name}.x, sum", self._stream)

    def _weight_gradient(self, matrix: Matrix, *, projected: bool = False) -> None:
        kept = self.updates is None and not (projected and self.settings.gradients == "factored")
        size = gradient_bytes(self.settings, matrix, projected=projected)
        self.timeline.make("gradients" if kept else "gradient", "gradients", size)

    def _weight_gradient_is_ready(self, matrix: Matrix, *, projected: bool = False) -> None:
        if self.updates is not None:
            self.updates.update(matrix, projected)
        self.timeline.free("gradient")
