"""Timing: interleaved rounds, percentiles, ratios.

A shared machine drifts by tens of per cent within minutes. So every round times a block of calls of every
participant, one after the other, and ratios are taken within a round before their median is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Call = Callable[[int], object]
"""A timed call; its argument counts calls, so that it can rotate over copies of its operands."""

Clock = Callable[[], int]
"""Nanoseconds from an arbitrary start."""


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) with linear interpolation between the two nearest values."""
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


@dataclass(frozen=True)
class Times:
    """Seconds per call: the mean, and percentiles over rounds."""

    mean: float
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        return cls(sum(seconds) / len(seconds), *(percentile(seconds, q) for q in (20, 50, 80)))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """numerator / denominator, round by round; rounds that only one of them took part in are left out."""
    return [a / b for a, b in zip(numerator, denominator, strict=False)]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of numerator / denominator."""
    return median(ratios(numerator, denominator))


def chained(run: Callable[[Tensor, int, Tensor], Tensor], x: Tensor, copies: int) -> Call:
    """Calls of which each multiplies what the one before returned, x [m, k] at first; k outputs as inputs."""
    outs = [torch.empty_like(x) for _ in range(3)]
    last = [x]

    def call(i: int) -> Tensor:
        last[0] = run(x if i == 0 else last[0], i % copies, outs[i % len(outs)])
        return last[0]

    return call


class CpuBlock:
    """Times blocks of `inner` calls by the clock. The count of calls goes on from block to block."""

    launch = "direct"

    def __init__(self, call: Call, inner: int = 1, clock: Clock = time.perf_counter_ns) -> None:
        self.call, self.inner, self.clock = call, inner, clock
        self.calls = 0

    def __call__(self) -> float:
        """Seconds per call of the next block."""
        first, call = self.calls, self.call
        start = self.clock()
        for i in range(first, first + self.inner):
            call(i)
        elapsed = self.clock() - start
        self.calls += self.inner
        return elapsed / self.inner / 1e9


@cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """One stream for all captures of a device: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


class CudaBlock:
    """Times replays of a CUDA graph of `inner` calls, by events on the stream.

    Every call of a rotation has run once before the capture, so nothing is compiled, loaded or allocated for the first
    time inside it. A call that cannot be captured is launched one by one instead; `launch` says which of the two it
    was, and `why_not_graph` the reason. A GPU that reaches its power limit lowers its clock over some tenths of a
    second: with `settle` seconds, each timed replay comes right behind untimed ones that take about as long.
    """

    def __init__(self, call: Call, inner: int, settle: float = 0.0) -> None:
        self.call, self.inner, self.before = call, inner, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.why_not_graph: str | None = None
        self.stream = capture_stream(torch.cuda.current_device())
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for i in range(inner):
                call(i)
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    for i in range(inner):
                        call(i)
                self.graph = graph
            except Exception as error:
                self.why_not_graph = (str(error) or type(error).__name__).splitlines()[0]
                # A stream whose capture broke off may not be fit for the next one.
                capture_stream.cache_clear()
                torch.cuda.synchronize()
        self.events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        once = self() * inner
        self.before = math.ceil(settle / once) if settle else 0

    @property
    def launch(self) -> str:
        return "graph" if self.graph is not None else "eager"

    def _replay(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for i in range(self.inner):
                self.call(i)

    def __call__(self) -> float:
        """Seconds per call of the next replay."""
        start, end = self.events
        with torch.cuda.stream(self.stream):
            for _ in range(self.before):
                self._replay()
            start.record()
            self._replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.inner / 1e3


def rounds(
    blocks: Mapping[str, Callable[[], float]], counts: Mapping[str, int], late: Callable[[], bool] = lambda: False
) -> dict[str, list[float]]:
    """Seconds per call of every block, one value for each round that it took part in.

    Block b takes part in the first counts[b] rounds. Each round starts with another block, so that no block always
    follows the same neighbour. Once `late` says so, no round begins after the first FEWEST_SLOW_ROUNDS, since other
    work on the machine may make calls many times slower than their estimate.
    """
    names = list(blocks)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(max(counts.values(), default=0)):
        if number >= FEWEST_SLOW_ROUNDS and late():
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if number < counts[name]:
                times[name].append(blocks[name]())
    return times


@dataclass(frozen=True)
class Plan:
    """How often each block runs: calls in a block, and rounds."""

    inner: dict[str, int]
    outer: dict[str, int]


BLOCK_SECONDS = 0.015
FEWEST_ROUNDS, FEWEST_SLOW_ROUNDS, MOST_ROUNDS = 7, 3, 100
SLOW_SECONDS = 0.4


def plan(estimates: Mapping[str, float], budget: float, inner: int | None = None, outer: int | None = None) -> Plan:
    """Calls and rounds that fit `budget` seconds, from an estimate of seconds per call of every participant.

    A block lasts about BLOCK_SECONDS, so that the clock and the change of participant do not count; there are
    between FEWEST_ROUNDS and MOST_ROUNDS rounds, FEWEST_SLOW_ROUNDS for a call that takes SLOW_SECONDS. `inner` and
    `outer`, if given, are taken as they are.
    """
    calls = {name: inner or min(100, max(1, round(BLOCK_SECONDS / t))) for name, t in estimates.items()}
    fast = sum(calls[name] * t for name, t in estimates.items() if t < SLOW_SECONDS)
    count = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(budget / fast) if fast else FEWEST_ROUNDS))
    counts = {name: outer or (count if t < SLOW_SECONDS else FEWEST_SLOW_ROUNDS) for name, t in estimates.items()}
    return Plan(calls, counts)
