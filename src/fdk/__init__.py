"""fdk: fused dequantisation kernels for low-bit weights of language models.

Importing fdk touches no GPU, no compiler and no network.
"""

from fdk import nn
from fdk.errors import FdkError, FormatError, UnsupportedError
from fdk.formats import Format, parse
from fdk.ops import dequantise, explain, linear
from fdk.weight import QuantisedWeight, concat

__version__ = "0.1.0"

__all__ = [
    "FdkError",
    "Format",
    "FormatError",
    "QuantisedWeight",
    "UnsupportedError",
    "concat",
    "dequantise",
    "explain",
    "linear",
    "nn",
    "parse",
]
