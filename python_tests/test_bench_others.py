"""The other benchmarks than kernel_bench.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

# Where kernel_bench.py, run as a script, finds its modules.
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))


def test_state_bytes_of_llama_60m_by_hand() -> None:
    pytest.importorskip("transformers", reason="pretrain extra")
    import state_bytes

    counted = {count.optimizer: count.bytes for count in state_bytes.counts("60m")}
    hidden, middle, rank, layers, words = 512, 1376, 128, 8, 32_000
    scalars = 4 + 8  # step and skipped
    # 8-bit moments of n elements, n a multiple of 256 here: 2 (n + 4 n / 256) bytes
    moments = {n: 2 * (n + n // 64) for n in (hidden * rank, middle * rank, words * hidden)}
    bases = 2 * hidden * rank  # bfloat16; the short side is 512 in all seven matrices
    layer = 4 * moments[hidden * rank] + 3 * moments[middle * rank] + 7 * (bases + scalars)
    norms = (2 * layers + 1) * (2 * 4 * hidden + scalars)  # small tensors: float32 moments
    expected = layers * layer + norms + 2 * (moments[words * hidden] + scalars)
    assert counted["GaLoreFusedAdam8bit"] == expected
    parameters = layers * (4 * hidden**2 + 3 * hidden * middle) + 2 * words * hidden + (2 * layers + 1) * hidden
    assert counted["AdamW, bf16 moments"] == 4 * parameters


def test_bytes_of_int8_weights_of_llama_60m_by_hand() -> None:
    pytest.importorskip("transformers", reason="pretrain extra")
    import state_bytes

    hidden, middle, layers, words = 512, 1376, 8, 32_000
    codes = 4 * hidden**2 + 3 * hidden * middle
    # A scale for each 256 of a row: 2 of 512, and 6 of 1376 elements.
    scales = 2 * (4 * hidden + 2 * middle) + 6 * hidden
    rest = 2 * (2 * words * hidden + (2 * layers + 1) * hidden)
    for found in state_bytes.q_apollos("60m"):
        assert found.weights == layers * (codes + 4 * scales) + rest
        assert found.gradients == 2 * words * hidden  # the largest: the embedding's, or the head's


def test_the_overhead_of_a_step_is_less_in_groups() -> None:
    import step_overhead

    found = {what: step_overhead.measure(what, True, steps=3, layers=4).median for what in step_overhead.GROUPS}
    assert max(found["optimizer"], found["optimizer and pipeline"]) < found["one at a time"]


def test_subspaces_are_judged_and_timed(tmp_path: Path) -> None:
    pytest.importorskip("galore_torch", reason="bench extra")
    import subspace_bench

    assert subspace_bench.main(["--quick", "--json", str(tmp_path / "subspace.json")]) == 0
    data = json.loads((tmp_path / "subspace.json").read_text())
    ours = [row for row in data["quality"] if row["method"] == "ours, cold"]
    assert len(ours) == 11 * 3
    assert all(0.8 < row["share"] <= 1.001 and row["orthonormality"] < 1e-5 for row in ours)
    assert {row["method"] for row in data["timings"]} >= {"ours, cold", "ours, warm", "galore_torch"}


def test_runs_with_several_seeds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    import pretrain_seeds

    def run(name: str, seed: int, loss: float, final: str = "final") -> None:
        config = dict.fromkeys(("preset", "optimizer", "steps", "lr", "rank", "update_proj_gap", "split"), 1)
        log = [
            {"kind": "header", "config": config | {"seed": seed}, "corpus": {"sha256": "0"}},
            {"kind": "subspaces", "step": 9, "layers": {"a": {"refreshes": 3}, "b": {"refreshes": 4}}},
            {"kind": final, "step": 9, "validation_loss": loss, "optimizer_state_bytes": 100},
        ]
        (tmp_path / f"{name}-{seed}").mkdir()
        (tmp_path / f"{name}-{seed}" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))

    for seed, losses in enumerate([(1.5, 1.25), (1.75, 1.25)]):
        run("svd", seed, losses[0])
        run("warm-staggered", seed, losses[1])
    first, second = pretrain_seeds.read_options(tmp_path)
    assert (first.name, first.mean, first.refreshes) == ("warm-staggered", 1.25, 7)
    assert first.differences == {"0": -0.25, "1": -0.5}
    assert (second.name, second.mean) == ("svd", 1.625)
    run("int8", 0, 1.0, final="train")
    with pytest.raises(ValueError, match=r"int8-0.*expected a finished run"):
        pretrain_seeds.read_options(tmp_path)


def test_the_family_s_table_has_losses_bytes_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import family

    run = tmp_path / "tiny-apollo_mini"
    run.mkdir()
    log = [
        {"kind": "header", "config": {"optimizer": "apollo_mini"}},
        {"kind": "final", "step": 400, "validation_loss": 1.5},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    monkeypatch.setattr(family, "NAMES", ("apollo_mini",))
    assert family.main([str(tmp_path), "--rounds", "2", "--out", str(tmp_path / "family.json")]) == 0
    (row,) = json.loads((tmp_path / "family.json").read_text())["rows"]
    assert (row["name"], row["loss"], row["rank"], len(row["seconds"])) == ("apollo_mini", 1.5, 1, 2)
    # Of 28 matrices two float32 moments of their longer side; the rest is at full rank.
    longer = 4 * (4 * 256 + 3 * 688)
    full = 2 * 256 * 256 + 9 * 256
    assert row["state_bytes"] == 2 * 4 * (longer + full) + 28 * (4 + 8 + 4) + 11 * (4 + 8)
