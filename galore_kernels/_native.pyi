"""Types of the compiled module (csrc/bindings.cpp). Buffers are addresses of contiguous row-major memory.

dtype codes: 0 float32, 1 bfloat16, 2 float16; for a projected weight 3 int8, with weight_scale (else 0); for a basis
3 int8 or 4 int4, with basis_scale (else 0). side: 0 right, 1 left. An absmax address of 0 means fp32 moments.
"""

from collections.abc import Sequence
from typing import Any

# Keys: "compiler" (str), "cuda_archs" (list[str]), "isa" (str), "version" (str).
def build_info() -> dict[str, Any]: ...
def dynamic_map(signed: bool) -> list[float]: ...
def philox(seed: int, stream: int, n: int) -> bytes: ...
def quantize_blockwise(x: int, dtype: int, n: int, signed: bool, codes: int, absmax: int, threads: int) -> None: ...
def dequantize_blockwise(codes: int, absmax: int, n: int, signed: bool, out: int, threads: int) -> None: ...
def all_representable(x: int, dtype: int, n: int, inv_grad_scale: float, threads: int) -> bool: ...
def adam_update(
    param: int,
    param_dtype: int,
    grad: int,
    grad_dtype: int,
    m: int,
    v: int,
    m_absmax: int,
    v_absmax: int,
    n: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    inv_grad_scale: float,
    maximize: bool,
    rounding_seed: int | None,
    threads: int,
) -> None: ...
def project(
    grad: int,
    grad_dtype: int,
    rows: int,
    cols: int,
    side: int,
    basis: int,
    basis_dtype: int,
    basis_scale: int,
    rank: int,
    lowrank_out: int,
    squares: int,
    inv_grad_scale: float,
    workspace: int,
    threads: int,
) -> bool: ...
def lowrank_adam(
    lowrank_inout: int,
    n: int,
    m: int,
    v: int,
    m_absmax: int,
    v_absmax: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    inv_grad_scale: float,
    maximize: bool,
    threads: int,
) -> None: ...
def back_project_update(
    param: int,
    param_dtype: int,
    weight_scale: int,
    rows: int,
    cols: int,
    side: int,
    update: int,
    basis: int,
    basis_dtype: int,
    basis_scale: int,
    rank: int,
    scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    inv_grad_scale: float,
    maximize: bool,
    rounding_seed: int | None,
    workspace: int,
    threads: int,
) -> None: ...
def random_basis(seed: int, rows: int, rank: int, magnitudes: int, out: int, threads: int) -> None: ...
def workspace_bytes(rows: int, cols: int, rank: int, side: int, param_dtype: int, threads: int) -> int: ...
def rotate_moments(
    rows: int,
    rotation: int,
    rank: int,
    new_rank: int,
    m: int,
    v: int,
    m_absmax: int,
    v_absmax: int,
    new_m: int,
    new_v: int,
    new_m_absmax: int,
    new_v_absmax: int,
    beta1: float,
    beta2: float,
    step: int,
    workspace: int,
    threads: int,
) -> None: ...
def rotate_workspace_bytes(rank: int, new_rank: int, threads: int) -> int: ...

# The tensors of backends/batch.py, all of which a call updates.
class CpuBatch:
    def __init__(
        self,
        rows_of_table: Sequence[tuple[int, ...]],
        rows: int,
        cols: int,
        moments: int,
        rank: int,
        side: int,
        weight_dtype: int,
        basis_dtype: int,
        magnitudes: int,
        stochastic: bool,
        long_basis: int,
        long_basis_dtype: int,
        kept: int,
        gradient: tuple[int, int, int],
    ) -> None: ...
    def scratch_bytes(self, threads: int) -> int: ...

class CpuScalars:
    def __init__(
        self,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        inv_grad_scale: float,
        maximize: bool,
    ) -> None: ...

class CpuAdafactorScalars:
    def __init__(
        self,
        lr: float,
        eps1: float,
        eps2: float,
        clip_threshold: float,
        decay_rate: float,
        beta1: float,
        weight_decay: float,
        scale_parameter: bool,
        relative_step: bool,
        warmup_init: bool,
        inv_grad_scale: float,
        maximize: bool,
    ) -> None: ...

def cpu_adafactor_update(
    batch: CpuBatch,
    gradients: Sequence[int],
    grad_dtype: int,
    scalars: CpuAdafactorScalars,
    scale: float,
    is_projected: bool,
    scratch: int,
    threads: int,
) -> None: ...
def cpu_adam_update(
    batch: CpuBatch, gradients: Sequence[int], grad_dtype: int, scalars: CpuScalars, threads: int
) -> None: ...
def cpu_galore_update(
    batch: CpuBatch,
    gradients: Sequence[int],
    grad_dtype: int,
    scalars: CpuScalars,
    scale: float,
    scratch: int,
    threads: int,
) -> None: ...
def cpu_lowrank_update(
    batch: CpuBatch,
    gradients: Sequence[int],
    grad_dtype: int,
    scalars: CpuScalars,
    scale: float,
    scratch: int,
    threads: int,
) -> None: ...
def cpu_apollo_update(
    batch: CpuBatch,
    gradients: Sequence[int],
    grad_dtype: int,
    scalars: CpuScalars,
    per_tensor: bool,
    scale: float,
    scale_front: bool,
    norm_growth_limit: float,
    scratch: int,
    threads: int,
) -> None: ...

# What follows exists only where the package was built with nvcc: build_info()["cuda_archs"] is not empty. Everything
# is enqueued on `stream` of `device`; addresses are of that device's memory. galore_kernels/backends/pipeline.py has
# the stages' contracts, the layout of a table's rows and of the control rows.
class CudaBatch:
    def __init__(
        self,
        table: int,
        row: tuple[int, ...],
        count: int,
        rows: int,
        cols: int,
        moments: int,
        rank: int,
        side: int,
        weight_dtype: int,
        grad_dtype: int,
        basis_dtype: int,
        magnitudes: int,
        eight_bit: bool,
        stochastic: bool,
        aligned: bool,
    ) -> None: ...

def cuda_write_column(
    table: int, columns: int, column: int, values: Sequence[int], device: int, stream: int
) -> None: ...
def cuda_prepare(
    batch: CudaBatch,
    control: int,
    lr: int,
    lr_is_double: bool,
    grad_scale: int,
    grad_scale_is_double: bool,
    found_inf: int,
    found_inf_is_double: bool,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    scale: float,
    device: int,
    stream: int,
) -> None: ...
def cuda_project_splits(batch: CudaBatch, device: int) -> int: ...
def cuda_project(
    batch: CudaBatch, control: int, lowrank: int, final: bool, splits: int, partial: int, device: int, stream: int
) -> None: ...
def cuda_scale_and_check(
    source: int, dtype: int, count: int, elements: int, control: int, lowrank: int, device: int, stream: int
) -> None: ...
def cuda_lowrank_adam(
    batch: CudaBatch, control: int, lowrank: int, direction: int, direction_dtype: int, device: int, stream: int
) -> None: ...
def cuda_back_project_update(
    batch: CudaBatch, control: int, direction: int, direction_dtype: int, device: int, stream: int
) -> None: ...
def cuda_adam_update(batch: CudaBatch, control: int, device: int, stream: int) -> None: ...
def cuda_in_one_pass(batch: CudaBatch, device: int) -> bool: ...
def cuda_galore_update(batch: CudaBatch, control: int, device: int, stream: int) -> None: ...
def cuda_quantize_blockwise(
    x: int, dtype: int, n: int, signed: bool, codes: int, absmax: int, device: int, stream: int
) -> None: ...
def cuda_dequantize_blockwise(
    codes: int, absmax: int, n: int, signed: bool, out: int, device: int, stream: int
) -> None: ...
def cuda_rotate_moments(
    source: tuple[int, int, int, int],
    target: tuple[int, int, int, int],
    rows: int,
    rank: int,
    new_rank: int,
    rotation: int,
    step: int,
    beta1: float,
    beta2: float,
    device: int,
    stream: int,
) -> None: ...
def cuda_launch_shapes() -> dict[str, tuple[int, int]]: ...
