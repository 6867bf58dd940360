"""The planner: what one training step takes and sends, before it is run. ``python -m galore_kernels.plan --help``.

>>> from galore_kernels.plan import plan
>>> plan("7b", "galore8bit", rank=256, weights="int8", gradients="factored", tokens=256).peak
>>> from galore_kernels.plan import scaling
>>> scaling("7b", rank=1024).seconds("lowrank", 64, "infiniband").mean
"""

from galore_kernels.plan.errors import PlanError
from galore_kernels.plan.estimate import Plan, plan
from galore_kernels.plan.optimizers import OPTIMIZERS
from galore_kernels.plan.scaling import Scaling, scaling
from galore_kernels.plan.settings import Settings
from galore_kernels.plan.shapes import MODELS, LlamaShape
from galore_kernels.plan.timeline import PARTS

__all__ = ["MODELS", "OPTIMIZERS", "PARTS", "LlamaShape", "Plan", "PlanError", "Scaling", "Settings", "plan", "scaling"]
