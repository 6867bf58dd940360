"""Shapes of Llama models: the papers' by name, others from a ``config.json`` of Hugging Face."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from galore_kernels.plan.errors import PlanError
from galore_kernels.pretrain.presets import PRESETS as PRETRAIN_PRESETS

__all__ = ["MODELS", "LlamaShape", "Matrix", "find_model", "from_config"]


@dataclass(frozen=True)
class Matrix:
    """A weight of shape (rows, cols), as ``torch.nn.Linear`` has it: (out, in); ``input`` names what it multiplies."""

    name: str
    rows: int
    cols: int
    input: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama. ``name`` is for titles only."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    head_width: int = 0

    def __post_init__(self) -> None:
        sizes = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocabulary")
        for key in sizes:
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"{key}={value!r}: expected an integer >= 1; see the model's config.json")
        if self.head_width == 0:
            object.__setattr__(self, "head_width", self.hidden // self.heads)
        if self.heads % self.kv_heads:
            raise PlanError(
                f"kv_heads={self.kv_heads}: expected a number that divides heads ({self.heads}); "
                "take num_key_value_heads from the model's config.json"
            )

    @property
    def query_width(self) -> int:
        """Columns of the queries, and of what attention returns."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Columns of the keys, and of the values."""
        return self.kv_heads * self.head_width

    def linears(self) -> tuple[Matrix, ...]:
        """The projected matrices of one layer, in the order of its forward pass."""
        h, i, q, kv = self.hidden, self.intermediate, self.query_width, self.kv_width
        return (
            Matrix("q", q, h, "attention.input"),
            Matrix("k", kv, h, "attention.input"),
            Matrix("v", kv, h, "attention.input"),
            Matrix("o", h, q, "attention.output"),
            Matrix("gate", i, h, "mlp.input"),
            Matrix("up", i, h, "mlp.input"),
            Matrix("down", h, i, "product"),
        )

    def tables(self) -> tuple[Matrix, ...]:
        """Embedding and output head, or the one that they share."""
        embedding = Matrix("embedding", self.vocabulary, self.hidden)
        return (embedding,) if self.tied else (embedding, Matrix("head", self.vocabulary, self.hidden))

    @property
    def norms(self) -> int:
        """How many norms of ``hidden`` elements there are."""
        return 2 * self.layers + 1

    @property
    def projected_elements(self) -> int:
        """Elements of all linear layers but the head."""
        return self.layers * sum(matrix.numel for matrix in self.linears())

    @property
    def other_elements(self) -> int:
        """Elements of embedding, head and norms."""
        return sum(table.numel for table in self.tables()) + self.norms * self.hidden

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.projected_elements + self.other_elements


def _from_pretrain(name: str) -> LlamaShape:
    preset = PRETRAIN_PRESETS[name]
    heads = preset.heads
    return LlamaShape(name, preset.hidden, preset.intermediate, preset.layers, heads, heads, preset.vocabulary)


#: The GaLore paper's, which ``galore-pretrain`` trains; OpenLLaMA's 3B, LLaMA's 13B (arXiv 2302.13971, table 2) and
#: Llama 2's 70B (arXiv 2307.09288), whose eight heads of queries share one of keys and values.
MODELS: dict[str, LlamaShape] = {
    **{name: _from_pretrain(name) for name in PRETRAIN_PRESETS},
    "3b": LlamaShape("3b", 3200, 8640, 26, 32, 32, 32000),
    "13b": LlamaShape("13b", 5120, 13824, 40, 40, 40, 32000),
    "70b": LlamaShape("70b", 8192, 28672, 80, 64, 8, 32000),
}


def find_model(model: str | Path | LlamaShape) -> LlamaShape:
    """The shape of a preset's name, of a ``config.json`` or of the folder that holds one.

    Raises:
        PlanError: there is neither such a preset nor such a file, or the file is of no Llama.
    """
    if isinstance(model, LlamaShape):
        return model
    if str(model).lower() in MODELS:
        return MODELS[str(model).lower()]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise PlanError(f"model={str(model)!r}: expected one of {', '.join(MODELS)}, or the path of a config.json")
    return from_config(path)


def from_config(path: Path) -> LlamaShape:
    """The shape that a ``config.json`` of Hugging Face's Llama describes.

    Raises:
        PlanError: it can't be read, lacks a size, or describes another architecture.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: expected a config.json, which is JSON ({error}); download it again") from error
    kind = config.get("model_type", "llama") if isinstance(config, dict) else type(config).__name__
    if kind != "llama":
        raise PlanError(f'{path}: expected model_type "llama", got {kind!r}; only Llama\'s layers are known here')
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in keys if key not in config]
    if missing:
        raise PlanError(f"{path}: expected the keys {', '.join(keys)}, got none of {', '.join(missing)}; add them")
    hidden, intermediate, layers, heads, vocabulary = (config[key] for key in keys)
    kv_heads = config.get("num_key_value_heads") or heads
    name = str(config.get("_name_or_path") or (path.parent.name if path.name == "config.json" else path.stem))
    tied = bool(config.get("tie_word_embeddings", False))
    return LlamaShape(
        name, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, config.get("head_dim") or 0
    )
