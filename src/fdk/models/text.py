"""Texts as token ids: by a folder's tokenizer, as bytes, or as ids that are written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fdk.errors import FdkError, FormatError

BYTES = 256
"""A model of so many tokens that has no tokenizer reads bytes."""
BUILT_IN = "builtin"
"""In place of a file to calibrate on: the sources of Python's standard library, which every machine has."""
_BYTES_A_TOKEN = 16


@dataclass(frozen=True)
class Encoded:
    """What a tokenizer makes of a text."""

    ids: list[int]


class ByteTokenizer:
    """UTF-8, a token a byte, with the methods of the package tokenizers that are used here."""

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        return Encoded(list(text.encode()))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def tokenizer(folder: Path, config: Mapping):
    """The tokenizer of a model folder, bytes for a model of 256 tokens that has none.

    FdkError if there is none, or the package that reads it is missing.
    """
    path = folder / "tokenizer.json"
    if not path.exists() and config.get("vocab_size") == BYTES:
        return ByteTokenizer()
    if not path.exists():
        raise FdkError(f"{folder} has no tokenizer.json; copy the original model's there, or give token ids with --ids")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise FdkError(
            "reading tokenizer.json needs the package tokenizers: pip install "
            "'fused-dequantisation-kernels[transformers]', or give token ids with --ids"
        ) from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise FdkError(f"{path} cannot be read ({error}); restore it from the original model, or use --ids") from None


def calibration_tokens(path: Path, count: int, folder: Path | None, config: Mapping, ids: bool = False) -> Tensor:
    """int64 [at most `count`] of the beginning of a text, as `read_tokens` takes it, or of the one that is BUILT_IN.

    folder: None for a model without a tokenizer, whose built-in text are bytes, and whose files hold ids.
    """
    if str(path) != BUILT_IN:
        return read_tokens(path, folder, config, ids or folder is None)[:count]
    from fdk.models.tiny import corpus

    raw, _ = corpus()
    reader = ByteTokenizer() if folder is None else tokenizer(folder, config)
    text = raw[: count * _BYTES_A_TOKEN].numpy().tobytes().decode(errors="ignore")
    return torch.tensor(reader.encode(text, add_special_tokens=False).ids[:count], dtype=torch.int64)


def read_tokens(path: Path, folder: Path, config: Mapping, ids: bool = False) -> Tensor:
    """int64 [tokens] of the text in the file `path`, for the model in `folder` with that config.json.

    ids: the file holds token ids, separated by blanks. FormatError, naming the file, if it cannot be read.
    """
    try:
        raw = path.read_bytes()
        if ids:
            return torch.tensor([int(word) for word in raw.split()], dtype=torch.int64)
        if not (folder / "tokenizer.json").exists() and config.get("vocab_size") == BYTES:
            return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() if raw else torch.empty(0).long()
        text = raw.decode()
    except OSError as error:
        raise FormatError(f"cannot read {path} ({error.strerror}); give a text file") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 (byte {error.start}); convert it, or use --ids") from None
    except ValueError:
        raise FormatError(f"{path} holds something other than token ids; leave --ids out to read it as text") from None
    return torch.tensor(tokenizer(folder, config).encode(text, add_special_tokens=False).ids, dtype=torch.int64)
