"""Pre-training a Llama from scratch: the example that ships with the library, and the command ``galore-pretrain``.

Needs ``pip install galore-kernels[pretrain]`` (transformers, matplotlib, rich). Nothing else in the package imports it.
"""

from .cli import main
from .config import Config, PretrainError
from .corpus import Corpus, load_corpus
from .train import build_model, train

__all__ = ["Config", "Corpus", "PretrainError", "build_model", "load_corpus", "main", "train"]
