"""fdk: fused dequantisation kernels for low-bit weights of language models.

Importing fdk touches no GPU, no compiler and no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fdk import nn
from fdk.deferred import after_import
from fdk.errors import FdkError, FormatError, UnsupportedError
from fdk.formats import Format, parse
from fdk.ops import dequantise, explain, linear
from fdk.weight import QuantisedWeight, concat

if TYPE_CHECKING:
    from fdk import models
    from fdk.integrations.transformers import FdkConfig, decode
    from fdk.models import load, save, set_precision
    from fdk.nn.convert import from_linear, quantise_
    from fdk.nn.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "FdkConfig",
    "FdkError",
    "Format",
    "FormatError",
    "QuantisedWeight",
    "UnsupportedError",
    "concat",
    "decode",
    "dequantise",
    "explain",
    "from_linear",
    "linear",
    "load",
    "models",
    "nn",
    "parse",
    "quantise_",
    "save",
    "set_precision",
    "warmup",
]

# Imported when first used, so that `import fdk` stays light.
_LAZY = {
    "FdkConfig": "fdk.integrations.transformers",
    "decode": "fdk.integrations.transformers",
    "from_linear": "fdk.nn.convert",
    "load": "fdk.models",
    "quantise_": "fdk.nn.convert",
    "save": "fdk.models",
    "set_precision": "fdk.models",
    "warmup": "fdk.nn.warmup",
}


def __getattr__(name: str):
    if name == "models":
        return import_module("fdk.models")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fdk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Registers the quantisation method "fdk" where transformers looks for it.
after_import("transformers.quantizers.auto", "fdk.integrations.transformers")
