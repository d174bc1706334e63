"""Values of flags that several commands have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class UsageError(Exception):
    """The command line is wrong; the text says how to right it."""


def device_of(name: str) -> torch.device:
    """--device as a `torch.device` that this machine has."""
    import torch

    from fdk.device import why_no_cuda

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is unknown; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (reason := why_no_cuda()):
        raise UsageError(f"--device {name}: {reason}; use --device cpu")
    return device


def shard_bytes_of(size: float) -> int:
    """--shard-size in bytes."""
    if not 0 < size < math.inf:
        raise UsageError(f"--shard-size {size}: a positive number of GB is needed")
    return int(size * 1e9)
