"""A device without hardware: CPU tensors take the CUDA kernels' ordinary way, and launches run on the machine."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

import made_once
from emulate import machine, ptx
from emulate.machine import SCHEDULES, EmulationError, Kernel, Schedule
from fdk import kernels
from fdk.kernels import cuda
from fdk.kernels.cuda import attend, decode, decode_config, dense, driver, flags, jit, prefill, routes, spread, stream

_MAGIC = 0x70616D66646B2121
# What no kernel in front writes, and what earlier ones have written before a kernel that waited for them.
_EARLY = (
    "codes",
    "scales",
    "zeros",
    "table",
    "data",
    "cos",
    "sin",
    "query_norm",
    "key_norm",
    "position",
    "keys",
    "values",
)
_WINDOW = 1024
"""Shared memory that the system keeps in front of a CTA's on Hopper."""


def unavailable() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    return jit.unavailable() or machine.unavailable()


@cache
def _kernel(file: str, defines: tuple[tuple[str, int], ...], arch: str) -> Kernel:
    source = file, dict(defines), arch
    window = _WINDOW if jit.capability(arch) >= (9, 0) else 0

    def translated() -> str:
        return json.dumps(asdict(ptx.translate(jit.ptx(*source), window)))

    return Kernel(ptx.Program(**json.loads(made_once.text_of("program", source, translated))))


class Device:
    """What runs launches: compute capability, multiprocessors, schedule, and what the launches so far were."""

    def __init__(self, capability: tuple[int, int], sms: int, schedule: Schedule) -> None:
        self.capability, self.sms, self.schedule = capability, sms, schedule
        self.executed: list[tuple[str, int]] = []
        """Entry and instructions of every launch."""
        self.extents: dict[int, int] = {}
        """Bytes of the tensor that last said where it lies, by address."""
        device = self

        class Function:
            """Takes the place of driver.Function; its cubin is what `cubin` below gives instead."""

            def __init__(
                self, cubin, name: str, threads: int, shared: int, cluster: int, dependent: bool = True
            ) -> None:
                self.kernel, declared = cubin
                assert self.kernel.program.entry == name and shared <= decode_config.MAX_SHARED
                self.threads, self.cluster, self.dependent = threads, cluster, dependent
                self.shared = declared.get("FDK_SHARED_BYTES", shared)
                self.early = tuple(name for name in _EARLY if name != "codes" or not declared.get("FDK_FRESH"))
                assert self.shared <= shared

            def __call__(self, grid: int, stream: int, params: ctypes.Structure) -> None:
                device.launch(self, grid, params)

        self.function = Function

    def cubin(self, file: str, defines: jit.Defines, arch: str) -> tuple[Kernel, jit.Defines]:
        return _kernel(file, tuple(sorted(defines.items())), arch), defines

    def launch(self, function, grid: int, params: ctypes.Structure) -> None:
        hopper, operands = self.capability >= (9, 0), self.operands(params)
        executed = function.kernel.run(
            grid,
            function.threads,
            bytes(params),
            operands,
            (_WINDOW if hopper else 0, function.shared),
            function.cluster,
            max(1, self.sms // function.cluster),
            function.early if function.dependent else None,
            self.schedule,
        )
        if "flags" in operands and any(ctypes.string_at(params.flags, operands["flags"][1] - params.flags)):
            raise EmulationError(f"{function.kernel.program.entry} leaves flags behind that are not zero")
        self.executed.append((function.kernel.program.entry, executed))

    def operands(self, params: ctypes.Structure) -> dict[str, tuple[int, int]]:
        """First and end address of what each pointer of a kernel's argument points to."""
        found = {}
        for name, kind in params._fields_:
            value = getattr(params, name)
            if kind is ctypes.c_void_p and value:
                found[name] = (value, value + self.extents[value])
            elif kind is driver.TensorMap and value[0] == _MAGIC:
                found[name] = (value[1], value[1] + value[2] * value[3] * 2)
        return found

    def tensor_map(self, address: int, bf16: bool, shape: tuple[int, int], box: tuple[int, int]) -> ctypes.Array:
        assert address % 16 == 0 and shape[1] * 2 % 16 == 0 and box[0] <= 256 and box[1] == 64
        return driver.TensorMap(_MAGIC, address, *shape, *box)

    def data_ptr(self, tensor: Tensor) -> int:
        """Where a tensor lies; its extent becomes what a launch may touch there."""
        address = torch._C.TensorBase.data_ptr(tensor)
        if tensor.numel():
            last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            self.extents[address] = (last + 1) * tensor.element_size()
        return address


_CACHES = (
    *(decode.load, decode.equal_indices, dense.load, prefill.load, spread.load, attend.load, stream._load),
    *(flags.of_device, cuda._device_facts, routes.routes, kernels._choose),
)


def _clear() -> None:
    for cached in _CACHES:
        cached.cache_clear()


@contextlib.contextmanager
def emulated(capability: tuple[int, int] = (9, 0), sms: int = 4, schedule: Schedule = SCHEDULES[0]) -> Iterator[Device]:
    """Inside, kernel="cuda" serves CPU tensors by running its kernels on an emulated GPU of `sms` multiprocessors.

    Weights must be made, or their caches emptied, inside: a weight remembers the kernels that it was bound to.
    """
    device = Device(capability, sms, schedule)
    facts = SimpleNamespace(multi_processor_count=sms, major=capability[0], minor=capability[1])
    current = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    table = tuple(
        (name, module, (*where, "cpu") if name == "cuda" else where) for name, module, where in kernels._TABLE
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (jit, "cubin", device.cubin),
            (driver, "Function", device.function),
            (driver, "tensor_map", device.tensor_map),
            (driver, "capture_id", lambda stream: 0),
            (kernels, "_TABLE", table),
            (torch.cuda, "get_device_capability", lambda device=None: capability),
            (torch.cuda, "get_device_properties", lambda device=None: facts),
            (torch.cuda, "current_device", lambda: None),
            (torch.cuda, "current_stream", lambda device=None: current),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.object(Tensor, "data_ptr", lambda tensor: device.data_ptr(tensor)))
        _clear()
        stack.callback(_clear)
        yield device
