"""The kernels there are, and how one is chosen: one table in order of preference, ending at the reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fdk.arguments import shown
from fdk.errors import UnsupportedError
from fdk.packing.layouts import Geometry, layout
from fdk.weight import QuantisedWeight


@dataclass(frozen=True)
class Problem:
    """One product x [m, k] @ W[n, k].T: everything that the choice of a kernel may depend on."""

    m: int
    geometry: Geometry
    device: torch.device


@runtime_checkable
class Kernel(Protocol):
    """One algorithm for the product. A kernel is an object without state beyond its compiled code."""

    name: str
    layout: str
    """Name of the layout it reads, the same for every m, so that one copy of a weight serves all batch sizes."""

    def supports(self, problem: Problem) -> str | None:
        """None if it can serve the problem, else the reason, as a clause that completes 'cpu: ...'."""

    def rounds_weights(self, problem: Problem) -> bool:
        """True if scaled weights are rounded to the activation dtype before they are multiplied."""

    def linear(self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor) -> None:
        """Write every element of out [m, n] = x [m, k] @ W.T + bias; x and out contiguous, weight in `layout`."""


# Preference order. A kernel's module is imported only when its device is asked for, and may not need a compiler
# or a GPU to be imported.
_TABLE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("cpu", "fdk.kernels.cpu", ("cpu",)),
    ("cuda", "fdk.kernels.cuda", ("cuda",)),
    ("triton", "fdk.kernels.triton", ("cuda", "cpu")),
    ("reference", "fdk.kernels.reference", ("cpu", "cuda", "meta")),
    ("torch.compile", "fdk.kernels.compiled", ("cuda", "cpu")),  # after the reference: by name only
)


def names() -> tuple[str, ...]:
    """Names of all kernels, in order of preference."""
    return tuple(name for name, _, _ in _TABLE)


@cache
def kernel(name: str) -> Kernel:
    """The kernel called `name`."""
    for entry, module, _ in _TABLE:
        if entry == name:
            return import_module(module).KERNEL
    raise _unknown(name)


def _unknown(name: object) -> UnsupportedError:
    return UnsupportedError(f"unknown kernel {shown(name)}; choose auto or one of {', '.join(names())}")


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for a problem, and why those before it in the table were passed over."""

    problem: Problem
    kernel: Kernel
    rejected: tuple[tuple[str, str], ...]


def reason_against(candidate: Kernel, problem: Problem) -> str | None:
    """Why `candidate` cannot serve `problem`, its layout's limits included; None if it can."""
    devices = next(devices for name, _, devices in _TABLE if name == candidate.name)
    if problem.device.type not in devices:
        return f"runs on {' or '.join(devices)}, the weight lies on {problem.device.type}"
    return layout(candidate.layout).supports(problem.geometry) or candidate.supports(problem)


def rows_text(m: int) -> str:
    """ "1 row", "2 rows"."""
    return f"{m} row" if m == 1 else f"{m} rows"


def choose(problem: Problem, name: str = "auto") -> Choice:
    """The first kernel of the table that serves the problem, or the one named.

    Raises UnsupportedError with the reason if the named kernel cannot serve it.
    """
    if not isinstance(name, str):
        raise _unknown(name)
    return _choose(problem, name)


@lru_cache(maxsize=4096)
def _choose(problem: Problem, name: str) -> Choice:
    if name != "auto":
        candidate = kernel(name)
        if reason := reason_against(candidate, problem):
            raise UnsupportedError(
                f"kernel {name!r} cannot multiply {problem.geometry.format} "
                f"[{problem.geometry.n}, {problem.geometry.k}] by {rows_text(problem.m)}: {reason}; use kernel='auto'"
            )
        return Choice(problem, candidate, ())
    rejected = []
    for entry in names():
        candidate = kernel(entry)
        reason = reason_against(candidate, problem)
        if reason is None:
            return Choice(problem, candidate, tuple(rejected))
        rejected.append((entry, reason))
    raise UnsupportedError(f"no kernel serves {problem}: " + "; ".join(f"{entry}: {why}" for entry, why in rejected))
