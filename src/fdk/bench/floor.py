"""The streaming floor on a GPU: fdk's streaming kernel over as many bytes as a format stores, cold, in a CUDA graph."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fdk.bench.timing import Call, CudaBlock

TRIALS = 3
FEWEST_CALLS = 20


class GpuFloor:
    """Reads windows of a pool of memory by the streaming kernel, with the grid that is fastest for each size.

    unavailable: why the kernel cannot run here, or None; asking for calls is then an error.
    """

    def __init__(self, pool: Tensor) -> None:
        self.pool = pool
        self._grids: dict[tuple[int, int], object] = {}
        self._outs: dict[int, Tensor] = {}
        self.unavailable: str | None = None
        try:
            from fdk.kernels.cuda import jit, stream

            self.unavailable = jit.unavailable()
            if self.unavailable is None:
                self.kernel, self.candidates = stream.stream_floor, stream.CANDIDATES
                self.kernel(self.pool[:65536], self._out(64))
                torch.cuda.synchronize()
        except Exception as error:
            self.unavailable = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"

    def _out(self, n: int) -> Tensor:
        if n not in self._outs:
            self._outs[n] = torch.empty(n, dtype=torch.bfloat16, device=self.pool.device)
        return self._outs[n]

    def _call(self, size: int, n: int, grid: object, dependent: bool) -> Call:
        step = -(-size // 4096) * 4096
        windows = [self.pool[start : start + size] for start in range(0, len(self.pool) - size + 1, step)]
        kernel, out, count = self.kernel, self._out(n), len(windows)
        return lambda i: kernel(windows[i % count], out, grid, dependent)

    def _size(self, size: int) -> int:
        return min(len(self.pool) // 16 * 16, max(16, -(-size // 16) * 16))

    def cold_calls(self, size: int) -> int:
        """Calls that read as much of the pool as is there, so that no window is still in the cache."""
        return max(FEWEST_CALLS, -(-len(self.pool) // (2 * self._size(size))))

    def prepare(self, sizes: Iterable[tuple[int, int]]) -> str | None:
        """`choose`, or become unavailable; returns the reason for that."""
        try:
            self.choose(sizes)
        except Exception as error:
            self.unavailable = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        return self.unavailable

    def choose(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Find the fastest grid of every (bytes, outputs) not known yet: compile on all cores, then time."""
        wanted = [(self._size(size), n) for size, n in sizes]
        wanted = [key for key in dict.fromkeys(wanted) if key not in self._grids]
        device = self.pool.device

        def compile_one(task: tuple[int, int, object]) -> None:
            # A new thread has no context until it has used the device.
            with torch.cuda.device(device), torch.inference_mode():
                torch.zeros(1, device=device)
                size, n, grid = task
                self.kernel(self.pool[:size], outs[n], grid, True)

        outs = {n: torch.empty(n, dtype=torch.bfloat16, device=device) for _, n in wanted}
        if wanted:
            with ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1))) as workers:
                list(workers.map(compile_one, [(*key, grid) for key in wanted for grid in self.candidates]))
            torch.cuda.synchronize()
        for size, n in wanted:
            best = None
            for grid in self.candidates:
                block = CudaBlock(self._call(size, n, grid, True), self.cold_calls(size))
                seconds = min(block() for _ in range(TRIALS))
                if best is None or seconds < best[0]:
                    best = (seconds, grid)
            self._grids[size, n] = best[1]

    def grid(self, size: int, n: int) -> str:
        """The chosen grid in words."""
        found = self._grids[self._size(size), n]
        return f"fdk_stream {found.ctas}x{found.threads}x{found.unroll}"

    def calls(self, size: int, n: int) -> tuple[Call, Call]:
        """Calls that read `size` bytes and write n outputs, with programmatic dependent launch and without."""
        self.choose([(size, n)])
        size = self._size(size)
        grid = self._grids[size, n]
        return self._call(size, n, grid, True), self._call(size, n, grid, False)
