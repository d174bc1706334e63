"""Instructions per weight of the ARM kernels, and what a pipeline model makes of them. Nothing is run.

`python -m fdk.bench.instructions [--output FILE]` cross-compiles the units as an installation does, finds the innermost
loop of each kernel in the disassembly and counts it; llvm-mca models its cycles. It needs g++-aarch64-linux-gnu
(or $FDK_AARCH64_CXX) and its binutils, and for the model an llvm-mca that knows the cores ($LLVM_MCA, else llvm-mca-19
or llvm-mca).

A model knows no cache misses: `modelled_gb_per_second` is the rate at which one core could decode if memory kept up.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from fdk.bench.records import environment
from fdk.kernels.cpu import build


@dataclass(frozen=True)
class Unit:
    """A compiled unit: its instruction set, its path, its multiplication and how many weights that takes; the widths of
    which one row of x takes sums that NEON looks up by nibbles."""

    isa: str
    source: str
    flag: str
    path: str
    multiplication: str
    weights: int
    nibbles: tuple[int, ...] = ()


UNITS = (
    Unit("neon", "arm_neon.cpp", "", "NeonPath<{anon}NeonUpper>", "fmla", 4, (1, 2)),
    Unit("neonbf16", "arm_bf16.cpp", "", "ArmDotPath<{anon}NeonDot>", "bfdot", 8, (1,)),
    Unit("sve128", "arm_sve.cpp", "-msve-vector-bits=128", "ArmDotPath<{anon}Sve>", "bfdot", 8, (1,)),
    Unit("sve256", "arm_sve.cpp", "-msve-vector-bits=256", "ArmDotPath<{anon}Sve>", "bfdot", 16),
    Unit("sve512", "arm_sve.cpp", "-msve-vector-bits=512", "ArmDotPath<{anon}Sve>", "bfdot", 32),
)
# (core of llvm-mca, clock in GHz that the rate is stated at, instruction sets it has)
CORES = (
    ("neoverse-v1", 2.6, ("neon", "neonbf16", "sve256")),
    ("neoverse-v2", 3.2, ("neon", "neonbf16", "sve128")),
    ("cortex-a510", 2.0, ("neon", "neonbf16")),
    ("cortex-a53", 1.4, ("neon",)),
)
GROUP = 64
JUMP = re.compile(r"(b\.\w+|b|cbn?z|tbn?z)\s.*?([0-9a-f]+) <")


def disassemble(unit: Unit, compiler: list[str], folder: Path) -> str:
    """Disassembly of a unit with demangled names."""
    for source, flags in build.units("aarch64"):
        if source.name == unit.source and (not unit.flag or unit.flag in flags):
            target = folder / "unit.o"
            subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
            objdump = compiler[0].replace("g++", "objdump")
            command = [objdump, "-d", "-C", "--no-show-raw-insn", str(target)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    raise LookupError(f"no unit {unit.source} {unit.flag}")


def inner_loop(text: str, name: str, multiplication: str) -> list[str]:
    """The instructions of the innermost loop of function `name` with the most multiplications."""
    start = text.index(f"<{name}")
    body = text[start : text.find("\n\n", start)]
    instructions = [(int(at, 16), what) for at, what in re.findall(r"^ +([0-9a-f]+):\t(.*)$", body, re.M)]
    index = {at: i for i, (at, _) in enumerate(instructions)}
    loops = []
    for i, (_, what) in enumerate(instructions):
        target = JUMP.match(what)
        if target and index.get(int(target.group(2), 16), i + 1) <= i:
            loops.append((index[int(target.group(2), 16)], i))
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    bodies = [[what for _, what in instructions[a : b + 1]] for a, b in innermost]
    return max(bodies, key=lambda lines: sum(line.startswith(multiplication) for line in lines))


def modelled_cycles(loop: list[str], core: str, model: str) -> float:
    """Cycles of one iteration by llvm-mca."""
    lines = [re.sub(r"\s*//.*", "", line) for line in loop]
    lines[-1] = re.sub(r"[0-9a-f]+ <.*", "loop", lines[-1])
    text = "loop:\n" + "\n".join(lines) + "\n"
    command = [model, "-mtriple=aarch64", f"-mcpu={core}", "-iterations=100"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr[-500:]}")
    return int(re.search(r"Total Cycles:\s+(\d+)", done.stdout).group(1)) / 100


def rows(compiler: list[str], model: str | None):
    """A flat record for every instruction set, width and number of rows of x, and for every core that has it."""
    here = "(anonymous namespace)::"
    neon = None
    for unit in UNITS:
        with tempfile.TemporaryDirectory(prefix="fdk-count-") as folder:
            text = disassemble(unit, compiler, Path(folder))
        neon = neon or text
        for bits in range(1, 9):
            for m in (1, 4, 8) if bits <= 6 else (1,):
                if m == 1 and bits in unit.nibbles:
                    # An addition serves four rows and the codes of a nibble.
                    operation, weights, kernel = "fadd", 4 * 4 // bits, "nibbles"
                    loop = inner_loop(neon, f"{here}Nibbles<{here}Neon, {bits}>::run(", operation)
                else:
                    operation, weights, kernel = unit.multiplication, unit.weights / m, "direct"
                    path = unit.path.format(anon=here)
                    loop = inner_loop(text, f"{here}Block<{here}{path}, {bits}, {m}, false>::run(", operation)
                count = sum(line.startswith(operation) for line in loop)
                weights *= count
                entry = {
                    "test": "instructions", "isa": unit.isa, "bits": bits, "m": m, "kernel": kernel,
                    "loop_instructions": len(loop), "operation": operation, "loop_operations": count,
                    "loop_weights": weights,
                    "stack_accesses": sum("[sp" in line or "[x29" in line for line in loop),
                    "instructions_per_weight": round(len(loop) / weights, 4),
                }  # fmt: skip
                yield entry
                for core, clock, isas in CORES if model and m == 1 else ():
                    if unit.isa in isas:
                        cycles = modelled_cycles(loop, core, model) / weights
                        yield entry | {
                            "test": "modelled", "core": core, "clock_ghz": clock, "cycles_per_weight": round(cycles, 5),
                            "modelled_gb_per_second": round(clock / cycles * (bits + 16 / GROUP) / 8, 2),
                        }  # fmt: skip


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def find_model() -> str | None:
    names = (os.environ.get("LLVM_MCA"), "llvm-mca-19", "llvm-mca")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def table(records: list[dict]) -> str:
    """Markdown: a line for each width, a column for each instruction set."""
    isas = [unit.isa for unit in UNITS]
    found = {(r["isa"], r["bits"]): r for r in records if r["test"] == "instructions" and r["m"] == 1}
    lines = ["| bits | " + " | ".join(isas) + " |", "|---" * (len(isas) + 1) + "|"]
    for bits in range(1, 9):
        lines.append(
            f"| {bits} | " + " | ".join(f"{found[i, bits]['instructions_per_weight']:.2f}" for i in isas) + " |"
        )
    modelled = [r for r in records if r["test"] == "modelled"]
    if modelled:
        lines += ["", "| core, modelled | " + " | ".join(f"lut{bits}" for bits in range(1, 9)) + " |", "|---" * 9 + "|"]
    for core, isa, clock in dict.fromkeys((r["core"], r["isa"], r["clock_ghz"]) for r in modelled):
        rates = {r["bits"]: r["modelled_gb_per_second"] for r in modelled if (r["core"], r["isa"]) == (core, isa)}
        cells = " | ".join(f"{rates[bits]:.1f}" for bits in range(1, 9))
        lines.append(f"| {core} at {clock} GHz, {isa} | {cells} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fdk.bench.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write records to this file, one a line")
    args = parser.parse_args(arguments)
    compiler = shlex.split(os.environ.get("FDK_AARCH64_CXX", "aarch64-linux-gnu-g++"))
    if not shutil.which(compiler[0]):
        print(f"{compiler[0]} is not installed; on Debian: apt-get install g++-aarch64-linux-gnu", file=sys.stderr)
        return 2
    model = find_model()
    if model is None:
        print("llvm-mca is not installed, so nothing is modelled; on Debian: apt-get install llvm-19", file=sys.stderr)
    run = environment(torch.device("cpu"))
    facts = {name: run[name] for name in ("commit", "dirty", "date")} | {
        "compiler": build.version_of(compiler).splitlines()[0],
        "model": model and re.search(r"LLVM version \S+", _output(model, "--version")).group(),
    }
    records = [entry | facts for entry in rows(compiler, model)]
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    print(table(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
