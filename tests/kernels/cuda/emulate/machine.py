"""The emulated machine of csrc/ as a library: built at first use, kept in the kernels' cache, called by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from emulate.ptx import Program
from fdk.kernels.cpu import build

_SOURCES = Path(__file__).with_name("csrc")
# Without -march=native a lane at a time: three times slower. Contraction would change roundings.
_FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra", "-fPIC")
_MESSAGE = 1 << 16


class EmulationError(Exception):
    """A kernel did what a GPU would punish, or did not end; the message says where."""


class _Launch(ctypes.Structure):
    """Twin of Launch in csrc/machine.hpp."""

    _fields_ = (
        *(
            (name, ctypes.c_uint32)
            for name in ("grid", "threads", "cluster", "resident", "shared_base", "shared_bytes")
        ),
        *((name, ctypes.c_uint32) for name in ("order", "copies", "dependent", "races")),
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Schedule:
    """Which of the orders that a GPU may take is emulated.

    order   of warps: "forward", "backward", or "random" with turns of random length
    copies  when asynchronous copies arrive: "at once", "late" (when nobody can go on without), or at "random" times
    races   whether accesses to shared memory that nothing orders are errors, also where this order does no harm
    """

    order: str = "forward"
    copies: str = "late"
    seed: int = 0
    races: bool = True

    def numbers(self) -> tuple[int, int, int, bool]:
        return (
            ("forward", "backward", "random").index(self.order),
            ("at once", "late", "random").index(self.copies),
            self.seed,
            self.races,
        )


SCHEDULES = (
    Schedule("forward", "late"),
    Schedule("backward", "at once"),
    Schedule("random", "random", 1),
)
"""One of each kind: what is read too early shows with late copies, what is overwritten too early with early ones."""


def unavailable() -> str | None:
    """Why the machine cannot be built here, or None."""
    return None if build.find_compiler() else "the emulator needs a C++ compiler; install g++ or clang++"


@cache
def _library() -> ctypes.CDLL:
    compiler = build.find_compiler()
    sources = sorted(_SOURCES.iterdir())
    key = hashlib.sha256(repr((_FLAGS, build.version_of(compiler), _processor())).encode())
    for path in sources:
        key.update(path.read_bytes())
    path = build.cache_directory() / f"emulator-{key.hexdigest()[:20]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            units = [source for source in sources if source.suffix == ".cpp"]

            def compiled(source: Path) -> str:
                output = f"{folder}/{source.stem}.o"
                subprocess.run([*compiler, *_FLAGS, "-c", "-o", output, str(source)], check=True)
                return output

            with ThreadPoolExecutor() as pool:
                objects = list(pool.map(compiled, units))
            subprocess.run([*compiler, "-shared", "-o", f"{folder}/machine.so", *objects], check=True)
            os.replace(f"{folder}/machine.so", path)
    library = ctypes.CDLL(str(path))
    library.emulator_load.restype = ctypes.c_void_p
    library.emulator_load.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.emulator_run.restype = ctypes.c_longlong
    library.emulator_run.argtypes = [
        *(ctypes.c_void_p, ctypes.POINTER(_Launch), ctypes.c_void_p, ctypes.c_size_t),
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t),
    ]
    return library


def _processor() -> str:
    """What -march=native depends on, as far as it is known."""
    try:
        return next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    except OSError:
        return ""


class Kernel:
    """A translated kernel, loaded into the machine."""

    def __init__(self, program: Program) -> None:
        self.program = program
        message = ctypes.create_string_buffer(_MESSAGE)
        self._handle = _library().emulator_load(program.text.encode(), message, _MESSAGE)
        if not self._handle:
            raise EmulationError(f"{program.entry}: {message.value.decode()}")

    def run(
        self,
        grid: int,
        threads: int,
        params: bytes,
        ranges: dict[str, tuple[int, int]],
        shared: tuple[int, int],
        cluster: int = 1,
        resident: int = 1,
        early: Collection[str] | None = None,
        schedule: Schedule = SCHEDULES[0],
        limit: int = 1 << 32,
    ) -> int:
        """Run `grid` CTAs; the number of instructions that warps executed. EmulationError where something is wrong.

        ranges: first and end address of each global operand by its name, the only memory that may be touched
        shared: base and bytes of a CTA's shared memory
        resident: clusters at a time
        early: operands that may be read before the wait for the kernel in front; None where launches do not overlap
        """
        if len(params) != self.program.param_bytes:
            raise EmulationError(
                f"{self.program.entry} takes an argument of {self.program.param_bytes} bytes and gets {len(params)}"
            )
        if grid % cluster or self.program.threads not in (None, threads):
            raise EmulationError(
                f"{self.program.entry}: {grid} CTAs in clusters of {cluster}, {threads} threads each, "
                f"compiled for {self.program.threads}"
            )
        order, copies, seed, races = schedule.numbers()
        dependent = early is not None
        launch = _Launch(grid, threads, cluster, resident, *shared, order, copies, dependent, races, seed, limit)
        facts = [fact for name, pair in ranges.items() for fact in (*pair, not dependent or name in early)]
        bounds = (ctypes.c_uint64 * len(facts))(*facts)
        message = ctypes.create_string_buffer(_MESSAGE)
        executed = _library().emulator_run(
            self._handle, ctypes.byref(launch), params, len(params), bounds, len(ranges), message, _MESSAGE
        )
        if executed < 0:
            raise EmulationError(f"{self.program.entry} ({schedule}): {self._readable(message.value.decode(), ranges)}")
        return executed

    def _readable(self, message: str, ranges: dict[str, tuple[int, int]]) -> str:
        names = list(ranges)
        message = re.sub(r"<range (\d+)>", lambda found: names[int(found[1])], message)
        return re.sub(r"<pc (\d+)>", lambda found: f"`{self.program.statements[int(found[1])]}`", message)
