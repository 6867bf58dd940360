"""The scaling model's command line, picture and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scaling_page

from galore_kernels.plan import scaling
from galore_kernels.plan.cli import main
from galore_kernels.plan.network import NETWORKS
from galore_kernels.plan.scaling import GPUS

RUN = ["--scaling", "--model", "60m", "--rank", "64"]


def test_the_page_has_the_plans_tables() -> None:
    page = scaling_page.PAGE.read_text()
    assert scaling_page.filled(page) == page, "run python bench/scaling_page.py"
    with pytest.raises(ValueError, match="expected 7 places for tables, got 1"):
        scaling_page.filled(scaling_page.BEGIN)


@pytest.mark.parametrize(
    ("gradients", "label"), [("dense", "DDP / reduce_lowrank mean"), ("factored", "DDP / prepared layers mean")]
)
def test_tables_and_picture(gradients: str, label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "scaling.png"
    assert main([*RUN, "--gpus", "8", "64", "--gradients", gradients, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    for word in ("bfloat16 gradients", label, "NVLink:", "hidden from tokens, 64", "FSDP2", "InfiniBand NDR", "10 GbE"):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--weights", "fp32", "--bucket-cap-mb", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["gpus"]) == [str(count) for count in GPUS]
    own = scaling("60m", 1.0, rank=64, weights="fp32")
    assert data["payload_bytes"]["full"]["ordinary"] == 4 * data["parameters"]
    assert data["calls"]["full"] == own.calls("full") > 10
    of_64 = data["gpus"]["64"]
    assert of_64["wire_bytes"]["full"]["mean"] == pytest.approx(2 * 63 / 64 * 4 * data["parameters"])
    for name in NETWORKS:
        assert of_64["seconds"][name]["lowrank"]["mean"] == own.seconds("lowrank", 64, name).mean
        assert of_64["sharded"]["full"]["seconds"][name] < of_64["sharded"]["lowrank"]["seconds"][name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RUN, "--gpus", "12"], "gpus=12: expected 1 to 8"),
        ([*RUN, "--gpus", "0", "--json"], "gpus=0"),
        ([*RUN, "--compare"], "--scaling: expected none of --compare"),
        ([*RUN, "--fit", "24GB"], "--scaling: expected none of --compare, --fit"),
        (["--gpus", "8"], "--gpus, --bucket-cap-mb: expected --scaling"),
    ],
)
def test_a_bad_command_line_is_answered_on_stderr(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
