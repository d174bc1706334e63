"""Folders of safetensors files: read through memory maps, written one tensor at a time, swapped in whole.

A tensor's CRC-32 stands in the metadata of the file that fdk wrote, so that a damaged bit is found on load.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fdk.errors import FormatError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
CHECKSUMS = "fdk.crc32"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

DTYPE_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

Spec = tuple[torch.dtype, tuple[int, ...]]


class TensorFiles:
    """The tensors of a folder, by name. Nothing is read before it is asked for.

    FormatError for a folder without safetensors, a damaged header or index, or a file that the index names in vain.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, object] = {}
        self._checksums: dict[str, dict[str, str]] = {}
        self.files = self._locate()

    def _locate(self) -> dict[str, str]:
        """File name of every tensor."""
        if (self.folder / INDEX).exists():
            return self._indexed()
        single = self.folder / SINGLE
        found = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not found:
            pickled = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLED)
            if pickled:
                raise FormatError(
                    f"{self.folder} holds its weights as pickles ({pickled[0]}), which can run code when loaded, so "
                    "fdk never does; save the model as safetensors (save_pretrained in transformers does)"
                )
            if any(self.folder.glob("*.gguf")):
                raise FormatError(
                    f"{self.folder} holds its weights as GGUF, llama.cpp's format, which fdk does not read; give the "
                    "folder of the original model"
                )
            raise FormatError(f"{self.folder} holds no safetensors file; give the folder that {SINGLE} is in")
        if len(found) > 1:
            raise FormatError(f"{self.folder} holds {len(found)} safetensors files but no {INDEX}; copy that file too")
        return dict.fromkeys(self._handle(found[0].name).keys(), found[0].name)

    def _indexed(self) -> dict[str, str]:
        path = self.folder / INDEX
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) and "/" not in name for name in files.values()):
            raise FormatError(f"{path} has no weight_map from tensors to files; copy it again from the original")
        for file in sorted(set(files.values())):
            if Path(file).suffix in PICKLED:
                raise FormatError(
                    f"{path} names the pickle {file}; fdk reads safetensors only, save the model in that form"
                )
            present = set(self._handle(file).keys())
            listed = {name for name, where in files.items() if where == file}
            if lost := sorted(listed - present):
                raise FormatError(
                    f"{self.folder / file} lacks the tensor {lost[0]} that {INDEX} places there; copy both again"
                )
            if extra := sorted(present - listed):
                raise FormatError(
                    f"{self.folder / file} holds a tensor {extra[0]} that {INDEX} does not list; copy both again"
                )
        return files

    def _handle(self, file: str):
        if file not in self._open:
            path = self.folder / file
            try:
                handle = safe_open(path, "pt")
                metadata = handle.metadata() or {}
            except FileNotFoundError:
                raise FormatError(f"{path} is missing; copy the whole folder again") from None
            except (SafetensorError, OSError) as error:
                raise FormatError(
                    f"{path} is damaged or truncated ({error}); copy it again from the original"
                ) from None
            try:
                self._checksums[file] = json.loads(metadata.get(CHECKSUMS, "{}"))
            except json.JSONDecodeError:
                raise FormatError(
                    f"{path} has damaged checksums in its header; copy it again from the original"
                ) from None
            self._open[file] = handle
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{self.folder / self.files[name]}: {name}" if name in self.files else f"{self.folder}: {name}"

    def spec(self, name: str) -> Spec:
        """dtype and shape of a tensor, from the header alone."""
        part = self._handle(self.files[name]).get_slice(name)
        code = part.get_dtype()
        if code not in _DTYPES:
            raise FormatError(f"{self.where(name)} has dtype {code}, which fdk does not read; save it in bfloat16")
        return _DTYPES[code], tuple(part.get_shape())

    def get(self, name: str, verify: bool = True) -> Tensor:
        """A tensor on the CPU, mapped from its file; FormatError if its bytes do not match their checksum."""
        file = self.files[name]
        tensor = self._handle(file).get_tensor(name)
        expected = self._checksums[file].get(name)
        if verify and expected is not None and checksum(tensor) != expected:
            raise FormatError(f"{self.where(name)} is damaged: its checksum does not match; copy the file again")
        return tensor


def read_json(path: Path) -> dict:
    """A JSON object from a file; FormatError naming the file, line and column if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{path} is not JSON (line {error.lineno}, column {error.colno}: {error.msg}); restore it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; restore it") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds {type(value).__name__} in place of an object; restore it")
    return value


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes, eight hexadecimal digits."""
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"


class TensorWriter:
    """Writes tensors of known dtype and shape to one file or several, in any order, each when it is ready.

    specs: name to (dtype, shape). Consecutive names go to one file until it would exceed `shard_bytes`.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.specs = folder, dict(specs)
        shards = _shards(self.specs, shard_bytes)
        total = len(shards)
        self.names = (
            [SINGLE] if total == 1 else [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
        )
        self.file_of = {name: index for index, shard in enumerate(shards) for name in shard}
        self._headers: list[dict] = []
        self._starts: list[int] = []
        self._files: list[int] = []
        self._written: set[str] = set()
        for file, shard in zip(self.names, shards, strict=True):
            header = _header(self.specs, shard)
            raw = _encode(header)
            handle = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._files.append(handle)
            self._headers.append(header)
            self._starts.append(len(raw))

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place."""
        spec = tensor.dtype, tuple(tensor.shape)
        if spec != self.specs[name] or name in self._written:
            raise ValueError(f"{name}: {spec} was announced as {self.specs[name]} or written before")
        index = self.file_of[name]
        data = tensor_bytes(tensor)
        header = self._headers[index]
        start, _ = header[name]["data_offsets"]
        header["__metadata__"][CHECKSUMS][name] = f"{zlib.crc32(data):08x}"
        _write_at(self._files[index], data, self._starts[index] + start)
        self._written.add(name)

    def finish(self) -> None:
        """Write the headers and the index; every tensor must have been written."""
        if missing := self.specs.keys() - self._written:
            raise ValueError(f"tensors announced but not written: {', '.join(sorted(missing)[:5])}")
        for handle, header, start in zip(self._files, self._headers, self._starts, strict=True):
            raw = _encode(header)
            # Checksums have a fixed width, so the header is as long as the one that was planned.
            assert len(raw) == start
            _write_at(handle, memoryview(raw), 0)
        self.close()
        if len(self.names) > 1:
            sizes = sum(_size(spec) for spec in self.specs.values())
            weight_map = {name: self.names[index] for name, index in self.file_of.items()}
            index = {"metadata": {"total_size": sizes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files, complete or not."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _size(spec: Spec) -> int:
    dtype, shape = spec
    return dtype.itemsize * torch.Size(shape).numel()


def _shards(specs: dict[str, Spec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if spec[0] not in DTYPE_CODES:
            raise FormatError(f"{name} has dtype {spec[0]}, which a safetensors file does not hold; convert it")
        if shards[-1] and filled + _size(spec) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(spec)
    return shards


def _header(specs: dict[str, Spec], shard: list[str]) -> dict:
    header: dict = {"__metadata__": {"format": "pt", CHECKSUMS: dict.fromkeys(shard, "0" * 8)}}
    offset = 0
    # Wide elements first, so that every tensor is aligned to its own width.
    for name in sorted(shard, key=lambda name: (-specs[name][0].itemsize, name)):
        dtype, shape = specs[name]
        end = offset + _size(specs[name])
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return header


def _encode(header: dict) -> bytes:
    metadata = header["__metadata__"]
    sums = json.dumps(metadata[CHECKSUMS], separators=(",", ":"))
    raw = json.dumps({**header, "__metadata__": {**metadata, CHECKSUMS: sums}}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while data:
        # Linux writes at most 2 GiB at a time.
        count = os.pwrite(handle, data[: 1 << 30], offset)
        data, offset = data[count:], offset + count


def check_target(target: Path, overwrite: bool) -> None:
    """FormatError if `target` may not be written: it exists, or it is no folder of fdk's to be replaced."""
    if not os.path.lexists(target):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise FormatError(
            f"{target} already exists; choose another folder, or replace it with overwrite=True (--overwrite)"
        )
    config = target / "config.json"
    if not config.is_file() or read_json(config).get("quantization_config", {}).get("quant_method") != "fdk":
        raise FormatError(
            f"{target} was not written by fdk, so it is not replaced; remove it yourself or choose another folder"
        )


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and is removed otherwise.

    Everything is on the disk before the rename, so that `target` is whole or not there. What a killed process has left
    of an earlier attempt is cleared away.
    """
    _tidy(target)
    check_target(target, overwrite)
    for parent in target.parents:
        if parent.is_dir():
            break
        if os.path.lexists(parent):
            raise FormatError(f"{target} cannot be made, because {parent} is a file; choose another folder")
    token = uuid.uuid4().hex[:8]
    work = target.parent / f".{target.name}.partial-{token}"
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise FormatError(f"{target} cannot be made ({error.strerror}); choose another folder") from None
    lock = os.open(work, os.O_RDONLY)
    # Tells the next one that this folder is being worked on; the system lets go of it when the process ends.
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield work
        for path in (*work.iterdir(), work):
            _sync(path)
        check_target(target, overwrite)
        old = None
        if target.exists():
            old = target.parent / f".{target.name}.replaced-{token}"
            target.rename(old)
        try:
            work.rename(target)
        except BaseException:
            if old is not None:
                old.rename(target)
            raise
        _sync(target.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        # A write does not say to which file it went.
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            error.filename = str(target)
        raise
    finally:
        os.close(lock)


def _tidy(target: Path) -> None:
    """Clear away what a process that was killed has left beside `target`; put back what it had moved aside."""
    for path in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
        if path.name.startswith(f".{target.name}.partial-") and _abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(f".{target.name}.replaced-"):
            token = path.name.rpartition("-")[2]
            if (target.parent / f".{target.name}.partial-{token}").exists():
                continue
            if target.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(target)


def _abandoned(folder: Path) -> bool:
    """Whether no process works on a temporary folder of `new_folder` any more."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
