"""The optimizers in what is built around torch's optimizers: accelerate, TRL, Lightning; and the published example."""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.2")
pytest.importorskip("accelerate")

from hf_models import RANK, TARGETS, VOCABULARY, arguments, llama, texts

from galore_kernels import GaLoreFusedAdam8bit, LayerwiseOptimizer, galore_param_groups
from galore_kernels.integrations.huggingface import SubspaceCallback, subspace_summary, trainer_optimizer

EXAMPLES = Path(__file__).parent.parent / "examples"


def made(model: nn.Module) -> GaLoreFusedAdam8bit:
    return GaLoreFusedAdam8bit(galore_param_groups(model, TARGETS, rank=RANK, update_proj_gap=2), lr=1e-2)


def batches(count: int) -> list[torch.Tensor]:
    rows = [text["input_ids"] for text in texts()]
    return [torch.stack(rows[2 * i : 2 * i + 2]) for i in range(count)]


def trained_plainly(data: Iterable[torch.Tensor]) -> nn.Module:
    model = llama(attention_dropout=0.0)
    optimizer = made(model)
    for tokens in data:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, LayerwiseOptimizer], ids=["whole", "layerwise"])
def test_accelerate(wrap: Any, tmp_path: Path) -> None:
    """``prepare``, ``backward``, ``save_state`` and ``load_state`` of an Accelerator."""
    from accelerate import Accelerator

    plain = trained_plainly(batches(4))
    accelerator = Accelerator(cpu=True)
    inner = llama(attention_dropout=0.0)
    model, optimizer = accelerator.prepare(inner, wrap(made(inner)))
    for step, tokens in enumerate(batches(4)):
        if step == 2:
            accelerator.save_state(str(tmp_path))
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(accelerator.unwrap_model(model), plain)
    accelerator.load_state(str(tmp_path))
    for tokens in batches(4)[2:]:
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(accelerator.unwrap_model(model), plain)
    accelerator.free_memory()


def test_trl(tmp_path: Path) -> None:
    """SFTTrainer on token ids: no tokenizer is needed but for padding."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokens = [row["input_ids"].tolist() for row in texts(16)]
    args = arguments(tmp_path, optim_target_modules=TARGETS, weight_decay=0.1, max_steps=4)
    model = llama()
    before = copy.deepcopy(model.state_dict())
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"input_ids": tokens}),
        processing_class=padding_tokenizer(),
        callbacks=[SubspaceCallback()],
        optimizer_cls_and_kwargs=trainer_optimizer(args, rank=RANK, update_proj_gap=2),
    )
    trainer.train()
    assert [entry["subspace_refreshes"] for entry in trainer.state.log_history if "loss" in entry] == [14, 28]
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1


def padding_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1", pad_token="2", unk_token="0")


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
def test_lightning(tmp_path: Path) -> None:
    """``configure_optimizers``, and a checkpoint of the first of two epochs, from which another Trainer goes on."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = llama(attention_dropout=0.0)

        def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
            return loss

        def configure_optimizers(self) -> GaLoreFusedAdam8bit:
            return made(self.model)

    def fit(epochs: int, resume: Path | None = None) -> tuple[Any, Any]:
        off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet = {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}
        trainer = lightning.Trainer(max_epochs=epochs, **off, **quiet)
        module = Module()
        loader: Any = torch.utils.data.DataLoader(batches(2), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, loader, ckpt_path=resume)
        return trainer, module

    plain = trained_plainly(2 * batches(2))
    trainer, module = fit(2)
    assert_same(module.model, plain)
    assert subspace_summary(trainer.optimizers[0])["subspace_refreshes"] == 28
    trainer, _ = fit(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    _, module = fit(2, tmp_path / "first.ckpt")
    assert_same(module.model, plain)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_the_published_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", ["sft_mistral.py", "--max-steps", "2", "--output-dir", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "sft_mistral.py"), run_name="__main__")
    assert "train_loss" in capsys.readouterr().out
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert [group["rank"] for group in state["param_groups"]] == [128, None, None]
