"""Flags in global memory by which the CTAs of one launch tell each other that sums are there: zero between launches.

A launch leaves its flags as it found them, so launches that follow each other share a set. Launches that may run at the
same time must not: every stream has a set, and another in every CUDA graph, since graphs may be replayed on any stream.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

from fdk.kernels.cuda import driver

FLAGS = 640
"""32-bit flags of a set."""

_SETS = 2048


class Flags:
    """Sets of flags of one CUDA device; must be made outside of captures."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sets = torch.zeros(_SETS, FLAGS, dtype=torch.int32, device=device)
        # Any stream may be the first to use a set.
        torch.cuda.current_stream(device).synchronize()
        self.taken: dict[tuple[int, int], Tensor] = {}
        # Threads with streams of their own must not be given the same set.
        self._lock = threading.Lock()

    def take(self, stream: int) -> Tensor:
        """int32 [FLAGS] of zeros for a launch on `stream`, the device's current one."""
        key = stream, driver.capture_id(stream)
        found = self.taken.get(key)
        if found is None:
            with self._lock:
                if key not in self.taken and len(self.taken) < _SETS:
                    self.taken[key] = self.sets[len(self.taken)]
                found = self.taken.get(key)
        # With no set left, one more node or launch zeroes flags in memory that belongs to the graph or stream.
        return torch.zeros(FLAGS, dtype=torch.int32, device=self.device) if found is None else found


@cache
def of_device(device: torch.device) -> Flags:
    """The sets of a CUDA device, made at the first call."""
    return Flags(device)
