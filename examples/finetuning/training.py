"""Pre-training and fine-tuning, both by the Hugging Face Trainer and both resumable."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils._pytree import tree_leaves
from transformers import (
    PrinterCallback,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from galore_kernels.integrations.huggingface import trainer_optimizer

from .settings import Method, Settings
from .task import encode_snippets, load_task, naive_bayes_accuracy, pretraining_rows, train_tokenizer

__all__ = ["Experiment"]

# Every linear layer of the encoder. GaLore projects the gradients of these, LoRA has its adapters on them; the
# classification head, new in fine-tuning, is trained at full rank by all.
TARGETS = r".*encoder\.layer\..*(query|key|value|dense)"

RESULT_NAME = "result.json"
FACTS_NAME = "pretraining.json"


class StepClock(TrainerCallback):
    """Time of each training step, from its batch to its update; checkpoints are written in between.

    The process's own time is recorded beside the clock's: others on the machine disturb it less.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self._begin = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        begin, cpu_begin = self._begin
        self.seconds.append(time.perf_counter() - begin)
        self.cpu_seconds.append(time.process_time() - cpu_begin)

    def facts(self) -> dict[str, list[float]]:
        """For a result file."""
        return {"step_seconds": self.seconds, "step_cpu_seconds": self.cpu_seconds}


class Experiment:
    """A folder with what its settings need once (the pre-trained encoder), and one for each fine-tuning run.

    Settings, text and tokenizer decide the folder's name: nothing is taken from a cache that was made for others.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.settings = settings
        self.task = load_task(settings)
        self.tokenizer = train_tokenizer(self.task, settings)
        self.parts = encode_snippets(self.task, self.tokenizer)
        key = json.dumps([settings.to_dict(), self.task.sha256, self.tokenizer.backend_tokenizer.to_str()])
        self.folder = out / hashlib.sha256(key.encode()).hexdigest()[:12]

    def run_folder(self, method: Method, lr: float, seed: int) -> Path:
        """Of one fine-tuning run: checkpoints, the model, the result."""
        return self.folder / f"{method.name}-lr{lr:g}-seed{seed}"

    @cached_property
    def pretrained(self) -> Path:
        """The folder of the pre-trained encoder; made now if it is not there, resumed if that was interrupted."""
        folder = self.folder / "pretrained"
        if not folder.exists():
            self._pretrain(folder)
        return folder

    def _pretrain(self, folder: Path) -> None:
        s = self.settings
        config = RobertaConfig(
            vocab_size=len(self.tokenizer), hidden_size=s.hidden, num_hidden_layers=s.layers,
            num_attention_heads=s.heads, intermediate_size=4 * s.hidden, max_position_embeddings=s.tokens + 2,
            type_vocab_size=1, pad_token_id=self.tokenizer.pad_token_id, bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.06,  # for this width; with RoBERTa's 0.02 it learns later
        )  # fmt: skip
        print(f"pre-training for {s.pretrain_steps} steps, once", flush=True)
        set_seed(0)
        trainer = self._trainer(
            RobertaForMaskedLM(config), self.folder / "pretraining", s.pretrain_lr, 0,
            train_dataset=pretraining_rows(self.task, self.tokenizer), max_steps=s.pretrain_steps,
        )  # fmt: skip
        _train(trainer)
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        trainer.save_model(str(new))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        facts = {"rows": len(trainer.train_dataset), "last_losses": losses[-5:]}
        (new / FACTS_NAME).write_text(json.dumps(facts))
        new.replace(folder)  # whole, or not there
        shutil.rmtree(self.folder / "pretraining")

    def fine_tune(self, method: Method, lr: float, seed: int, resume: bool) -> dict[str, Any]:
        """Train, measure and save one model; with ``resume``, go on from what an interruption left, or has finished.

        Returns:
            What is in the run's result file: accuracies, bytes, times.
        """
        folder = self.run_folder(method, lr, seed)
        result_path = folder / RESULT_NAME
        if resume and result_path.exists():
            return json.loads(result_path.read_text())
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        trainer = self._trainer(
            self._model(method, seed), folder, lr, seed, galore_rank=method.rank if method.kind == "galore" else None,
            train_dataset=self.parts["train"], num_train_epochs=self.settings.epochs,
        )  # fmt: skip
        clock = _train(trainer)
        trainer.save_model(str(folder / "model"))
        result = {
            "method": method.name, "lr": lr, "seed": seed, "steps": trainer.state.global_step,
            "validation_accuracy": self._accuracy(trainer, "validation"),
            "test_accuracy": self._accuracy(trainer, "test"),
            **_counted_bytes(trainer), **clock.facts(), "load": os.getloadavg()[0],
        }  # fmt: skip
        new = result_path.with_suffix(".new")
        new.write_text(json.dumps(result))
        new.replace(result_path)
        return result

    def _model(self, method: Method, seed: int) -> Any:
        classes = len(self.task.packages)
        pretrained = self.pretrained
        set_seed(seed)
        if method.from_scratch:
            return RobertaForSequenceClassification(RobertaConfig.from_pretrained(pretrained, num_labels=classes))
        model = RobertaForSequenceClassification.from_pretrained(pretrained, num_labels=classes)
        if method.kind == "lora":
            options = LoraConfig(
                task_type=TaskType.SEQ_CLS, r=method.rank, lora_alpha=2 * method.rank, target_modules=TARGETS
            )
            return get_peft_model(model, options)
        model.roberta.embeddings.requires_grad_(not method.frozen_embeddings)
        return model

    def _trainer(
        self, model: Any, folder: Path, lr: float, seed: int, *, train_dataset: list[dict[str, Any]],
        galore_rank: int | None = None, **arguments: Any,
    ) -> Any:  # fmt: skip
        args = TrainingArguments(**{
            "output_dir": str(folder), "learning_rate": lr, "seed": seed, "lr_scheduler_type": "linear",
            "warmup_steps": 0.1, "per_device_train_batch_size": self.settings.batch,
            "per_device_eval_batch_size": 64, "save_steps": self.settings.save_steps, "save_total_limit": 1,
            "logging_steps": 50, "optim": "adamw_torch_fused", "use_cpu": True, "dataloader_pin_memory": False,
            "report_to": "none", "disable_tqdm": True, **arguments,
        })  # fmt: skip
        galore: Any = None
        if galore_rank is not None:
            galore = trainer_optimizer(
                args, "GaLoreFusedAdamW", target_modules=TARGETS, rank=galore_rank, scale=16 / galore_rank,
                update_proj_gap=self.settings.update_proj_gap,
            )  # fmt: skip
        trainer = Trainer(
            model, args, train_dataset=train_dataset, processing_class=self.tokenizer,
            optimizer_cls_and_kwargs=galore,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _accuracy(self, trainer: Any, part: str) -> float:
        predicted = trainer.predict(self.parts[part])
        return float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))

    def pretraining_facts(self) -> dict[str, Any]:
        """For the comparison's file: how many rows there were to read, and the losses that were logged last."""
        return json.loads((self.pretrained / FACTS_NAME).read_text())

    def baselines(self) -> dict[str, float]:
        """Test accuracies of what needs no encoder."""
        classes = len(self.task.packages)
        return {
            "chance": 1 / classes,
            "majority class": self.task.majority_accuracy,
            "naive Bayes over tokens": naive_bayes_accuracy(self.parts, classes, len(self.tokenizer)),
        }


def _train(trainer: Any) -> StepClock:
    """From the last whole checkpoint in the trainer's folder, if there is one."""
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(Path(trainer.args.output_dir)))
    return clock


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The last that the Trainer could finish, which writes its own state last; unfinished ones are deleted."""
    last: str | None = get_last_checkpoint(folder) if folder.exists() else None
    if last is None:
        return None
    try:
        TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))
    except (FileNotFoundError, ValueError):
        shutil.rmtree(last)
        return _last_whole_checkpoint(folder)
    return last


def _counted_bytes(trainer: Any) -> dict[str, int]:
    """Of the tensors that training keeps: weights, gradients, optimizer state."""
    parameters = list(trainer.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    state = tree_leaves([trainer.optimizer.state[parameter] for parameter in trained])
    return {
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "weight_bytes": sum(parameter.nbytes for parameter in parameters),
        "gradient_bytes": sum(parameter.nbytes for parameter in trained),
        "state_bytes": sum(leaf.nbytes for leaf in state if isinstance(leaf, torch.Tensor)),
    }
