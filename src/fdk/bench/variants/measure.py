"""Check and time the variants of one problem beside each other, on a GPU or on a stand-in for one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from fdk.bench import timing
from fdk.bench.variants.configurations import CHOSEN, Problem, Variant

Result = dict[str, object]
Block = Callable[[], float]
"""Runs a block of calls and returns seconds per call."""

FLOOR, CUBLAS, CHAIN = "floor", "cuBLAS", "chain "
CLOCK_RECOVERS = 0.3
"""Seconds that the clock of a GPU takes to rise again after products in float64, which the check needs."""


class Machine(Protocol):
    """What measuring one problem needs of a device."""

    def check(self, variant: Variant) -> str | None:
        """None if the variant's products are right and equal bit for bit when repeated, else what is wrong."""

    def blocks(self, variant: Variant) -> Mapping[str, Block]:
        """Timed blocks of a variant: "" for independent calls, CHAIN where each multiplies what the last returned."""

    def references(self) -> Mapping[str, Block]:
        """Timed blocks of the streaming floor and of cuBLAS."""

    def facts(self) -> Mapping[str, object]:
        """What belongs into every record of the problem: bytes, copies."""


class Broken(Exception):
    """The device is of no use to this process any more; the text says what it reported."""


def _failure(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    if "CUDA error" in text:
        raise Broken(text) from error
    return text


def measure(
    problem: Problem,
    variants: Sequence[Variant],
    machine: Machine,
    deadline: float,
    rounds: int,
    begin: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[Result]:
    """A result of every variant and reference: "ok" with times, "failed" or "skipped" with a reason.

    At least three rounds are timed, more until `deadline` of `clock`, at most `rounds`; a variant whose check would
    begin after it is skipped. begin: told the name of a variant before anything of it runs. Raises Broken after an
    error of the device.
    """
    results: dict[str, Result] = {}
    blocks: dict[str, Block] = {}
    for variant in variants:
        result: Result = {"who": "fdk", "variant": variant.name, "status": "ok", "reason": None}
        results[variant.name] = result
        if clock() > deadline:
            result |= {"status": "skipped", "reason": "the time allowed by --seconds was used up"}
            continue
        begin(variant.name)
        try:
            wrong = machine.check(variant)
            if wrong is None:
                blocks |= {f"{kind}{variant.name}": block for kind, block in machine.blocks(variant).items()}
        except Exception as error:
            wrong = _failure(error)
        if wrong is not None:
            result |= {"status": "failed", "reason": wrong}
    begin("")
    try:
        for name, block in machine.references().items():
            blocks[name] = block
            results[name] = {"who": name, "variant": None, "status": "ok", "reason": None}
    except Exception as error:
        _failure(error)
        raise
    pause(CLOCK_RECOVERS)
    try:
        times = timing.rounds(blocks, dict.fromkeys(blocks, rounds), lambda: clock() > deadline)
    except Exception as error:
        _failure(error)
        raise
    for name, result in results.items():
        if seconds := times.get(name):
            spread = timing.Times.of(seconds)
            result |= {
                "rounds": len(seconds), "time_p20": spread.p20, "time_p50": spread.p50, "time_p80": spread.p80,
            }  # fmt: skip
            for other, field in ((CHOSEN, "x_chosen"), (FLOOR, "x_floor"), (CUBLAS, "x_cublas")):
                if other in times:
                    result[field] = timing.ratio(seconds, times[other])
            if chain := times.get(CHAIN + name):
                result["chain_time"] = timing.median(chain)
                if CHAIN + CHOSEN in times:
                    result["chain_x_chosen"] = timing.ratio(chain, times[CHAIN + CHOSEN])
    facts = dict(machine.facts())
    return [facts | result for result in results.values()]
