"""Machine code of configurations: compiled ahead in parallel; registers, stack and instructions of its main loop."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fdk.bench.variants.configurations import SOURCES, Problem, Variant, defines, is_hopper, unfit
from fdk.kernels.cuda import jit


@dataclass(frozen=True)
class Code:
    """What became of a configuration: machine code, or the reason why there is none.

    registers   of a thread
    stack       bytes of a thread's stack: the kernels use none, so these are registers spilled to memory
    """

    cubin: bytes = b""
    reason: str | None = None
    registers: int | None = None
    stack: int | None = None


# Attributes of a kernel in an ELF section .nv.info, each a tag of two bytes, a length and the symbol's number first.
_SIZED, _REGISTERS, _STACK = 0x04, 0x2F, 0x12


def attributes(cubin: bytes) -> tuple[int | None, int | None]:
    """(registers, bytes of stack) of the one kernel in a cubin; None where the file does not say."""
    table, entry, count, names = (
        struct.unpack_from("<Q", cubin, 40)[0],
        *struct.unpack_from("<HHH", cubin, 58),
    )
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    start = sections[names][4]
    found: dict[int, int] = {}
    for name, _, _, _, offset, size in sections:
        end_of_name = cubin.index(b"\0", start + name)
        if cubin[start + name : end_of_name] != b".nv.info":
            continue
        at = offset
        while at < offset + size:
            form, tag, length = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == _SIZED:
                if tag in (_REGISTERS, _STACK):
                    found[tag] = struct.unpack_from("<I", cubin, at + 4)[0]
                at += length
    return found.get(_REGISTERS), found.get(_STACK)


def compile_one(problem: Problem, variant: Variant, arch: str) -> Code:
    """Machine code from the cache or the compiler; the compiler's first error as the reason if it has one."""
    hopper = is_hopper(arch)
    if reason := unfit(problem, variant.config, hopper):
        return Code(reason=reason)
    try:
        cubin = jit.cubin(SOURCES[problem.kernel], defines(problem, variant.config, hopper), arch)
    except RuntimeError as error:
        lines = str(error).splitlines()
        wrong = [line for line in lines if "error" in line] or lines
        return Code(reason=f"does not compile: {wrong[0].strip()}")
    return Code(cubin, None, *attributes(cubin))


def compile_all(work: Sequence[tuple[Problem, Variant]], arch: str, jobs: int | None = None) -> list[Code]:
    """Machine code of all of `work`, in its order."""
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda item: compile_one(*item, arch), work))


@cache
def disassembler() -> str | None:
    """Path of cuobjdump: the CUDA toolkit's, or the one that comes with Triton; None without either."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump") or next(
        (str(place / "cuobjdump") for place in places if (place / "cuobjdump").exists()), None
    )


def sass(cubin: bytes) -> str | None:
    """Disassembly of a cubin, or None without cuobjdump."""
    if disassembler() is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([disassembler(), "-sass", str(path)], capture_output=True, text=True, timeout=120)
    return done.stdout if done.returncode == 0 else None


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P[T\d]+ +)?([^;]*?) *;")
_BRANCH = re.compile(r"BRA\b.*?\b0x([0-9a-f]+)")


def main_loop(text: str) -> list[str]:
    """Instructions, without their predicates, of the innermost loop that multiplies weights; empty if none does.

    That is the last one that multiplies a quarter as much as any: sums of activations are products, too, and come
    before. A loop that waits for a barrier is no loop of its own here, since it multiplies nothing.
    """
    code = [(int(address, 16), instruction) for address, instruction in _INSTRUCTION.findall(text)]
    loops = []
    for at, instruction in code:
        branch = _BRANCH.match(instruction)
        if branch and (to := int(branch[1], 16)) < at:
            body = [other for address, other in code if to <= address <= at]
            loops.append((to, at, sum("MMA" in other.split()[0] for other in body), body))
    loops = [found for found in loops if found[2]]

    def has_inner(outer) -> bool:
        # Returns from rarely taken code behind the loop are branches back into the middle of it, so overlap counts too.
        to, at, products, body = outer
        return any(
            other[0] <= at and to <= other[1] and len(other[3]) < len(body) and 2 * other[2] >= products
            for other in loops
        )

    inner = [found for found in loops if not has_inner(found)]
    most = max((found[2] for found in inner), default=0)
    return max((found for found in inner if 4 * found[2] >= most), default=(0, 0, 0, []))[3]


def instructions(cubin: bytes) -> dict[str, int] | None:
    """Instructions of the main loop by opcode, the most frequent first; None without cuobjdump."""
    text = sass(cubin)
    if text is None:
        return None
    counts = collections.Counter(instruction.split()[0].split(".")[0] for instruction in main_loop(text))
    return dict(counts.most_common())


def units_in_loop(problem: Problem, variant: Variant, counts: dict[str, int]) -> float:
    """Units of 64 x 64 weights that a warp multiplies in one round of its main loop, by its matrix instructions.

    Decode: 16 of a unit for every 8 tokens, 8 where integer products take twice the columns at once, 5 a token of
    several with those that their sums start from, 16 a token where codes are indices. Prefill, of spread codes too: 4
    of a warpgroup's unit, of which a warp has 16 rows.
    """
    products = sum(count for name, count in counts.items() if "MMA" in name)
    if problem.kernel != "decode":
        return products / 4
    config = variant.config
    if config.indices:
        return products / (16 * config.tokens)
    own_sums = 4 * (config.x_sums and (problem.shape.bits == 1 or problem.geometry.format.has_zeros))
    if config.digits:
        return products / (5 * config.tokens if config.many_digits(problem.shape) else 8)
    return products / ((16 + own_sums) * -(-config.tokens // 8))
