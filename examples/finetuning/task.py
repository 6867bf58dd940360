"""The task: which package of Python's standard library a few lines come from; and the text to pre-train on."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from galore_kernels.pretrain.documents import documents

from .settings import Settings

__all__ = ["Task", "encode_snippets", "load_task", "naive_bayes_accuracy", "pretraining_rows", "shared_out",
           "train_tokenizer"]  # fmt: skip

PARTS = ("train", "validation", "test")

# A package with fewer files than this could not give each part files of its own.
FEWEST_FILES = 6


@dataclass(frozen=True)
class Task:
    """What there is to read.

    Attributes:
        packages: the classes, by name.
        snippets: of each part, (text, index of the package), by package and place.
        pretraining: texts of all files that neither validate nor test.
        sha256: fingerprint of all of it.
    """

    packages: list[str]
    snippets: dict[str, list[tuple[str, int]]]
    pretraining: list[str]
    sha256: str

    def facts(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "packages": self.packages,
            "snippets": {part: len(pairs) for part, pairs in self.snippets.items()},
            "pretraining_characters": sum(map(len, self.pretraining)),
            "sha256": self.sha256,
        }

    @property
    def majority_accuracy(self) -> float:
        """On the test part, of always answering the package that is most frequent in training."""
        answer = Counter(label for _, label in self.snippets["train"]).most_common(1)[0][0]
        labels = [label for _, label in self.snippets["test"]]
        return labels.count(answer) / len(labels)


def load_task(settings: Settings) -> Task:
    """Read the standard library of the Python that runs, choose the packages and cut their files into snippets.

    The classes are the packages with most source among those of at least six files. A file gives snippets to one part
    only. The classes' names are hidden in all text, whatever their case, or `import email` would tell.
    """
    content = {name: data.decode("utf-8", errors="replace") for name, data in documents([])}
    files: dict[str, list[str]] = defaultdict(list)
    for name in content:
        if "/" in name:
            files[name.partition("/")[0]].append(name)
    by_source = sorted(files, key=lambda package: -sum(len(content[name]) for name in files[package]))
    packages = sorted([name for name in by_source if len(files[name]) >= FEWEST_FILES][: settings.packages])
    names_of_classes = re.compile("|".join(packages), re.IGNORECASE)

    def hidden(name: str) -> str:
        return names_of_classes.sub("package", content[name])

    snippets: dict[str, list[tuple[str, int]]] = {part: [] for part in PARTS}
    withheld: set[str] = set()
    for label, package in enumerate(packages):
        cut = {name: list(_pieces(hidden(name), settings.snippet_characters)) for name in files[package]}
        for (part, names), most in zip(shared_out(cut, settings.snippets).items(), settings.snippets, strict=True):
            pool = [piece for name in sorted(names) for piece in cut[name]]
            count = min(most, len(pool))
            snippets[part] += [(pool[place * len(pool) // count], label) for place in range(count)]
            if part != "train":
                withheld |= names
    pretraining = [hidden(name) for name in sorted(content.keys() - withheld)[: settings.pretrain_files]]
    fingerprint = hashlib.sha256(repr((packages, snippets, pretraining)).encode()).hexdigest()
    return Task(packages, snippets, pretraining, fingerprint)


def _pieces(text: str, size: int) -> Iterator[str]:
    """Whole lines, as many as it takes for ``size`` characters; what is left at the end is dropped."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= size:
            yield "".join(lines)
            lines = []


def shared_out(cut: dict[str, list[str]], wanted: tuple[int, ...]) -> dict[str, set[str]]:
    """Files to parts: the largest first, each to the part that has the smallest share of what it wants."""
    given: dict[str, set[str]] = {part: set() for part in PARTS}
    got = dict.fromkeys(PARTS, 0)
    for name in sorted(cut, key=lambda name: (-len(cut[name]), name)):
        part = min(PARTS, key=lambda part: got[part] / wanted[PARTS.index(part)])
        given[part].add(name)
        got[part] += len(cut[name])
    return given


def train_tokenizer(task: Task, settings: Settings) -> PreTrainedTokenizerFast:
    """RoBERTa's kind, byte-pair encoding of bytes, on the text to pre-train on."""
    model = ByteLevelBPETokenizer()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
               "mask_token": "<mask>"}  # fmt: skip
    model.train_from_iterator(
        task.pretraining, vocab_size=settings.vocabulary, special_tokens=list(special.values()), show_progress=False
    )
    begin, end = special["bos_token"], special["eos_token"]
    model.post_processor = RobertaProcessing((end, model.token_to_id(end)), (begin, model.token_to_id(begin)))
    return PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, model_max_length=settings.tokens,
        model_input_names=["input_ids", "attention_mask"], cls_token=begin, sep_token=end, **special,
    )  # fmt: skip


def pretraining_rows(task: Task, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """The text to pre-train on in windows of the tokenizer's length; a file's last, shorter one is left out.

    Tokens are masked here, once: a collator that masks batch by batch draws for the next batch before a checkpoint is
    written, so that a resumed run would see other masks.
    """
    cut = tokenizer(task.pretraining, truncation=True, return_overflowing_tokens=True)["input_ids"]
    rows = [{"input_ids": ids} for ids in cut if len(ids) == tokenizer.model_max_length]
    masked = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0)(rows)
    return [
        {"input_ids": ids, "labels": labels} for ids, labels in zip(masked["input_ids"], masked["labels"], strict=True)
    ]


def encode_snippets(task: Task, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[dict[str, Any]]]:
    """Of each part the rows for the Trainer, cut to the tokenizer's length."""
    return {
        part: [{**tokenizer(text, truncation=True), "label": label} for text, label in pairs]
        for part, pairs in task.snippets.items()
    }


def naive_bayes_accuracy(parts: dict[str, list[dict[str, Any]]], classes: int, vocabulary: int) -> float:
    """On the test part, of a multinomial naive Bayes over token counts: what it takes to beat a bag of tokens."""

    def counts(row: dict[str, Any]) -> np.ndarray[Any, Any]:
        return np.bincount(row["input_ids"][1:-1], minlength=vocabulary)

    seen = np.ones((classes, vocabulary))
    prior = np.zeros(classes)
    for row in parts["train"]:
        seen[row["label"]] += counts(row)
        prior[row["label"]] += 1
    likelihood = np.log(seen / seen.sum(1, keepdims=True))
    right = [int(np.argmax(likelihood @ counts(row) + np.log(prior))) == row["label"] for row in parts["test"]]
    return sum(right) / len(right)
