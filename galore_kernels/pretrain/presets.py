"""Model shapes and training settings by name: a small one for two CPU cores, and those of the GaLore paper."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Shapes of a Llama and the settings it is trained with; every field has a flag that overrides it.

    ``hidden``, ``intermediate``, ``layers`` and ``heads`` are the model's; a step trains on ``batch`` x
    ``accumulate`` windows of ``sequence`` tokens. ``galore_lr`` and ``apollo_lr`` are for optimizers that project,
    ``adam_lr`` for the full-rank ones. ``vocabulary`` is the least size used with a tokenizer (bytes need 256 whatever
    the preset).
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    sequence: int
    batch: int
    accumulate: int
    steps: int
    warmup_fraction: float
    galore_lr: float
    apollo_lr: float
    adam_lr: float
    rank: int
    update_proj_gap: int
    dtype: str
    vocabulary: int
    eval_every: int
    val_windows: int
    log_every: int
    save_every: int


def _paper(  # GaLore, arXiv 2403.03507, section 5 and appendix C: 512 windows of 256 tokens a step, bf16, 10% warm-up
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    *,
    batch: int,  # how many of the 512 go through the model at once; no matter for the result beyond rounding
    steps: int,
    rank: int,
    galore_lr: float = 0.01,
    adam_lr: float = 1e-3,
    update_proj_gap: int = 200,
) -> Preset:
    return Preset(
        hidden,
        intermediate,
        layers,
        heads,
        sequence=256,
        batch=batch,
        accumulate=512 // batch,
        steps=steps,
        warmup_fraction=0.1,
        galore_lr=galore_lr,
        apollo_lr=0.01,  # Zhu et al., arXiv 2412.05270, appendix: at every size
        adam_lr=adam_lr,
        rank=rank,
        update_proj_gap=update_proj_gap,
        dtype="bfloat16",
        vocabulary=32000,
        eval_every=500,
        val_windows=4096,
        log_every=10,
        save_every=500,
    )


# 3.3 M parameters on bytes: 400 steps in two to three minutes on two CPU cores.
_TINY = Preset(
    hidden=256,
    intermediate=688,
    layers=4,
    heads=4,
    sequence=256,
    batch=8,
    accumulate=1,
    steps=400,
    warmup_fraction=0.05,
    galore_lr=0.01,
    apollo_lr=0.005,
    adam_lr=5e-4,
    rank=64,
    update_proj_gap=100,
    dtype="float32",
    vocabulary=256,
    eval_every=50,
    val_windows=256,
    log_every=5,
    save_every=100,
)

# Hidden and intermediate width, layers, heads.
PRESETS = {
    "tiny": _TINY,
    "60m": _paper(512, 1376, 8, 8, batch=64, steps=10_000, rank=128),
    "130m": _paper(768, 2048, 12, 12, batch=64, steps=20_000, rank=256),
    "350m": _paper(1024, 2736, 24, 16, batch=32, steps=60_000, rank=256),
    "1b": _paper(2048, 5461, 24, 32, batch=16, steps=100_000, rank=512, adam_lr=5e-4),
    "7b": _paper(
        4096, 11008, 32, 32, batch=8, steps=150_000, rank=1024, galore_lr=0.005, adam_lr=5e-4, update_proj_gap=500
    ),
}
