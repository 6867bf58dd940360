"""The Triton backend's tables of tiles: what is chosen for whom, and how it is overridden."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton import configuration
from galore_kernels.backends.triton.configuration import ENVIRONMENT_VARIABLE, Tile, override

GPU = torch.device("cuda", 0)


def batch(rank: int, dtype: torch.dtype = torch.bfloat16, *, aligned: bool = True, **changes: Any) -> Batch:
    facts = {
        "addresses": ((16,) * 10,),
        "gradients": (16,),
        "table": None,
        "shape": (4096, 4096),
        "rank": rank,
        "side": "right",
        "moments": 4096 * rank,
        "weight_dtype": dtype,
        "grad_dtype": dtype,
        "basis_dtype": dtype,
        "magnitudes": None,
        "eight_bit": True,
        "stochastic": False,
        "fixed_aligned": aligned,
        "aligned": aligned,
        "device": torch.device("cpu"),
    }
    return Batch(**(facts | changes))


@pytest.fixture(params=configuration.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the table


def test_tiles_are_what_triton_takes(architecture: str) -> None:
    # Powers of two, products of at least 16 x 16 x 16, and not so many stages that a program needs more shared memory
    # than there is; test_triton_compile.py knows for sure.
    for stage, choose in (
        ("project", configuration.project_tile),
        ("back_project_update", configuration.back_project_update_tile),
    ):
        for bits, dtype in ((16, torch.bfloat16), (32, torch.float32)):
            assert list(configuration.limits(architecture, stage, bits)) == sorted(
                configuration.limits(architecture, stage, bits)
            )
            for rank in range(1, 1100):
                with override(architecture=architecture):
                    tile = choose(batch(rank, dtype))
                for size in (tile.rows, tile.columns, tile.depth):
                    assert size >= 16
                    assert size & (size - 1) == 0
                assert tile.warps in (4, 8)


def test_a_tile_covers_the_rank_if_one_does(architecture: str) -> None:
    with override(architecture=architecture):
        largest = configuration.limits(architecture, "project", 16)[-1]
        for rank in (1, 16, 17, 32, 33, 64, 65, 128):  # around the table's steps
            columns = configuration.project_tile(batch(rank)).columns
            assert rank <= columns < max(32, 2 * rank)
        assert configuration.project_tile(batch(1024)).columns == largest


def test_two_16bit_operands_of_one_dtype_are_multiplied_as_they_are(architecture: str) -> None:
    with override(architecture=architecture):
        native, split = (configuration.project_tile(batch(128, dtype)) for dtype in (torch.bfloat16, torch.float32))
        assert native != split
        mixed: dict[str, Any] = {"grad_dtype": torch.bfloat16, "basis_dtype": torch.float16}
        assert configuration.project_tile(batch(128, **mixed)) == split
        # What is back-projected has the basis' dtype.
        assert configuration.back_project_update_tile(
            batch(128, grad_dtype=torch.float32)
        ) == configuration.back_project_update_tile(batch(128))


@pytest.mark.parametrize("codes", [torch.int8, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_basis_codes_take_the_tile_of_what_they_are_multiplied_with(
    architecture: str, dtype: torch.dtype, codes: torch.dtype
) -> None:
    with override(architecture=architecture):
        for rank in (32, 128, 512):
            for choose in (configuration.project_tile, configuration.back_project_update_tile):
                assert choose(batch(rank, dtype, basis_dtype=codes)) == choose(batch(rank, dtype))


@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float32, torch.int8, torch.uint8])
def test_a_tile_of_an_int8_weight_is_one_group_wide(architecture: str, basis_dtype: torch.dtype) -> None:
    for rank in (1, 16, 17, 127, 128, 1024):  # around the table's steps; an odd one, of which packed codes aren't even
        for aligned in (True, False):
            of_codes = batch(rank, torch.int8, aligned=aligned, basis_dtype=basis_dtype, grad_dtype=torch.bfloat16)
            with override(architecture=architecture, back_project_update={"columns": 64}):
                assert configuration.back_project_update_tile(of_codes).columns == 256
                assert configuration.back_project_update_tile(batch(rank, aligned=aligned)).columns == 64
            with override(back_project_update_int8={"rows": 16}):
                assert configuration.back_project_update_tile(of_codes).rows == 16
                assert configuration.back_project_update_tile(of_codes).columns == 256


def test_rows_of_packed_codes_may_be_aligned_where_the_directions_are_not(architecture: str) -> None:
    with override(architecture=architecture):
        for choose in (configuration.project_tile, configuration.back_project_update_tile):
            odd = choose(batch(127, basis_dtype=torch.uint8))  # 64 bytes of codes, 254 of bfloat16
            assert odd == choose(batch(127, aligned=False))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), "sm_89"),  # as little shared memory as any
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((10, 3), "sm_90"),
        ((12, 0), "sm_89"),
    ],
)
def test_every_card_gets_a_column_that_fits(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    configuration._architecture_of.cache_clear()
    assert configuration.architecture(GPU) == expected
    monkeypatch.setattr(torch.version, "hip", "6.0")
    configuration._architecture_of.cache_clear()
    assert configuration.architecture(GPU) == "other"
    configuration._architecture_of.cache_clear()


def test_devices_without_a_column_keep_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU stands for them. Of AMD's, Triton asks for 64 KB at most.
    monkeypatch.setattr(configuration, "interpreted", lambda: False)
    for dtype in (torch.bfloat16, torch.float32):
        for rank in (8, 128, 512):
            assert configuration.project_tile(batch(rank, dtype)).stages == 2
            assert configuration.back_project_update_tile(batch(rank, dtype)).stages == 2


@pytest.mark.parametrize(
    ("size", "factor"),
    [(4096, 16), (24, 8), (20, 4), (7, 1), (0, 16)],  # nothing is a multiple of everything
)
def test_known_factor(size: int, factor: int) -> None:
    assert configuration.known_factor(size, True) == factor
    assert configuration.known_factor(size, False) == 1


# --- splits


@pytest.mark.parametrize(
    ("shape", "count", "processors", "expected"),
    [
        ((4096, 4096), 1, 132, 8),  # 32 tiles: two for each multiprocessor
        ((4096, 4096), 8, 132, 1),  # 256 tiles
        ((128, 4096), 1, 132, 8),  # no part below eight steps of 64
        ((128, 100), 1, 132, 1),
        ((0, 4096), 1, 132, 8),  # no tile: no division by zero either
    ],
)
def test_splits_fill_the_device(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], count: int, processors: int, expected: int
) -> None:
    project = pytest.importorskip("galore_kernels.backends.triton.project")
    monkeypatch.setattr(project, "multiprocessors", lambda device: processors)
    many = batch(128, shape=shape, addresses=((16,) * 10,) * count, gradients=(16,) * count)
    with override(architecture="sm_90"):
        assert project.project_splits(many) == expected
        with override(splits=5):
            assert project.project_splits(many) == 5


# --- overriding


def test_an_override_changes_what_it_names_for_as_long_as_it_lasts() -> None:
    with override(architecture="sm_90"):
        before = configuration.project_tile(batch(128))
        with override(project={"rows": 32, "stages": 3}):
            changed = configuration.project_tile(batch(128))
            assert changed == Tile(32, before.columns, before.depth, before.warps, 3)
            with override(splits=3, lowrank_adam={"blocks": 2}):  # one within another keeps it
                assert configuration.project_tile(batch(128)) == changed
                assert configuration.forced_splits() == 3
                assert configuration.element_tile("lowrank_adam", 10**6).blocks == 2
        assert configuration.project_tile(batch(128)) == before
        assert configuration.forced_splits() is None


def test_an_override_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), override(splits=3):
        raise KeyError
    assert configuration.forced_splits() is None


def test_the_environment_overrides_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '{"project": {"warps": 2, "precision": "ieee"}, "architecture": "sm_80"}')
    tile = configuration.project_tile(batch(64))
    assert (tile.warps, tile.precision) == (2, "ieee")
    assert configuration.architecture(GPU) == "sm_80"
    with override(project={"warps": 1}):
        assert configuration.project_tile(batch(64)).warps == 1
        assert configuration.architecture(GPU) == "sm_80"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"projekt": {}}, "unknown key 'projekt'"),
    ({"project": {"row": 64}}, "project takes a mapping of columns, depth, precision, rows, stages, warps"),
    ({"project": 64}, "project takes a mapping"),
    ({"project": {"rows": 96}}, "rows must be a power of two >= 16, got 96"),
    ({"project": {"depth": 8}}, "depth must be a power of two >= 16, got 8"),
    ({"project": {"warps": 3}}, "warps must be a power of two >= 1, got 3"),
    ({"project": {"stages": 0}}, "stages must be an integer >= 1, got 0"),
    ({"project": {"precision": "tf32"}}, "precision must be ieee, tf32x3 or bf16x6, got 'tf32'"),
    ({"lowrank_adam": {"rows": 16}}, "lowrank_adam takes a mapping of blocks, warps"),
    ({"rotate_moments": {"blocks": 4}}, "rotate_moments takes a mapping of columns, depth"),
    ({"back_project_update_int8": {"columns": 128}}, "update_int8 takes a mapping of depth, precision, rows, stages"),
    ({"splits": 0}, "splits must be an integer >= 1, got 0"),
    ({"architecture": "sm_70"}, "architecture must be one of sm_80, sm_89, sm_90, got 'sm_70'"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD)
def test_bad_overrides_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), override(**overrides):
        pass


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "expected a JSON object"), ('{"splits": 0}', "splits must be")]
)
def test_a_bad_environment_is_named(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE}.*{message}"):
        configuration.project_tile(batch(64))
