"""Other packages' optimizers by their own names and arguments, and their state brought over in mid-run.

>>> from galore_kernels.compat.galore_torch import GaLoreAdamW  # instead of: from galore_torch import GaLoreAdamW
"""

from galore_kernels.compat.import_state import import_state_dict

__all__ = ["import_state_dict"]
