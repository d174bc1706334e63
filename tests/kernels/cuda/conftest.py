"""NVRTC on all cores for the tests of this folder: each kernel is compiled once in a run, whoever asks for it."""

import platform
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pytest

from fdk.device import cpu_count
from fdk.kernels.cuda import jit

Source = tuple[str, dict[str, int], str]
"""A file of csrc, its macros and the architecture that it is compiled for."""


class Compiled(NamedTuple):
    """What ptxas reported: registers of a thread, bytes spilled to memory; the whole log."""

    registers: int
    spilled: int
    log: str


def _compile(source: Source) -> Compiled:
    _, log = jit.build(*source)
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers and spilled, log
    return Compiled(int(registers[1]), int(spilled[1]) + int(spilled[2]), log)


class Compiler:
    """NVRTC releases the interpreter lock, so threads are enough."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.found: dict[str, Future[Compiled]] = {}

    def __call__(self, sources: Iterable[Source]) -> list[Compiled]:
        keys = []
        for source in sources:
            keys.append(jit.cache_key(*source, jit.compiler_version()))
            if keys[-1] not in self.found:
                self.found[keys[-1]] = self.pool.submit(_compile, source)
        return [self.found[key].result() for key in keys]


@pytest.fixture(scope="session")
def compiled():
    """A function from sources to what ptxas reported of each."""
    reason = jit.unavailable()
    if reason and platform.system() != "Linux":
        pytest.skip(reason)
    assert reason is None, f"{reason} (the dev extra has both)"
    with ThreadPoolExecutor(cpu_count()) as pool:
        yield Compiler(pool)
