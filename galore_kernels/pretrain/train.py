"""The training loop: from a configuration to a trained model, a log and checkpoints that resume it bit for bit."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import Config, PretrainError
from .corpus import Corpus
from .display import Display
from .machine import SignalWatch, machine_facts, peak_memory, sole_trainer
from .optimizers import build_optimizer, package_versions, subspace_report
from .parallel import ALONE, Processes, own_part
from .resume import Progress, restore_run, save_run
from .rivals import optimizer_state_bytes
from .runlog import RunLog
from .states import whole_states

__all__ = ["RunInterruptedError", "build_model", "train", "validation_loss"]


class RunInterruptedError(Exception):
    """SIGINT or SIGTERM arrived; the state after ``step`` was saved in ``folder``."""

    def __init__(self, signal_number: int, step: int, folder: Path) -> None:
        super().__init__(f"{signal.Signals(signal_number).name} at step {step}")
        self.signal_number = signal_number
        self.step = step
        self.folder = folder


def build_model(config: Config, vocabulary: int) -> torch.nn.Module:
    """``LlamaForCausalLM`` of the configured shape, from scratch, initialised in float32 from the seed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise PretrainError(
            f"pre-training needs the package transformers ({error}): pip install 'galore-kernels[pretrain]'"
        ) from error
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.sequence,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(config.seed)
    model: torch.nn.Module = LlamaForCausalLM(shape)
    # Parameters alone: Transformers keeps the buffers (the rotary frequencies) in float32 when it loads a model.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, config.dtype))
    return model


def train(
    config: Config,
    corpus: Corpus,
    folder: Path,
    display: Display,
    *,
    device: torch.device,
    resume: Path | None = None,
    log_every: int,
    save_every: int,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Run ``config`` in ``folder`` and return the final line of its log.

    Args:
        folder: existing folder of this run; receives ``log.jsonl`` and ``checkpoint-STEP.pt`` (the latest two).
        resume: checkpoint to go on from; the log is continued too.
        log_every: steps between lines of the log.
        save_every: steps between checkpoints; one is always saved at the end.
        processes: of the run, each of which calls this; those behind the first have a ``folder`` of their own.

    Raises:
        PretrainError: the checkpoint belongs to another configuration or corpus, another process trains in
            ``folder``, or the loss is no longer finite.
        RunInterruptedError: SIGINT or SIGTERM; a checkpoint was saved at the end of the step.
        CheckpointError: the checkpoint is damaged, or could not be written.
    """
    with sole_trainer(folder), SignalWatch() as signals:
        model = build_model(config, corpus.vocabulary).to(device)
        processes.divide(model, device)
        model.train()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = build_optimizer(model, config)
        header = {
            "config": config.to_dict(),
            "corpus": {"description": corpus.description, **corpus.facts()},
            "parameters": parameters,
            "optimizer": repr(optimizer),
            "machine": machine_facts(device) | {"processes": processes.world, "parallel": processes.parallel},
            "versions": package_versions(),
        }
        progress = Progress() if resume is None else restore_run(resume, config, corpus, model, optimizer)
        if resume is None or not processes.is_first:
            log = RunLog.begin(folder, header)
        else:
            log = RunLog.resume(folder, progress.step)
            log.write("resume", step=progress.step, machine=header["machine"], versions=header["versions"])
        trained = processes.wrap(model, optimizer, config)
        with log, display:
            display.start(header, progress.step)
            run = _Run(
                config, corpus, folder, display, device, model, trained, optimizer, progress, log, log_every,
                save_every, processes,
            )  # fmt: skip
            return run.to_the_end(signals)


def validation_loss(
    model: torch.nn.Module, corpus: Corpus, batch: int, device: torch.device, processes: Processes = ALONE
) -> float:
    """Mean negative log-likelihood over the validation windows, in nats a token; each process takes its share."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    with processes.evaluates(model):
        for begin in range(0, len(corpus.validation), batch):
            rows = corpus.rows(corpus.validation[begin : begin + batch]).to(device)
            own = processes.share(rows)
            total += model(input_ids=own, labels=own).loss.double() * len(rows)
    return processes.mean(total) / len(corpus.validation)


@dataclass
class _Run:
    config: Config
    corpus: Corpus
    folder: Path
    display: Display
    device: torch.device
    model: torch.nn.Module
    trained: torch.nn.Module  # the same, as its processes share it
    optimizer: torch.optim.Optimizer
    progress: Progress
    log: RunLog
    log_every: int
    save_every: int
    processes: Processes

    def to_the_end(self, signals: SignalWatch) -> dict[str, Any]:
        progress = self.progress
        while progress.step < self.config.steps:
            begin = time.perf_counter()
            loss = self._step()
            seconds = time.perf_counter() - begin
            progress.step += 1
            progress.seconds += seconds
            progress.interval_steps += 1
            progress.interval_loss += loss
            progress.interval_seconds += seconds
            last = progress.step == self.config.steps
            if progress.step % self.log_every == 0 or last:
                self._log_interval()
            if progress.step % self.config.eval_every == 0 or last:
                self._validate()
            received = self.processes.largest(signals.received or 0)
            if progress.step % self.save_every == 0 or last or received:
                self._save()
            if received and not last:
                raise RunInterruptedError(received, progress.step, self.folder)
        final = self.log.write(
            "final",
            step=progress.step,
            validation_loss=progress.validation_loss,
            seconds=round(progress.seconds, 2),
            tokens=progress.step * self.config.tokens_per_step,
            **self._memory(),
        )
        self.display.show(final)
        return final

    def _step(self) -> float:
        config = self.config
        lr = config.lr_at(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rows = self.corpus.training_rows(self.progress.step, config.batch * config.accumulate, config.seed)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        micro_batches = torch.split(rows.to(self.device), config.batch)
        for number, micro_batch in enumerate(micro_batches, 1):
            own = self.processes.share(micro_batch)
            with self.processes.accumulates(self.trained, last=number == len(micro_batches)):
                loss = self.trained(input_ids=own, labels=own).loss / config.accumulate
                loss.backward()
            total += loss.detach()
        if config.clip > 0 and config.updates == "whole":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        mean = self.processes.mean(total)
        self._expect_finite(mean, "training", self.progress.step + 1)
        self.optimizer.step()
        return mean

    def _log_interval(self) -> None:
        progress = self.progress
        tokens = progress.interval_steps * self.config.tokens_per_step
        entry = self.log.write(
            "train",
            step=progress.step,
            loss=round(progress.interval_loss / progress.interval_steps, 6),
            lr=self.config.lr_at(progress.step - 1),
            tokens_per_second=round(tokens / progress.interval_seconds, 1),
            seconds=round(progress.seconds, 2),
            **self._memory(),
        )
        progress.interval_steps, progress.interval_loss, progress.interval_seconds = 0, 0.0, 0.0
        self.display.show(entry)

    def _validate(self) -> None:
        begin = time.perf_counter()
        loss = validation_loss(self.model, self.corpus, self.config.batch, self.device, self.processes)
        self.progress.seconds += time.perf_counter() - begin
        self._expect_finite(loss, "validation", self.progress.step)
        self.progress.validation_loss = round(loss, 6)
        self.display.show(self.log.write("validation", step=self.progress.step, loss=self.progress.validation_loss))
        subspaces = subspace_report(self.optimizer)
        if subspaces:
            self.display.show(self.log.write("subspaces", step=self.progress.step, layers=subspaces))

    def _save(self) -> None:
        finite = all(bool(own_part(parameter).isfinite().all()) for parameter in self.model.parameters())
        if self.processes.largest(not finite):
            # The loss of this step was that of the weights before it. A good checkpoint must not make way for this.
            raise self._not_finite("some weights are no longer finite", self.progress.step)
        model, optimizer = whole_states(self.model, self.optimizer, self.config)  # all processes have a part in it
        if not self.processes.is_first:
            return
        self.log.sync()  # the checkpoint's step promises that the log is complete up to it
        path = save_run(self.folder, self.config, self.corpus, model, optimizer, self.progress, self.device)
        self.display.show({"kind": "saved", "step": self.progress.step, "path": str(path)})

    def _memory(self) -> dict[str, int]:
        return {
            "optimizer_state_bytes": optimizer_state_bytes(self.optimizer),
            "peak_memory_bytes": peak_memory(self.device),
        }

    def _expect_finite(self, loss: float, kind: str, step: int) -> None:
        if not math.isfinite(loss):
            raise self._not_finite(f"the {kind} loss became {loss}", step)

    def _not_finite(self, what: str, step: int) -> PretrainError:
        return PretrainError(
            f"{what} at step {step}: lower --lr, or set --clip 1; the checkpoints saved before are untouched in "
            f"{self.folder}"
        )
