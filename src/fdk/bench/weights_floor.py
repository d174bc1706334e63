"""The streaming floor on a CPU: the bytes of the weights themselves, read where they lie.

Which part of a machine's memory a process is given decides how fast it can be read, so a pool of other memory would
say as much about the pool as about the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdk.bench.timing import Call

READER = "torch int64"
"""A sum of 64-bit integers: as fast as floats, and its speed does not depend on what the weights hold."""
ALIGNMENT = 64
SMALL = 0.01
"""Share of a copy's bytes below which a tensor is not read: tables stay in the cache, and a call would cost more."""


def words(tensors: Sequence[Tensor], size: int) -> list[Tensor]:
    """int64 views of the memory of `tensors`, `size` bytes in all or as many as there are, in whole ALIGNMENT pieces.

    Nothing is copied. A tensor shorter than SMALL of `size` or than ALIGNMENT is left out.
    """
    found, least = [], SMALL * size
    for tensor in tensors:
        take = min(size, tensor.numel() * tensor.element_size()) // ALIGNMENT * ALIGNMENT
        if take == 0 or take < least:
            continue
        start = tensor.storage_offset() * tensor.element_size() // 8
        found.append(torch.empty(0, dtype=torch.int64).set_(tensor.untyped_storage(), start, (take // 8,)))
        size -= take
    return found


def stream(copies: Sequence[Sequence[Tensor]], size: int) -> Call:
    """A call that reads `size` bytes of one copy's tensors on torch's threads, those of the next copy each time."""
    views = [words(tensors, size) for tensors in copies]

    def call(i: int) -> None:
        for view in views[i % len(views)]:
            view.sum()

    return call
