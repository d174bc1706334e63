"""Modules that multiply by low-bit weights."""

from fdk.nn.linear import Linear
from fdk.nn.parallel import ColumnParallelLinear, ParallelLinear, RowParallelLinear

__all__ = ["ColumnParallelLinear", "Linear", "ParallelLinear", "RowParallelLinear"]
