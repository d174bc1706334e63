"""The CPU library in this process: where it came from, its instruction set, its threads, its C functions.

Nothing is loaded or compiled before the first call of `library`.
"""

from __future__ import annotations

import ctypes
import os
import platform
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from fdk.errors import UnsupportedError
from fdk.kernels.cpu import build

ABI = 3
ISAS = ("generic", "avx2", "avx512", "avx512bf16", "neon", "neonbf16", "sve")
"""Instruction sets of all architectures, ascending in each; the position is the number the library knows them by."""

_SIGNATURES = {
    "fdk_abi": (c_int32,),
    "fdk_sources": (c_char_p,),
    "fdk_isa_available": (c_int32, c_int32),
    "fdk_isa_missing": (c_char_p, c_int32),
    "fdk_preferred_isa": (c_int32,),
    "fdk_use_isa": (c_int32, c_int32),
    "fdk_current_isa": (c_int32,),
    "fdk_exact_rows": (c_int64,),
    "fdk_use_openmp": (None, c_void_p, c_void_p, c_void_p),
    "fdk_weight_size": (c_int64, c_int64),
    "fdk_weight_init": (
        c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int64, c_int32, c_int32, c_void_p, c_int64, c_void_p,
        c_int32,
    ),
    "fdk_pack": (None, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32),
    "fdk_unpack": (None, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32),
    "fdk_linear": (c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32),
    "fdk_dequantise": (None, c_void_p, c_void_p, c_int64, c_int64, c_int32),
    "fdk_read": (None, c_void_p, c_int64, c_int32),
    "fdk_multiply": (c_int64, c_int32, c_int64, c_int32),
}  # fmt: skip


class Library:
    """The loaded library; its C functions are attributes without their `fdk_` prefix."""

    def __init__(self, path: Path, openmp: str | None) -> None:
        self.path = path
        self.openmp = openmp
        # The handle of the runtime must outlive the function pointers the library holds.
        self._runtime = None
        handle = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("fdk_"), function)
        if self.abi() != ABI:
            raise OSError(f"{path} has interface version {self.abi()}, this package needs {ABI}; reinstall the package")
        built_from = (self.sources() or b"").decode()
        if built_from != build.source_digest():
            raise OSError(f"{path} was built from other sources than those beside it; reinstall the package")
        if openmp:
            self._runtime = ctypes.CDLL(openmp)
            names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
            self.use_openmp(*(ctypes.cast(getattr(self._runtime, name), c_void_p) for name in names))
        self.use(requested_isa() or ISAS[self.preferred_isa()])

    def isas(self) -> tuple[str, ...]:
        """The instruction sets that library and machine have, in ascending order."""
        return tuple(name for index, name in enumerate(ISAS) if self.isa_available(index))

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return ISAS[self.current_isa()]

    def use(self, isa: str) -> None:
        """Run on `isa` from now on; UnsupportedError if it is unknown or this machine lacks it. Used by tests."""
        if isa not in ISAS:
            raise UnsupportedError(f"FDK_CPU_ISA={isa!r} is not an instruction set; choose one of {', '.join(ISAS)}")
        if self.use_isa(ISAS.index(isa)) < 0:
            raise UnsupportedError(
                f"FDK_CPU_ISA={isa!r}: {self.isa_missing(ISAS.index(isa)).decode()}; this machine "
                f"({platform.machine()}) has only {', '.join(self.isas())}; choose one of these, or unset FDK_CPU_ISA"
            )


def requested_isa() -> str | None:
    """$FDK_CPU_ISA, or None if it is unset or empty."""
    return os.environ.get("FDK_CPU_ISA") or None


def find_openmp(maps: str = "/proc/self/maps") -> str | None:
    """Path of the OpenMP runtime that torch has loaded into this process, torch's own copy first; None without one.

    A second runtime would compete with torch's threads for the cores, so none is linked and this one is used.
    """
    try:
        lines = Path(maps).read_text().splitlines()
    except OSError:
        return None
    paths = dict.fromkeys(line.split(None, 5)[5] for line in lines if line.count("/") and ".so" in line)
    found = [path for path in paths if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    home = str(Path(torch.__file__).parent.parent)
    found.sort(key=lambda path: not path.startswith(home))
    for path in found:
        try:
            ctypes.CDLL(path).GOMP_parallel  # noqa: B018
            return path
        except (OSError, AttributeError):
            continue
    return None


@lru_cache(maxsize=1)
def _load() -> Library | str:
    """The library, or the reason why there is none."""
    if os.name != "posix":
        return f"no CPU library for {platform.system()}"
    reasons = []
    if build.LIBRARY.exists():
        try:
            return Library(build.LIBRARY, find_openmp())
        except (OSError, AttributeError) as error:
            reasons.append(f"{build.LIBRARY}: {error}")
    else:
        reasons.append("the package was installed without a prebuilt CPU library")
    try:
        return Library(build.cached_library(), find_openmp())
    except (build.BuildError, OSError, AttributeError) as error:
        return "; ".join([*reasons, str(error)])


def library() -> Library | None:
    """The library, loaded (and built, if it must be) by the first call; None if there is none, see `why_not`.

    Raises UnsupportedError if FDK_CPU_ISA names an instruction set that is unknown or that this machine lacks.
    """
    loaded = _load()
    return loaded if isinstance(loaded, Library) else None


def why_not() -> str | None:
    """Why `library` returns None; None if it does not."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def info() -> dict[str, object]:
    """Facts for people: library, isa, isas, openmp, threads, and reason (why there is no library, else None)."""
    loaded = library()
    facts: dict[str, object] = {
        "library": str(loaded.path) if loaded else None,
        "isa": loaded.isa if loaded else None,
        "isas": loaded.isas() if loaded else (),
        "openmp": loaded.openmp if loaded else None,
        "threads": torch.get_num_threads() if loaded and (loaded.openmp or build.MACOS) else 1,
        "reason": why_not(),
    }
    if loaded and not loaded.openmp and not build.MACOS:
        facts["note"] = "torch has loaded no OpenMP runtime, so the kernels run on one thread"
    return facts
