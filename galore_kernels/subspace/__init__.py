"""When and how the basis of a projected gradient is computed: its side, and its refresh.

Everything here is plain PyTorch, and runs wherever PyTorch runs.
"""

from galore_kernels.subspace.factors import AllReduce, Factors
from galore_kernels.subspace.precision import full_precision
from galore_kernels.subspace.products import Gradient, in_batches
from galore_kernels.subspace.projection import project_rows
from galore_kernels.subspace.ranks import RANK_MULTIPLE, RankChoices, choose_ranks
from galore_kernels.subspace.refresh import REFRESH_METHODS, find_subspace, find_subspaces, refresh_basis
from galore_kernels.subspace.schedule import MOMENTS_ON_REFRESH, REFRESH_SCHEDULES, RefreshRecord, Schedule, phases
from galore_kernels.subspace.search import Subspace, block_columns
from galore_kernels.subspace.sharded import ShardedGradient, SummedGradient, exchanged, is_thin
from galore_kernels.subspace.side import PROJ_TYPES, Side, projection_side

__all__ = [
    "MOMENTS_ON_REFRESH",
    "PROJ_TYPES",
    "RANK_MULTIPLE",
    "REFRESH_METHODS",
    "REFRESH_SCHEDULES",
    "AllReduce",
    "Factors",
    "Gradient",
    "RankChoices",
    "RefreshRecord",
    "Schedule",
    "ShardedGradient",
    "Side",
    "Subspace",
    "SummedGradient",
    "block_columns",
    "choose_ranks",
    "exchanged",
    "find_subspace",
    "find_subspaces",
    "full_precision",
    "in_batches",
    "is_thin",
    "phases",
    "project_rows",
    "projection_side",
    "refresh_basis",
]
