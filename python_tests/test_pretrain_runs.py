"""galore_kernels.pretrain: runs, their logs and checkpoints, and what happens when they are stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import exit_status
from pretrain_runs import (
    EVERY,
    NANO,
    STEPS,
    assert_equal_runs,
    log_lines,
    nano,
    start_in_child,
    write_text,
)

from galore_kernels import checkpoint
from galore_kernels.pretrain import main
from galore_kernels.pretrain.config import FULL_RANK, OPTIMIZERS, Config
from galore_kernels.pretrain.corpus import load_corpus
from galore_kernels.pretrain.optimizers import build_optimizer
from galore_kernels.pretrain.presets import PRESETS
from galore_kernels.pretrain.rivals import optimizer_state_bytes, patched_galore_torch_adamw8bit
from galore_kernels.pretrain.train import build_model

RIVAL_PACKAGES = {
    "adamw8bit": ["bitsandbytes"],
    "galore_torch": ["galore_torch"],
    "galore_torch8bit": ["bitsandbytes", "galore_torch"],
    "galore_torch_adafactor": ["galore_torch"],
    "apollo_torch": ["apollo_torch"],
}


def need(optimizer: str) -> None:
    for package in RIVAL_PACKAGES.get(optimizer, []):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, "whole", of torch's AdamW. Copy it; leave it as it is."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished")
    assert main(nano(text, out, "whole", "--optimizer", "adamw")) == 0
    return out


def copy_run(finished: Path, out: Path, name: str = "run", keep_final: bool = False) -> Path:
    folder = out / name
    shutil.copytree(finished / "whole", folder)
    if not keep_final:
        (folder / f"checkpoint-{STEPS:08d}.pt").unlink()
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(
    text: Path, tmp_path: Path, optimizer: str, dtype: str
) -> None:
    need(optimizer)
    assert main(nano(text, tmp_path, "whole", "--optimizer", optimizer, "--dtype", dtype)) == 0
    folder = copy_run(tmp_path, tmp_path)
    assert main(["--out", str(tmp_path), "--resume", str(folder), *EVERY]) == 0
    assert [line["step"] for line in log_lines(tmp_path, "run", "resume")] == [10]
    assert_equal_runs(tmp_path, "whole", "run")


@pytest.mark.parametrize("updates", ["whole", "layerwise"])
def test_int8_weights_under_apollo_are_resumed(text: Path, tmp_path: Path, updates: str) -> None:
    options = ["--optimizer", "apollo_mini", "--weights", "int8", "--updates", updates, "--lr", "0.01"]
    assert main(nano(text, tmp_path, "whole", *options)) == 0
    folder = copy_run(tmp_path, tmp_path)
    assert main(["--out", str(tmp_path), "--resume", str(folder), *EVERY]) == 0
    assert_equal_runs(tmp_path, "whole", "run")
    saved = checkpoint.load(tmp_path / "run" / f"checkpoint-{STEPS:08d}.pt")["model"]
    assert saved["model.layers.0.mlp.up_proj.weight_codes"].dtype == torch.int8
    losses = [line["loss"] for line in log_lines(tmp_path, "run", "train")]
    assert losses[-1] < losses[0] - 0.5


def test_the_loss_falls_and_the_optimizers_differ(text: Path, tmp_path: Path) -> None:
    losses = {}
    for optimizer in ("galore8bit", "galore", "galore_adafactor", "adamw"):
        assert main(nano(text, tmp_path, optimizer, "--optimizer", optimizer, "--lr", "0.01")) == 0
        train = log_lines(tmp_path, optimizer, "train")
        assert train[-1]["loss"] < train[0]["loss"] - 0.5
        losses[optimizer] = train[-1]["loss"]
    assert len(set(losses.values())) == 4
    assert losses["galore8bit"] == pytest.approx(losses["galore"], rel=0.02)


@pytest.mark.parametrize("split", ["file", "window"])
def test_accumulated_micro_batches_give_the_gradient_of_the_batch(text: Path, tmp_path: Path, split: str) -> None:
    halves = ["--batch", "2", "--accumulate", "2"]
    assert main(nano(text, tmp_path, "one", "--optimizer", "adamw", "--split", split)) == 0
    assert main(nano(text, tmp_path, "two", "--optimizer", "adamw", "--split", split, *halves)) == 0
    one, two = (log_lines(tmp_path, name, "train")[-1]["loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)  # other sums, else the same


def test_the_log_tells_everything(finished: Path) -> None:
    entries = [json.loads(line) for line in (finished / "whole" / "log.jsonl").read_text().splitlines()]
    header, final = entries[0], entries[-1]
    assert header["kind"] == "header"
    assert header["config"]["optimizer"] == "adamw"
    assert header["config"]["hidden"] == 64
    assert header["versions"]["torch"] == torch.__version__
    assert header["parameters"] == sum(
        tensor.numel() for tensor in checkpoint.load(finished / "whole" / "checkpoint-00000012.pt")["model"].values()
    )
    assert [entry["step"] for entry in entries if entry["kind"] == "train"] == [3, 6, 9, 12]
    assert [entry["step"] for entry in entries if entry["kind"] == "validation"] == [4, 8, 12]
    assert final["kind"] == "final"
    assert final["validation_loss"] == [entry for entry in entries if entry["kind"] == "validation"][-1]["loss"]
    assert final["tokens"] == 12 * 4 * 32
    # AdamW keeps two float32 values a parameter, and a step count for each tensor.
    tensors = len(checkpoint.load(finished / "whole" / "checkpoint-00000012.pt")["optimizer"]["state"])
    assert final["optimizer_state_bytes"] == 8 * header["parameters"] + 4 * tensors
    assert final["peak_memory_bytes"] > 10**8


def test_the_latest_checkpoint_and_the_one_before_are_kept(finished: Path) -> None:
    kept = sorted(path.name for path in (finished / "whole").glob("*.pt"))
    assert kept == ["checkpoint-00000010.pt", "checkpoint-00000012.pt"]


def test_resume_without_a_path_takes_the_newest(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "old", keep_final=True)
    copy_run(finished, tmp_path, "new")
    for path in (tmp_path / "old").iterdir():
        os.utime(path, (1, 1))
    assert main(["--out", str(tmp_path), "--resume"]) == 0
    assert (tmp_path / "new" / "checkpoint-00000012.pt").exists()


def test_resuming_a_finished_run_changes_nothing(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "whole", tmp_path / "whole")
    copy_run(finished, tmp_path, keep_final=True)
    assert main(["--out", str(tmp_path), "--resume", str(tmp_path / "run")]) == 0
    assert_equal_runs(tmp_path, "whole", "run")


def test_the_log_is_continued_without_duplicates_after_a_kill(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "whole", tmp_path / "whole")
    folder = copy_run(finished, tmp_path)  # its log is ahead of its checkpoint
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"kind": "train", "step": 13, "lo')  # a line that a kill cut short
    assert main(["--out", str(tmp_path), "--resume", str(folder), *EVERY]) == 0
    assert_equal_runs(tmp_path, "whole", "run")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lr", "0.5"], "lr was 0.0005, is 0.5"),
        (["--optimizer", "adamw8bit"], "optimizer was 'adamw', is 'adamw8bit'"),
        (["--hidden", "128", "--seed", "3"], "hidden was 64, is 128; seed was 0, is 3"),
        (["--steps", "13"], "steps was 12, is 13"),
        (["--preset", "60m"], "preset was 'tiny', is '60m'"),
        (["--split", "window"], "split was 'file', is 'window'"),
        (["--text", "elsewhere"], "text was"),
    ],
)
def test_another_configuration_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    folder = copy_run(finished, tmp_path)
    before = (folder / "log.jsonl").read_bytes()
    assert main(["--out", str(tmp_path), "--resume", str(folder), *options]) == 2
    assert named in capsys.readouterr().err
    assert (folder / "log.jsonl").read_bytes() == before


def test_the_same_options_given_again_are_accepted(text: Path, finished: Path, tmp_path: Path) -> None:
    folder = copy_run(finished, tmp_path)
    options = ["--text", str(text), "--optimizer", "adamw", *NANO, *EVERY]
    assert main(["--out", str(tmp_path), "--resume", str(folder), *options]) == 0


def test_other_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text")
    assert main(nano(text, tmp_path / "out", "run", "--optimizer", "adamw")) == 0
    (text / "d3.txt").write_text("something else")
    assert main(["--resume", str(tmp_path / "out" / "run")]) == 2
    assert "corpus sha256 was" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_run(finished, tmp_path, keep_final=True)
    latest = folder / "checkpoint-00000012.pt"
    content = bytearray(latest.read_bytes())
    content[1000] ^= 1
    latest.write_bytes(content)
    assert main(["--resume", str(folder)]) == 2
    earlier = folder / "checkpoint-00000010.pt"
    assert f"--resume {earlier}" in capsys.readouterr().err
    assert main(["--resume", str(earlier), *EVERY]) == 0
    assert_equal_runs_across(finished, "whole", tmp_path, "run")


def assert_equal_runs_across(finished: Path, one: str, out: Path, other: str) -> None:
    shutil.copytree(finished / one, out / one)
    assert_equal_runs(out, one, other)


def test_kill_9_at_random_moments_and_resume(text: Path, finished: Path, tmp_path: Path) -> None:
    begin = nano(text, tmp_path, "run", "--optimizer", "adamw", "--save-every", "1")
    resume = ["--out", str(tmp_path), "--resume", str(tmp_path / "run"), "--save-every", "1", "--log-every", "3"]
    draw = random.Random(1)
    kills = 0

    def saved() -> list[Path]:
        return sorted((tmp_path / "run").glob("checkpoint-*.pt"))

    def last_step() -> int:
        return max((int(path.stem.partition("-")[2]) for path in saved()), default=0)

    while True:
        for path in saved():
            checkpoint.load(path)
        wanted = min(last_step() + draw.randint(0, 2), 12)
        child = start_in_child(resume if saved() else begin)  # killed before its first save, it begins again
        wait_for(lambda wanted=wanted: last_step() >= wanted, time.monotonic() + 60)
        time.sleep(draw.uniform(0.0, 0.05))
        if kills < 8:
            os.kill(child, signal.SIGKILL)
        status = exit_status(child)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= 2, "the run was over before it could be killed: the test shows nothing"
    assert_equal_runs_across(finished, "whole", tmp_path, "run")


def wait_for(condition: Any, deadline: float) -> None:
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_says_how_to_go_on(
    text: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    log = tmp_path / "run" / "log.jsonl"
    child = start_in_child(nano(text, tmp_path, "run", "--optimizer", "adamw", "--save-every", "1000"))
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2, time.monotonic() + 60)  # header, first line
    os.kill(child, number)
    assert exit_status(child) == 128 + number
    out = capfd.readouterr().out
    assert f"stopped by {number.name} at step" in out
    assert f"galore-pretrain --resume {tmp_path / 'run'}" in out
    assert "Traceback" not in out
    assert main(["--out", str(tmp_path), "--resume", *EVERY]) == 0
    assert_equal_runs_across(finished, "whole", tmp_path, "run")


def test_two_processes_do_not_train_in_one_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from galore_kernels.pretrain.machine import sole_trainer

    folder = copy_run(finished, tmp_path)
    with sole_trainer(folder):
        assert main(["--resume", str(folder)]) == 2
    assert "another process is training" in capsys.readouterr().err


@pytest.mark.parametrize("lr", ["1e30", "1e38"])  # finite weights and a NaN loss; weights that overflow at once
def test_a_run_that_diverges_stops_and_keeps_its_good_checkpoints(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lr: str
) -> None:
    options = ["--optimizer", "adamw", "--lr", lr, "--warmup", "12", "--weight-decay", "0.5", "--save-every", "1"]
    assert main(nano(text, tmp_path, "run", *options)) == 2
    assert "lower --lr" in capsys.readouterr().err
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.load(path)["model"].values())


def test_a_name_that_is_taken_is_refused_and_default_names_are_numbered(
    text: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_run(finished, tmp_path)
    assert main(nano(text, tmp_path, "run")) == 2
    assert "holds a run; add --resume" in capsys.readouterr().err
    unnamed = ["--text", str(text), "--out", str(tmp_path), "--optimizer", "adamw", *NANO, *EVERY]
    assert main(unnamed) == 0
    assert main(unnamed) == 0
    assert {path.name for path in tmp_path.glob("tiny*")} == {"tiny-adamw", "tiny-adamw-2"}


@pytest.mark.parametrize("optimizer", sorted(RIVAL_PACKAGES))
def test_a_rival_that_is_not_installed_is_named_with_the_command_that_installs_it(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    for module in ("bitsandbytes", "bitsandbytes.optim.optimizer", "galore_torch", "apollo_torch"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(nano(text, tmp_path, "run", "--optimizer", optimizer)) == 2
    package = RIVAL_PACKAGES[optimizer][0].replace("_", "-")
    assert f"pip install {package}" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_gets_the_settings_and_all_parameters(text: Path, tmp_path: Path, optimizer: str) -> None:
    need(optimizer)
    settings = {"lr": 0.125, "eps": 1e-5, "weight_decay": 0.25, "rank": 8, "update_proj_gap": 7, "scale": 0.75}
    config = Config.resolve({"hidden": 64, "heads": 2, "layers": 2, "optimizer": optimizer, **settings})
    model = build_model(config, 256)
    built = build_optimizer(model, config)
    in_groups = [parameter for group in built.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in in_groups} == {id(parameter) for parameter in model.parameters()}
    assert len(in_groups) == len(list(model.parameters()))
    for group in built.param_groups:
        assert {key: group[key] for key in ("lr", "weight_decay")} == {"lr": 0.125, "weight_decay": 0.25}
        if optimizer.endswith("adafactor"):  # whose eps is another thing
            own = {"eps": (1e-30, 1e-3), "relative_step": False, "scale_parameter": False, "beta1": None}
            assert {key: group[key] for key in own} == own
        else:
            assert float(group["eps"]) == settings["eps"]
    projected = [group for group in built.param_groups if group.get("rank") is not None]
    if optimizer in FULL_RANK:
        assert projected == []
    else:  # 7 linear layers in each of 2 blocks
        assert sum(len(group["params"]) for group in projected) == 14
        for group in projected:
            assert {key: group[key] for key in ("rank", "update_proj_gap", "scale")} == {
                key: settings[key] for key in ("rank", "update_proj_gap", "scale")
            }
            assert group["proj_type"] == "std"


def test_the_patched_rival_moves_small_tensors_and_is_not_clipped() -> None:
    # Unpatched with bitsandbytes 0.50, max_unorm is 100 and skip_zeros is set: see galore_kernels/pretrain/rivals.py.
    need("galore_torch8bit")
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = patched_galore_torch_adamw8bit()([weight], lr=0.5)  # type: ignore[call-arg]
    weight.grad = torch.tensor([1.0, -1.0, 1e-3, -1e-3, 2.0, -2.0, 1.0, 1.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -0.5 * weight.grad.sign(), rtol=1e-3, atol=0)
    arguments: Any = optimizer
    assert not arguments.args.skip_zeros
    assert not arguments.args.max_unorm


def test_the_patch_leaves_torch_as_it_was() -> None:
    need("galore_torch8bit")
    synchronize = torch.cuda.synchronize
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = patched_galore_torch_adamw8bit()([weight])  # type: ignore[call-arg]
    weight.grad = torch.ones(8)
    optimizer.step()
    assert torch.cuda.synchronize is synchronize


def test_state_bytes_count_each_tensor_once_and_look_into_objects() -> None:
    class Projector:
        def __init__(self) -> None:
            self.basis = torch.zeros(5, 3)

    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight])
    shared = torch.zeros(7, dtype=torch.uint8)
    optimizer.state[weight] = {"a": shared, "b": [shared, {"c": torch.zeros(2, dtype=torch.bfloat16)}],
                               "projector": Projector(), "step": 3}  # fmt: skip
    assert optimizer_state_bytes(optimizer) == 7 + 2 * 2 + 4 * 15


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_have_the_papers_sizes(name: str) -> None:
    # Parameters with a vocabulary of 32,000, from the shapes in GaLore's table; tiny's with bytes.
    expected = {"tiny": 3.3e6, "60m": 58e6, "130m": 134e6, "350m": 368e6, "1b": 1339e6, "7b": 6738e6}
    config = Config.resolve({"preset": name})
    with torch.device("meta"):
        model = build_model(config, 256 if name == "tiny" else 32000)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(expected[name], rel=0.01)
    if name != "tiny":
        assert config.tokens_per_step == 512 * 256


def test_clipping_bounds_the_gradient(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, closure: Any = None) -> Any:
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None])))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    assert main(nano(text, tmp_path, "run", "--optimizer", "adamw", "--clip", "0.01")) == 0
    assert len(norms) == STEPS
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_the_schedule_warms_up_and_falls_to_a_tenth() -> None:
    config = Config.resolve({"steps": 400, "lr": 1.0})
    rates = [config.lr_at(step) for step in range(400)]
    assert config.warmup == 20
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19] == rates[20] == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[210] == pytest.approx(0.55)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.1, rel=1e-3)


def test_equal_seeds_give_equal_runs_and_others_do_not(text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(nano(text, tmp_path, name, "--seed", seed, "--optimizer", "adamw")) == 0
    assert_equal_runs(tmp_path, "a", "b")
    assert log_lines(tmp_path, "a", "train")[0]["loss"] != log_lines(tmp_path, "c", "train")[0]["loss"]


def test_the_example_runs_as_a_program(text: Path, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "pretrain.py"
    result = subprocess.run(
        [sys.executable, str(example), *nano(text, tmp_path, "run", "--threads", "1")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "galore8bit" in result.stdout
    assert "validation loss" in result.stdout
    assert (tmp_path / "loss_curves.png").exists()


def test_the_default_corpus_is_trained_on(tmp_path: Path) -> None:
    config = Config.resolve({"optimizer": "adamw"})
    corpus = load_corpus(config, tmp_path)
    assert len(corpus.train) > 10_000
    assert len(corpus.validation) == config.val_windows
