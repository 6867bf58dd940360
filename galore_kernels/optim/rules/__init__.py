"""What the optimizers differ in: what becomes of a gradient, or of its projection, and the state that takes."""

from galore_kernels.optim.rules.adafactor import Adafactor
from galore_kernels.optim.rules.adam import Adam
from galore_kernels.optim.rules.apollo import Apollo
from galore_kernels.optim.rules.rule import Rule

__all__ = ["Adafactor", "Adam", "Apollo", "Rule"]
