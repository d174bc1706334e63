"""Ceilings, measured in the same process as what is held to them.

Read bandwidth: a sum over several hundred MB of a pool by the fastest of a few readers. bf16 rate: a large square torch
matmul. Streaming floors are in floor.py for GPUs and in weights_floor.py for CPUs; where a GPU's kernel cannot run, the
reader of the pool reads as many bytes as a product moves, rotated over cold memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdk.bench.timing import Call, CpuBlock, CudaBlock, median

POOL_BYTES = {"cpu": 384 << 20, "cuda": 1 << 30}
READ_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}

Reader = Callable[[Tensor], object]
"""Reads every byte of a contiguous uint8 tensor whose size is a multiple of 64."""


def readers() -> dict[str, Reader]:
    """Ways to read memory fast, by name: reductions that do next to nothing with what they load."""
    return {
        f"torch {dtype}".replace("torch.", ""): lambda t, dtype=dtype: t.view(dtype).sum()
        for dtype in (torch.int64, torch.float64, torch.float32)
    }


@dataclass(frozen=True)
class Ceilings:
    """Of one device and number of threads: bytes/s of reading and of copying (read and written), FLOP/s of bf16."""

    read: float
    reader: str
    copy: float
    peak: float


class Memory:
    """A pool of memory larger than any cache, and the fastest way found to read it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = POOL_BYTES[device.type]
        if device.type == "cpu":
            # The same kind of pages that packed weights lie in, so that the floor has no handicap.
            from fdk.kernels.cpu.launch import aligned_bytes

            self.pool = aligned_bytes(size)
        else:
            self.pool = torch.empty(size, dtype=torch.uint8, device=device)
        # Zero pages that were never written are all one page, and subnormal floats are slow on some machines.
        self.pool.fill_(0x3F)
        self.reader = next(iter(readers().values()))
        self.floor = None
        if device.type == "cuda":
            from fdk.bench.floor import GpuFloor

            self.floor = GpuFloor(self.pool)

    def block(self, call: Call, inner: int) -> Callable[[], float]:
        return CudaBlock(call, inner) if self.device.type == "cuda" else CpuBlock(call, inner)

    def stream(self, size: int) -> Call:
        """A call that reads `size` bytes (rounded up to 64), other ones each time until the pool is used up."""
        size = min(len(self.pool), max(64, -(-size // 64) * 64))
        step = -(-size // 4096) * 4096
        windows = [self.pool[start : start + size] for start in range(0, len(self.pool) - size + 1, step)]
        count = len(windows)
        return lambda i: self.reader(windows[i % count])

    @property
    def streams(self) -> bool:
        """Whether floors are timed by fdk's streaming kernel rather than by a torch reduction."""
        return self.floor is not None and self.floor.unavailable is None

    def ceilings(self) -> Ceilings:
        """Measure this device with torch's present number of threads, and keep the fastest reader."""
        size = READ_BYTES[self.device.type]
        best, name = 0.0, ""
        for candidate, reader in readers().items():
            self.reader = reader
            block = self.block(self.stream(size), len(self.pool) // size)
            block()
            bandwidth = size / min(block() for _ in range(3))
            if bandwidth > best:
                best, name = bandwidth, candidate
        self.reader = readers()[name]
        return Ceilings(best, name, self._copy(), self._peak())

    def use(self, ceilings: Ceilings) -> None:
        """Read from now on as was fastest when these ceilings were measured."""
        self.reader = readers()[ceilings.reader]

    def refine(self, known: Ceilings) -> Ceilings:
        """The same ceilings, raised where they are higher now: other work on the machine can only lower them."""
        return replace(known, copy=max(known.copy, self._copy()), peak=max(known.peak, self._peak()))

    def _copy(self) -> float:
        half = len(self.pool) // 2
        target, source = self.pool[:half].view(torch.int64), self.pool[half : 2 * half].view(torch.int64)
        block = self.block(lambda i: target.copy_(source), 1)
        block()
        return 2 * half / min(block() for _ in range(3))

    def _peak(self) -> float:
        size = PEAK_SIZE[self.device.type]
        generator = torch.Generator(self.device).manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator, device=self.device).to(torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        block = self.block(lambda i: torch.matmul(a, b.T, out=out), 1)
        block()
        seconds = [block() for _ in range(4)]
        return 2 * size**3 / (min(seconds) if self.device.type == "cpu" else median(seconds))


def share_floors(sizes: dict[str, int], tolerance: float = 0.01) -> dict[str, tuple[str, float]]:
    """For every name, whose floor it uses and the factor to scale it by: sizes within `tolerance` are timed once."""
    found: dict[str, tuple[str, float]] = {}
    timed: list[tuple[int, str]] = []
    for name, size in sizes.items():
        owner = next(((s, other) for s, other in timed if abs(size - s) <= tolerance * s), None)
        if owner is None:
            owner = (size, name)
            timed.append(owner)
        found[name] = (owner[1], size / owner[0])
    return found
