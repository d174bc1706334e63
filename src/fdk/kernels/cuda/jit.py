"""Compile CUDA C++ with NVRTC and keep the cubins on disk; nothing here touches a GPU.

A cubin is keyed by all sources, the defines, the architecture, the flags and the compiler's version. It is written
to a temporary file and renamed, so that two processes may fill the cache at once; a file whose checksum does not
match is compiled again; a directory that cannot be written to is read only. `FDK_CACHE_DIR` names the directory,
default ~/.cache/fdk. Nothing in a key is of the machine: cubins may be built on one and read on another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

from fdk.device import cpu_count
from fdk.errors import UnsupportedError

_CSRC = Path(__file__).parent / "csrc"
_FLAGS = ("--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v")
_MAGIC = b"fdk-cubin-1\n"

Defines = Mapping[str, int]
Source = tuple[str, Defines, str]
"""What a cubin is made of, apart from the compiler: a file of csrc, its macros, the architecture."""
Progress = Callable[[int, int], None]
"""Called with (compiled, of) after every kernel."""


def cache_dir() -> Path:
    """Where cubins are kept."""
    root = os.environ.get("FDK_CACHE_DIR")
    return Path(root) if root else Path.home() / ".cache" / "fdk"


@cache
def _nvrtc():
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise UnsupportedError(
            f"the CUDA kernels are compiled by NVRTC through cuda-bindings, which cannot be imported ({error}); "
            "pip install 'fused-dequantisation-kernels[cuda]'"
        ) from None
    return nvrtc


def unavailable(capability: tuple[int, int] | None = None) -> str | None:
    """Why kernels cannot be compiled here, for a GPU of that compute capability where one is named, or None."""
    try:
        version = compiler_version()
    except UnsupportedError as error:
        return str(error)
    if capability is not None and capability not in _known_capabilities():
        return (
            f"NVRTC {version[0]}.{version[1]} compiles for no {architecture(capability)}; "
            "install another nvidia-cuda-nvrtc, if the GPU exists"
        )
    return None


@cache
def _known_capabilities() -> frozenset[tuple[int, int]]:
    status, known = _nvrtc().nvrtcGetSupportedArchs()
    _check(status)
    return frozenset(divmod(number, 10) for number in known)


@cache
def compiler_version() -> tuple[int, int]:
    """(major, minor) of NVRTC."""
    try:
        status, major, minor = _nvrtc().nvrtcVersion()
    except RuntimeError as error:
        raise UnsupportedError(f"NVRTC cannot be loaded: {error}; install nvidia-cuda-nvrtc") from None
    if int(status):
        raise UnsupportedError(f"NVRTC does not answer: {status}")
    return major, minor


@cache
def sources() -> dict[str, str]:
    """Name and text of every file under csrc."""
    return {path.name: path.read_text() for path in sorted(_CSRC.glob("*.cuh"))}


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of a compute capability; from 9.0 on the variant with all instructions of that chip."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def capability(arch: str) -> tuple[int, int]:
    """The compute capability of an architecture's name: (9, 0) of sm_90a; UnsupportedError if it is no such name."""
    number = arch.removeprefix("sm_").rstrip("af")
    if not arch.startswith("sm_") or not number.isdigit() or len(number) < 2:
        raise UnsupportedError(f"{arch!r} names no architecture; write it like sm_80, sm_89, sm_90a or sm_100a")
    return int(number[:-1]), int(number[-1])


def _check(status, program=None) -> None:
    if int(status):
        log = compile_log(program) if program is not None else ""
        raise RuntimeError(f"NVRTC failed: {status}\n{log}")


def compile_log(program) -> str:
    nvrtc = _nvrtc()
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    buffer = b" " * size
    nvrtc.nvrtcGetProgramLog(program, buffer)
    return buffer.rstrip(b"\0 ").decode()


@contextlib.contextmanager
def _compiled(file: str, defines: Defines, target: str) -> Iterator[object]:
    """csrc/<file>, compiled, as a program of NVRTC. RuntimeError on failure."""
    nvrtc = _nvrtc()
    headers = sources()
    options = [
        f"--gpu-architecture={target}",
        *_FLAGS,
        *(f"-D{name}={value}" for name, value in sorted(defines.items())),
    ]
    status, program = nvrtc.nvrtcCreateProgram(
        f'#include "{file}"\n'.encode(),
        b"fdk.cu",
        len(headers),
        [text.encode() for text in headers.values()],
        [name.encode() for name in headers],
    )
    _check(status)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        _check(status, program)
        yield program
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def build(file: str, defines: Defines, arch: str) -> tuple[bytes, str]:
    """Compile csrc/<file> for `arch`; the cubin and the compiler's log (registers, spills). RuntimeError on failure."""
    nvrtc = _nvrtc()
    with _compiled(file, defines, arch) as program:
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(status)
        cubin = b" " * size
        (status,) = nvrtc.nvrtcGetCUBIN(program, cubin)
        _check(status)
        return cubin, compile_log(program)


def ptx(file: str, defines: Defines, arch: str) -> str:
    """The PTX that csrc/<file> becomes on its way to `arch`. RuntimeError on failure."""
    nvrtc = _nvrtc()
    with _compiled(file, defines, arch.replace("sm_", "compute_")) as program:
        status, size = nvrtc.nvrtcGetPTXSize(program)
        _check(status)
        text = b" " * size
        (status,) = nvrtc.nvrtcGetPTX(program, text)
        _check(status)
        return text.rstrip(b"\0 ").decode()


def cache_key(file: str, defines: Defines, arch: str, version: tuple[int, int]) -> str:
    """Hash of everything that the cubin depends on."""
    text = [file, arch, str(version), *_FLAGS]
    text += [f"{name}={value}" for name, value in sorted(defines.items())]
    text += [part for item in sources().items() for part in item]
    return hashlib.sha256("\0".join(text).encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    """A cached cubin, or None if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC)
    digest, cubin = data[head : head + 32], data[head + 32 :]
    return cubin if data[:head] == _MAGIC and hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    """Store a cubin so that readers see all of it or nothing; a cache that cannot be written to is left alone."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(_MAGIC + hashlib.sha256(cubin).digest() + cubin)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def _path(source: Source) -> Path:
    return cache_dir() / f"{cache_key(*source, compiler_version())}.cubin"


def cubin(file: str, defines: Defines, arch: str) -> bytes:
    """The machine code of csrc/<file> with `defines` for `arch`, from the cache or compiled now."""
    path = _path((file, defines, arch))
    cached = _read(path)
    if cached is not None:
        return cached
    code, _ = build(file, defines, arch)
    _write(path, code)
    return code


def missing(sources: Iterable[Source]) -> list[Source]:
    """Those that the cache does not hold, each once."""
    paths = {_path(source): source for source in sources}
    return [source for path, source in paths.items() if _read(path) is None]


def writable() -> bool:
    """Whether cubins can be written to the cache's directory, which is made if need be."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir()):
            return True
    except OSError:
        return False


def compile_ahead(sources: Iterable[Source], progress: Progress | None = None) -> int:
    """Compile into the cache what it does not hold, on all cores; how many kernels that were.

    Nothing where the cache cannot be written to. RuntimeError, with the log, for a kernel that does not compile.
    """
    wanted = missing(sources)
    if not wanted or not writable():
        return 0
    # NVRTC releases the interpreter lock.
    pool = ThreadPoolExecutor(min(len(wanted), cpu_count()))
    try:
        jobs = [pool.submit(cubin, *source) for source in wanted]
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            if progress:
                progress(done, len(wanted))
    finally:
        pool.shutdown(cancel_futures=True)
    return len(wanted)
