"""The operations as ``torch.library`` sees them: opcheck, compilation, fakes, version counters; and every check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from update_cases import assert_same_bits, assert_same_state, clone, options, tensors, warm_state

from galore_kernels import _native, backend_info, ops
from galore_kernels.ops import AdamOptions, AdamState, registry
from galore_kernels.quantizers import BASIS_FORMATS, quantize_basis

NAMESPACE = torch.ops.galore_kernels
UPDATES = ["adam8bit_update", "galore_update", "lowrank_update"]
ADAFACTOR = ["adafactor_update", "galore_adafactor_update", "lowrank_adafactor_update"]
ROWS, COLS, RANK, LONG_RANK = 12, 40, 3, 4


@dataclass
class Call:
    """An update's arguments, to be changed one at a time."""

    op: str
    param: Tensor
    grad: Tensor
    basis: Tensor
    state: AdamState
    options: AdamOptions
    long_basis: Tensor | None = None
    basis_scale: Tensor | None = None
    projection: dict[str, Any] = field(default_factory=lambda: {"side": "right", "scale": 0.25})

    def run(self, backend: str = "auto") -> None:
        if self.op == "adam8bit_update":
            ops.adam8bit_update(self.param, self.grad, self.state, self.options, backend=backend)
            return
        update = ops.galore_update if self.op == "galore_update" else ops.lowrank_update
        update(
            self.param,
            self.grad,
            self.basis,
            self.state,
            self.options,
            long_basis=self.long_basis,
            basis_scale=self.basis_scale,
            backend=backend,
            **self.projection,
        )

    def schema_arguments(self, backend: str) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """Positional and keyword arguments of the operator that ``torch.library`` knows."""
        projected = self.op != "adam8bit_update"
        state = [getattr(self.state, name) for name in AdamState.__dataclass_fields__]
        bases = [self.basis, self.long_basis, self.basis_scale] if projected else []
        positional = [self.param, self.grad, *bases, *state]
        scalars = {name: getattr(self.options, name) for name in AdamOptions.__dataclass_fields__}
        positional.append(scalars.pop("lr"))
        return tuple(positional), {**(self.projection if projected else {}), **scalars, "backend": backend}

    def everything(self) -> dict[str, Tensor]:
        """Every tensor of the call by name."""
        named = {"param": self.param, "grad": self.grad, "basis": self.basis, "lr": self.options.lr}
        if self.basis_scale is not None:
            named["basis_scale"] = self.basis_scale
        return {**named, **tensors(self.state)}


def quantized(call: Call, basis_format: str = "int8") -> Call:
    """The call with its basis quantized."""
    codes, scale = quantize_basis(call.basis, basis_format)
    return replace(call, basis=codes, basis_scale=scale)


def make_call(op: str, *, eight_bit: bool = True, side: str = "right", both: bool = False) -> Call:
    long, short = (ROWS, COLS) if side == "right" else (COLS, ROWS)
    lowrank_shape = (LONG_RANK if both else long, RANK)
    full = op == "adam8bit_update"
    return Call(
        op=op,
        param=torch.randn(ROWS, COLS),
        grad=torch.randn(*lowrank_shape) if op == "lowrank_update" else torch.randn(ROWS, COLS),
        basis=torch.randn(short, RANK),
        state=warm_state((ROWS, COLS) if full else lowrank_shape, eight_bit=eight_bit),
        options=options(weight_decay=0.1),
        long_basis=torch.randn(long, LONG_RANK) if both else None,
        projection={"side": side, "scale": 0.25},
    )


# --- torch.library


@pytest.mark.parametrize("eight_bit", [True, False])
def test_opcheck_accepts_adam8bit_update(backend: str, eight_bit: bool) -> None:
    positional, keywords = make_call("adam8bit_update", eight_bit=eight_bit).schema_arguments(backend)
    opcheck(NAMESPACE.adam8bit_update.default, positional, keywords)


@pytest.mark.parametrize("eight_bit", [True, False])
@pytest.mark.parametrize(("side", "both"), [("right", False), ("left", False), ("right", True)])
@pytest.mark.parametrize("op", ["galore_update", "lowrank_update"])
def test_opcheck_accepts_projected_updates(backend: str, op: str, side: str, both: bool, eight_bit: bool) -> None:
    call = make_call(op, eight_bit=eight_bit, side=side, both=both)
    # Optional tensors present as well.
    call.options = replace(call.options, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0))
    positional, keywords = call.schema_arguments(backend)
    opcheck(getattr(NAMESPACE, op).default, positional, keywords)


@pytest.mark.parametrize("basis_format", BASIS_FORMATS)
@pytest.mark.parametrize("op", ["galore_update", "lowrank_update"])
def test_opcheck_accepts_quantized_bases(backend: str, op: str, basis_format: str) -> None:
    positional, keywords = quantized(make_call(op), basis_format).schema_arguments(backend)
    opcheck(getattr(NAMESPACE, op).default, positional, keywords)


def turn_arguments(*, eight_bit: bool = True, both: bool = False) -> dict[str, Any]:
    """Arguments of ``ops.rotate_moments``."""
    return {
        "state": warm_state((ROWS, RANK), eight_bit=eight_bit),
        "rotation": torch.randn(RANK, LONG_RANK),
        "long_rotation": torch.randn(ROWS, 5) if both else None,
        "beta1": 0.9,
        "beta2": 0.999,
    }


def test_opcheck_accepts_stochastic_rounding(backend: str) -> None:
    call = make_call("galore_update")
    call.param = call.param.bfloat16()
    call.options = replace(call.options, rounding_seed=3)
    positional, keywords = call.schema_arguments(backend)
    opcheck(NAMESPACE.galore_update.default, positional, keywords)


@pytest.mark.parametrize("signed", [True, False])
def test_opcheck_accepts_the_quantizers(backend: str, signed: bool) -> None:
    x = torch.randn(5, 77) if signed else torch.rand(5, 77)
    opcheck(NAMESPACE.quantize_blockwise.default, (x, signed, backend))
    codes, absmax = ops.quantize_blockwise(x, signed, backend=backend)
    opcheck(NAMESPACE.dequantize_blockwise.default, (codes, absmax, signed, backend))


def all_operations(calls: list[Call], turns: list[dict[str, Any]], x: Tensor) -> tuple[Tensor, list[AdamState]]:
    """Every operation once."""
    codes, absmax = ops.quantize_blockwise(x, True)
    for call in calls:
        call.run()
    turned = [ops.rotate_moments(**turn) for turn in turns]
    return ops.dequantize_blockwise(codes, absmax, True), turned


# inductor meets no operation of torch's own here: compiling one in C++ would take half a minute.
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
def test_compiling_without_a_graph_break_gives_what_eager_gives(compiler: str) -> None:
    torch._dynamo.reset()
    calls = [make_call(op, eight_bit=eight_bit) for op in UPDATES for eight_bit in (True, False)]
    calls += [quantized(make_call("galore_update"), basis_format) for basis_format in BASIS_FORMATS]
    turns = [turn_arguments(eight_bit=eight_bit) for eight_bit in (True, False)]
    copies = [replace(call, param=call.param.clone(), state=clone(call.state)) for call in calls]
    x = torch.randn(300)
    expected, expected_turned = all_operations(copies, turns, x)
    got, turned = torch.compile(all_operations, fullgraph=True, backend=compiler)(calls, turns, x)
    assert_same_bits(got, expected, "decoded")
    for state, expected_state in zip(turned, expected_turned, strict=True):
        assert_same_state(state, expected_state)
    for call, copied in zip(calls, copies, strict=True):
        assert copied.state.step.item() == 4
        for name, tensor in copied.everything().items():
            assert_same_bits(call.everything()[name], tensor, f"{call.op}, {name}")


def test_a_compiled_update_serves_other_learning_rates_without_recompiling() -> None:
    torch._dynamo.reset()
    compilations = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(lambda call: call.run(), fullgraph=True, backend=counting)
    for lr in (1e-2, 1e-3, 1e-4):
        call = make_call("galore_update")
        call.options = replace(call.options, lr=torch.tensor(lr))
        compiled(call)
    assert len(compilations) == 1


@pytest.mark.parametrize("device", ["fake", "meta"])
def test_fakes_give_shapes_and_touch_nothing(device: str) -> None:
    def convert(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor) if device == "fake" else tensor.to("meta")

    mode = FakeTensorMode()
    tracing = mode if device == "fake" else contextlib.nullcontext()
    for shape in ((0,), (257,), (3, 5, 7)):
        x = convert(torch.zeros(shape))
        with tracing:
            codes, absmax = ops.quantize_blockwise(x, True)
            decoded = ops.dequantize_blockwise(codes, absmax, True)
        blocks = -(-x.numel() // 256)
        assert (codes.shape, codes.dtype, absmax.shape, absmax.dtype) == (shape, torch.uint8, (blocks,), torch.float32)
        assert (decoded.shape, decoded.dtype) == (shape, torch.float32)
    for op in UPDATES:
        call = make_call(op)
        call.param, call.grad, call.basis = map(convert, (call.param, call.grad, call.basis))
        call.options = replace(call.options, lr=convert(call.options.lr))
        call.state = replace(call.state, **{name: convert(tensor) for name, tensor in tensors(call.state).items()})
        with tracing:
            call.run()
        assert call.param.shape == (ROWS, COLS)
    for eight_bit, both in ((True, False), (False, False), (True, True)):
        turn = turn_arguments(eight_bit=eight_bit, both=both)
        state = turn["state"]
        turn["state"] = replace(state, **{name: convert(tensor) for name, tensor in tensors(state).items()})
        turn |= {name: convert(turn[name]) for name in ("rotation", "long_rotation") if turn[name] is not None}
        with tracing:
            turned = ops.rotate_moments(**turn)
        assert turned.exp_avg.shape == turned.exp_avg_sq.shape == (5 if both else ROWS, LONG_RANK)
        assert turned.exp_avg.dtype == state.exp_avg.dtype
        assert (turned.exp_avg_absmax is not None) == eight_bit


def test_fakes_check_shapes() -> None:
    for op in UPDATES:
        call = make_call(op)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="grad must be"):
            replace(call, grad=torch.zeros(3)).run()


@pytest.mark.parametrize("op", UPDATES)
def test_autograd_notices_that_the_weight_changed(backend: str, op: str) -> None:
    call = make_call(op)
    version = call.param._version
    call.run(backend)
    assert call.param._version > version
    # A backward pass that would read the overwritten weight is refused.
    call = make_call(op)
    call.param.requires_grad_()
    loss = (call.param**2).sum()
    with torch.no_grad():
        call.run(backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", UPDATES)
def test_weights_that_require_grad_are_taken_with_gradients_enabled(backend: str, op: str) -> None:
    call = make_call(op)
    expected = replace(call, param=call.param.clone(), state=clone(call.state))
    expected.run(backend)
    call.param.requires_grad_()
    call.run(backend)
    assert call.param.is_leaf
    assert_same_bits(call.param.detach(), expected.param, "param")


# --- the registry


def test_every_backend_is_there_or_says_why_not() -> None:
    info = backend_info()
    assert list(info) == ["cuda", "triton", "cpu", "reference"]
    assert info["cpu"]["available"]
    assert info["reference"]["available"]
    assert info["cuda"]["available"] == (torch.cuda.is_available() and bool(_native.build_info()["cuda_archs"]))
    for name, facts in info.items():
        if facts["available"]:
            others = ["apollo_update", "dequantize_blockwise", "quantize_blockwise", "random_basis", "rotate_moments"]
            adafactor = ADAFACTOR if name in ("cpu", "reference") else ADAFACTOR[1:]  # at full rank it is torch's
            assert facts["operations"] == sorted([*UPDATES, *others, *adafactor]), name
        else:
            assert facts["reason"], name


def test_auto_takes_the_first_that_serves_the_call() -> None:
    assert registry.select("galore_update", "auto", torch.device("cpu")).name == "cpu"


def test_a_backend_that_cannot_serve_a_call_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"cpu.*can't serve galore_update on meta.*serves cpu tensors only"):
        registry.select("galore_update", "cpu", torch.device("meta"))
    with pytest.raises(RuntimeError, match=r"cpu: .*reference: a meta tensor has no data"):
        registry.select("galore_update", "auto", torch.device("meta"))
    with pytest.raises(RuntimeError, match="does not implement muon_update"):
        registry.select("muon_update", "reference", torch.device("cpu"))


def test_backends_have_the_names_that_auto_asks_for() -> None:
    backend = registry.Backend("cuad", {}, lambda device: None, dict)
    with pytest.raises(ValueError, match="backend name 'cuad': expected one of cuda, triton, cpu, reference"):
        registry.register(backend)


# --- checks: each names the argument, and comes before anything is changed


def expanded(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape[0], 1).expand(shape)


def with_state(name: str, change: Callable[[Tensor], Any]) -> Callable[[Call], Call]:
    return lambda call: replace(call, state=replace(call.state, **{name: change(getattr(call.state, name))}))


def with_options(**changes: Any) -> Callable[[Call], Call]:
    return lambda call: replace(call, options=replace(call.options, **changes))


def scrambled(x: Tensor) -> Tensor:
    """The same numbers at other strides."""
    return x.T.contiguous().T


def sparse(x: Tensor) -> Tensor:
    return x.to_sparse()


MOMENTS = ["exp_avg", "exp_avg_sq"]
ABSMAX = ["exp_avg_absmax", "exp_avg_sq_absmax"]

#: What is wrong -> the words of the message, and the change that makes it so. They apply to every update.
BAD_CALLS: dict[str, tuple[str, Callable[[Call], Call]]] = {
    "integer weight": ("param must be", lambda c: replace(c, param=c.param.int())),
    "double weight": ("param must be", lambda c: replace(c, param=c.param.double())),
    "complex weight": ("param must be", lambda c: replace(c, param=c.param.to(torch.complex64))),
    "sparse weight": ("param must be a dense", lambda c: replace(c, param=sparse(c.param))),
    "overlapping weight": (
        "param must be without overlapping",
        lambda c: replace(c, param=expanded(tuple(c.param.shape))),
    ),
    "weight of sliding windows": (
        "param must be without overlapping",
        lambda c: replace(c, param=torch.zeros(ROWS + COLS - 1).unfold(0, COLS, 1)),
    ),
    "sparse gradient": ("grad must be a dense", lambda c: replace(c, grad=sparse(c.grad))),
    "complex gradient": ("grad must be", lambda c: replace(c, grad=c.grad.to(torch.complex64))),
    "double gradient": ("grad must be", lambda c: replace(c, grad=c.grad.double())),
    "transposed gradient": ("grad must be of shape", lambda c: replace(c, grad=c.grad.T)),
    "gradient elsewhere": ("grad must be on cpu", lambda c: replace(c, grad=c.grad.to("meta"))),
    **{f"{name} dtype": (f"{name} must be", with_state(name, Tensor.half)) for name in [*MOMENTS, *ABSMAX]},
    **{f"{name} size": (f"{name} must be of", with_state(name, lambda x: x[:-1])) for name in [*MOMENTS, *ABSMAX]},
    **{f"{name} strides": (f"{name} must be contiguous", with_state(name, scrambled)) for name in MOMENTS},
    **{
        f"{name} missing": ("exp_avg_absmax, exp_avg_sq_absmax must be", with_state(name, lambda x: None))
        for name in ABSMAX
    },
    **{
        f"{name} elsewhere": (f"{name} must be on cpu", with_state(name, lambda x: x.to("meta")))
        for name in [*MOMENTS, *ABSMAX, "step", "skipped"]
    },
    "integer step": ("step must be", with_state("step", Tensor.long)),
    "step of one dimension": ("step must be of shape", with_state("step", lambda x: x.view(1))),
    "float skipped": ("skipped must be", with_state("skipped", Tensor.float)),
    "lr of one dimension": ("lr must be of shape", with_options(lr=torch.ones(1))),
    "integer lr": ("lr must be", with_options(lr=torch.tensor(1))),
    "lr elsewhere": ("lr must be on cpu", with_options(lr=torch.tensor(1.0, device="meta"))),
    "beta1 negative": ("beta1 must be in", with_options(beta1=-0.1)),
    "beta1 of 1": ("beta1 must be in", with_options(beta1=1.0)),
    "beta2 of 1": ("beta2 must be in", with_options(beta2=1.0)),
    "beta2 NaN": ("beta2 must be in", with_options(beta2=float("nan"))),
    "eps negative": ("eps must be", with_options(eps=-1e-8)),
    "eps infinite": ("eps must be", with_options(eps=float("inf"))),
    "weight_decay negative": ("weight_decay must be", with_options(weight_decay=-0.1)),
    "weight_decay NaN": ("weight_decay must be", with_options(weight_decay=float("nan"))),
    "grad_scale of two": ("grad_scale must be a single", with_options(grad_scale=torch.ones(2))),
    "integer grad_scale": ("grad_scale must be", with_options(grad_scale=torch.tensor(2))),
    "found_inf of two": ("found_inf must be a single", with_options(found_inf=torch.ones(2))),
    "found_inf elsewhere": ("found_inf must be on cpu", with_options(found_inf=torch.ones((), device="meta"))),
    "seed for float32": ("rounding_seed must be None", with_options(rounding_seed=1)),
    "negative seed": (
        "rounding_seed must be in",
        lambda c: with_options(rounding_seed=-1)(replace(c, param=c.param.bfloat16())),
    ),
}


def with_projection(**changes: Any) -> Callable[[Call], Call]:
    return lambda call: replace(call, projection={**call.projection, **changes})


BAD_PROJECTIONS: dict[str, tuple[str, Callable[[Call], Call]]] = {
    "weight of three dimensions": ("param must be a matrix", lambda c: replace(c, param=c.param[None])),
    "unknown side": ("side must be one of left, right, got 'rigth'", with_projection(side="rigth")),
    "scale NaN": ("scale must be finite", with_projection(scale=float("nan"))),
    "scale infinite": ("scale must be finite", with_projection(scale=float("-inf"))),
    "basis of the other side": ("basis must have the shape", with_projection(side="left")),
    "basis transposed": ("basis must have the shape", lambda c: replace(c, basis=c.basis.T.contiguous())),
    "basis strides": ("basis must be contiguous", lambda c: replace(c, basis=scrambled(c.basis))),
    "basis dtype": ("basis must be", lambda c: replace(c, basis=c.basis.double())),
    "basis elsewhere": ("basis must be on cpu", lambda c: replace(c, basis=c.basis.to("meta"))),
    "basis of rank 0": ("basis must have the shape", lambda c: replace(c, basis=c.basis[:, :0].contiguous())),
    "basis of one dimension": ("basis must have the shape", lambda c: replace(c, basis=c.basis[:, 0].contiguous())),
    "long_basis size": ("long_basis must have the shape", lambda c: replace(c, long_basis=torch.ones(ROWS + 1, 2))),
    "long_basis of rank 0": ("long_basis must have the shape", lambda c: replace(c, long_basis=torch.ones(ROWS, 0))),
    "long_basis strides": ("long_basis must be contiguous", lambda c: replace(c, long_basis=torch.ones(2, ROWS).T)),
    "long_basis dtype": ("long_basis must be", lambda c: replace(c, long_basis=torch.ones(ROWS, 2).int())),
    "state of another rank": ("exp_avg must be of", lambda c: replace(c, basis=torch.ones(COLS, RANK + 1))),
}


#: The same of calls with a quantized basis, int8 unless the change makes it another.
BAD_QUANTIZED: dict[str, tuple[str, Callable[[Call], Call]]] = {
    "with long_basis": (
        "basis_scale must be None with long_basis",
        lambda c: replace(c, long_basis=torch.ones(ROWS, 2)),
    ),
    "scale dtype": ("basis_scale must be", lambda c: replace(c, basis_scale=torch.ones(RANK).double())),
    "scale elsewhere": (
        "basis_scale must be on cpu",
        lambda c: replace(c, basis_scale=torch.ones(RANK, device="meta")),
    ),
    "scale strides": ("basis_scale must be contiguous", lambda c: replace(c, basis_scale=torch.ones(2 * RANK)[::2])),
    "scale of two dimensions": (
        "basis_scale must have the shape",
        lambda c: replace(c, basis_scale=torch.ones(1, RANK)),
    ),
    "no scale": ("basis_scale must have the shape", lambda c: replace(c, basis_scale=torch.ones(0))),
    "scale of another rank": ("basis must be of shape", lambda c: replace(c, basis_scale=torch.ones(RANK + 1))),
    "float basis": ("basis must be torch.int8 or torch.uint8", lambda c: replace(c, basis=c.basis.float())),
    "codes alone": ("basis must be torch.float32", lambda c: replace(c, basis_scale=None)),
    "codes of the other side": ("basis must be of shape", with_projection(side="left")),
    "unpacked int4": ("basis must be of shape", lambda c: replace(c, basis=c.basis.byte())),
    "codes' strides": ("basis must be contiguous", lambda c: replace(c, basis=scrambled(c.basis))),
    "codes elsewhere": ("basis must be on cpu", lambda c: replace(c, basis=c.basis.to("meta"))),
}


def check_refused(call: Call, backend: str, message: str, error: type[Exception] = ValueError) -> None:
    before = {name: tensor.clone() for name, tensor in call.everything().items() if tensor.device.type == "cpu"}
    with pytest.raises(error, match=message) as raised:
        call.run(backend)
    assert str(raised.value).startswith(call.op + ":")
    for name, tensor in before.items():
        now = call.everything()[name]
        if tensor.layout == torch.strided and not tensor.dtype.is_complex:
            assert_same_bits(now.contiguous(), tensor.contiguous(), name)


@pytest.mark.parametrize("what", BAD_CALLS)
@pytest.mark.parametrize("op", UPDATES)
def test_bad_arguments_are_refused_before_anything_changes(backend: str, op: str, what: str) -> None:
    message, change = BAD_CALLS[what]
    if op == "lowrank_update":
        message = message.replace("grad must", "lowrank_grad must")
    if "absmax size" in what:
        message = message.replace("of", "of shape")
    check_refused(change(make_call(op)), backend, message)


@pytest.mark.parametrize("what", BAD_PROJECTIONS)
@pytest.mark.parametrize("op", ["galore_update", "lowrank_update"])
def test_bad_projections_are_refused_before_anything_changes(backend: str, op: str, what: str) -> None:
    message, change = BAD_PROJECTIONS[what]
    call = change(make_call(op))
    if what == "state of another rank" and op == "lowrank_update":
        call.grad = torch.ones(ROWS, RANK + 1)
    check_refused(call, backend, message)


@pytest.mark.parametrize("what", BAD_QUANTIZED)
@pytest.mark.parametrize("op", ["galore_update", "lowrank_update"])
def test_bad_quantized_bases_are_refused_before_anything_changes(backend: str, op: str, what: str) -> None:
    message, change = BAD_QUANTIZED[what]
    check_refused(change(quantized(make_call(op))), backend, message)


@pytest.mark.parametrize("op", UPDATES)
def test_float32_moments_of_the_wrong_kind_are_refused(backend: str, op: str) -> None:
    for name in MOMENTS:
        for convert in (Tensor.double, Tensor.byte):
            check_refused(with_state(name, convert)(make_call(op, eight_bit=False)), backend, f"{name} must be")


@pytest.mark.parametrize("op", UPDATES)
def test_unknown_backends_are_refused(op: str) -> None:
    for name in ("cuad", "", "CPU"):
        call = make_call(op)
        before = call.param.clone()
        with pytest.raises(ValueError, match=f"backend='{name}': this build has auto, .*reference"):
            call.run(name)
        assert_same_bits(call.param, before, "param")


def test_the_quantizers_refuse_what_they_cannot_take(backend: str) -> None:
    codes, absmax = ops.quantize_blockwise(torch.randn(300), True, backend=backend)
    for x in (torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int32), torch.zeros(3).to_sparse()):
        with pytest.raises(ValueError, match="quantize_blockwise: x must be"):
            ops.quantize_blockwise(x, True, backend=backend)
    with pytest.raises(ValueError, match="dequantize_blockwise: codes must be"):
        ops.dequantize_blockwise(codes.int(), absmax, True, backend=backend)
    for bad in (absmax.double(), absmax[:1], absmax.view(1, 2), absmax.to("meta"), torch.ones(4)[::2]):
        with pytest.raises(ValueError, match="dequantize_blockwise: absmax must be"):
            ops.dequantize_blockwise(codes, bad, True, backend=backend)
    with pytest.raises(ValueError, match="backend='cuad'"):
        ops.quantize_blockwise(torch.zeros(3), True, backend="cuad")
