"""galore_kernels.pretrain: text to windows. Deterministic, disjoint, every window once an epoch."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretrain_runs import nano, write_text

from galore_kernels.pretrain import main
from galore_kernels.pretrain.config import Config, PretrainError
from galore_kernels.pretrain.corpus import Corpus, load_corpus
from galore_kernels.pretrain.documents import documents, is_validation
from galore_kernels.pretrain.tokens import Tokenization


def load(folder: Path, **given: Any) -> Corpus:
    given = {"text": (str(folder),), "sequence": 32, "val_windows": 8} | given
    return load_corpus(Config.resolve(given), folder.parent / "cache")


def windows(corpus: Corpus, starts: np.ndarray[Any, Any]) -> set[bytes]:
    return {row.numpy().astype(np.uint8).tobytes() for row in corpus.rows(starts)}


def test_the_split_by_file_keeps_files_whole_and_apart(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    corpus = load(text, val_windows=10**6)
    files = dict(documents([str(text)]))
    held_out = {name for name in files if is_validation(name)}
    assert 0 < len(held_out) < len(files)
    training = b"".join(files[name] + b"\0" for name in files if name not in held_out)
    validation = b"".join(files[name] + b"\0" for name in files if name in held_out)
    for starts, expected in ((corpus.train, training), (np.sort(corpus.validation), validation)):
        found = corpus.rows(starts).numpy().astype(np.uint8).tobytes()
        assert found == expected[: len(expected) // 32 * 32]


def test_the_split_by_window_uses_each_window_once(tmp_path: Path) -> None:
    corpus = load(write_text(tmp_path / "text"), split="window", val_windows=10**6)
    every = np.concatenate([corpus.train, corpus.validation])
    assert sorted(every) == list(range(0, 32 * len(every), 32))
    assert len(corpus.validation) == pytest.approx(0.05 * len(every), abs=1)


@pytest.mark.parametrize("split", ["file", "window"])
def test_the_same_text_gives_the_same_corpus(tmp_path: Path, split: str) -> None:
    one, two = (load(write_text(tmp_path / name / "text"), split=split) for name in ("a", "b"))
    assert one.sha256 == two.sha256
    assert np.array_equal(one.train, two.train)
    assert np.array_equal(one.validation, two.validation)


def test_the_fingerprint_tells_text_and_split_apart(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    prints = {load(text).sha256, load(text, split="window").sha256}
    (text / "d1.txt").write_text("x" * (text / "d1.txt").stat().st_size)
    assert len(prints | {load(text).sha256}) == 3


def test_which_documents_validate_is_the_same_in_every_process_and_version() -> None:
    # Written down once, as in people's runs: it must never change.
    assert [number for number in range(100) if is_validation(f"file{number}.py")] == VALIDATION_FILES
    share = sum(is_validation(f"{number}") for number in range(10_000)) / 10_000
    assert share == pytest.approx(0.05, abs=0.01)


def test_an_epoch_has_every_window_once_and_seeds_and_epochs_differ(tmp_path: Path) -> None:
    corpus = load(write_text(tmp_path / "text"))
    count = len(corpus.train)
    batch = 7  # divides nothing: batches straddle the epochs
    steps = [corpus.training_rows(step, batch, seed=0) for step in range(2 * count // batch + 2)]
    rows = torch.cat(steps)
    first, second = rows[:count], rows[count : 2 * count]
    expected = sorted(map(bytes, corpus.rows(corpus.train).numpy().astype(np.uint8)))
    assert sorted(map(bytes, first.numpy().astype(np.uint8))) == expected
    assert sorted(map(bytes, second.numpy().astype(np.uint8))) == expected
    assert not torch.equal(first, second)
    assert not torch.equal(corpus.training_rows(0, batch, seed=1), steps[0])


def test_the_windows_of_a_step_do_not_depend_on_the_steps_before(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    one, two = load(text), load(text)
    for step in range(5):
        one.training_rows(step, 4, seed=3)
    assert torch.equal(one.training_rows(5, 4, seed=3), two.training_rows(5, 4, seed=3))


def test_one_step_may_be_longer_than_an_epoch(tmp_path: Path) -> None:
    corpus = load(write_text(tmp_path / "text"))
    rows = corpus.training_rows(0, 3 * len(corpus.train), seed=0)
    _, counts = np.unique(rows.numpy(), axis=0, return_counts=True)
    assert counts.sum() == 3 * len(corpus.train)
    assert (counts % 3 == 0).all()


def test_the_order_is_the_same_in_every_process_and_version(tmp_path: Path) -> None:
    # Written down once. If it changes, runs of an older version cannot be resumed: raise the checkpoint's format.
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "all.txt").write_bytes(bytes(range(1, 101)))
    corpus = load(tmp_path / "text", sequence=2, split="window", val_windows=100)
    assert corpus.rows(corpus.validation)[:, 0].tolist() == VALIDATION_ORDER
    assert corpus.training_rows(0, 6, seed=5)[:, 0].tolist() == TRAINING_ORDER


VALIDATION_FILES = [0, 11, 69, 90]
VALIDATION_ORDER = [1, 87]
TRAINING_ORDER = [65, 45, 83, 27, 99, 21]


def test_validation_windows_do_not_depend_on_the_seed_and_are_limited(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    one, two = load(text, seed=1), load(text, seed=2)
    assert np.array_equal(one.validation, two.validation)
    assert len(one.validation) == 8


def test_documents_are_ordered_and_leave_out_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, content in {
        "b.txt": b"b", "a.md": "ä".encode(), "sub/c": b"c", "image.png": b"\x89PNG\xff", "zeros.txt": b"a\0b",
        ".hidden/d.txt": b"d", ".e.txt": b"e",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    assert [name for name, _ in documents([str(tmp_path)])] == ["a.md", "b.txt", "sub/c"]
    assert [name for name, _ in documents([str(tmp_path / "b.txt"), str(tmp_path / "sub")])] == ["b.txt", "c"]


def test_the_standard_library_is_found_without_its_tests_and_without_installed_packages() -> None:
    names = [name for name, _ in documents([])]
    assert len(names) > 300
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert names == sorted(set(names), key=lambda name: Path(name))
    assert not any(part in name.split("/") for name in names for part in ("site-packages", "test", "tests"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "no-such-place"], "no such file or folder"),
        (["--sequence", "100000"], "0 training and 0 validation windows of 100000 tokens"),
        (["--tokenizer", "/no/such/tokenizer"], "transformers could not load it"),
    ],
)
def test_text_that_will_not_do_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    text = write_text(tmp_path / "text")
    assert main([*nano(text, tmp_path / "out", "run", "--optimizer", "adamw"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def make_tokenizer(folder: Path) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<end>", "<unknown>", *"abcdefgh", "bottles", "of"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unknown>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", unk_token="<unknown>").save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_sets_the_vocabulary_and_ends_documents(tmp_path: Path) -> None:
    name = make_tokenizer(tmp_path / "tokenizer")
    tokenization = Tokenization.load(name)
    assert tokenization.encode(b"bottles of x").tolist() == [10, 11, 1, 0]
    assert tokenization.dtype is np.uint16
    assert tokenization.vocabulary("tiny") == 256
    assert tokenization.vocabulary("60m") == 32000
    assert Tokenization.load(None).vocabulary("60m") == 256
    text = write_text(tmp_path / "text")
    assert main(nano(text, tmp_path / "out", "run", "--optimizer", "adamw", "--tokenizer", name)) == 0


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, configuration, split, streaming))
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_data_set_is_streamed_once_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"document {number} " * 20, "url": "-"} for number in range(200)]
    calls = fake_datasets(monkeypatch, rows)
    given = {"dataset": "some/text:en", "dataset_tokens": 5000, "sequence": 32, "val_windows": 4}
    config = Config.resolve(given)
    one, two = (load_corpus(config, tmp_path / "cache") for _ in range(2))
    assert calls == [("some/text", "en", "train", True)]
    assert one.sha256 == two.sha256
    assert len(one.train) == 5000 // 32
    training = b"".join(
        row["text"].encode() + b"\0" for number, row in enumerate(rows) if not is_validation(f"{number}")
    )
    assert one.rows(one.train).numpy().astype(np.uint8).tobytes() == training[: 5000 // 32 * 32]
    held_out = b"".join(row["text"].encode() + b"\0" for number, row in enumerate(rows) if is_validation(f"{number}"))
    assert all(window in held_out for window in windows(one, one.validation))
    assert not any(path.name.endswith(".tmp") for path in (tmp_path / "cache").iterdir())


def test_a_resumed_run_finds_the_streamed_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, [{"text": f"document {number} " * 20} for number in range(200)])
    options = nano(tmp_path, tmp_path / "out", "run", "--optimizer", "adamw", "--dataset", "some/text")[2:]
    assert main(options) == 0
    (tmp_path / "out" / "run" / "checkpoint-00000012.pt").unlink()
    assert main(["--resume", str(tmp_path / "out" / "run")]) == 0  # no --out: the run's own folder tells
    assert len(calls) == 1


def test_a_data_set_without_the_column_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"body": "x", "title": "y"}])
    with pytest.raises(PretrainError, match=r"--dataset-column text.*has body, title"):
        load_corpus(Config.resolve({"dataset": "some/text"}), tmp_path)


def test_missing_datasets_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PretrainError, match="pip install datasets"):
        load_corpus(Config.resolve({"dataset": "some/text"}), tmp_path)


def test_a_local_data_set_of_the_real_package(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    lines = "".join(f'{{"text": "document {number} of some length, so that windows exist"}}\n' for number in range(200))
    (folder / "train.jsonl").write_text(lines)
    out = tmp_path / "out"
    program = f"""
from galore_kernels.pretrain import main
raise SystemExit(main({nano(Path("-"), out, "run", "--optimizer", "adamw", "--dataset", str(folder))[2:]!r}))
"""  # its own process: datasets starts threads and reads the environment when it is imported
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment | _python_path()
    )
    assert result.returncode == 0, result.stderr
    assert "dataset" in result.stdout


def _python_path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path)}
