"""Facts about this machine, found when they are asked for and not before."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

import torch

from fdk.arguments import shown
from fdk.errors import UnsupportedError

# Instruction sets that the CPU kernels care about, as /proc/cpuinfo spells them.
_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vbmi",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)


@lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def cpu_name() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_instruction_sets() -> tuple[str, ...]:
    """Those of the processor's instruction sets that matter to the kernels."""
    facts = _cpuinfo()
    present = set((facts.get("flags") or facts.get("Features") or "").split())
    return tuple(flag for flag in _FLAGS if flag in present)


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(device: torch.device) -> tuple[int, int]:
    """(all, free) bytes of memory of the CPU or a CUDA device; what the kernel could free counts as free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = total
    return _within_group(total, free)


def peak_host_bytes() -> int | None:
    """The most memory that this process has held so far, mapped files and libraries included; None where unknown."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _within_group(total: int, free: int) -> tuple[int, int]:
    """The same within the limit of a control group, as containers have one."""
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return total, free
    return min(total, limit), max(0, min(free, limit - used))


def cuda_devices() -> list[str]:
    """A line for every CUDA device: name, architecture, multiprocessors, memory. Starts the driver."""
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        size = facts.total_memory / 2**30
        found.append(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.multi_processor_count} SMs, {size:.0f} GiB")
    return found


def device_of(name: torch.device | str | None) -> torch.device | None:
    """`name` as a device that this machine has; None stays None. UnsupportedError names it, the reason and a remedy."""
    if name is None:
        return None
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise UnsupportedError(f"device {shown(name)} is unknown; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda", "meta"):
        raise UnsupportedError(f"device {str(name)!r} is not supported; use cpu or cuda")
    if device.type == "cuda":
        if reason := why_no_cuda():
            raise UnsupportedError(f"device {str(name)!r}: {reason}; use cpu")
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise UnsupportedError(f"device {str(name)!r} does not exist; the last of {count} is cuda:{count - 1}")
    return device


def why_no_cuda() -> str | None:
    """Why there is no CUDA device; None if there is one."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch was built for CUDA {torch.version.cuda}, but sees no device; check the driver"
    return None
