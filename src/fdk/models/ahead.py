"""Which kernels the products of a quantised folder will need, from its headers alone; no GPU is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from fdk.kernels.cuda.prebuild import Product
from fdk.models.checkpoint import joined, layer_specs, quantisation_of
from fdk.models.skeleton import read_config
from fdk.models.tensors import TensorFiles
from fdk.packing.fragments import BLOCK
from fdk.packing.layouts import Geometry

_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of the same input, which decoding and vLLM merge into one product."""

Kind = tuple[Geometry, "torch.dtype | None"]


def merged(kinds: Sequence[Kind]) -> Kind | None:
    """What weights below each other are as one weight, if they merge: `models.merge.merge_`."""
    (first, zeros), ends = kinds[0], [0, *accumulate(geometry.n for geometry, _ in kinds)]
    alike = {(geometry.format, geometry.k, geometry.dtype, own) for geometry, own in kinds}
    row_ends = [start + end for start, (g, _) in zip(ends, kinds, strict=False) for end in g.row_ends]
    if len(alike) > 1 or any(end % BLOCK for end in row_ends):
        return None
    tables = first.format.is_table and first.format.kind.table != "fixed"
    return Geometry(first.format, ends[-1], first.k, first.dtype, tuple(row_ends) if tables else (ends[-1],)), zeros


def products(folder: Path, rows: Iterable[int]) -> list[Product]:
    """Products of those rows of x with the layers of a folder that fdk wrote, and with those that merge.

    FormatError as for `fdk.load`.
    """
    files = TensorFiles(folder)
    specs = layer_specs(quantisation_of(read_config(folder), folder), files)
    kinds: dict[str, Kind] = {}
    for name, spec in specs.items():
        zeros = files.spec(joined(spec.same_as or name, "zeros"))[0] if spec.geometry.format.has_zeros else None
        kinds[name] = spec.geometry, zeros
    wanted = dict.fromkeys(kinds.values())
    for names in _MERGED:
        for first in kinds:
            prefix, _, last = first.rpartition(".")
            group = [kinds.get(joined(prefix, name)) for name in names]
            if last == names[0] and all(group) and (kind := merged(group)):
                wanted[kind] = None
    return [Product(*kind, m) for kind in wanted for m in rows]
