"""What a quantised folder holds, from its headers alone: layers, formats, memory, kernels and why, how it decodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from fdk import kernels, ops
from fdk.errors import FdkError
from fdk.models.checkpoint import layer_specs, quantisation_of
from fdk.models.llama import RELATIVES, LlamaConfig
from fdk.models.skeleton import read_config
from fdk.models.tensors import TensorFiles

COLUMNS = ("layer", "format", "kernel on {device}", "shape", "bits", "SQNR dB", "MB")


@dataclass(frozen=True)
class Inventory:
    """`rows` under COLUMNS, one a layer; then lines of text: the choice of every kernel, decoding, the sum."""

    rows: list[tuple[str, ...]]
    kernels: list[str]
    decoding: str
    summary: str


def inventory(folder: Path, device: torch.device) -> Inventory:
    """The inventory of a folder that fdk wrote, for a product of one row on `device`; FormatError as for `load`."""
    config = read_config(folder)
    files = TensorFiles(folder)
    layers = layer_specs(quantisation_of(config, folder), files)
    rows, low_bytes, weights = [], 0, 0
    served: dict[tuple[str, str], kernels.Problem] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for layer, spec in layers.items():
        geometry = spec.geometry
        size = geometry.format.nbytes(geometry.n, geometry.k, geometry.dtype.itemsize, len(geometry.row_ends), 1)
        if spec.same_as is None:
            low_bytes, weights = low_bytes + size, weights + geometry.n * geometry.k
        problem = kernels.Problem(1, geometry, device)
        kind = str(geometry.format), kernels.choose(problem).kernel.name
        served.setdefault(kind, problem)
        counts[kind] += 1
        rows.append(
            (
                (layer or "(the layer)") + ("" if spec.same_as is None else f" = {spec.same_as}"),
                *kind,
                f"{geometry.n} x {geometry.k}",
                f"{8 * size / max(1, geometry.n * geometry.k):.3f}",
                "-" if spec.sqnr_db is None else f"{spec.sqnr_db:.1f}",
                f"{size / 1e6:.3f}",
            )
        )
    total = stored_bytes(files)
    what = (config.get("architectures") or [config.get("fdk_module", "model")])[0] if config else "model"
    return Inventory(
        rows,
        [f"{_of_layers(counts[kind])}{ops.explain_problem(problem)}" for kind, problem in served.items()],
        _decoding(config, device),
        f"{folder}: {what}, {len(layers)} low-bit layers, {weights:,} weights in {size_text(low_bytes)} "
        f"({8 * low_bytes / max(1, weights):.3f} bits each), {size_text(total - low_bytes)} dense, "
        f"{size_text(total)} in all",
    )


def _of_layers(count: int) -> str:
    """What stands before the explanation of the first of several layers of one format."""
    return f"the first of {count} layers: " if count > 1 else ""


def _decoding(config: dict, device: torch.device) -> str:
    """How `fdk generate` would decode the model."""
    name = (config.get("architectures") or ["module"])[0]
    if name not in RELATIVES:
        return f"decoding: by the forward of transformers, because a {name} is not built like {', '.join(RELATIVES)}"
    try:
        window = LlamaConfig.from_hf(config).sliding_window
    except FdkError as error:
        return f"decoding: by the forward of transformers, because {error}"
    how = "one CUDA graph a token" if device.type == "cuda" else "by the forward of fdk's Llama, as there is no GPU"
    return f"decoding: {how}" + (f", up to {window} positions (sliding_window)" if window else "")


def size_text(count: int) -> str:
    """Bytes for people: 12.3 MB, 4.56 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def stored_bytes(files: TensorFiles) -> int:
    """Bytes of all tensors of the files."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in map(files.spec, files))
