"""Load cubins and launch kernels through the CUDA driver, by ctypes, in torch's contexts and on torch's streams."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_char, c_int, c_uint, c_uint64, c_void_p
from functools import cache

import torch

from fdk.errors import UnsupportedError

_MAX_DYNAMIC_SHARED, _SHARED_CARVEOUT, _NON_PORTABLE_CLUSTER = 8, 9, 14
_INVALID_CONTEXT = 201
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALISATION = 4, 6


class _Value(ctypes.Union):
    _fields_ = (("dimension", c_uint * 3), ("flag", c_int), ("size", c_char * 64))


class _Attribute(ctypes.Structure):
    _fields_ = (("id", c_int), ("pad", c_int), ("value", _Value))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", c_uint),
    )


@cache
def _library() -> ctypes.PyDLL:
    # PyDLL keeps the interpreter lock during a call: a launch takes a few microseconds, and arguments stay put.
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.PyDLL(name)
        except OSError:
            continue
    raise UnsupportedError("the CUDA driver library cannot be loaded; install the NVIDIA driver")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'unknown').decode()} (CUDA error {status})")


_CAPTURING = 1


def capture_id(stream: int) -> int:
    """A number of the CUDA graph that `stream` is being captured into, unlike that of any other; 0 if it is not."""
    if stream == 0:
        return 0  # the legacy stream cannot be captured
    status, number = c_int(), c_uint64()
    failed = _library().cuStreamGetCaptureInfo_v2(c_void_p(stream), byref(status), byref(number), None, None, None)
    _check(failed, "asking whether a stream is captured")
    return number.value if status.value == _CAPTURING else 0


TensorMap = c_uint64 * 16
"""A CUtensorMap, copied into a kernel's argument."""

_FLOAT16, _BFLOAT16 = 6, 9
_SWIZZLE_128, _PROMOTE_256 = 3, 3


def tensor_map(address: int, bf16: bool, shape: tuple[int, int], box: tuple[int, int]) -> ctypes.Array:
    """The copy engine's description of a contiguous 16-bit matrix: boxes [rows, 64 columns], 128-byte swizzle.

    Elements of a box outside the matrix become zeros. The address and a row's bytes must be multiples of 16.
    """
    rows, columns = shape
    # The driver wants the map at a multiple of 64 bytes; the copy need not be.
    space = (c_uint64 * 24)()
    at = -(-ctypes.addressof(space) // 64) * 64
    status = _library().cuTensorMapEncodeTiled(
        c_void_p(at),
        _BFLOAT16 if bf16 else _FLOAT16,
        2,
        c_void_p(address),
        (c_uint64 * 2)(columns, rows),
        (c_uint64 * 1)(columns * 2),
        (c_uint * 2)(box[1], box[0]),
        (c_uint * 2)(1, 1),
        0,
        _SWIZZLE_128,
        _PROMOTE_256,
        0,
    )
    _check(status, f"describing a {rows} x {columns} matrix at {address:#x} to the copy engine")
    return TensorMap.from_buffer_copy(ctypes.string_at(at, 128))


class Function:
    """A kernel loaded into the current device's context, with its launch shape.

    Raises RuntimeError while a CUDA graph is being captured: code must be loaded before.
    """

    def __init__(
        self, cubin: bytes, name: str, threads: int, shared: int, cluster: int, dependent: bool = True
    ) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name} is not loaded yet and cannot be while a CUDA graph is captured; "
                "run the layer once, or call fdk.warmup, before the capture"
            )
        torch.cuda.current_stream()  # makes the device's primary context current
        cuda = _library()
        self._module, self._function = c_void_p(), c_void_p()
        _check(cuda.cuModuleLoadData(byref(self._module), cubin), f"loading {name}")
        _check(cuda.cuModuleGetFunction(byref(self._function), self._module, name.encode()), f"finding {name}")
        self._context = c_void_p()
        _check(cuda.cuCtxGetCurrent(byref(self._context)), f"finding the context of {name}")
        self._lock = threading.Lock()
        settings = [(_MAX_DYNAMIC_SHARED, shared), (_SHARED_CARVEOUT, 100)]
        if cluster > 8:
            settings.append((_NON_PORTABLE_CLUSTER, 1))
        for attribute, value in settings:
            _check(cuda.cuFuncSetAttribute(self._function, attribute, value), f"configuring {name}")
        self._name = name
        self._attributes = (_Attribute * 2)()
        count = 0
        if dependent:
            self._attributes[count].id = _PROGRAMMATIC_STREAM_SERIALISATION
            self._attributes[count].value.flag = 1
            count += 1
        if cluster > 1:
            self._attributes[count].id = _CLUSTER_DIMENSION
            self._attributes[count].value.dimension = (cluster, 1, 1)
            count += 1
        self._config = _LaunchConfig((0, 1, 1), (threads, 1, 1), shared, None, self._attributes, count)
        self._launch = cuda.cuLaunchKernelEx

    def __call__(self, grid: int, stream: int, params: ctypes.Structure) -> None:
        """Launch `grid` CTAs on a stream with one by-value struct as the argument, which is copied before returning."""
        arguments = (c_void_p * 1)(ctypes.addressof(params))
        with self._lock:
            self._config.grid[0] = grid
            self._config.stream = stream
            status = self._launch(byref(self._config), self._function, arguments, None)
            if status == _INVALID_CONTEXT:
                # A thread that has called nothing of the runtime yet, such as one of autograd's.
                _check(_library().cuCtxSetCurrent(self._context), f"entering the context of {self._name}")
                status = self._launch(byref(self._config), self._function, arguments, None)
        if status:
            _check(status, f"launching {self._name}")
