"""``trainer_optimizer`` and ``SubspaceCallback``: what the Trainer's arguments ask for is what the optimizer does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

pytest.importorskip("transformers", minversion="5.2")
pytest.importorskip("accelerate")

from hf_models import RANK, TARGETS, arguments, llama, texts, trained
from refusals import REMEDY
from transformers import RobertaConfig, RobertaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from galore_kernels import (
    GaLoreFusedAdam8bit,
    GaLoreFusedAdamW,
    LayerwiseOptimizer,
    galore_param_groups,
    plain_state_dict,
    prepare,
)
from galore_kernels.integrations.huggingface import SubspaceCallback, subspace_summary, trainer_optimizer


def made(model: nn.Module, args: TrainingArguments, *positional: Any, **options: Any) -> Any:
    """The optimizer, as the Trainer makes it."""
    chosen = trainer_optimizer(args, *positional, **options)
    return Trainer(model, args, train_dataset=texts(), optimizer_cls_and_kwargs=chosen).create_optimizer()


def names_of(optimizer: Optimizer, *, projected: bool) -> set[str]:
    groups = [group for group in optimizer.param_groups if (group["rank"] is not None) is projected]
    return {name for group in groups for name in group["param_names"]}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def roberta() -> nn.Module:
    """An encoder with biases and LayerNorms."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 2
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=64, max_position_embeddings=20, **sizes))


# ---------------------------------------------------------------------- what the arguments say


def test_the_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.1}
    args = arguments(tmp_path, **adam)
    optimizer = made(llama(), args, "GaLoreFusedAdamW", target_modules=TARGETS, rank=RANK, scale=0.5)
    assert type(optimizer) is GaLoreFusedAdamW
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.95), 1e-5)
    assert (optimizer.param_groups[0]["rank"], optimizer.param_groups[0]["scale"]) == (RANK, 0.5)


def test_options_go_before_optim_args_which_go_before_the_arguments(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, optim_args="rank=8, scale=0.1,proj_type=right, warm_start=True,eps=1e-3", optim_target_modules=TARGETS
    )
    group = made(llama(), args, rank=RANK, lr=0.5, betas=(0.5, 0.6)).param_groups[0]
    assert (group["rank"], group["scale"], group["proj_type"], group["warm_start"]) == (RANK, 0.1, "right", True)
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.5, 0.6), 1e-3)


def test_the_default_rank_is_the_classs(tmp_path: Path) -> None:
    group = made(llama(), arguments(tmp_path), target_modules=TARGETS).param_groups[0]
    assert (group["rank"], group["rank_is_explicit"]) == (128, True)


def test_arguments_are_read_when_the_optimizer_is_made(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    chosen = trainer_optimizer(args, target_modules=TARGETS, rank=RANK)
    args.learning_rate = 0.25  # as a search for hyperparameters does
    optimizer = Trainer(llama(), args, optimizer_cls_and_kwargs=chosen).create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


class Factored(Optimizer):
    """As Adafactor: no betas, another eps, another default rank."""

    def __init__(
        self, params: Any, lr: float = 1.0, eps: Any = (1e-30, 1e-3), weight_decay: float = 0.0, *, rank: int | None = 7
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rank": None})


def test_a_class_gets_what_its_constructor_takes(tmp_path: Path) -> None:
    optimizer = made(llama(), arguments(tmp_path, weight_decay=0.1), Factored, target_modules=TARGETS)
    projected, rest, undecayed = optimizer.param_groups
    assert (projected["rank"], rest["rank"], undecayed["rank"]) == (7, None, None)
    for group in optimizer.param_groups:
        assert (group["lr"], group["eps"]) == (1e-2, (1e-30, 1e-3))
        assert "betas" not in group


@pytest.mark.parametrize("architecture", [llama, roberta])
def test_what_decays_is_what_the_trainer_lets_decay(architecture: Any, tmp_path: Path) -> None:
    model = architecture()
    args = arguments(tmp_path, weight_decay=0.1)
    decays = {}
    for optimizer in (
        made(model, args, target_modules="all-linear", rank=RANK),
        Trainer(model, args).create_optimizer(),
    ):
        decays[type(optimizer)] = {
            id(param): group["weight_decay"] for group in optimizer.param_groups for param in group["params"]
        }
    ours, theirs = decays.values()
    assert ours == theirs
    assert set(ours.values()) == {0.0, 0.1}


@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "targets",
    [
        ["attn", "mlp"],  # parts of names
        [r".*.attn.*", r".*.mlp.*"],  # the published example's
        [r".*\.1\.mlp\.(up|down)_proj", "q_proj"],  # a regular expression for all of a name, in a list
        r".*layers\.1\..*_proj",  # one string
        ["model.layers.0.self_attn.q_proj"],  # a whole name
    ],
    ids=str,
)
def test_targets_are_those_of_optim_target_modules(targets: Any, tmp_path: Path) -> None:
    pytest.importorskip("galore_torch")
    model = llama()
    args = arguments(tmp_path, optim="galore_adamw", optim_target_modules=targets)
    theirs = Trainer(model, args).create_optimizer().param_groups[1]["params"]
    optimizer = made(model, args, rank=RANK)
    assert {id(param) for param in theirs} == {
        id(param) for group in optimizer.param_groups if group["rank"] is not None for param in group["params"]
    }


@pytest.mark.parametrize("spelling", ["all-linear", "all_linear"])
def test_all_linear_leaves_out_the_output_head(spelling: str, tmp_path: Path) -> None:
    optimizer = made(llama(), arguments(tmp_path, optim_target_modules=spelling), rank=RANK)
    assert len(names_of(optimizer, projected=True)) == 14
    assert "lm_head.weight" in names_of(optimizer, projected=False)
    assert "lm_head.weight" in names_of(made(llama(), arguments(tmp_path), target_modules=[".*"]), projected=True)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"target_modules": None}, r"target_modules: expected the layers to project.*optim_target_modules"),
        ({}, {"optimizer": "GaLoreFusedAdamw"}, r'did you mean "GaLoreFusedAdamW"'),
        ({}, {"optimizer": torch.optim.AdamW}, r"expected one of .*GaLoreFusedAdam8bit, .*with the option rank"),
        ({"optim_args": "rank"}, {}, r'optim_args=.rank.: expected "name=value'),
        (
            {"gradient_accumulation_steps": 2},
            {"layerwise": True},
            r"set max_grad_norm=0 there, and pass max_grad_norm=1.0 to trainer_optimizer",
        ),
        ({}, {"layerwise": True, "max_grad_norm": 1.0}, r"max_grad_norm=1.0: expected None unless"),
        ({"max_grad_norm": 0.0}, {"max_grad_norm": 1.0}, r"max_grad_norm=1.0: expected None unless layerwise=True"),
    ],
)
def test_bad_arguments(changes: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        trainer_optimizer(args, **{"target_modules": TARGETS, **options})


def test_an_unknown_option_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"GaLoreFusedAdam8bit has no option 'rnak', but .*did you mean \"rank\""):
        trainer_optimizer(arguments(tmp_path), target_modules=TARGETS, rnak=4)


@pytest.mark.parametrize(
    ("changes", "stage", "host"),
    [
        ({"fsdp": True, "fsdp_config": {"version": 1}}, 0, r'FSDP1 \(fsdp_config=\{"version": 2\} is FSDP2\)'),
        ({"fsdp": True, "fsdp_config": {"version": 2, "xla": True}}, 0, "XLA's FSDP"),
        ({}, 1, "DeepSpeed ZeRO 1"),
        ({}, 3, "DeepSpeed ZeRO 3"),
    ],
)
def test_hosts_that_flatten_are_refused(changes: dict[str, Any], stage: int, host: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, **changes)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
    with pytest.raises(ValueError, match=f"ask for {host}, which flattens the matrices.*{REMEDY}"):
        trainer_optimizer(args, target_modules=TARGETS)


def test_fsdp2_and_zero_0_are_taken(tmp_path: Path) -> None:
    args = arguments(tmp_path, fsdp=True, fsdp_config={"version": 2})
    assert trainer_optimizer(args, target_modules=TARGETS)
    args = arguments(tmp_path)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=0)
    assert trainer_optimizer(args, target_modules=TARGETS)


def test_layerwise_refuses_a_gradient_scaler(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match="set bf16=True"):
        trainer_optimizer(args, target_modules=TARGETS, layerwise=True)


def test_weights_that_were_flattened_are_refused(tmp_path: Path) -> None:
    model = llama()
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = nn.Parameter(layer.weight.detach().flatten())
    with pytest.raises(
        ValueError, match=rf"up_proj\.weight: expected a matrix to project, got shape \(1536,\);.*{REMEDY}"
    ):
        made(model, arguments(tmp_path), target_modules=TARGETS)


def test_targets_without_a_match_list_the_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target_modules=\['attention'\] matches no trainable linear layer.*q_proj"):
        made(llama(), arguments(tmp_path), target_modules=["attention"])


# ---------------------------------------------------------------------- which parameters


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    model = llama()
    for name, param in model.named_parameters():
        param.requires_grad_("layers.1" in name)
    before = snapshot(model)
    args = arguments(tmp_path, weight_decay=0.1)
    trainer = trained(model, args, trainer_optimizer(args, target_modules=TARGETS, rank=RANK))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "layers.1" in name}
    assert trainer.optimizer is not None
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(moved)


@pytest.mark.parametrize(("targets", "embedding"), [("all-linear", False), (["lm_head"], True), (["mlp"], False)])
def test_tied_weights_are_one_parameter(targets: Any, embedding: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    args = arguments(tmp_path)
    trainer = trained(model, args, trainer_optimizer(args, target_modules=targets, rank=RANK))
    optimizer = trainer.optimizer.optimizer  # type: ignore[union-attr]
    assert ("model.embed_tokens.weight" in names_of(optimizer, projected=True)) is embedding
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_of_a_peft_model_the_adapters_are_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.LoraConfig(r=8, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), adapted)
    before = snapshot(model)
    args = arguments(tmp_path)
    trainer = trained(model, args, trainer_optimizer(args, target_modules=["lora_A", "lm_head"], rank=RANK))
    optimizer = trainer.optimizer.optimizer  # type: ignore[union-attr]
    projected, rest = names_of(optimizer, projected=True), names_of(optimizer, projected=False)
    assert {name.rpartition("proj.")[2] for name in projected} == {
        "lora_A.default.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    }
    assert {name.rpartition("proj.")[2] for name in rest} == {"lora_B.default.weight"}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == projected | rest
    with pytest.raises(ValueError, match="matches no trainable linear layer"):
        made(model, args, target_modules=["down_proj"])


# ---------------------------------------------------------------------- training


def test_it_trains_as_the_same_optimizer_made_by_hand(tmp_path: Path) -> None:
    run = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    options: dict[str, Any] = {"rank": RANK, "update_proj_gap": 2, "scale": 0.5}
    results = []
    for by_hand in (True, False):
        model, args = llama(), arguments(tmp_path, **run)
        if by_hand:
            groups = galore_param_groups(model, TARGETS, **options)
            optimizer = GaLoreFusedAdam8bit(groups, lr=1e-2)
            Trainer(model, args, train_dataset=texts(), optimizers=(optimizer, None)).train()
        else:
            trained(model, args, trainer_optimizer(args, target_modules=TARGETS, **options))
        results.append(snapshot(model))
    assert_same(*results)


def layerwise_runs(tmp_path: Path, rank: int | None, **run: Any) -> list[dict[str, torch.Tensor]]:
    """The weights that whole steps and layerwise ones end with; an epoch's last step is a shorter one."""
    results = []
    for layerwise in (False, True):
        model, args = llama(), arguments(tmp_path, max_grad_norm=0.0, **run)
        chosen = trainer_optimizer(args, target_modules=TARGETS, rank=rank, update_proj_gap=2, layerwise=layerwise)
        trainer = trained(model, args, chosen, count=16)
        assert isinstance(trainer.optimizer.optimizer, LayerwiseOptimizer) is layerwise  # type: ignore[union-attr]
        results.append(snapshot(model))
    return results


def test_layerwise_updates_are_those_of_whole_steps(tmp_path: Path) -> None:
    assert_same(*layerwise_runs(tmp_path, RANK))


def test_layerwise_updates_take_what_accumulates(tmp_path: Path) -> None:
    # At full rank: the first basis of layerwise updates is that of the first backward pass, not of all three.
    assert_same(*layerwise_runs(tmp_path, None, gradient_accumulation_steps=3))


@pytest.mark.parametrize(("accumulation", "in_arguments"), [(1, True), (3, False)])
def test_layerwise_updates_are_clipped(accumulation: int, in_arguments: bool, tmp_path: Path) -> None:
    results = []
    for norm in (0.0, 1e-7):  # so small that Adam's eps is felt
        model = llama()
        args = arguments(
            tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=norm if in_arguments else 0.0
        )
        own: dict[str, Any] = {} if in_arguments else {"max_grad_norm": norm}
        trained(
            model, args, trainer_optimizer(args, target_modules=TARGETS, rank=RANK, layerwise=True, **own), count=16
        )
        results.append(snapshot(model))
    start = llama().state_dict()
    far, near = (sum(float((end[name] - start[name]).square().sum()) for name in end) for end in results)
    assert near < 0.25 * far


@pytest.mark.parametrize("weights", [None, "int8"])
def test_prepared_models(weights: str | None, tmp_path: Path) -> None:
    """Their ranks and sides are those of ``prepare``; what is saved is loaded by a plain model."""
    model: Any = prepare(llama(), TARGETS, RANK, weights=weights)
    before = {name: value.clone() for name, value in plain_state_dict(model).items()}
    args = arguments(tmp_path, weight_decay=0.1, max_grad_norm=0.5, gradient_accumulation_steps=2)
    trainer = trained(model, args, trainer_optimizer(args, target_modules=TARGETS, update_proj_gap=2))
    optimizer = trainer.optimizer.optimizer  # type: ignore[union-attr]
    projected = [group for group in optimizer.param_groups if group["rank"] is not None]
    assert [(group["rank"], group["weight_decay"], len(group["params"])) for group in projected] == [(RANK, 0.1, 14)]
    assert subspace_summary(optimizer)["subspace_refreshes"] == 14 * 3
    assert not any(torch.equal(value, before[name]) for name, value in plain_state_dict(model).items())
    model.save_pretrained(tmp_path / "saved", state_dict=plain_state_dict(model))
    plain = type(model).from_pretrained(tmp_path / "saved")
    assert_same(plain.state_dict(), plain_state_dict(model))
    with pytest.raises(ValueError, match=r"rank=8 in .*was prepared with rank 4"):
        made(model, args, target_modules=TARGETS, rank=8)


@pytest.mark.parametrize("layerwise", [False, True])
def test_int8_weights_for_apollo(layerwise: bool, tmp_path: Path) -> None:
    """The rank is the factory's, as of a model that was not prepared."""
    model: Any = prepare(llama(), TARGETS, rank=None, weights="int8")
    before = {name: value.clone() for name, value in plain_state_dict(model).items()}
    args = arguments(tmp_path, weight_decay=0.1, max_grad_norm=0.5)
    factory = trainer_optimizer(args, "APOLLOFusedAdam8bit", target_modules=TARGETS, rank=RANK, layerwise=layerwise)
    trainer = trained(model, args, factory)
    optimizer = trainer.optimizer.optimizer  # type: ignore[union-attr]
    projected = [group for group in optimizer.param_groups if group["rank"] is not None]
    assert [(group["rank"], group["weight_decay"], len(group["params"])) for group in projected] == [(RANK, 0.1, 14)]
    assert not any(torch.equal(value, before[name]) for name, value in plain_state_dict(model).items())
    model.save_pretrained(tmp_path / "saved", state_dict=plain_state_dict(model))
    assert_same(type(model).from_pretrained(tmp_path / "saved").state_dict(), plain_state_dict(model))


# ---------------------------------------------------------------------- the callback


def test_the_callback_logs_the_subspaces(tmp_path: Path) -> None:
    model, args = llama(), arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    chosen = trainer_optimizer(args, target_modules=TARGETS, rank=RANK, update_proj_gap=2)
    trainer = trained(model, args, chosen, callbacks=[SubspaceCallback()], eval_dataset=texts(4))
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["subspace_refreshes"] for entry in steps] == [14, 28, 42]
    assert all(entry["subspace_rank"] == RANK and 0 < entry["subspace_captured"] <= 1 for entry in steps)
    assert ["subspace_overlap" in entry for entry in steps] == [False, True, True]
    state_bytes = trainer.optimizer.optimizer.state_bytes()  # type: ignore[union-attr]
    assert [entry.get("optimizer_state_bytes") for entry in steps] == [state_bytes, None, None]
    assert "skipped_steps" not in steps[-1]
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others
    assert not [key for entry in others for key in entry if key.startswith(("subspace", "optimizer"))]


def test_the_callback_put_first_is_seen_by_what_reports(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    args = arguments(tmp_path, max_steps=2)
    chosen = trainer_optimizer(args, target_modules=TARGETS, rank=RANK)
    trainer = Trainer(llama(), args, train_dataset=texts(), callbacks=[Reporter()], optimizer_cls_and_kwargs=chosen)
    trainer.callback_handler.callbacks.insert(0, SubspaceCallback())
    trainer.train()
    assert seen[0]["subspace_refreshes"] == 14


def test_the_callback_is_one_of_the_trainers() -> None:
    assert issubclass(SubspaceCallback, TrainerCallback)
    with pytest.raises(ImportError, match="cannot import name 'Subspace'"):
        from galore_kernels.integrations.huggingface import Subspace  # noqa: F401


def test_the_callback_wants_an_optimizer_that_reports(tmp_path: Path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=texts(), callbacks=[SubspaceCallback])
    with pytest.raises(TypeError, match=r"expected an optimizer with a subspace_report, got AdamW.*trainer_optimizer"):
        trainer.train()


def test_a_summary_counts_skipped_steps() -> None:
    skips = {"0": 2, "1": 1}
    summary = subspace_summary(SimpleNamespace(subspace_report=dict, skipped_steps=lambda: skips))
    assert summary == {"subspace_refreshes": 0, "skipped_steps": 3}
