"""When and how the basis of a projected gradient is computed: its side, and its refresh.

Everything here is plain PyTorch, imports nothing else of this package, and runs wherever PyTorch runs.
"""

from galore_kernels.subspace.refresh import REFRESH_METHODS, find_subspace, find_subspaces, refresh_basis
from galore_kernels.subspace.search import Subspace
from galore_kernels.subspace.side import PROJ_TYPES, Side, projection_side

__all__ = [
    "PROJ_TYPES",
    "REFRESH_METHODS",
    "Side",
    "Subspace",
    "find_subspace",
    "find_subspaces",
    "projection_side",
    "refresh_basis",
]
