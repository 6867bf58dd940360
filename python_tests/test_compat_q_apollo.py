"""The drop-in for apollo_torch's ``QAPOLLOAdamW``: its signature, and the training it would have made.

apollo_torch's quantizes to uint8 with a zero point and new scales in every step, ours to int8 with scales that stay: on
int8 weights both are compared with what float weights would have become. On float weights, which its optimizer takes
too, they are compared with each other.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from compat_cases import PARITY, differences, llama, mean_of_last, train
from optimizer_cases import clone_params, make_params, set_grads
from optimizer_cases import train as train_by_hand
from test_compat_apollo_torch import SCALINGS, groups, our_bases
from torch import Tensor, nn

from galore_kernels import galore_param_groups, prepare
from galore_kernels.compat import apollo_torch as compat
from galore_kernels.compat.apollo_torch import QAPOLLOAdamW
from galore_kernels.nn import Int8Linear
from galore_kernels.quantizers import GROUP_SIZE

RANK = 8
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.fixture
def their_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """apollo_torch's, with bitsandbytes' arguments given by keyword and without its call of CUDA.

    It gives bitsandbytes' by position, of which two mean others since 0.50, and reads an option that is gone there.
    """
    original = pytest.importorskip("apollo_torch").QAPOLLOAdamW
    two_state: Any = pytest.importorskip("bitsandbytes.optim.optimizer").Optimizer2State
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    class Patched(original):  # type: ignore[misc, valid-type]  # a class known at run time only
        def __init__(self, params: Any, scale_front: bool = False, **options: Any) -> None:
            given = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, **options}
            two_state.__init__(self, "adam", params, optim_bits=32, **given)
            self.scale_front = scale_front
            self.init_seeds()

        def get_config(self, *place: Any) -> dict[str, Any]:
            return {"percentile_clipping": 100, **super().get_config(*place)}

    return Patched


def test_the_signature_is_theirs() -> None:
    theirs = inspect.signature(pytest.importorskip("apollo_torch").QAPOLLOAdamW).parameters
    ours = inspect.signature(QAPOLLOAdamW).parameters
    assert [(name, p.default) for name, p in theirs.items()] == [
        (name, p.default) for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY
    ]


def test_every_optimizer_of_theirs_is_here() -> None:
    theirs = pytest.importorskip("apollo_torch")
    names = {name for name, value in vars(theirs).items() if isinstance(value, type)}
    assert names == set(compat.__all__)
    assert all(hasattr(compat, name) for name in names)


@pytest.mark.parametrize("own", [{"amsgrad": True}, {"optim_bits": 8}, {"is_paged": True}], ids=str)
def test_bitsandbytes_arguments_have_their_defaults(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(own))}=.* in QAPOLLOAdamW"):
        QAPOLLOAdamW(make_params().values(), **own)


# ---------------------------------------------------------------------- float weights


MATRICES = {"tall": (300, 64), "wide": (64, 300), "small": (40, 20)}


def without_bias_correction(optimizer: Any, param: Tensor) -> None:
    """A million steps on, and the limiter's norm as if there had been no correction in the first either."""
    state = optimizer.state[param]
    if isinstance(state["step"], Tensor):
        state["step"].fill_(10**6)
        state["next_refresh"] = 10**7
    else:
        state["step"] = 10**6
        state["projector"].update_proj_gap = 10**7
        state["scaled_grad"] = state["scaled_grad"] / (math.sqrt(1 - 0.999) / (1 - 0.9))


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_steps_are_theirs_where_bias_correction_is_over(scaling: str, front: bool, their_class: Any) -> None:
    """Its limiter sees corrected gradients, ours and ``APOLLOAdamW``'s uncorrected ones."""
    results, starts = [], []
    for make in (their_class, QAPOLLOAdamW):
        params = make_params(MATRICES)
        group = {"rank": RANK, "update_proj_gap": 60, "proj_type": "std", **SCALINGS[scaling]}
        optimizer = make([{"params": list(params.values()), **group}], scale_front=front, **OPTIONS)
        with our_bases():
            train_by_hand(optimizer, params, range(1))
            starts.append({name: param.detach().clone() for name, param in params.items()})
            for param in params.values():
                without_bias_correction(optimizer, param)
            train_by_hand(optimizer, params, range(1, 40))
        results.append({name: param.detach() for name, param in params.items()})
    assert max(differences(starts[1], starts[0])) <= PARITY
    assert max(differences(results[1], results[0])) <= PARITY
    assert min(differences(starts[0], results[0])) >= 100 * PARITY


def test_its_loss_falls_as_theirs(their_class: Any) -> None:
    last = []
    for make in (their_class, QAPOLLOAdamW):
        model = llama()
        with our_bases():
            losses = train(model, make(groups(model, RANK, "channel"), **OPTIONS), range(100))
        last.append(mean_of_last(losses))
    assert last[0] < losses[0] - 1
    assert abs(last[1] - last[0]) < 0.05


def test_it_has_no_decay_at_full_rank_and_ours_has(their_class: Any) -> None:
    changes = []
    for make in (their_class, QAPOLLOAdamW):
        param = nn.Parameter(torch.ones(5))
        optimizer = make([param], lr=1e-2, weight_decay=0.1)
        param.grad = torch.zeros(5)
        optimizer.step()
        changes.append(1 - float(param.detach()[0]))
    assert changes[0] == 0
    assert changes[1] == pytest.approx(1e-3, rel=1e-3)


# ---------------------------------------------------------------------- int8 weights


def theirs_quantized(weight: Tensor, optimizer_class: Any) -> Any:
    """As its training scripts prepare a parameter: codes, a scale and a zero point for each 256 elements."""
    param: Any = nn.Parameter(torch.empty_like(weight, dtype=torch.uint8), requires_grad=False)
    param.group_size, param.stochastic_round = GROUP_SIZE, True
    param.data, param.scales, param.zeros = optimizer_class._quantize(None, weight, GROUP_SIZE)
    return param


def test_int8_weights_follow_float_ones_as_closely_as_theirs(their_class: Any) -> None:
    shape, steps = (96, 2 * GROUP_SIZE), 30
    group = {"rank": RANK, "update_proj_gap": 200, "proj_type": "std", **SCALINGS["channel"]}
    gradients = []
    for step in range(steps):
        probe = {"w": torch.zeros(shape)}
        set_grads(probe, step % 2)  # so that steps add up to much more than roundings
        assert probe["w"].grad is not None
        gradients.append(probe["w"].grad)
    torch.manual_seed(0)
    start = 0.1 * torch.randn(shape)

    plain = nn.Parameter(start.clone())
    optimizer = QAPOLLOAdamW([{"params": [plain], **group}], **OPTIONS)
    for grad in gradients:
        plain.grad = grad
        optimizer.step()

    quantized = theirs_quantized(start, their_class)
    with our_bases():
        rival = their_class([{"params": [quantized], **group}], **OPTIONS)
        for grad in gradients:
            quantized.float_grad = grad.clone()
            rival.step()
    of_theirs = rival._dequantize(quantized.data, torch.float32, GROUP_SIZE, quantized.scales, quantized.zeros)

    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data.copy_(start)
    (layer,) = prepare(nn.Sequential(linear), "all-linear", rank=None, weights="int8")
    assert isinstance(layer, Int8Linear)
    ours = QAPOLLOAdamW([{"params": [layer.dense], **group}], **OPTIONS)
    for grad in gradients:
        layer.dense.grad = grad
        ours.step()

    def distance(weight: Tensor) -> float:
        return float((weight - plain.detach()).norm() / (plain.detach() - start).norm())

    # Both round at random in every step. Our new scales leave room to grow: roundings are an eighth larger.
    assert distance(of_theirs) < 0.2
    assert distance(layer.weight) < 1.25 * distance(of_theirs)


def test_it_trains_a_prepared_model() -> None:
    model = prepare(llama(), rank=None, weights="int8")
    projected = galore_param_groups(model, rank=RANK, update_proj_gap=60, **SCALINGS["tensor"])
    before = [layer.weight_codes.clone() for layer in model.modules() if isinstance(layer, Int8Linear)]
    losses = train(model, QAPOLLOAdamW(projected, **OPTIONS), range(100))
    assert mean_of_last(losses) < losses[0] - 1
    after = [layer.weight_codes for layer in model.modules() if isinstance(layer, Int8Linear)]
    assert len(after) == 14
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with pytest.raises(ValueError, match="has int8 weights, which no full-rank update takes"):
        QAPOLLOAdamW(model.parameters())


# ---------------------------------------------------------------------- state brought over


def test_a_run_moves_over_in_mid_way(their_class: Any) -> None:
    group = {
        "rank": 16,
        "update_proj_gap": 50,
        "scale": 2.0,
        "proj_type": "std",
        "proj": "svd",
        "scale_type": "channel",
    }
    params = make_params({"tall": (300, 64), "wide": (64, 300)})
    rival = their_class([{"params": list(params.values()), **group}], **OPTIONS)
    train_by_hand(rival, params, range(7))
    copies = clone_params(params)
    optimizer = QAPOLLOAdamW([{"params": list(copies.values()), **group}], **OPTIONS)
    optimizer.load_state_dict(rival.state_dict())
    for name, param in params.items():
        theirs, own = rival.state[param], optimizer.state[copies[name]]
        # Before bias correction, as ours.
        correction = math.sqrt(1 - 0.999**7) / (1 - 0.9**7)
        assert float(own["scaled_norm"]) == pytest.approx(float(theirs["scaled_grad"]) / correction, rel=1e-6)
        assert own["next_refresh"] == 50
    before = {name: param.detach().clone() for name, param in params.items()}
    for own in (params, copies):
        set_grads(own, 7)
    rival.step()
    optimizer.step()
    for name, param in params.items():
        change = (param.detach() - before[name]).norm()
        # Their limiter sees the correction grow by a few percent from step to step, beyond the 1.01 that may.
        assert (param.detach() - copies[name].detach()).norm() < 0.1 * change
