"""Arguments of another type than asked for: each check raises FormatError with the name, the value and the remedy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path

import torch
from torch import Tensor, nn

from fdk.errors import FormatError

LONGEST = 60
_PLAIN = (bool, int, float, complex, str, bytes, os.PathLike, torch.dtype, torch.device)


def shown(value: object) -> str:
    """What a message calls a value: itself if that is short and plain, else its type."""
    if value is None or isinstance(value, _PLAIN):
        text = str(value) if isinstance(value, os.PathLike | torch.device) else repr(value)
        if len(text) <= LONGEST:
            return text
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor {list(value.shape)}"
    if isinstance(value, type):
        return f"the type {value.__name__}"
    empty = "empty " if isinstance(value, list | tuple | dict | set) and not value else ""
    name = f"{empty}{'numpy.' * _is_numpys(value)}{type(value).__name__}"
    return f"a{'n' * (name[0] in 'AEIOUaeiou')} {name}"


def _is_numpys(value: object) -> bool:
    return type(value).__module__ == "numpy"


def check_tensor(value: object, name: str) -> None:
    """FormatError unless it is a tensor."""
    if not isinstance(value, Tensor):
        remedy = "a tensor"
        if _is_numpys(value) or isinstance(value, list | tuple | int | float):
            remedy = f"torch.{'as_tensor' if _is_numpys(value) else 'tensor'}(...)"
        raise FormatError(f"{name} is {shown(value)}, not a torch.Tensor; give {remedy}")


def check_dense(value: object, name: str) -> None:
    """FormatError unless it is a tensor with strides, and not one of torch's own quantised ones."""
    check_tensor(value, name)
    if value.layout != torch.strided or value.is_quantized:
        remedy = "dequantize" if value.is_quantized else "to_dense"
        raise FormatError(f"{name} has layout {value.layout} and dtype {value.dtype}; give {name}.{remedy}()")


def check_tensors(owner: str, **tensors: object) -> None:
    """FormatError, naming `owner`, unless each of them is a dense tensor."""
    for name, tensor in tensors.items():
        check_dense(tensor, f"{owner}: {name}")


def check_parts(parts: object, name: str = "parts") -> None:
    """FormatError unless it maps names to dense tensors."""
    if not isinstance(parts, Mapping) or not len(parts):
        raise FormatError(f"{name} is {shown(parts)}; give {{name: tensor}}, as fdk.quantise.quantise makes it")
    for part, tensor in parts.items():
        check_dense(tensor, str(part))


def check_module(value: object, name: str, remedy: str = "give a torch.nn.Module") -> None:
    """FormatError unless it is a module."""
    if not isinstance(value, nn.Module):
        raise FormatError(f"{name} is {shown(value)}, not a torch.nn.Module; {remedy}")


def check_dtype(value: object, name: str, allowed: Sequence[torch.dtype]) -> None:
    """FormatError unless it is one of the dtypes."""
    if not isinstance(value, torch.dtype) or value not in allowed:
        raise FormatError(f"{name} {shown(value)} is not supported; use {_listed(map(str, allowed))}")


def check_name(value: object, what: str, known: Sequence[str], owner: str = "") -> None:
    """FormatError, after the name of the `owner`, unless it is one of the names."""
    if not isinstance(value, str) or value not in known:
        raise FormatError(
            f"{owner + ': ' * bool(owner)}unknown {what} {shown(value)}; choose one of {', '.join(known)}"
        )


def check_callable(value: object, name: str, signature: str) -> None:
    """FormatError unless it is None or can be called."""
    if value is not None and not callable(value):
        raise FormatError(f"{name} is {shown(value)}, which cannot be called; give a function {signature} or None")


def as_integer(value: object, name: str) -> int:
    """The whole number that it is, numpy's and torch's too; FormatError for anything else, such as True and 2.0."""
    try:
        if not isinstance(value, bool):
            return index(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise FormatError(f"{name} is {shown(value)}, not a whole number; give an int")


def as_integers(values: object, name: str) -> tuple[int, ...]:
    """The whole numbers in it; FormatError if it holds others, or is a single value or text."""
    try:
        found = None if isinstance(values, str | bytes | Mapping) else tuple(values)
    except (TypeError, RuntimeError):
        found = None
    if found is None:
        raise FormatError(f"{name} is {shown(values)}, not a sequence of whole numbers; give such as (1, 8)")
    return tuple(as_integer(value, f"{name}[{i}]") for i, value in enumerate(found))


def as_path(value: object, name: str) -> Path:
    """The path that it names; FormatError if it names none."""
    if not isinstance(value, str | os.PathLike):
        raise FormatError(f"{name} is {shown(value)}, not a path; give a str or a pathlib.Path")
    return Path(value)


def _listed(words) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
