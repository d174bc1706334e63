"""The products of one problem on a CUDA device: cold copies of a weight, every variant bound to them, references."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fdk import testing
from fdk.bench import timing
from fdk.bench.command import copies_for
from fdk.bench.floor import GpuFloor
from fdk.bench.gate import Gate
from fdk.bench.operands import Source
from fdk.bench.problems import DTYPES, Line, operations, weight_bytes
from fdk.bench.providers import prepare
from fdk.bench.variants.configurations import KERNELS, Problem, Variant
from fdk.bench.variants.measure import CHAIN, CUBLAS, FLOOR, Block
from fdk.packing import fragments
from fdk.weight import QuantisedWeight

ACTIVATIONS = 4
BLOCK_SECONDS, FEWEST_CALLS, MOST_CALLS = 2e-3, 20, 100
"""How long a replay of a CUDA graph should last, by how many calls: starting one costs as much as a short call."""
REPEATS = 20
"""Products that must be equal bit for bit to the first: waits that are missing show now and then only."""


def calls_in_block(problem: Problem, bytes_read: int) -> int:
    """Calls for which a replay lasts about BLOCK_SECONDS if the product takes what an H200 needs at least."""
    least = max(bytes_read / 4e12, operations(problem.m, problem.k, problem.n) / 8e14)
    return min(MOST_CALLS, max(FEWEST_CALLS, round(BLOCK_SECONDS / least)))


class Gpu:
    """A problem's operands on `device`; every variant multiplies the same copies of one weight."""

    def __init__(self, problem: Problem, device: torch.device, floor: GpuFloor, chain: bool, seed: int = 42) -> None:
        self.problem, self.device, self.floor = problem, device, floor
        self.chain = chain and problem.n == problem.k
        line = Line("fdk", "", problem.format, problem.dtype)
        source = Source(line, problem.n, problem.k, device, seed)
        self.bytes = weight_bytes(problem.format, problem.n, problem.k, problem.dtype)
        self.calls = calls_in_block(problem, self.bytes)
        first = source.weight
        self.weights = [self._packed(first) for _ in range(copies_for(self.bytes, None, device, self._room()))]
        generator = torch.Generator().manual_seed(seed + 1)
        self.x = torch.randn(problem.m, problem.k, generator=generator).to(DTYPES[problem.dtype]).to(device)
        self.gate = Gate(self.x, source.exact_rows, problem.n)
        self.xs = [self.x.clone() for _ in range(ACTIVATIONS)]
        self.outs = [self._out() for _ in range(ACTIVATIONS)]
        self.plans: dict[Variant, list] = {}

    def _room(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] // 3

    def _out(self) -> Tensor:
        return torch.empty(self.problem.m, self.problem.n, dtype=DTYPES[self.problem.dtype], device=self.device)

    @staticmethod
    def _packed(first: QuantisedWeight) -> QuantisedWeight:
        fresh = QuantisedWeight(first.geometry, {name: part.clone() for name, part in first.parts.items()})
        return fresh.relayout_(fragments.FRAGMENTS.name)

    def _bound(self, variant: Variant) -> list:
        if variant not in self.plans:
            plan = KERNELS[self.problem.kernel].Plan
            self.plans[variant] = [plan(weight, variant.config) for weight in self.weights]
        return self.plans[variant]

    def check(self, variant: Variant) -> str | None:
        plans = self._bound(variant)
        rounds_weights = getattr(variant.config, "rounds", False)

        def product(x: Tensor, out: Tensor, index: int) -> Tensor:
            plans[index](x, None, out)
            return out

        for index in sorted({0, len(plans) - 1}):
            wrong = self.gate.check(lambda x, out, i=index: product(x, out, i), self.problem.m, rounds_weights)
            if wrong is not None:
                return wrong

        def fresh() -> Tensor:
            return testing.poisoned(*self.outs[0].shape, self.x.dtype, self.device)

        first = product(self.x, fresh(), 0)
        again = [product(self.x, fresh(), i % len(plans)) for i in range(REPEATS)]
        different = sum(not torch.equal(first, other) for other in again)
        return f"{different} of {REPEATS} repeated products differ from the first" if different else None

    def blocks(self, variant: Variant) -> Mapping[str, Block]:
        plans, xs, outs = self._bound(variant), self.xs, self.outs
        copies = len(plans)

        def call(i: int) -> None:
            plans[i % copies](xs[i % ACTIVATIONS], None, outs[i % ACTIVATIONS])

        found: dict[str, Block] = {"": timing.CudaBlock(call, max(copies, self.calls))}
        if self.chain:

            def run(x: Tensor, index: int, out: Tensor) -> Tensor:
                plans[index](x, None, out)
                return out

            found[CHAIN] = timing.CudaBlock(timing.chained(run, self.x.clone(), copies), max(copies, self.calls))
        for block in found.values():
            if block.graph is None:
                raise RuntimeError(f"no CUDA graph: {block.why_not_graph}")
        return found

    def references(self) -> Mapping[str, Block]:
        found: dict[str, Block] = {}
        if not self.floor.unavailable:
            call, _ = self.floor.calls(self.bytes, self.problem.n)
            found[FLOOR] = timing.CudaBlock(call, max(self.floor.cold_calls(self.bytes), self.calls))
        line = Line(f"torch-{self.problem.dtype}", "", self.problem.dtype, self.problem.dtype)
        dense = prepare(line, Source(line, self.problem.n, self.problem.k, self.device, 42))
        dense.copy_to(copies_for(dense.weight_bytes, None, self.device, self._room()))
        count = len(dense.weights)
        xs, outs = self.xs, self.outs
        found[CUBLAS] = timing.CudaBlock(
            lambda i: dense.run(xs[i % ACTIVATIONS], i % count, outs[i % ACTIVATIONS]), max(count, self.calls)
        )
        return found

    def facts(self) -> Mapping[str, object]:
        return {"bytes_read": self.bytes, "copies": len(self.weights), "calls": max(len(self.weights), self.calls)}
