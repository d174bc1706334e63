"""Which kernels the products of a quantised folder will need, from its headers alone; no GPU is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from fdk.kernels.cuda import attend, jit
from fdk.kernels.cuda.prebuild import Product, Target
from fdk.models.chain import Products, arranged, sources, tables_of
from fdk.models.checkpoint import joined, layer_specs, quantisation_of
from fdk.models.llama import RELATIVES, LlamaConfig
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


def _kinds(folder: Path, files: TensorFiles) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for name, spec in layer_specs(quantisation_of(read_config(folder), folder), files).items():
        zeros = files.spec(joined(spec.same_as or name, "zeros"))[0] if spec.geometry.format.has_zeros else None
        kinds[name] = spec.geometry, zeros
    return kinds


def _group(kinds: dict[str, Kind], prefix: str, names: Iterable[str]) -> Kind | None:
    group = [kinds.get(joined(prefix, name)) for name in names]
    return merged(group) if all(group) else None


def products(folder: Path, rows: Iterable[int]) -> list[Product]:
    """Products of those rows of x with the layers of a folder that fdk wrote, and with those that merge.

    FormatError as for `fdk.load`.
    """
    kinds, rows = _kinds(folder, TensorFiles(folder)), tuple(rows)
    wanted = dict.fromkeys(kinds.values())
    for first in kinds:
        prefix, _, last = first.rpartition(".")
        for names in _MERGED:
            if last == names[0] and (kind := _group(kinds, prefix, names)):
                wanted[kind] = None
    return [Product(*kind, m) for kind in wanted for m in rows]


def step_sources(folder: Path, batch: int, target: Target) -> list[jit.Source]:
    """What `models.step.Step` compiles beside plain products for `batch` sequences: epilogues and attention, by NVRTC.

    Nothing for models that it does not decode.
    """
    stored = read_config(folder)
    if (stored.get("architectures") or [None])[0] not in RELATIVES:
        return []
    config, files = LlamaConfig.from_hf(stored), TensorFiles(folder)
    kinds = _kinds(folder, files)
    layers = [_layer(kinds, f"model.layers.{i}", batch) for i in range(config.num_hidden_layers)]
    # As `chain.reason_against` has it.
    layers = [
        one if one and all(product.geometry.dtype == torch.bfloat16 for product in one) else None for one in layers
    ]

    def tables(i: int) -> int:
        gate, up = (f"model.layers.{i}.mlp.{name}.table" for name in _MERGED[1])
        return tables_of(torch.stack([files.get(gate)[0], files.get(up)[0]]) if gate in files else None)

    found = {repr(source): source for source in sources(layers, arranged(layers, tables, target), target)}
    heads = batch * config.num_key_value_heads
    if target.capability >= (9, 0) and heads <= target.sms:
        queries = config.num_attention_heads // config.num_key_value_heads
        types = {dtype == torch.bfloat16 for dtype in {geometry.dtype for geometry, _ in kinds.values()}}
        for length in range(1, _LENGTHS + 1):
            for is_bf16 in types:
                chosen = attend.choose_config(
                    config.head_dim, queries, heads, length, is_bf16, config.qk_norm, target.sms
                )
                if chosen:
                    source = attend.source(chosen, target.capability)
                    found[repr(source)] = source
    return list(found.values())


_LENGTHS = 1 << 15
"""Positions of a cache from which on the attention's configuration does not change."""


def _layer(kinds: dict[str, Kind], prefix: str, batch: int) -> Products | None:
    """The products of a decoder layer, None if one of them is not low-bit or merged."""
    found = [
        _group(kinds, f"{prefix}.self_attn", _MERGED[0]),
        kinds.get(f"{prefix}.self_attn.o_proj"),
        _group(kinds, f"{prefix}.mlp", _MERGED[1]),
        kinds.get(f"{prefix}.mlp.down_proj"),
    ]
    return Products(*(Product(*kind, batch) for kind in found)) if all(found) else None
