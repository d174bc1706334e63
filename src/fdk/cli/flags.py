"""Values of flags that several commands have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fdk.errors import UnsupportedError

if TYPE_CHECKING:
    import torch


class UsageError(Exception):
    """The command line is wrong; the text says how to right it."""


def device_of(name: str) -> torch.device:
    """--device as a `torch.device` that this machine has."""
    from fdk import device

    try:
        found = device.device_of(name)
    except UnsupportedError as error:
        raise UsageError(f"--{error}") from None
    if found.type == "meta":
        raise UsageError(f"--device {name!r} holds no numbers; use cpu or cuda")
    return found


def shard_bytes_of(size: float) -> int:
    """--shard-size in bytes."""
    if not 0 < size < math.inf:
        raise UsageError(f"--shard-size {size}: a positive number of GB is needed")
    return int(size * 1e9)
