"""Whether a model fits where it is to go, and at which widths it would."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fdk import device as devices
from fdk.errors import FdkError
from fdk.formats import Format
from fdk.formats.registry import LUT
from fdk.models.checkpoint import METHOD
from fdk.models.tensors import TensorFiles

# What the cache, activations and the largest layer on its way into its layout take beside the weights.
SHARE = 0.9


def folder_room(folder: Path, config: dict, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """FdkError if the model of a folder, as it is stored or dense in `dtype`, does not fit on `device`.

    Only headers are read. The message says how much is missing, and which widths would fit.
    """
    files = TensorFiles(folder)
    specs = {name: files.spec(name) for name in files}
    stored = config.get("quantization_config")
    layers: list[tuple[int, int]] = []
    if isinstance(stored, dict) and stored.get("quant_method") == METHOD:
        sizes = {name: kind.itemsize * torch.Size(shape).numel() for name, (kind, shape) in specs.items()}
        owners = {name for name, entry in stored.get("layers", {}).items() if "same_as" not in entry}
        layers = [tuple(stored["layers"][name]["shape"]) for name in owners]
        rest = sum(size for name, size in sizes.items() if name.rpartition(".")[0] not in owners)
    else:
        sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (_, shape) in specs.items()}
        linear = {name for name, (_, shape) in specs.items() if len(shape) == 2 and not _is_vocabulary(name)}
        layers = [specs[name][1] for name in linear]
        rest = sum(size for name, size in sizes.items() if name not in linear)
    check_room(str(folder), sum(sizes.values()), layers, rest, device)


def _is_vocabulary(name: str) -> bool:
    return any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


def check_room(name: str, needed: int, layers: Iterable[tuple[int, int]], rest: int, device: torch.device) -> None:
    """FdkError unless `needed` bytes fit on `device`.

    layers: shapes [n, k] of what could be narrower; rest: bytes of everything else.
    """
    _, free = devices.memory(device)
    room = int(SHARE * free)
    if needed <= room:
        return
    layers = list(layers)
    fitting = [bits for bits in LUT.bits if rest + sum(_bytes(bits, n, k) for n, k in layers) <= room]
    advice = (
        f"at {max(fitting)} bits a weight or fewer it would fit (fdk quantise --bits {max(fitting)})"
        if fitting
        else f"no width makes it fit, because {rest / 1e9:.2f} GB stay dense; use a smaller model or another device"
    )
    raise FdkError(
        f"{name} needs {needed / 1e9:.2f} GB on {device}, {(needed - room) / 1e9:.2f} GB more than "
        f"{SHARE:.0%} of what is free there ({free / 1e9:.2f} GB); {advice}"
    )


def _bytes(bits: int, n: int, k: int) -> int:
    return Format(LUT, bits, 64 if k % 64 == 0 else None).nbytes(n, k)
