"""``prepare``: what a step's launches share, from scalars that lie on the device. One program for each tensor."""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from galore_kernels.backends.batch import Batch
from galore_kernels.backends.triton.elements import (
    ARRIVED,
    BETA1,
    BETA2,
    CONTROL_WORDS,
    DECAY,
    EPS,
    GRADIENT_SCALE,
    ONE_MINUS_BETA1,
    ONE_MINUS_BETA2,
    SKIP,
    SKIP_FOUND_INF,
    STEP,
    STEP_NUMBER,
    STEP_SIZE,
    exact_step_size,
    row_pointer,
)
from galore_kernels.backends.triton.launch import launch
from galore_kernels.ops.adam import AdamOptions


@triton.jit
def as_double(x: float) -> tl.tensor:
    """x, which as an argument is a double on a device and Python's number in the interpreter, as a double tensor."""
    return tl.full((), x, tl.float64)


@triton.jit
def one_minus_powers(beta1: tl.tensor, beta2: tl.tensor, exponent: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """1 - beta ** exponent of both, by squaring: the same bits everywhere, and within 1e-13 of the exact ones."""
    power1, power2 = as_double(1.0), as_double(1.0)
    while exponent > 0:
        odd = (exponent & 1) != 0
        power1 = tl.where(odd, power1 * beta1, power1)
        power2 = tl.where(odd, power2 * beta2, power2)
        beta1 *= beta1
        beta2 *= beta2
        exponent = exponent >> 1
    return 1.0 - power1, 1.0 - power2


@triton.jit
def prepare_kernel(
    table: tl.tensor,
    control: tl.tensor,
    lr_pointer: tl.tensor,
    grad_scale: tl.tensor,
    found_inf: tl.tensor,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    scale: tl.float64,
    MAXIMIZE: tl.constexpr,
    HAS_GRAD_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
) -> None:
    tensor = tl.program_id(0).to(tl.int64)
    lr = tl.load(lr_pointer).to(tl.float64)
    inverse_grad_scale = as_double(1.0)
    if HAS_GRAD_SCALE:
        inverse_grad_scale = inverse_grad_scale / tl.load(grad_scale).to(tl.float64)
    if MAXIMIZE:
        inverse_grad_scale = -inverse_grad_scale
    skip = 0
    if HAS_FOUND_INF:
        skip = tl.where(tl.load(found_inf).to(tl.float64) != 0.0, SKIP_FOUND_INF, 0)
    number = tl.load(row_pointer(table, tensor, STEP, tl.float32, False)).to(tl.int64) + 1
    beta1, beta2 = as_double(beta1), as_double(beta2)
    correction1, correction2 = one_minus_powers(beta1, beta2, number)
    step_size = lr * tl.sqrt(correction2) / correction1 * as_double(scale)

    row = control + tensor * CONTROL_WORDS
    floats = row.to(tl.pointer_type(tl.float32))
    tl.store(floats + GRADIENT_SCALE, inverse_grad_scale.to(tl.float32))
    tl.store(floats + BETA1, beta1.to(tl.float32))
    tl.store(floats + ONE_MINUS_BETA1, (1.0 - beta1).to(tl.float32))
    tl.store(floats + BETA2, beta2.to(tl.float32))
    tl.store(floats + ONE_MINUS_BETA2, (1.0 - beta2).to(tl.float32))
    tl.store(floats + EPS, as_double(eps).to(tl.float32))
    tl.store(floats + STEP_SIZE, step_size.to(tl.float32))
    tl.store(floats + DECAY, (1.0 - lr * as_double(weight_decay)).to(tl.float32))
    tl.store(row + SKIP, skip)
    tl.store(row + ARRIVED, 0)
    tl.store(exact_step_size(control, tensor), step_size)
    tl.store((row + STEP_NUMBER).to(tl.pointer_type(tl.int64)), number)


def prepare(batch: Batch, table: Tensor, control: Tensor, options: AdamOptions, scale: float) -> None:
    """Fills the control rows."""
    lr, grad_scale, found_inf = options.lr, options.grad_scale, options.found_inf
    launch(
        prepare_kernel,
        batch.count,
        batch.device,
        table,
        control,
        lr,
        lr if grad_scale is None else grad_scale,
        lr if found_inf is None else found_inf,
        float(options.beta1),
        float(options.beta2),
        float(options.eps),
        float(options.weight_decay),
        float(scale),
        MAXIMIZE=options.maximize,
        HAS_GRAD_SCALE=grad_scale is not None,
        HAS_FOUND_INF=found_inf is not None,
        warps=1,
    )
