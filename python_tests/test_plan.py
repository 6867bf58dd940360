"""The memory planner against sums done by hand, its solver and command line; the counter that it is checked by."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import plan_check
import pytest
import torch

from galore_kernels import GaLoreFusedAdafactor, GaLoreFusedAdam8bit, GaLoreFusedAdamW
from galore_kernels.plan import MODELS, OPTIMIZERS, PARTS, LlamaShape, PlanError, plan
from galore_kernels.plan.activations import saved_tensors
from galore_kernels.plan.cli import main
from galore_kernels.plan.fit import parse_bytes, solve
from galore_kernels.plan.live import LiveBytes
from galore_kernels.plan.settings import Settings
from galore_kernels.plan.shapes import find_model
from galore_kernels.plan.timeline import Timeline

# 4 heads of 16 for queries, 2 for keys and values; a hidden width below a group of int8 weights, one above it.
SMALL = LlamaShape("small", hidden=64, intermediate=300, layers=2, heads=4, kv_heads=2, vocabulary=100)

LINEAR = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 2 * 300 * 64 + 64 * 300  # q, k and v, o, gate and up, down
OTHER = 2 * 100 * 64 + 5 * 64  # embedding and head, norms


# ------------------------------------------------------------------ parts, by hand


def test_weights_by_format() -> None:
    frequencies = 16 * 4  # two float32 copies of half a head's width
    assert plan(SMALL, weights="fp32").parts["weights"] == 4 * (2 * LINEAR + OTHER) + frequencies
    assert plan(SMALL, weights="bf16").parts["weights"] == 2 * (2 * LINEAR + OTHER) + frequencies
    rows = 64 + 2 * 32 + 64 + 2 * 300  # one group of at most 256 columns in a row
    scales = 4 * (rows + 64 * 2)  # and two of 300
    int8 = plan(SMALL, weights="int8", gradients="factored")
    assert int8.parts["weights"] == 2 * (LINEAR + scales) + 2 * OTHER + frequencies


def test_tied_tables_are_one() -> None:
    tied = LlamaShape("tied", 64, 300, 2, 4, 2, 100, tied=True)
    assert SMALL.parameters - tied.parameters == 100 * 64


def saved_by_hand(own: int, tokens: int) -> int:
    norms = 2 * tokens * (64 * 4 + 2 * 64 * own + 4)  # x in float32, normed and weighted, 1 / rms
    attention = tokens * ((64 + 32 + 32 + 64) * own + 4 * 4)  # q, k, v, output, log-sum-exp of 4 heads
    return norms + attention + tokens * 4 * 300 * own  # gate, up, silu(gate), product


@pytest.mark.parametrize(("weights", "own"), [("fp32", 4), ("bf16", 2), ("int8", 2)])
def test_what_a_layer_saves(weights: str, own: int) -> None:
    saved = saved_tensors(Settings(SMALL, weights=weights, tokens=7))
    assert sum(tensor.bytes for tensor in saved) == saved_by_hand(own, 7)


def test_factored_gradients_save_projected_inputs_on_the_right_side() -> None:
    saved = saved_tensors(Settings(SMALL, rank=8, gradients="factored", tokens=7))
    # q, o (both square), gate and up are on the right side, k, v and down on the left. k and v need attention's input
    # and down its own; attention's output is saved by attention itself: only the MLP's input is not.
    by_hand = saved_by_hand(2, 7) - 7 * 64 * 2 + 4 * 7 * 8 * 2
    assert sum(tensor.bytes for tensor in saved) == by_hand
    refreshing = saved_tensors(Settings(SMALL, rank=8, gradients="factored", tokens=7), keeps_inputs=True)
    assert sum(tensor.bytes for tensor in refreshing) == saved_by_hand(2, 7)


@pytest.mark.parametrize(
    ("optimizer", "cls"),
    [("galore8bit", GaLoreFusedAdam8bit), ("galore", GaLoreFusedAdamW), ("galore_adafactor", GaLoreFusedAdafactor)],
)
@pytest.mark.parametrize("basis_format", [None, "int8", "int4"])
def test_our_state_is_the_optimizers_own_count(optimizer: str, cls: Any, basis_format: str | None) -> None:
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (300, 64), (300, 64), (64, 300)] * 2
    projected = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
    rest = [torch.nn.Parameter(torch.zeros(n, 64, dtype=torch.bfloat16)) for n in (100, 100)]
    rest += [torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16)) for _ in range(5)]
    own = cls([{"params": projected, "rank": 8, "basis_format": basis_format}, {"params": rest}])
    parts = plan(SMALL, optimizer, rank=8, basis_format=basis_format).parts
    assert parts["moments"] + parts["basis"] == own.state_bytes()
    element = {None: 2, "int8": 1, "int4": 0.5}[basis_format]
    short = 64 + 32 + 32 + 64 + 64 + 64 + 64
    assert parts["basis"] == 2 * (short * 8 * element + (7 * 8 * 4 if basis_format else 0))


def test_gradients_by_mode() -> None:
    update: dict[str, Any] = {
        "step": "ordinary",
        "tokens": 1,
    }  # so few that all gradients are there at the fullest moment
    assert plan(SMALL, **update).parts["gradients"] == 2 * (2 * LINEAR + OTHER)
    long = 64 + 64 + 64 + 64 + 300 + 300 + 300  # L of q, k, v, o, gate, up and down
    factored = plan(SMALL, rank=8, gradients="factored", **update)
    assert factored.parts["gradients"] == 2 * (2 * long * 8 + OTHER)
    assert plan(SMALL, updates="layerwise", **update).parts["gradients"] == 2 * 64 * 300  # the largest


def test_rivals_states() -> None:
    assert plan(SMALL, "adamw").parts["moments"] == 4 * SMALL.parameters + 4 * (14 + 2 + 5)
    big, small = 2 * LINEAR + 2 * 6400 - 2 * 2 * 2048, 2 * 2 * 2048 + 5 * 64  # k and v have fewer than 4096 elements
    blocks = 2 * (16 + 16 + 3 * 75) + 2 * 25
    assert plan(SMALL, "adamw8bit").parts["moments"] == 2 * (big + 4 * blocks) + 8 * small
    low_rank = 2 * 8 * (64 + 64 + 64 + 64 + 900)
    galore = plan(SMALL, "galore_torch", rank=8).parts
    assert galore["moments"] == 4 * (low_rank + OTHER)
    assert galore["basis"] == 2 * 2 * 8 * (64 + 32 + 32 + 64 + 3 * 64)
    apollo = plan(SMALL, "apollo_torch", rank=8).parts
    assert (apollo["moments"], apollo["basis"]) == (galore["moments"], galore["basis"])


def test_the_loss_takes_three_float32_copies_of_the_logits() -> None:
    wide = LlamaShape("wide", 64, 300, 1, 4, 4, 50_000)
    found = plan(wide, "adamw8bit", weights="bf16", tokens=100_000)
    assert found.moment == "backward pass, loss"
    assert found.parts["logits"] == 3 * 4 * 100_000 * 50_000


# ------------------------------------------------------------------ how parts move


def test_every_mode_saves_what_it_is_for() -> None:
    def peak(**options: Any) -> int:
        return plan("7b", rank=256, tokens=2048, **options).peak

    assert peak(gradients="factored") < peak()
    assert peak(updates="layerwise") < peak()
    assert peak(checkpointing="layer", updates="layerwise") < peak(updates="layerwise")
    light = {"gradients": "factored", "updates": "layerwise"}
    assert peak(weights="int8", **light) < peak(**light)
    assert peak(basis_format="int4", **light) < peak(basis_format="int8", **light) < peak(**light)


def test_a_staggered_refresh_keeps_the_factors_of_few_layers() -> None:
    options: dict[str, Any] = {"rank": 256, "tokens": 256, "gradients": "factored", "step": "refresh"}
    periodic = plan("7b", refresh_schedule="periodic", **options).tensors["kept for the refresh"]
    assert periodic == 32 * 2 * 256 * (3 * 4096 + 11008 + 5 * 4096 + 2 * 11008)  # X, once where shared, and dY
    staggered = plan("7b", refresh_schedule="staggered", **options)
    assert staggered.tensors.get("kept for the refresh", 0) <= periodic / 32


def test_parts_add_up_to_the_peak_and_so_do_tensors() -> None:
    for optimizer in OPTIMIZERS:
        found = plan("130m", optimizer, tokens=512)
        assert set(found.parts) == set(PARTS)
        assert found.peak == sum(found.parts.values()) == sum(found.tensors.values())
        assert min(found.parts.values()) >= 0


def test_timeline() -> None:
    line = Timeline("begin")
    line.make("a", "weights", 10)
    with line.during("b", "logits", 5):
        line.moment = "later"
    assert (line.peak, line.peak_moment, line.total) == (15, "begin", 10)
    line.make("c", "gradients", 4)
    line.keep("c", "kept", "refresh workspace")
    line.free("c", "unknown")
    assert line.total == 14
    line.make("d", "activations", 3)
    assert line.peak_parts["refresh workspace"] == 4
    assert line.peak_tensors == {"a": 10, "kept": 4, "d": 3}


# ------------------------------------------------------------------ models


def test_presets_have_their_sizes() -> None:
    sizes = {"60m": 58e6, "130m": 134e6, "350m": 368e6, "1b": 1339e6, "3b": 3426e6, "7b": 6738e6, "13b": 13016e6}
    sizes["70b"] = 68977e6
    for name, parameters in sizes.items():
        assert MODELS[name].parameters == pytest.approx(parameters, rel=0.01)


def test_a_config_json(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 300, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert find_model(tmp_path).parameters == find_model(path).parameters == SMALL.parameters
    path.write_text(json.dumps({**config, "tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": None}))
    found = find_model(path)
    assert (found.tied, found.query_width, found.kv_heads) == (True, 128, 4)
    path.write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(PlanError, match="expected model_type \"llama\", got 'gpt2'"):
        find_model(path)
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(PlanError, match="intermediate_size"):
        find_model(path)
    path.write_text("{")
    with pytest.raises(PlanError, match=r"expected a config\.json"):
        find_model(path)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int9"}, "weights='int9': expected one of fp32, bf16, int8; did you mean \"int8\""),
        ({"rank": 0}, "rank=0: expected an integer >= 1"),
        ({"tokens": 2.5}, "tokens=2.5: expected an integer"),
        ({"tokens": 10, "sequence": 4}, "tokens=10: expected a multiple of sequence"),
        ({"proj_type": "full"}, "proj_type='full': expected one of std"),
        ({"basis_format": "int3"}, "basis_format='int3': expected one of int8, int4"),
        ({"rnak": 3}, "unknown option.*rnak.*rank"),
        ({"optimizer": "adamw", "gradients": "factored"}, "gradients='factored' with adamw.*galore8bit"),
        ({"optimizer": "apollo8bit", "gradients": "factored"}, "gradients='factored' with apollo8bit"),
        ({"optimizer": "galore_torch", "weights": "int8"}, "weights='int8' with galore_torch"),
        ({"optimizer": "adam"}, "optimizer='adam': expected one of .*did you mean \"adamw\""),
        ({"model": "8b"}, "model='8b': expected one of .*7b.*config.json"),
    ],
)
def test_errors_name_the_argument_and_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(options.pop("model", SMALL), options.pop("optimizer", "galore8bit"), **options)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(PlanError, match="kv_heads=3: expected a number that divides heads"):
        LlamaShape("bad", 64, 300, 2, 4, 3, 100)
    with pytest.raises(PlanError, match="layers=0"):
        LlamaShape("bad", 64, 300, 0, 4, 4, 100)


# ------------------------------------------------------------------ what fits


@pytest.mark.parametrize(("unknown", "unit"), [("rank", 16), ("tokens", 128)])
def test_the_solver_finds_the_last_that_fits(unknown: str, unit: int) -> None:
    options: dict[str, Any] = {"gradients": "factored", "updates": "layerwise", "sequence": 128, "tokens": 128}
    budget = 550_000_000
    fit = solve("130m", "galore8bit", unknown, budget, **options)
    assert fit.value % unit == 0
    assert fit.plan.peak <= budget
    assert getattr(fit.plan.settings, unknown) == fit.value
    above = plan("130m", "galore8bit", **{**options, unknown: fit.value + unit}).peak
    assert fit.next_plan is None or (above == fit.next_plan.peak and above > budget)


def test_the_solver_stops_at_the_narrowest_matrix_and_says_what_helps() -> None:
    assert solve("60m", "galore8bit", "rank", 10**12, tokens=8).value == 512
    with pytest.raises(PlanError, match=r"rank=16 takes .* GB .*expected at most 1.00 GB; try gradients=factored"):
        solve("7b", "galore8bit", "rank", 10**9, tokens=8)
    with pytest.raises(PlanError, match="solve='layers': expected one of rank, tokens"):
        solve("7b", "galore8bit", "layers", 10**9)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("1.5 mb", 1_500_000), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_sizes_that_are_none() -> None:
    with pytest.raises(PlanError, match="'24 G8': expected a size like 24GB"):
        parse_bytes("24 G8")


# ------------------------------------------------------------------ the command line


SMALL_RUN = ["--model", "60m", "--rank", "64", "--tokens", "256"]


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    light = ["--weights", "int8", "--gradients", "factored", "--updates", "layerwise"]
    assert main([*SMALL_RUN, *light, "--compare", "--plot", str(picture), "--fit", "24GB"]) == 0
    out = capsys.readouterr().out
    for word in ("GaLoreFusedAdam8bit", "Q-GaLore", "torch AdamW", "int8 weights", "256 tokens", "activations", "peak"):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*SMALL_RUN, "--plot", str(tmp_path / "nowhere" / "plan.png")]) == 2
    assert "name a file in a folder that is there" in capsys.readouterr().err


def test_json_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--model", "60m", "--optimizer", "galore8bit", "adamw", "--sequence", "256", "--json"]
    assert main([*run, "--fit", "4GB", "--reserve", "1GB", "--solve", "tokens"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["budget_bytes"] == 3 * 10**9
    assert [found["optimizer"] for found in data["plans"]] == ["galore8bit", "adamw"]
    for found, fit in zip(data["plans"], data["fits"], strict=True):
        assert found["settings"]["tokens"] == fit["value"]
        assert found["peak_bytes"] == sum(found["parts"].values()) <= 3 * 10**9
    assert main([*SMALL_RUN[:2], "--batch", "3", "--sequence", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["settings"]["tokens"] == 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solve", "rank"], "--solve rank: expected --fit as well"),
        (["--batch", "2"], "--batch: expected --sequence with it"),
        (["--optimizer", "adam"], "did you mean"),
        (["--fit", "much"], "expected a size like"),
    ],
)
def test_a_bad_command_line_is_answered_on_stderr(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_planning_loads_no_extra() -> None:
    program = (
        "import sys; from galore_kernels.plan import plan; plan('7b', tokens=256); "
        "print(*{'transformers', 'rich', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == []


# ------------------------------------------------------------------ the counter, and the plan measured


def test_the_counter_sees_each_memory_once_and_lets_it_go() -> None:
    with LiveBytes() as counter:
        counter.phase = "making"
        a = torch.zeros(1000)
        views = (a.view(10, 100), a[5:], a.T if a.dim() == 2 else a.unsqueeze(0))
        assert counter.current == 4000
        b = a + 1
        counter.phase = "after"
        del b, views
        gc.collect()
        assert (counter.current, counter.peak, counter.peak_phase) == (4000, 8000, "making")
        assert [tensor.shape for tensor in counter.at_peak()] == [(1000,), (1000,)]
        counter.reset_peak()
        assert counter.peak == 4000
    assert "2 x" not in counter.describe_peak()


def test_the_counter_sees_what_our_kernels_and_backward_take() -> None:
    weight = torch.nn.Parameter(torch.randn(256, 64))
    optimizer = GaLoreFusedAdam8bit([{"params": [weight], "rank": 8}], update_proj_gap=1000)
    with LiveBytes() as counter:
        counter.add([weight], "before")
        (weight.square().sum()).backward()
        assert counter.current == 2 * 4 * 256 * 64  # the gradient
        optimizer.step()
        state = optimizer.state_bytes()
        assert counter.current == pytest.approx(2 * 4 * 256 * 64 + state, abs=64)  # and the learning rate
        counter.reset_peak()
        optimizer.step()
        assert counter.peak >= counter.current + 4 * 256 * 8  # R in float32


QUICK = [
    plan_check.Case("grouped", "adamw", 2, 64, {"weights": "fp32", "step": "ordinary"}),
    plan_check.Case("grouped", "galore8bit", 2, 64, {"weights": "bf16", "checkpointing": "layer", "step": "ordinary"}),
    plan_check.Case("grouped", "galore8bit", 1, 8, {"weights": "bf16", "step": "refresh"}),
    plan_check.Case("grouped", "galore_adafactor", 1, 8, {"weights": "bf16", "step": "ordinary"}),
    plan_check.Case("grouped", "galore8bit", 2, 64, {"weights": "fp32", **plan_check.LIGHT, "step": "refresh"}),
]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_the_plan_is_what_a_step_takes(case: plan_check.Case) -> None:
    pytest.importorskip("transformers")
    row = plan_check.measure(case)
    assert row.ratio == pytest.approx(1, abs=plan_check.TOLERANCE), f"{row.predicted.tensors}\n{row.tensors}"
