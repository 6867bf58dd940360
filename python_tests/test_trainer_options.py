"""What the table of bench/trainer_options.py says of ours: the weights show that every argument is honoured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.2")
pytest.importorskip("accelerate")

import trainer_options


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", ["GaLoreFusedAdam8bit", "GaLoreFusedAdam8bit, layerwise"])
def test_ours_honours_all_arguments(optimizer: str, tmp_path: Path) -> None:
    trainer_options.main(["--only", optimizer, "--json", str(tmp_path / "seen.json")])
    found = json.loads((tmp_path / "seen.json").read_text())["findings"][optimizer]
    assert found.keys() == trainer_options.PROBES.keys()
    rest = {name: finding for name, finding in found.items() if finding["verdict"] != "honoured"}
    # The first basis of layerwise updates is that of the first micro-batch.
    expected = {"gradient_accumulation_steps": "in part"} if "layerwise" in optimizer else {}
    assert {name: finding["verdict"] for name, finding in rest.items()} == expected, rest


@pytest.mark.filterwarnings("ignore")
def test_the_probes_see_what_is_ignored() -> None:
    pytest.importorskip("galore_torch")
    theirs = 'optim="galore_adamw"'
    assert trainer_options.probed(theirs, "adam_beta2").verdict == "ignored"
    assert trainer_options.probed(theirs, "weight_decay").verdict == "ignored"
    assert trainer_options.probed(theirs, "max_grad_norm").verdict == "honoured"
