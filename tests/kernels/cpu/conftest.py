"""What the kernel tests run on: the instruction sets of this machine, and ARM processors under emulation.

ARM processors take part where a cross compiler (g++-aarch64-linux-gnu, or $FDK_AARCH64_CXX) and qemu-user are
installed; elsewhere their tests are skipped with the reason. FDK_TEST_EMULATED=1 (`make test-arm`) runs every test on
each of them; without it they run the tests marked `emulated`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from fdk import testing
from fdk.bench import records
from fdk.kernels import cpu
from fdk.kernels.cpu import build, launch, library
from fdk.kernels.cpu.library import ISAS
from fdk.weight import QuantisedWeight

DRIVER = Path(__file__).parent / "driver.cpp"


@dataclass(frozen=True)
class Processor:
    """A processor of qemu and the instruction set that the library should choose on it."""

    name: str
    cpu: str
    isa: str


PROCESSORS = (
    Processor("cortex-a53", "cortex-a53", "neon"),
    Processor("neoverse-n1", "neoverse-n1", "neon"),
    Processor("max", "max,sve=off", "neonbf16"),
    Processor("sve128", "max,sve-max-vq=1", "sve"),
    Processor("sve256", "max,sve-max-vq=2", "sve"),
    Processor("sve512", "max,sve-max-vq=4", "sve"),
)


class Native:
    """The library of this machine on one instruction set."""

    emulated = False
    linear = staticmethod(launch.KERNEL.linear)
    dequantise = staticmethod(cpu.dequantise)

    def __init__(self, isa: str) -> None:
        self.name = isa

    def __str__(self) -> str:
        return self.name


def cross_compiler() -> list[str] | None:
    return build.find_compiler("aarch64")


def emulator() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def why_not_emulated() -> str | None:
    """Why there are no tests on emulated ARM processors here; None if there are."""
    if cross_compiler() is None:
        return "no compiler for aarch64; on Debian: apt-get install g++-aarch64-linux-gnu"
    if emulator() is None:
        return "no emulator of aarch64; on Debian: apt-get install qemu-user-static"
    return None


@cache
def driver() -> Path:
    """The kernels for aarch64 with driver.cpp, built once for these sources; beside it the library for aarch64."""
    key = build.cache_key([*cross_compiler()], DRIVER)
    target = build.cache_directory() / f"aarch64-{key}" / "driver"
    shared = target.with_name(build.LIBRARY.name)
    if not (target.exists() and shared.exists()):
        build.build_program(DRIVER, target, cross_compiler(), "aarch64", library=shared)
    return target


class Emulated:
    """The kernels on an emulated processor, a driver asked through a pipe. No threads, but the cuts between them."""

    emulated = True

    def __init__(self, processor: Processor) -> None:
        self.name = processor.name
        command = [emulator(), "-cpu", processor.cpu, str(driver()), str(ISAS.index(processor.isa))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        line = self.process.stdout.readline().decode()
        assert line and not line.startswith("missing"), f"{command}: {line}"
        self.isas = [ISAS[int(index)] for index in line.split()]

    def __str__(self) -> str:
        return self.name

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, operation: int, weight: QuantisedWeight, x, bias, out: torch.Tensor) -> None:
        arguments = launch.description(weight)
        pieces = [
            array("q", arguments.row_ends),
            raw(weight.parts["data"]),
            b"" if arguments.table is None else raw(arguments.table),
            b"" if x is None else raw(x),
            b"" if bias is None else raw(bias),
            raw(out),
        ]
        n, k = weight.shape
        header = (
            operation, n, k, arguments.bits, arguments.group, arguments.dtype, arguments.family, arguments.storage,
            len(arguments.row_ends), 0 if x is None else x.shape[0], torch.get_num_threads(),
            len(pieces[1]), len(pieces[2]), len(pieces[4]),
        )  # fmt: skip
        self.process.stdin.write(b"".join([array("q", header).tobytes(), *map(bytes, pieces)]))
        self.process.stdin.flush()
        size = out.numel() * out.element_size()
        answer = self.process.stdout.read(8 + size)
        assert len(answer) == 8 + size, f"the driver on {self.name} ended: {self.process.poll()}"
        assert answer[:8] == bytes(8), f"the driver on {self.name} refused {weight}"
        if size:
            out.copy_(torch.frombuffer(bytearray(answer[8:]), dtype=out.dtype).view(out.shape))

    def linear(self, x: torch.Tensor, weight: QuantisedWeight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        self._ask(1, weight, x.contiguous(), bias, out)

    def dequantise(self, weight: QuantisedWeight) -> torch.Tensor:
        out = testing.poisoned(*weight.shape, weight.geometry.dtype, "cpu")
        self._ask(2, weight, None, None, out)
        return out


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="session")
def machines():
    """Emulated processors by name, started when they are first asked for."""
    running: dict[str, Emulated] = {}
    yield running
    for machine in running.values():
        machine.close()


@pytest.fixture
def driver_path() -> Path:
    if why_not_emulated():
        pytest.skip(why_not_emulated())
    return driver()


@pytest.fixture
def run_python(driver_path):
    """Output of a Python for aarch64: run_python(processor of qemu, script, arguments...).

    FDK_TEST_FETCH=1 (`make test-arm`, .ci/run) fetches that Python; without it one that is in the cache is used.
    """
    root = build.cache_directory() / "aarch64-python"
    if not root.exists():
        script = Path(__file__).parent / "fetch_python.py"
        if os.environ.get("FDK_TEST_FETCH") != "1":
            pytest.skip(
                f"no aarch64 Python in {root}; FDK_TEST_FETCH=1 or `python {script.name} {root}` fetches Debian's"
            )
        done = subprocess.run([sys.executable, script, root], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(done.stderr.strip())

    def run(processor: str, *arguments) -> str:
        command = [emulator(), "-cpu", processor, "-L", root, root / "usr" / "bin" / "python3", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def start_driver():
    """The first line of the driver: start_driver(processor of qemu, instruction set)."""
    if why_not_emulated():
        pytest.skip(why_not_emulated())

    def start(processor: str, isa: str) -> str:
        command = [emulator(), "-cpu", processor, str(driver()), str(ISAS.index(isa))]
        line = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout.strip()
        return line if line.startswith("missing") else " ".join(ISAS[int(index)] for index in line.split())

    return start


@pytest.fixture
def isa(request, machines):
    """Every instruction set of this machine, and every emulated processor, one after the other."""
    if isinstance(request.param, Processor):
        if why_not_emulated():
            pytest.skip(why_not_emulated())
        if request.param.name not in machines:
            machines[request.param.name] = Emulated(request.param)
        yield machines[request.param.name]
        return
    loaded = library.library()
    if loaded is None:
        pytest.skip(library.why_not())
    if request.param not in loaded.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = loaded.isa
    loaded.use(request.param)
    yield Native(request.param)
    loaded.use(before)


def pytest_generate_tests(metafunc):
    if "isa" not in metafunc.fixturenames:
        return
    emulated = os.environ.get("FDK_TEST_EMULATED") == "1" or metafunc.definition.get_closest_marker("emulated")
    own = ISAS[1:4] if platform.machine() in build.X86 else ISAS[4:]
    machines = ["generic", *own, *(PROCESSORS if emulated else ())]
    metafunc.parametrize("isa", machines, indirect=True, ids=lambda machine: getattr(machine, "name", machine))


def pytest_terminal_summary(terminalreporter):
    """Appends a line for every emulated processor and test to $FDK_TEST_SUMMARY/arm_emulated/contract.jsonl."""
    folder = os.environ.get("FDK_TEST_SUMMARY")
    if not folder or os.environ.get("FDK_TEST_EMULATED") != "1" or why_not_emulated():
        return
    counts: Counter[tuple[str, str, str]] = Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            function, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
            for processor in PROCESSORS:
                # test_arm.py names processors as qemu does.
                word = processor.cpu if "/test_arm.py" in report.nodeid else processor.name
                if f"{parameters.rstrip(']')}-".startswith(f"{word}-"):
                    counts[processor.name, function, outcome] += 1
    run = records.environment(torch.device("cpu"))
    tools = [subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
             for tool in (emulator(), cross_compiler()[0])]  # fmt: skip
    path = Path(folder) / "arm_emulated" / "contract.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for processor in PROCESSORS:
            for function in sorted({function for name, function, _ in counts if name == processor.name}):
                line = {
                    "test": function, "processor": processor.name, "cpu": processor.cpu, "isa": processor.isa,
                    **{outcome: counts[processor.name, function, outcome] for outcome in ("passed", "failed", "error")},
                    "skipped": counts[processor.name, function, "skipped"],
                    "fuzz_cases": int(os.environ.get("FDK_FUZZ_CASES") or 30) if "random" in function else None,
                    "emulator": tools[0], "compiler": tools[1],
                    **{name: run[name] for name in ("commit", "dirty", "date")},
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
