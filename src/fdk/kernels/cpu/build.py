"""Build of the CPU library: one table of sources and flags for setup.py and for the build at run time.

Only the standard library is imported, so that setup.py can use this file without importing fdk.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parent / "csrc"
LIBRARY = Path(__file__).resolve().parent / "_fdk_cpu.so"
"""Where an installed package keeps the library that was built with it."""

# Contraction would fuse the generic unit's products and sums on some architectures only.
FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
    "-ffp-contract=off", "-Wall", "-Wextra", "-Werror=return-type",
)  # fmt: skip
MACOS = platform.system() == "Darwin"  # untested
LINK_FLAGS = ("-dynamiclib",) if MACOS else ("-shared", "-Wl,--as-needed", "-pthread")
PROGRAM_LINK_FLAGS = () if MACOS else ("-static", "-pthread", "-s")  # macOS has no static C library
X86 = ("x86_64", "AMD64")
ARM = ("aarch64", "arm64")
# Scheduling before registers are allocated keeps more values at a time than there are registers; the counts of
# instructions are in docs/kernels.md.
ARM_FLAGS = ("-O2", "-fno-schedule-insns")
ARM_LINUX = ("aarch64",)  # macOS says arm64, and has no SVE
# GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
AVX512 = (
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c",
    "-Wno-maybe-uninitialized", "-Wno-uninitialized",
)  # fmt: skip

# (source, architectures that compile it or None for all, flags): one unit per instruction set, each with its own
# flags, because target attributes inside one unit fail with some compilers.
UNITS: tuple[tuple[str, tuple[str, ...] | None, tuple[str, ...]], ...] = (
    ("dispatch.cpp", None, ("-O2",)),
    ("pack.cpp", None, ("-O3",)),
    ("generic.cpp", None, ("-O2",)),
    ("x86_avx2.cpp", X86, ("-O2", "-mavx2", "-mfma", "-mf16c")),
    ("x86_avx512.cpp", X86, ("-O2", *AVX512)),
    (
        "x86_avx512bf16.cpp",
        X86,
        ("-O2", *AVX512, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512bf16"),
    ),
    ("arm_neon.cpp", ARM, ARM_FLAGS),
    ("arm_bf16.cpp", ARM, (*ARM_FLAGS, "-march=armv8.2-a+bf16")),
    ("arm_sve.cpp", ARM_LINUX, (*ARM_FLAGS, "-march=armv8.2-a+sve+bf16", "-msve-vector-bits=128")),
    ("arm_sve.cpp", ARM_LINUX, (*ARM_FLAGS, "-march=armv8.2-a+sve+bf16", "-msve-vector-bits=256")),
    ("arm_sve.cpp", ARM_LINUX, (*ARM_FLAGS, "-march=armv8.2-a+sve+bf16", "-msve-vector-bits=512")),
)


class BuildError(Exception):
    """No compiler, or the compiler failed; the message holds its output."""


def find_compiler(machine: str | None = None) -> list[str] | None:
    """The C++ compiler for an architecture (default: this one) as a command; None without one.

    $CXX, else the first of c++, g++ and clang++ that exists; for aarch64 on another machine $FDK_AARCH64_CXX, else
    aarch64-linux-gnu-g++.
    """
    if machine and machine != platform.machine():
        command = shlex.split(os.environ.get("FDK_AARCH64_CXX", "aarch64-linux-gnu-g++"))
        return command if machine == "aarch64" and shutil.which(command[0]) else None
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        return command if command and shutil.which(command[0]) else None
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    return None


def compiler_for(machine: str | None = None) -> list[str]:
    """As `find_compiler`; BuildError that names the remedy where there is none."""
    if found := find_compiler(machine):
        return found
    if not machine or machine == platform.machine():
        raise BuildError("no C++ compiler found; install g++ or clang++, or set CXX")
    raise BuildError(
        f"no compiler for {machine}; for aarch64 on Debian: apt-get install g++-aarch64-linux-gnu, or name one in "
        "FDK_AARCH64_CXX"
    )


def units(machine: str | None = None) -> list[tuple[Path, tuple[str, ...]]]:
    """Sources with their flags for an architecture (default: this one)."""
    machine = machine or platform.machine()
    wanted = [(name, flags) for name, arches, flags in UNITS if arches is None or machine in arches]
    digest = (f'-DFDK_SOURCES="{source_digest()}"',)
    return [(CSRC / name, FLAGS + flags + (digest if name == "dispatch.cpp" else ())) for name, flags in wanted]


def version_of(compiler: list[str]) -> str:
    """What the compiler says about itself; part of the cache key."""
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout


def source_digest() -> str:
    """A digest of the sources and flags; the library carries the one it was built from."""
    digest = hashlib.sha256(repr((FLAGS, LINK_FLAGS, UNITS)).encode())
    for path in sorted(CSRC.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def cache_key(compiler: list[str], *more: Path) -> str:
    """A digest of all sources, `more` files, flags, the architecture and the compiler's version."""
    text = source_digest() + platform.machine() + version_of(compiler) + "".join(path.read_text() for path in more)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def cache_directory() -> Path:
    """$FDK_CACHE_DIR, else ~/.cache/fdk."""
    return Path(os.environ.get("FDK_CACHE_DIR") or Path.home() / ".cache" / "fdk")


def build(output: Path, compiler: list[str] | None = None, machine: str | None = None) -> Path:
    """Compile and link the library into `output`, which appears all at once or not at all.

    Raises BuildError without a compiler, or with the compiler's messages if it fails.
    """
    compiler = compiler or compiler_for(machine)
    with tempfile.TemporaryDirectory(prefix="fdk-build-") as folder:
        return _link(compiler, _compile(compiler, units(machine), Path(folder)), LINK_FLAGS, Path(folder), Path(output))


def build_program(
    source: Path,
    output: Path,
    compiler: list[str] | None = None,
    machine: str | None = None,
    library: Path | None = None,
) -> Path:
    """Compile `source` with the kernels into a program that needs no shared library; as `build` otherwise. The kernels
    are linked into `library` too if that is given.
    """
    compiler = compiler or compiler_for(machine)
    own = (source, (*FLAGS, "-O3", "-I", str(CSRC)))
    with tempfile.TemporaryDirectory(prefix="fdk-build-") as folder:
        program, *kernels = _compile(compiler, [own, *units(machine)], Path(folder))
        if library:
            _link(compiler, kernels, LINK_FLAGS, Path(folder), Path(library))
        return _link(compiler, [program, *kernels], PROGRAM_LINK_FLAGS, Path(folder), Path(output))


def _compile(compiler: list[str], sources: list[tuple[Path, tuple[str, ...]]], folder: Path) -> list[str]:
    """The objects of sources with their flags, compiled side by side."""
    running = []
    for number, (source, flags) in enumerate(sources):
        target = str(folder / f"{number}-{source.stem}.o")
        command = [*compiler, *flags, "-c", str(source), "-o", target]
        running.append((command, target, _start(command)))
    for command, _, process in running:
        _finish(command, process)
    return [target for _, target, _ in running]


def _link(compiler: list[str], objects: list[str], flags: tuple[str, ...], folder: Path, output: Path) -> Path:
    built = folder / output.name
    command = [*compiler, *objects, *flags, "-o", str(built)]
    _finish(command, _start(command))
    output.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder may be on another file system: copy next to the target, then rename.
    handle, staged = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}-")
    os.close(handle)
    try:
        shutil.copy(built, staged)
        os.chmod(staged, 0o755)
        os.replace(staged, output)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise
    return output


def _start(command: list[str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from None


def _finish(command: list[str], process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise BuildError(f"{shlex.join(command)} failed with exit status {process.returncode}:\n{output[-4000:]}")
    if output and os.environ.get("FDK_BUILD_VERBOSE"):
        sys.stderr.write(output)


def cached_library() -> Path:
    """The library for these sources from the cache, built first if it is not there.

    A finished build is reused even where the cache is read-only. Raises BuildError if it cannot be built or kept.
    """
    compiler = compiler_for()
    try:
        target = cache_directory() / f"cpu-{cache_key(compiler)}" / LIBRARY.name
        if target.exists():
            return target
        print(f"fdk: compiling the CPU kernels into {target.parent}, once; a minute or two", file=sys.stderr)
        return build(target, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{error}; set FDK_CACHE_DIR to a folder that can be written") from None


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY))
