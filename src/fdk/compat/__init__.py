"""Entry points shaped like those of the projects that fdk succeeds, so that a script written for them runs.

Each imports the foreign tensors once, exactly, and multiplies through `fdk.linear`; every kernel of fdk serves them.
"""

from fdk.compat import marlin
from fdk.compat.int4matmul import quant_matmul
from fdk.compat.matgptq import MatGPTQLinear

__all__ = ["MatGPTQLinear", "marlin", "quant_matmul"]
