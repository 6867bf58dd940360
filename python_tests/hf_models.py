"""Tiny models, token batches and arguments for tests with Hugging Face's Trainer. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY = 64
RANK = 4
TARGETS = ["attn", "mlp"]


def llama(**changes: Any) -> nn.Module:
    """Two layers; dropout, so that a resumed run needs the random numbers' state too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**{"vocab_size": VOCABULARY, **sizes, "attention_dropout": 0.1, **changes})
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model


def texts(count: int = 64) -> list[dict[str, Tensor]]:
    tokens = torch.randint(VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    """Six steps on the CPU; a learning rate at which all weights move."""
    plain = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 2}
    run = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    return TrainingArguments(output_dir=str(folder), **{**plain, **run, **changes})


def trained(
    model: nn.Module,
    args: TrainingArguments,
    optimizer: Any,
    *,
    count: int = 64,
    resume: str | None = None,
    **more: Any,
) -> Trainer:
    trainer = Trainer(model, args, train_dataset=texts(count), optimizer_cls_and_kwargs=optimizer, **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
