"""csrc/bindings.cpp: cheap checks that name the argument, before any memory is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from galore_kernels import _native

ADAM: dict[str, Any] = {
    "lr": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "step": 0,
    "inv_grad_scale": 1.0,
    "maximize": False,
    "threads": 1,
}
MOMENTS: dict[str, Any] = {"m": 0, "v": 0, "m_absmax": 0, "v_absmax": 0}
NEW_MOMENTS: dict[str, Any] = {f"new_{name}": 0 for name in MOMENTS}
MATRIX: dict[str, Any] = {"rows": 0, "cols": 0, "side": 0, "basis": 0, "basis_dtype": 0, "basis_scale": 0, "rank": 1}

# Each call is valid as it stands, and harmless: no elements, null addresses.
CALLS: dict[str, dict[str, Any]] = {
    "quantize_blockwise": {"x": 0, "dtype": 0, "n": 0, "signed": True, "codes": 0, "absmax": 0, "threads": 1},
    "dequantize_blockwise": {"codes": 0, "absmax": 0, "n": 0, "signed": True, "out": 0, "threads": 1},
    "philox": {"seed": 0, "stream": 0, "n": 0},
    "all_representable": {"x": 0, "dtype": 0, "n": 0, "inv_grad_scale": 1.0, "threads": 1},
    "adam_update": {"param": 0, "param_dtype": 0, "grad": 0, "grad_dtype": 0, "n": 0, **MOMENTS, **ADAM}
    | {"rounding_seed": None},
    "project": {"grad": 0, "grad_dtype": 0, "lowrank_out": 0, "squares": 0, "workspace": 0, "threads": 1}
    | {"inv_grad_scale": 1.0, **MATRIX},
    "random_basis": {"seed": 0, "rows": 0, "rank": 1, "magnitudes": 0, "out": 0, "threads": 1},
    "lowrank_adam": {"lowrank_inout": 0, "n": 0, **MOMENTS, **ADAM},
    "back_project_update": {"param": 0, "param_dtype": 0, "update": 0, "scale": 1.0, "workspace": 0, **MATRIX, **ADAM}
    | {"rounding_seed": None, "weight_scale": 0},
    "workspace_bytes": {"rows": 1, "cols": 1, "rank": 1, "side": 0, "param_dtype": 0, "threads": 1},
    "rotate_moments": {"rows": 0, "rotation": 0, "rank": 1, "new_rank": 1, **MOMENTS, **NEW_MOMENTS}
    | {"beta1": 0.9, "beta2": 0.999, "step": 0, "workspace": 0, "threads": 1},
    "rotate_workspace_bytes": {"rank": 1, "new_rank": 1, "threads": 1},
}

# One bad value per kind of argument, with what the message must say was expected.
BAD: dict[str, tuple[int, str]] = {
    "n": (-1, "0 or more"),
    "rows": (-1, "0 or more"),
    "cols": (-1, "0 or more"),
    "step": (-1, "0 or more"),
    "rank": (0, "1 or more"),
    "new_rank": (0, "1 or more"),
    "threads": (0, "1 or more"),
    "side": (2, "0 (right) or 1 (left)"),
    "dtype": (3, "0 (float32), 1 (bfloat16) or 2 (float16)"),
    "param_dtype": (-1, "0 (float32), 1 (bfloat16)"),
    "grad_dtype": (3, "0 (float32), 1 (bfloat16) or 2 (float16)"),
    "basis_dtype": (99, "0 (float32), 1 (bfloat16), 2 (float16), 3 (int8) or 4 (int4)"),
}


def function(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(_native, name)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_nothing_to_do_is_fine(name: str) -> None:
    function(name)(**CALLS[name])


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, call in CALLS.items() for argument in call if argument in BAD]
)
def test_bad_value_names_its_argument(name: str, argument: str) -> None:
    value, expected = BAD[argument]
    with pytest.raises(ValueError, match=f"^{argument}={value}: expected ") as error:
        function(name)(**(CALLS[name] | {argument: value}))
    assert expected in str(error.value)


@pytest.mark.parametrize("name", ["adam_update", "lowrank_adam", "rotate_moments"])
def test_one_absmax_without_the_other(name: str) -> None:
    with pytest.raises(ValueError, match="m_absmax, v_absmax: expected both"):
        function(name)(**(CALLS[name] | {"m_absmax": 64}))


def test_moments_are_turned_to_their_own_format() -> None:
    with pytest.raises(ValueError, match="new_m_absmax, new_v_absmax: expected both"):
        function("rotate_moments")(**(CALLS["rotate_moments"] | {"m_absmax": 64, "v_absmax": 64}))


@pytest.mark.parametrize("name", ["project", "back_project_update"])
@pytest.mark.parametrize(("dtype", "scale"), [(3, 0), (4, 0), (0, 64)])  # codes without scales, scales without codes
def test_codes_have_scales_and_nothing_else_has(name: str, dtype: int, scale: int) -> None:
    with pytest.raises(ValueError, match=f"basis_scale: expected an address with int8 .* with basis_dtype={dtype}"):
        function(name)(**(CALLS[name] | {"basis_dtype": dtype, "basis_scale": scale}))


@pytest.mark.parametrize("name", ["adam_update", "back_project_update"])
@pytest.mark.parametrize("dtype", [0, 2])  # float32, float16
def test_stochastic_rounding_is_for_bfloat16(dtype: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"rounding_seed: .* got param_dtype={dtype}"):
        function(name)(**(CALLS[name] | {"param_dtype": dtype, "rounding_seed": 1}))


@pytest.mark.parametrize(("dtype", "scale"), [(3, 0), (0, 64), (1, 64)])  # codes without scales, scales without codes
def test_int8_weights_have_scales_and_nothing_else_has(dtype: int, scale: int) -> None:
    with pytest.raises(ValueError, match=f"weight_scale: expected an address with int8 .* with param_dtype={dtype}"):
        function("back_project_update")(
            **(CALLS["back_project_update"] | {"param_dtype": dtype, "weight_scale": scale, "rounding_seed": 1})
        )


def test_int8_weights_are_rounded_stochastically() -> None:
    call = CALLS["back_project_update"] | {"param_dtype": 3, "weight_scale": 64}
    function("back_project_update")(**(call | {"rounding_seed": 1}))
    with pytest.raises(ValueError, match="rounding_seed=None: expected a seed with int8 parameters"):
        function("back_project_update")(**call)


def test_a_full_rank_weight_has_no_codes() -> None:
    with pytest.raises(ValueError, match=r"param_dtype=3: expected 0 \(float32\), 1 \(bfloat16\) or 2 \(float16\)"):
        function("adam_update")(**(CALLS["adam_update"] | {"param_dtype": 3}))


def test_build_info() -> None:
    info = _native.build_info()
    assert info["isa"] in ("generic", "avx2", "avx512", "avx512_bf16")
    assert isinstance(info["cuda_archs"], list)
    assert info["compiler"]
    assert info["version"]


def test_workspace_grows_with_threads_and_counts_in_64_bits() -> None:
    one = _native.workspace_bytes(1024, 4096, 128, 0, 0, 1)
    assert 0 < one < _native.workspace_bytes(1024, 4096, 128, 0, 0, 2)
    assert _native.workspace_bytes(2**20, 2**20, 2**13, 0, 0, 1) > 2**32


#: Of one tensor without elements.
BATCH: dict[str, Any] = {"rows": 0, "cols": 0, "moments": 0, "rank": 1, "side": 0, "weight_dtype": 0, "basis_dtype": 0}
BATCH |= {
    "magnitudes": 0,
    "stochastic": False,
    "long_basis": 0,
    "long_basis_dtype": 0,
    "kept": 0,
    "gradient": (0, 0, 0),
}


def batch(row: dict[int, int] | None = None, **changed: Any) -> Any:
    """``row``: column of the table -> number."""
    numbers = [(row or {}).get(column, 0) for column in range(14)]
    return _native.CpuBatch([tuple(numbers)], **(BATCH | changed))


@pytest.mark.parametrize(
    ("row", "changed", "message"),
    [
        ({}, {"rows": -1}, "rows=-1: expected 0 or more"),
        ({}, {"cols": -1}, "cols=-1: expected 0 or more"),
        ({}, {"moments": -1}, "moments=-1: expected 0 or more"),
        ({}, {"rank": -1}, "rank=-1: expected 0 or more"),
        ({}, {"kept": -1}, "kept=-1: expected 0 or more"),
        ({}, {"gradient": (1, -1, 1)}, "gradient=-1: expected 0 or more"),
        ({}, {"side": 2}, "side=2: expected 0"),
        ({}, {"weight_dtype": 4}, "param_dtype=4: expected 0"),
        ({}, {"basis_dtype": 5}, "basis_dtype=5: expected 0"),
        ({}, {"long_basis_dtype": 3}, "long_basis_dtype=3: expected 0"),
        ({4: 64}, {}, "m_absmax, v_absmax: expected both"),
        ({6: 64}, {}, "basis_scale: expected an address with int8"),
        ({7: 64}, {}, "weight_scale: expected an address with int8"),
        ({7: 64}, {"weight_dtype": 3}, "stochastic: expected true with int8 weights"),
        ({}, {"stochastic": True}, "stochastic: .* false with float32"),
    ],
)
def test_a_batch_names_what_does_not_fit(row: dict[int, int], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch(row, **changed)


@pytest.mark.parametrize("name", ["cpu_adam_update", "cpu_galore_update", "cpu_lowrank_update", "cpu_apollo_update"])
def test_an_update_names_what_does_not_fit(name: str) -> None:
    scalars = _native.CpuScalars(0.1, 0.9, 0.999, 1e-8, 0.0, 1.0, False)
    rest: tuple[Any, ...] = {"cpu_adam_update": (), "cpu_apollo_update": (False, 1.0, False, 1.01, 0)}.get(
        name, (1.0, 0)
    )
    projects = name != "cpu_adam_update"
    with pytest.raises(ValueError, match="gradients: expected 1, one of each tensor, got 2"):
        function(name)(batch(), [0, 0], 0, scalars, *rest, 1)
    with pytest.raises(ValueError, match="grad_dtype=3: expected"):
        function(name)(batch(), [0], 3, scalars, *rest, 1)
    if projects:
        row = {11: 64}
        with pytest.raises(ValueError, match="rank=0: expected 1 or more"):
            function(name)(batch(row, rank=0), [0], 0, scalars, *rest, 1)
    if name == "cpu_apollo_update":
        with pytest.raises(ValueError, match="scaled_norm: expected an address, got 0"):
            function(name)(batch(), [0], 0, scalars, *rest, 1)


def test_adafactor_s_update_names_what_does_not_fit() -> None:
    scalars = _native.CpuAdafactorScalars(0.1, 0.0, 0.0, 1.0, -0.8, 0.0, 0.0, False, False, False, 1.0, False)
    rest: tuple[Any, ...] = scalars, 1.0, False, 0, 1
    run = function("cpu_adafactor_update")
    with pytest.raises(ValueError, match="gradients: expected 1, one of each tensor, got 2"):
        run(batch(), [0, 0], 0, *rest)
    with pytest.raises(ValueError, match="gradient: expected matrices of 6 elements together, got 8"):
        run(batch(moments=6, gradient=(2, 2, 2)), [0], 0, *rest)
    for row in ({}, {4: 64}, {3: 64, 4: 64, 5: 64}):  # none; of the rows alone; both kinds
        with pytest.raises(ValueError, match="exp_avg_sq: expected its address, or those of its means"):
            run(batch(row, moments=6, gradient=(1, 2, 3)), [0], 0, *rest)
