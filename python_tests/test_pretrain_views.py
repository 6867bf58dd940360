"""galore_kernels.pretrain: the command line, the displays, the picture and the table."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pretrain_runs import nano, write_text

from galore_kernels.pretrain import main
from galore_kernels.pretrain.config import Config, PretrainError
from galore_kernels.pretrain.display import PlainDisplay, choose_display, format_bytes, format_seconds
from galore_kernels.pretrain.plot import comparison_table, plot_runs, read_runs
from galore_kernels.pretrain.runlog import RunLog, read_log


def write_run(out: Path, name: str, losses: list[float], *, finished: bool = True, **config: Any) -> None:
    """A run's log without the run."""
    settings = Config.resolve({"steps": 10 * len(losses), **config})
    folder = out / name
    folder.mkdir(parents=True)
    header = {
        "config": settings.to_dict(),
        "corpus": {"description": "ten files", "sha256": "0", "vocabulary": 256, "training_windows": 90,
                   "validation_windows": 5},
        "parameters": 3_300_000,
        "optimizer": "...",
        "machine": {"device": "cpu", "name": "x86_64", "cpus": 2, "threads": 1, "python": "3.11",
                    "peak_memory_of": "process"},
        "versions": {},
    }  # fmt: skip
    with RunLog.begin(folder, header) as log:
        for number, loss in enumerate(losses, start=1):
            log.write("train", step=10 * number, loss=loss, lr=0.01, tokens_per_second=1000.0, seconds=20.0 * number,
                      optimizer_state_bytes=9_200_000, peak_memory_bytes=700_000_000)  # fmt: skip
            log.write("validation", step=10 * number, loss=loss + 0.1)
        if finished:
            log.write("final", step=10 * len(losses), validation_loss=losses[-1] + 0.1, seconds=20.0 * len(losses),
                      tokens=0, optimizer_state_bytes=9_200_000, peak_memory_bytes=700_000_000)  # fmt: skip


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_the_picture_shows_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "good", [5.0, 3.0, 2.0, 1.5], optimizer="galore")
    write_run(tmp_path, "bad", [5.0, 4.0, 3.0, 2.5], optimizer="adamw")
    write_run(tmp_path, "stopped", [5.0, 4.5], finished=False)
    write_run(tmp_path, "just-begun", [], finished=False, steps=40)
    (tmp_path / "cache").mkdir()  # no run
    assert main(["--out", str(tmp_path), "--plot-only"]) == 0
    assert is_png(tmp_path / "loss_curves.png")
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:6]] == ["good", "bad", "stopped", "just-begun"]  # best first
    assert "1.6000" in table[2]
    assert "9.2 MB" in table[2]
    assert "20/20" in table[4]


def test_the_legend_gives_the_final_validation_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    savefig = Figure.savefig

    def recorded(self: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(self)
        savefig(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", recorded)
    write_run(tmp_path, "one", [5.0, 1.5])
    write_run(tmp_path, "two", [5.0, 2.5], finished=False)
    plot_runs(read_runs(tmp_path), tmp_path / "picture.png")
    legend = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    assert legend == ["1.600  one", "2.600  two (unfinished)"]


def test_comparing_prints_the_table_and_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "one", [5.0, 1.5])
    assert main(["--out", str(tmp_path), "--compare"]) == 0
    assert capsys.readouterr().out.strip() == comparison_table(read_runs(tmp_path))
    assert not (tmp_path / "loss_curves.png").exists()


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--plot-only"]) == 2
    assert "no runs in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "header"}\n{"kind": "tr\n{"kind": "final"}\n', "line 2"),
        ("[]\n", "line 1.*not an object"),
        ('{"kind": "train"}\n', "expected a header"),
        ("", "expected a header"),
    ],
)
def test_a_damaged_log_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(PretrainError, match=message):
        read_log(path)


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "header"}\n{"kind": "train", "step": 1}\n{"kind": "train", "st')
    assert [entry["kind"] for entry in read_log(path)] == ["header", "train"]


def test_no_line_of_a_log_is_invalid_json(tmp_path: Path) -> None:
    with RunLog.begin(tmp_path, {}) as log, pytest.raises(ValueError, match="JSON compliant"):
        log.write("train", loss=float("nan"))  # NaN is not JSON; the training loop stops before


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(choose_display(), PlainDisplay)
    text = write_text(tmp_path / "text")
    assert main(nano(text, tmp_path, "run", "--optimizer", "adamw")) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for wanted in ("step  3/12  loss ", " lr ", "tokens/s", "optimizer state", "peak memory", "(process)", "left",
                   "step  4/12  validation loss", "saved", "done: validation loss"):  # fmt: skip
        assert wanted in out


def test_the_live_display_shows_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = pytest.importorskip("rich.console")
    from galore_kernels.pretrain import cli, live

    screen = io.StringIO()
    terminal = console.Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(cli, "choose_display", lambda: live.LiveDisplay(terminal))
    text = write_text(tmp_path / "text")
    assert main(nano(text, tmp_path, "run", "--optimizer", "adamw")) == 0
    shown = screen.getvalue()
    for wanted in ("validation loss", "tokens/s", "learning rate", "optimizer state", "peak memory (process)",
                   "elapsed", "left", "12/12", "checkpoint-00000012.pt", "0.1 M parameters", "▁"):  # fmt: skip
        assert wanted in shown


def test_the_live_display_is_chosen_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    from galore_kernels.pretrain.live import LiveDisplay

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert isinstance(choose_display(), LiveDisplay)


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [([], 5, ""), ([1.0], 5, "▁"), ([8.0, 1.0], 5, "█▁"), ([3.0, 3.0], 5, "▁▁"), ([1, 1, 8, 8], 2, "▁█")],
)
def test_sparkline(values: list[float], width: int, expected: str) -> None:
    pytest.importorskip("rich")
    from galore_kernels.pretrain.live import sparkline

    assert sparkline(values, width) == expected


def test_units() -> None:
    assert [format_bytes(size) for size in (0, 999, 1000, 1_536_000, 999_700, 26_364_060, 2.5e9, 1.25e12)] == [
        "0 B", "999 B", "1 kB", "1.54 MB", "1 MB", "26.4 MB", "2.5 GB", "1,250 GB",
    ]  # fmt: skip
    assert [format_seconds(seconds) for seconds in (0, 59.6, 75, 3700)] == ["0:00", "1:00", "1:15", "1:01:40"]


def test_help_names_every_option() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "galore_kernels.pretrain", "--help"], capture_output=True, text=True, check=True
    )
    for name in ("preset", "optimizer", "resume", "text", "dataset", "tokenizer", "rank", "plot-only", "split"):
        assert f"--{name}" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "-1"], "--lr -1.0: expected a finite number that is not negative"),
        (["--lr", "nan"], "--lr nan"),
        (["--eps", "inf"], "--eps inf"),
        (["--weight-decay", "-0.1"], "--weight-decay -0.1"),
        (["--clip", "-1"], "--clip"),
        (["--scale", "nan"], "--scale"),
        (["--scale", "0"], "--scale 0.0: expected a finite number > 0"),
        (["--proj-type", "rigth"], "--proj-type 'rigth': expected one of std"),
        (["--rank", "0"], "--rank 0: expected at least 1"),
        (["--update-proj-gap", "0"], "--update-proj-gap 0"),
        (["--steps", "0"], "--steps 0"),
        (["--batch", "0"], "--batch 0"),
        (["--accumulate", "0"], "--accumulate 0"),
        (["--warmup", "500"], "--warmup 500: expected between 0 and --steps (400)"),
        (["--sequence", "1"], "--sequence 1"),
        (["--heads", "3"], "--heads 3: expected a number that divides --hidden (256)"),
        (["--heads", "256"], "--heads 256"),  # heads of width 1: odd
        (["--seed", "-1"], "--seed -1"),
        (["--eval-every", "0"], "--eval-every 0"),
        (["--log-every", "0"], "--log-every 0"),
        (["--save-every", "-5"], "--save-every -5"),
        (["--threads", "0"], "--threads 0"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--text", "a", "--dataset", "b"], "drop one of them"),
        (["--resume", "nowhere"], "--resume nowhere: there is no such file or folder"),
        (["--resume"], "--resume: no checkpoint in"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main(["--out", str(out), "--optimizer", "adamw", *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_file_in_the_place_of_the_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert main(["--out", str(tmp_path / "out"), "--optimizer", "adamw"]) == 2
    assert "expected a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("options", [["--optimizer", "sgd"], ["--preset", "2b"], ["--dtype", "int8"], ["--nonsense"]])
def test_unknown_choices_are_refused(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert "usage: galore-pretrain" in capsys.readouterr().err


def test_a_configuration_resolves_to_itself() -> None:
    config = Config.resolve({"preset": "60m", "steps": 1000, "text": ["a", "b"], "rank": 3})
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert Config.resolve(plain) == config
    assert config.warmup == 100
    with pytest.raises(PretrainError, match=r"unknown option.*rnak"):
        Config.resolve({"rnak": 3})


def test_learning_rates_follow_the_kind_of_optimizer() -> None:
    assert Config.resolve({"optimizer": "adamw"}).lr == 5e-4
    assert Config.resolve({"optimizer": "galore_torch"}).lr == 0.01
    assert Config.resolve({"optimizer": "galore8bit", "preset": "7b"}).lr == 0.005
