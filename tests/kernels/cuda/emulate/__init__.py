"""CUDA kernels on a CPU: NVRTC's PTX, translated and run on an emulated GPU, so that results can be held to bounds.

    from emulate import emulated

    with emulated():
        weight = testing.random_weight(parse("lut4_g64"), 128, 512)
        y = fdk.linear(x, weight, kernel="cuda")        # CPU tensors, run as on a GPU

One product from the command line, with a chosen configuration (see `--help`):

    PYTHONPATH=src:tests/kernels/cuda python -m emulate lut4_g64 --n 128 --k 512 --m 1 --set stages=2

What it finds besides wrong results: accesses outside the operands or shared memory, misaligned ones, barriers of wrong
counts, copies nobody waited for, CTAs that end too early, deadlocks (where each warp waits), accesses to shared memory
that nothing orders (csrc/races.hpp), and, by other orders of warps and other times of copies (`Schedule`), other waits
that are missing. What it cannot: timing, registers and spills, scopes and proxies of the memory model (every write is
seen at once), and races in global memory that none of its schedules shows.

ptx.py      PTX to a program;  machine.py: the machine (csrc/) as a library;  device.py: what stands in for the driver
"""

from emulate.device import Device, emulated, unavailable
from emulate.machine import SCHEDULES, EmulationError, Schedule

__all__ = ["SCHEDULES", "Device", "EmulationError", "Schedule", "emulated", "unavailable"]
