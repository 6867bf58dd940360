"""``plan``: the peak memory of one training step, by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from galore_kernels.plan.activations import norm_saved, saved_bytes, saved_tensors
from galore_kernels.plan.backward import Backward, gradient_bytes
from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.optimizers import OPTIMIZERS, Memory, Parameter, parameters
from galore_kernels.plan.settings import Settings, check_choice
from galore_kernels.plan.shapes import LlamaShape, Matrix, find_model
from galore_kernels.plan.timeline import Timeline
from galore_kernels.quantizers import weight_scale_shape

__all__ = ["Plan", "estimate", "plan"]

_INTEGER = torch.int64.itemsize


@dataclass(frozen=True)
class Plan:
    """What a step takes at its fullest moment.

    Attributes:
        settings: what was planned. optimizer: its name in ``OPTIMIZERS``. label: its name in tables.
        parts: bytes by part (``PARTS``) at the peak. moment: when that is.
        tensors: bytes of everything that is alive then, by name.
    """

    settings: Settings
    optimizer: str
    label: str
    parts: dict[str, int]
    moment: str
    tensors: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "settings": asdict(self.settings),
            "parameters": self.settings.shape.parameters,
            "optimizer": self.optimizer,
            "peak_bytes": self.peak,
            "moment": self.moment,
            "parts": self.parts,
            "tensors": self.tensors,
        }


def plan(model: str | Path | LlamaShape, optimizer: str = "galore8bit", **options: Any) -> Plan:
    """The peak memory of a training step of a Llama.

    What is counted are the tensors of Hugging Face's ``LlamaForCausalLM`` with ``attn_implementation="sdpa"``, its own
    loss, and gradients set to None between steps. Not counted: what libraries take for themselves (CUDA's context,
    cuBLAS, LAPACK), and what PyTorch's allocator rounds up and can't use again.

    A first step, which finds the first bases and makes the state, takes no more than one that refreshes.

    Args:
        model: a name of ``MODELS``, the path of a ``config.json`` or of its folder, or a shape.
        optimizer: a name of ``OPTIMIZERS``. options: fields of ``Settings``; without ``step``, the fuller of both.

    Raises:
        PlanError: an option out of range, or options that don't go together.
    """
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    settings = Settings.of(find_model(model), options)
    if "step" in options:
        return estimate(settings, optimizer)
    steps = [estimate(replace(settings, step=step), optimizer) for step in ("ordinary", "refresh")]
    return max(steps, key=lambda found: found.peak)


def estimate(settings: Settings, optimizer: str) -> Plan:
    """The plan of one kind of step."""
    memory = OPTIMIZERS[optimizer]
    if memory.rank is not None:
        settings = replace(settings, rank=memory.rank)
    for key in ("weights", "gradients"):
        value = getattr(settings, key)
        if value not in memory.modes:
            able = [name for name, other in OPTIMIZERS.items() if value in other.modes]
            raise PlanError(f"{key}={value!r} with {optimizer}: expected one of {', '.join(able)}; choose another")
    line = Timeline(moment="between steps")
    _Step(settings, memory, line).run()
    return Plan(settings, optimizer, memory.label, line.peak_parts, line.peak_moment, line.peak_tensors)


def weight_bytes(settings: Settings) -> int:
    """All parameters, and the rotary frequencies (float32, twice head_width / 2)."""
    shape, own = settings.shape, settings.dtype.itemsize
    projected = shape.projected_elements * own
    if settings.weights == "int8":
        scales = [weight_scale_shape((matrix.rows, matrix.cols)) for matrix in shape.linears()]
        per_layer = sum(rows * groups for rows, groups in scales) * torch.float32.itemsize
        projected = shape.projected_elements + shape.layers * per_layer
    return projected + shape.other_elements * own + shape.head_width * torch.float32.itemsize


@dataclass(frozen=True)
class _Step:
    settings: Settings
    memory: Memory
    line: Timeline

    def run(self) -> None:
        """Forward, backward, update."""
        settings, line = self.settings, self.line
        moments, bases = self.memory.state(settings)
        line.make("weights", "weights", weight_bytes(settings))
        line.make("moments", "moments", moments)
        line.make("basis", "basis", bases)
        layerwise = settings.updates == "layerwise"
        if settings.gradients == "factored" and not layerwise:
            every = (gradient_bytes(settings, matrix, projected=True) for matrix in settings.shape.linears())
            line.make("gradients", "gradients", settings.shape.layers * sum(every))
        keeping = self._layers_that_keep()
        self._forward(keeping)
        Backward(settings, line, self if layerwise else None, keeping).run()
        self._after_backward()

    def _layers_that_keep(self) -> int:
        """Layers with a matrix whose basis is found in this step from X and dY; all seven keep theirs."""
        if self.settings.gradients == "dense" or self.memory.refresh is None:
            return 0
        each = len(self.settings.shape.linears())
        return -(-self.settings.due(each * self.settings.shape.layers) // each)

    def _forward(self, keeping: int) -> None:
        settings, line = self.settings, self.line
        shape, own = settings.shape, settings.dtype.itemsize
        line.moment = "forward pass"
        line.make("token ids", "activations", 2 * settings.tokens * _INTEGER)  # and the shifted labels
        line.make("cos and sin", "activations", 2 * settings.positions * shape.head_width * own)
        if settings.checkpointing == "layer":
            size = shape.layers * settings.tokens * shape.hidden * own
        else:
            plain, kept = (saved_bytes(saved_tensors(settings, keeps_inputs=keeps)) for keeps in (False, True))
            size = (shape.layers - keeping) * plain + keeping * kept
        line.make("saved by layers", "activations", size)
        for tensor in norm_saved(settings, "output"):
            line.make(tensor.name, "activations", tensor.bytes)
        line.moment = "forward pass, loss"
        logits = settings.tokens * shape.vocabulary
        line.make("logits", "logits", logits * own)
        if settings.dtype != torch.float32:
            line.make("float logits", "logits", logits * torch.float32.itemsize)
        line.make("log-softmax", "logits", logits * torch.float32.itemsize)
        line.free("logits", "float logits")

    def refresh(self, matrix: Matrix) -> None:
        """Within backward, of one matrix."""
        if self.settings.step == "refresh":
            before, self.line.moment = self.line.moment, f"{self.line.moment}, search for the basis of {matrix.name}"
            self._search(matrix, 1)
            self.line.moment = before

    def update(self, matrix: Matrix, projected: bool) -> None:
        """Within backward, of one parameter."""
        before, self.line.moment = self.line.moment, f"{self.line.moment}, update of {matrix.name}"
        size = self.memory.update(self.settings, [Parameter(matrix, 1, projected)])
        with self.line.during("update", "update workspace", size):
            self.line.moment = before

    def _search(self, matrix: Matrix, count: int, *, found_before: bool = False) -> None:
        """The search for the bases of matrices of one shape; their update follows, unless they have been counted."""
        if self.memory.refresh is not None and count > 0:
            search, found = self.memory.refresh(self.settings, matrix, count)
            with self.line.during("search for bases", "refresh workspace", search + (0 if found_before else found)):
                pass

    def _after_backward(self) -> None:
        settings, line = self.settings, self.line
        every = parameters(settings.shape)
        factored = settings.gradients == "factored"
        if settings.updates == "layerwise":
            return
        line.moment = "search for bases, after backward"
        due = self._due()
        if factored and self.memory.refresh is not None:  # all are found before the first update
            found = sum(self.memory.refresh(settings, matrix, count)[1] for matrix, count in due)
            line.make("bases found", "refresh workspace", found)
        for matrix, count in due:
            self._search(matrix, count, found_before=factored)
        line.moment = "update, after backward"
        with line.during("update", "update workspace", self.memory.update(settings, every)):
            pass
        line.free("kept for the refresh", "bases found")

    def _due(self) -> list[tuple[Matrix, int]]:
        """Matrices of one shape whose bases are refreshed in this step, and how many of them; the largest first."""
        counts: dict[tuple[int, int], tuple[Matrix, int]] = {}
        for param in parameters(self.settings.shape):
            if param.projected:
                size = (param.matrix.rows, param.matrix.cols)
                matrix, count = counts.get(size, (param.matrix, 0))
                counts[size] = (matrix, count + param.count)
        left = self.settings.due(sum(count for _, count in counts.values()))
        due = []
        for matrix, count in sorted(counts.values(), key=lambda entry: -entry[0].numel):
            due.append((matrix, min(count, left)))
            left -= due[-1][1]
        return due
