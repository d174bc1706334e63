"""For the tests of this folder: NVRTC on all cores that other processes of the run leave, and where kernels run.

Each kernel is compiled to machine code once in a run, whoever asks for it. What runs on a CUDA device runs on the
emulated one of emulate/ everywhere.
"""

import os
import platform
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pytest

import made_once
from emulate import SCHEDULES, emulated, unavailable
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
    log = made_once.text_of("log", source, lambda: jit.build(*source)[1])
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
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with ThreadPoolExecutor(max(1, cpu_count() // processes)) as pool:
        yield Compiler(pool)


WITHOUT_EMULATOR = unavailable()


@pytest.fixture(
    params=[
        pytest.param("cuda:0", marks=pytest.mark.gpu),
        pytest.param("emulated", marks=pytest.mark.skipif(WITHOUT_EMULATOR is not None, reason=WITHOUT_EMULATOR or "")),
    ]
)
def where(request):
    """The torch device that a test's tensors lie on: "cuda:0", or "cpu" inside `emulated()`."""
    if request.param == "cuda:0":
        yield "cuda:0"
        return
    # Another schedule for another test, and the same one for the same test.
    number = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("FDK_EMULATED_SCHEDULE", "0"))
    with emulated(schedule=SCHEDULES[number % len(SCHEDULES)]):
        yield "cpu"
