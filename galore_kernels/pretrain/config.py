"""The configuration of one run: everything that decides what it computes, resolved and checked before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from galore_kernels.quantizers import BASIS_FORMATS
from galore_kernels.subspace import MOMENTS_ON_REFRESH, PROJ_TYPES, REFRESH_METHODS, REFRESH_SCHEDULES

from .presets import PRESETS, Preset

__all__ = [
    "DTYPES",
    "FULL_RANK",
    "GRADIENTS",
    "OPTIMIZERS",
    "OURS",
    "SPLITS",
    "UPDATES",
    "WEIGHTS",
    "Config",
    "PretrainError",
    "differences",
]

GALORE = ("galore8bit", "galore", "galore_adafactor")
APOLLO = ("apollo8bit", "apollo", "apollo_mini")
OURS = (*GALORE, *APOLLO)
OPTIMIZERS = (*OURS, "adamw", "adamw8bit", "galore_torch", "galore_torch8bit", "galore_torch_adafactor", "apollo_torch")
FULL_RANK = ("adamw", "adamw8bit")
GRADIENTS = ("dense", "factored")
UPDATES = ("whole", "layerwise")
WEIGHTS = ("float", "int8")
DTYPES = ("float32", "bfloat16")
SPLITS = ("file", "window")


def _is_apollo(optimizer: str) -> bool:
    return optimizer.startswith("apollo")


def _learning_rate(optimizer: str, preset: Preset) -> float:
    if optimizer in FULL_RANK:
        return preset.adam_lr
    return preset.apollo_lr if _is_apollo(optimizer) else preset.galore_lr


class PretrainError(RuntimeError):
    """Something the user can put right: a bad option, missing text or package, a run that does not match."""


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys whose values differ, with both values, for an error message; empty where there are none."""
    keys = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    return "; ".join(f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in keys)


@dataclass(frozen=True)
class Config:
    """One run. Two runs of equal configuration, corpus and library versions on one machine are bitwise equal."""

    preset: str
    optimizer: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    sequence: int
    batch: int
    accumulate: int
    steps: int
    warmup: int
    lr: float
    weight_decay: float
    eps: float
    clip: float
    rank: int
    update_proj_gap: int
    scale: float
    proj_type: str
    refresh_method: str
    refresh_schedule: str
    warm_start: bool
    async_refresh: bool
    moments_on_refresh: str
    basis_format: str | None
    gradients: str
    updates: str
    weights: str
    dtype: str
    seed: int
    split: str
    text: tuple[str, ...]
    dataset: str | None
    dataset_column: str
    dataset_tokens: int
    tokenizer: str | None
    eval_every: int
    val_windows: int

    @classmethod
    def resolve(cls, given: Mapping[str, Any]) -> Config:
        """Complete the values that were ``given`` with those of the preset (``tiny`` unless named).

        Raises:
            PretrainError: an unknown preset or option, or a value out of its range.
        """
        name = given.get("preset", "tiny")
        if name not in PRESETS:
            raise PretrainError(f"--preset {name!r}: expected one of {', '.join(PRESETS)}")
        preset = PRESETS[name]
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - fields)
        if unknown:
            raise PretrainError(f"unknown option(s) {', '.join(unknown)}; a run has {', '.join(sorted(fields))}")
        optimizer = given.get("optimizer", "galore8bit")
        steps = given.get("steps", preset.steps)
        values: dict[str, Any] = {
            "preset": name,
            "optimizer": optimizer,
            "warmup": round(preset.warmup_fraction * steps),
            "lr": _learning_rate(optimizer, preset),
            "weight_decay": 0.0,
            "eps": 1e-8,
            "clip": 0.0,
            "scale": 128.0 if optimizer == "apollo_mini" else 1.0 if _is_apollo(optimizer) else 0.25,
            "proj_type": "std",
            "refresh_method": "randomized",
            "refresh_schedule": "periodic",
            "warm_start": False,
            "async_refresh": False,
            "moments_on_refresh": "keep",
            "basis_format": None,
            "gradients": "dense",
            "updates": "whole",
            "weights": "float",
            "seed": 0,
            "split": "file",
            "text": (),
            "dataset": None,
            "dataset_column": "text",
            "tokenizer": None,
        }
        values |= {key: value for key, value in dataclasses.asdict(preset).items() if key in fields}
        if optimizer == "apollo_mini":
            values["rank"] = 1
        values |= given
        values["text"] = tuple(values["text"])
        if "dataset_tokens" not in given:  # each token once
            values["dataset_tokens"] = steps * values["batch"] * values["accumulate"] * values["sequence"]
        config = cls(**values)
        config._check()
        return config

    def _check(self) -> None:
        at_least_one = ("hidden", "intermediate", "layers", "heads", "batch", "accumulate", "steps", "rank",
                        "update_proj_gap", "eval_every", "val_windows", "dataset_tokens")  # fmt: skip
        for key in at_least_one:
            self._expect(key, getattr(self, key) >= 1, "at least 1")
        self._expect("sequence", self.sequence >= 2, "at least 2 (one token predicts the next)")
        self._expect("warmup", 0 <= self.warmup <= self.steps, f"between 0 and --steps ({self.steps})")
        self._expect("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        self._expect("scale", math.isfinite(self.scale) and self.scale > 0, "a finite number > 0")
        self._expect("proj_type", self.proj_type in PROJ_TYPES, "one of " + ", ".join(PROJ_TYPES))
        for key, choices in (
            ("refresh_method", REFRESH_METHODS),
            ("refresh_schedule", REFRESH_SCHEDULES),
            ("moments_on_refresh", MOMENTS_ON_REFRESH),
            ("basis_format", (None, *BASIS_FORMATS)),
            ("gradients", GRADIENTS),
            ("updates", UPDATES),
            ("weights", WEIGHTS),
        ):
            self._expect(key, getattr(self, key) in choices, "one of " + ", ".join(filter(None, choices)))
        if self.optimizer in APOLLO:  # whose bases are drawn
            self._expect("refresh_schedule", self.refresh_schedule != "adaptive", "periodic or staggered with APOLLO")
            for key in ("warm_start", "async_refresh", "basis_format"):
                self._expect(key, not getattr(self, key), "none with APOLLO")
            self._expect("moments_on_refresh", self.moments_on_refresh != "rotate", "keep or reset with APOLLO")
        both = self.proj_type == "full"
        self._expect("basis_format", self.basis_format is None or not both, "none with --proj-type full")
        if self.optimizer == "galore_adafactor":
            self._expect("moments_on_refresh", self.moments_on_refresh != "rotate", "keep or reset with Adafactor")
        ours, galore = self.optimizer in OURS, self.optimizer in GALORE
        self._expect("gradients", self.gradients == "dense" or galore, f"dense with --optimizer {self.optimizer}")
        self._expect("gradients", self.gradients == "dense" or not both, "dense with --proj-type full")
        self._expect("updates", self.updates == "whole" or ours, f"whole with --optimizer {self.optimizer}")
        self._expect("weights", self.weights == "float" or ours, f"float with --optimizer {self.optimizer}")
        for key in ("lr", "weight_decay", "eps", "clip"):
            value = getattr(self, key)
            self._expect(key, math.isfinite(value) and value >= 0, "a finite number that is not negative")
        self._expect("optimizer", self.optimizer in OPTIMIZERS, "one of " + ", ".join(OPTIMIZERS))
        self._expect("dtype", self.dtype in DTYPES, "one of " + ", ".join(DTYPES))
        self._expect("split", self.split in SPLITS, "one of " + ", ".join(SPLITS))
        head = self.hidden // self.heads
        even = self.hidden % self.heads == 0 and head % 2 == 0  # rotary position embeddings turn pairs
        self._expect("heads", even, f"a number that divides --hidden ({self.hidden}) into heads of even width")
        if self.text and self.dataset is not None:
            raise PretrainError("--text and --dataset were both given; a run has one corpus: drop one of them")

    def _expect(self, key: str, satisfied: bool, expected: str) -> None:
        if not satisfied:
            flag = "--" + key.replace("_", "-")
            raise PretrainError(f"{flag} {getattr(self, key)!r}: expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for a log line or a checkpoint; :meth:`resolve` accepts it back."""
        return dataclasses.asdict(self) | {"text": list(self.text)}

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step of the optimizer learns from."""
        return self.batch * self.accumulate * self.sequence

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step`` (counted from 0): linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))

    def run_name(self) -> str:
        """Name of the run's folder unless the user gives one."""
        return f"{self.preset}-{self.optimizer}"
