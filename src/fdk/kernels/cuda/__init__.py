"""CUDA C++ kernels for NVIDIA GPUs from compute capability 8.0, tuned for 9.0, compiled at first use by NVRTC.

routes.py   which of the four serves a product, by predicted time
decode.py   few rows of x (csrc/decode.cuh): launch arithmetic, launcher;  decode_config.py  what it is compiled for
            decode_choice/  which configuration serves a product
prefill.py  many rows of x on Hopper (csrc/prefill.cuh);  prefill_config.py, prefill_choice.py  as for decode.py
spread.py   many rows by 16:32 sparse integers as by dense ones on Hopper (csrc/spread.cuh, then prefill)
dense.py    dequantised weights and cuBLAS (csrc/dequantise_weights.cuh), the gradient, `fdk.dequantise`
attend.py   attention of a decoding step (csrc/attend.cuh)
stream.py   the streaming floor (csrc/stream.cuh), for the benchmark
jit.py      NVRTC and the cubin cache;  driver.py  loading and launching;  prebuild.py  what to compile ahead
flags.py    zeroed memory by which CTAs of a launch tell each other that sums are there
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from fdk.kernels import Problem, reason_against
from fdk.kernels.cuda import decode, decode_config, dense, jit, prebuild, prefill, routes, spread
from fdk.kernels.cuda.stream import stream_floor
from fdk.packing import fragments
from fdk.packing.layouts import Geometry
from fdk.weight import QuantisedWeight

__all__ = ["KERNEL", "compile_ahead", "product_of", "stream_floor", "target_of", "warmup"]

Call = Callable[[Tensor, Tensor | None, Tensor], None]


def product_of(weight: QuantisedWeight, m: int) -> prebuild.Product:
    """What is known ahead of a product of m rows of x with `weight`."""
    zeros = weight.parts.get("zeros")
    return prebuild.Product(weight.geometry, None if zeros is None else zeros.dtype, m)


@cache
def _device_facts(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors of a CUDA device."""
    facts = torch.cuda.get_device_properties(index)
    return (facts.major, facts.minor), facts.multi_processor_count


def target_of(device: torch.device) -> prebuild.Target:
    """What configurations depend on of the CUDA device of a tensor."""
    return prebuild.Target(*_device_facts(device.index))


def _routes(geometry: Geometry, zeros: torch.dtype | None, m: int, device: torch.device) -> tuple[routes.Route, ...]:
    capability, sms = _device_facts(torch.cuda.current_device() if device.index is None else device.index)
    shape = decode_config.shape_of(geometry, zeros)
    return routes.routes(shape, max(1, m), fragments.block_counts(geometry), sms, capability)


@cache
def _warn_of_scratch(device: torch.device) -> None:
    warnings.warn(
        f"fdk: no memory is left on {device} to dequantise weights into, so products of many rows take the decode "
        "kernel, 64 rows at a time, and are slower; free memory or use smaller batches",
        RuntimeWarning,
        stacklevel=4,
    )


class CudaKernel:
    """Tensor-core products with weights dequantised on the way, or in front where that is predicted to be faster."""

    name = "cuda"
    layout = fragments.FRAGMENTS.name

    def supports(self, problem: Problem) -> str | None:
        if reason := prebuild.unsupported(problem.geometry) or jit.unavailable():
            return reason
        index = torch.cuda.current_device() if problem.device.index is None else problem.device.index
        capability, _ = _device_facts(index)
        if capability < (8, 0):
            return f"needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
        return jit.unavailable(capability)

    def _problem_routes(self, problem: Problem) -> list[tuple[routes.Route, ...]]:
        """Routes for each dtype that zeros may have, which a problem does not tell."""
        geometry = problem.geometry
        kinds = (torch.uint8, geometry.dtype) if geometry.format.has_zeros else (None,)
        return [_routes(geometry, zeros, problem.m, problem.device) for zeros in kinds]

    def rounds_weights(self, problem: Problem) -> bool:
        return any(found[0].rounds for found in self._problem_routes(problem))

    def describe(self, problem: Problem) -> str:
        """The path inside the kernel that serves the problem, and what the others were predicted to take."""
        found = self._problem_routes(problem)[-1]
        names = {
            "decode": "dequantises on the way, mma.sync",
            "prefill": "dequantises on the way, wgmma",
            "spread": "spreads codes to memory, then dequantises on the way, wgmma",
            "dense": "dequantises to memory, cuBLAS",
        }
        first, *others = (
            f"{route.name} ({route.us:.3g} us predicted; {names[route.name]}{', rounds weights' * route.rounds})"
            for route in found
        )
        return first + "".join(f", rather than {other}" for other in others)

    def call(self, weight: QuantisedWeight, m: int) -> Call:
        """The product of m rows of x with `weight`, compiled, loaded and remembered in the weight."""
        found = weight.choices.get(("cuda", m))
        if found is None:
            zeros = weight.parts.get("zeros")
            zeros_dtype = None if zeros is None else zeros.dtype
            possible = _routes(weight.geometry, zeros_dtype, m, weight.device)
            found = weight.remember(("cuda", m), self._bind(weight, m, possible))
        return found

    def _bind(self, weight: QuantisedWeight, m: int, possible: tuple[routes.Route, ...]) -> Call:
        route = possible[0]
        if route.name in ("dense", "spread"):
            # What rounds weights cannot stand in for what does not.
            others = tuple(other for other in possible[1:] if other.rounds <= route.rounds)
            fallback = (lambda: self._bind(weight, m, others)) if others else None
            call = _in_parts_of_memory(self.dense_plan(weight)) if route.name == "dense" else self._plan(weight, route)
            return _Scratch(call, fallback, warns=route.name == "dense")
        plan = self._plan(weight, route)
        if route.rows == m:
            return plan
        last = plan
        if m % route.rows:
            zeros = weight.parts.get("zeros")
            rest = _routes(weight.geometry, None if zeros is None else zeros.dtype, m % route.rows, weight.device)
            last = self._bind(weight, m % route.rows, tuple(other for other in rest if other.name == "decode"))
        return _InParts(route.rows, plan, last)

    def _plan(self, weight: QuantisedWeight, route: routes.Route) -> Call:
        key = ("cuda", route.config)
        found = weight.cache.get(key)
        if found is None:
            module = {"decode": decode, "prefill": prefill, "spread": spread}[route.name]
            found = weight.cache[key] = module.Plan(weight, route.config)
        return found

    def chained(self, weight: QuantisedWeight, m: int, epilogue: decode_config.Epilogue) -> decode.Plan:
        """The product of m rows of x with an epilogue, where `prebuild.chain_us` is finite."""
        return decode.Plan(weight, prebuild.chain_config(product_of(weight, m), epilogue, target_of(weight.device)))

    def dense_plan(self, weight: QuantisedWeight) -> dense.Plan:
        """What dequantises `weight`, which lies in the kernel's layout; remembered in its cache."""
        found = weight.cache.get("cuda dense")
        if found is None:
            found = weight.cache["cuda dense"] = dense.Plan(weight)
        return found

    def linear(self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor) -> None:
        if x.data_ptr() % 16:
            x = x.clone()
        self.call(weight, x.shape[0])(x, bias, out)

    def dequantise(self, weight: QuantisedWeight) -> Tensor:
        """The dense weight [n, k], each value rounded once to the weight's dtype."""
        return self.dense_plan(weight).dense()

    def grad(self, grad: Tensor, weight: QuantisedWeight) -> Tensor:
        """grad [m, n] @ W -> [m, k] with W rounded to its dtype: the gradient with respect to x."""
        plan = self.dense_plan(weight)
        return dense.within_memory(lambda scratch: plan.grad(grad, scratch))


class _InParts:
    """A product by one launch for every `rows` rows of x, and one for the rest."""

    def __init__(self, rows: int, plan: Call, last: Call) -> None:
        self.rows, self.plan, self.last = rows, plan, last

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        for start in range(0, x.shape[0], self.rows):
            part = x[start : start + self.rows]
            # A row of x need not be a whole number of 16-byte pieces.
            part = part if part.data_ptr() % 16 == 0 else part.clone()
            plan = self.plan if part.shape[0] == self.rows else self.last
            plan(part, bias, out[start : start + self.rows])


def _in_parts_of_memory(plan: dense.Plan) -> Call:
    """A product by way of dense weights, with less scratch where memory is short."""
    return lambda x, bias, out: dense.within_memory(lambda scratch: plan(x, bias, out, scratch))


class _Scratch:
    """A product that needs scratch memory; without it another one, which is said once where `warns`."""

    def __init__(self, call: Call, fallback: Callable[[], Call] | None, warns: bool) -> None:
        self.call, self.fallback, self.warns = call, fallback, warns

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        try:
            self.call(x, bias, out)
        except torch.cuda.OutOfMemoryError:
            if self.fallback is None:
                raise
            if self.warns:
                _warn_of_scratch(x.device)
            self.fallback()(x, bias, out)


KERNEL = CudaKernel()


def compile_ahead(
    weights: Iterable[QuantisedWeight], rows: Iterable[int] = (1,), progress: jit.Progress | None = None
) -> int:
    """Compile on all cores what products of those rows of x with `weights` need; how many kernels that were.

    They go into the cubin cache: loading them is left to the first call, or to `warmup`.
    """
    if jit.unavailable():
        return 0
    found: dict[prebuild.Target, list[prebuild.Product]] = {}
    for weight in weights:
        if weight.device.type == "cuda":
            found.setdefault(target_of(weight.device), []).extend(product_of(weight, m) for m in rows)
    wanted = [
        source
        for target, products in found.items()
        if target.capability >= (8, 0) and not jit.unavailable(target.capability)
        for source in prebuild.sources(dict.fromkeys(products), target)
    ]
    return jit.compile_ahead(wanted, progress)


def warmup(weights: Iterable[QuantisedWeight], rows: Iterable[int] = (1,)) -> None:
    """Compile and load what products of those rows of x with `weights` need, so that no call waits for it.

    Needed before a CUDA graph is captured. The weights are brought into the kernels' layout, in place; those that
    the kernel does not serve are left alone.
    """
    weights, rows = tuple(weights), tuple(rows)
    compile_ahead(weights, rows)
    for weight in weights:
        if weight.device.type != "cuda":
            continue
        n, k = weight.shape
        for m in rows:
            if reason_against(KERNEL, Problem(m, weight.geometry, weight.device)) is None:
                x = torch.zeros(m, k, dtype=weight.dtype, device=weight.device)
                KERNEL.linear(x, weight.relayout_(KERNEL.layout), None, x.new_empty(m, n))
