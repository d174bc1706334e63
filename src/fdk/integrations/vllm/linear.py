"""vLLM's linear layers on fdk's products: one product for all projections of a layer that share a format.

While the checkpoint is read, every part is an empty placeholder whose loader hands tensors to the sources; afterwards
the layer holds the tensors that the kernels read, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import pad

from fdk import ops
from fdk.errors import FormatError
from fdk.integrations.vllm import interfaces as vllm
from fdk.integrations.vllm.sources import Place, Source
from fdk.models.checkpoint import GUARD
from fdk.weight import QuantisedWeight, concat, encode_spec

SHARDS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Product:
    """One product of a layer: its weight, and how a compiled graph finds its tensors in the layer."""

    weight: QuantisedWeight | Tensor
    names: tuple[str, ...]
    spec: str
    rows: int


class FdkLinearMethod(vllm.LinearMethodBase):
    """y = x @ W.T + bias, where W is one low-bit weight or several below each other.

    names: what the checkpoint calls the projections, in the order of their rows.
    """

    def __init__(self, config, names: list[str]) -> None:
        self.config, self.names = config, names

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        device = torch.empty(0).device
        places = _places(layer, self.names, output_partition_sizes, input_size_per_partition)
        layer.fdk_sources = [
            self.config.source(name, place, params_dtype, device)
            for name, place in zip(_repeat(self.names, len(places)), places, strict=True)
        ]
        layer.fdk_products = ()
        layer.fdk_missing_rows = sum(output_partition_sizes) - sum(place.n for place in places)
        for part in _parts(layer.fdk_sources):
            floating = part in ("weight", "scales", "table")
            empty = torch.empty(0, dtype=params_dtype if floating else torch.uint8)
            placeholder = torch.nn.Parameter(empty, requires_grad=False)
            placeholder.weight_loader = _loader(layer.fdk_sources, part, len(self.names))
            layer.register_parameter(part, placeholder)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if layer.fdk_products:
            return
        sources: list[Source] = layer.fdk_sources
        if _dummy():
            for source in sources:
                source.invent()
        weights = [source.finish() for source in sources]
        for part in _parts(sources)[1:]:
            delattr(layer, part)
        # vLLM asks an attribute of this name for the layer's device: attention with latent heads, adapters.
        layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
        layer.fdk_sources.clear()
        products = []
        while weights:
            index = len(products)
            weight, count = _first_run(weights)
            del weights[:count]
            products.append(hold(layer, weight, index))
        layer.fdk_products = tuple(products)
        _warm(products)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        products = layer.fdk_products
        if len(products) == 1 and not layer.fdk_missing_rows:
            return multiply(layer, products[0], x, bias)
        biases = [None] * len(products) if bias is None else bias.split([product.rows for product in products])
        pieces = [multiply(layer, product, x, part) for product, part in zip(products, biases, strict=True)]
        y = torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]
        return pad(y, (0, layer.fdk_missing_rows)) if layer.fdk_missing_rows else y


def multiply(layer: torch.nn.Module, product: Product, x: Tensor, bias: Tensor | None) -> Tensor:
    """x times one product's weight plus bias; in a graph that is being compiled, by the op."""
    if isinstance(product.weight, Tensor):
        return dense_linear(x, getattr(layer, product.names[0]), bias)
    if torch.compiler.is_compiling():
        parts = [getattr(layer, name) for name in product.names]
        return torch.ops.fdk.linear(x, parts, bias, product.spec, "auto")
    return ops.run(x, product.weight, bias)


def _parts(sources: list[Source]) -> list[str]:
    """Every tensor that the checkpoint may hold of a layer; `weight` also where it is only a folder's guard."""
    return list(dict.fromkeys(["weight", *(part for source in sources for part in source.parts)]))


def _repeat(names: list[str], count: int) -> list[str]:
    return names if len(names) == count else names * count


def _places(layer: torch.nn.Module, names: list[str], sizes: list[int], k: int) -> list[Place]:
    """Where each of the layer's local row ranges lies in the checkpoint's tensors."""
    world = getattr(layer, "tp_size", None) or vllm.tensor_parallel_size()
    rank = getattr(layer, "tp_rank", None)
    rank = vllm.tensor_parallel_rank() if rank is None else rank
    if indices := getattr(layer, "shard_indices", None):
        rows = indices.org_vocab_start_index, indices.org_vocab_end_index
        return [Place(rank, world, rows[1] - rows[0], k, rows=rows)]
    if len(names) == len(sizes):
        return [Place(rank, world, size, k) for size in sizes]
    if len(names) > 1:
        raise FormatError(f"{names[0]} and others make {len(names)} projections, but the layer has {len(sizes)}")
    # One tensor on disk holds several projections, which are cut one by one.
    totals = _rows_on_disk(layer, sizes, world)
    offsets = [sum(totals[:index]) for index in range(len(totals))]
    return [
        Place(rank, world, size, k, offset, total) for size, offset, total in zip(sizes, offsets, totals, strict=True)
    ]


def _rows_on_disk(layer: torch.nn.Module, sizes: list[int], world: int) -> list[int]:
    heads = getattr(layer, "total_num_heads", None), getattr(layer, "total_num_kv_heads", None)
    if len(sizes) == 3 and None not in heads:
        return [heads[0] * layer.head_size, heads[1] * layer.head_size, heads[1] * layer.v_head_size]
    return list(getattr(layer, "output_sizes", [size * world for size in sizes]))


def _loader(sources: list[Source], part: str, names: int) -> Callable:
    """vLLM's weight loader of one part: (parameter, tensor on disk, which projection of a merged layer)."""

    def load(parameter: Tensor, tensor: Tensor, shard: str | int | None = None) -> None:
        tensor = tensor.detach()
        if part == "weight" and tuple(tensor.shape) == GUARD[1]:
            return
        if shard is None and names == 1:
            for source in sources:
                source.load(part, tensor)
            return
        index = SHARDS.get(shard, shard)
        if not isinstance(index, int) or not 0 <= index < len(sources):
            raise FormatError(f"{sources[0].name}.{part}: vLLM asks for shard {shard!r} of {len(sources)} projections")
        if part in sources[index].parts:
            sources[index].load(part, tensor)

    return load


def _first_run(weights: list[QuantisedWeight | Tensor]) -> tuple[QuantisedWeight | Tensor, int]:
    """The first weights that can be one product, merged, and how many they are."""

    def kind(weight: QuantisedWeight | Tensor) -> tuple:
        if isinstance(weight, Tensor):
            return ("dense",)
        return weight.format, weight.shape[1], *(part.dtype for part in weight.parts.values())

    _, run = next(groupby(weights, kind))
    run = list(run)
    if len(run) == 1:
        return run[0], 1
    return (torch.cat(run) if isinstance(run[0], Tensor) else concat(run)), len(run)


def hold(layer: torch.nn.Module, weight: QuantisedWeight | Tensor, index: int) -> Product:
    """Put a weight's tensors into the layer, in the layout of the kernel that serves it."""
    if isinstance(weight, Tensor):
        parts, rows, spec = {"weight": weight}, weight.shape[0], ""
    else:
        ops.prepare(weight)
        parts, rows, spec = weight.parts, weight.shape[0], encode_spec(weight)
    names = tuple(f"fdk{index}_{part}" for part in parts)
    for name, part in zip(names, parts.values(), strict=True):
        layer.register_parameter(name, torch.nn.Parameter(part, requires_grad=False))
    return Product(weight, names, spec, rows)


def _dummy() -> bool:
    return str(getattr(vllm.current_config().load_config, "load_format", "")).endswith("dummy")


def _warm(products: list[Product]) -> None:
    """Compile and load what CUDA graphs will capture: every kernel for the numbers of rows to come."""
    config = vllm.current_config()
    sizes = {1, *(getattr(config.compilation_config, "cudagraph_capture_sizes", None) or ())}
    for product in products:
        weight = product.weight
        if isinstance(weight, QuantisedWeight) and weight.device.type == "cuda":
            for m in sizes:
                ops.run(torch.zeros(m, weight.shape[1], dtype=weight.dtype, device=weight.device), weight, None)
