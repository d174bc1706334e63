"""Projections of the same input merged into one product, of whose weight they stay views: one copy in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from fdk.nn import Linear
from fdk.packing import fragments
from fdk.packing.layouts import Geometry
from fdk.weight import QuantisedWeight


class Beside(nn.Module):
    """Outputs of several layers beside each other, for layers that cannot become one."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def merge_(layers: Sequence[nn.Module]) -> nn.Module:
    """A module whose output [..., n1 + n2 + ...] is that of `layers` beside each other, in one product if possible.

    The layers' weights become views of the merged one and stay what they were. Dense layers merge if all are dense;
    quantised ones if they share format, dtype and kernel, lie in the layout `fragments`, and have whole blocks of rows.
    """
    first = layers[0]
    if all(type(layer) is nn.Linear for layer in layers):
        return _merge_dense(layers)
    if all(type(layer) is Linear and layer.kernel == first.kernel for layer in layers) and _alike(layers):
        return _merge_quantised(layers)
    return Beside(layers)


def _alike(layers: Sequence[Linear]) -> bool:
    def kind(layer: Linear) -> tuple:
        geometry, parts = layer.weight.geometry, layer.weight.parts
        dtypes = tuple((name, part.dtype) for name, part in parts.items())
        return geometry.format, geometry.k, geometry.dtype, layer.weight.layout, layer.weight.device, dtypes

    first = layers[0].weight
    whole = all(end % fragments.BLOCK == 0 for layer in layers for end in layer.weight.geometry.row_ends)
    return first.layout == fragments.FRAGMENTS.name and whole and len({kind(layer) for layer in layers}) == 1


def _merge_bias(layers: Sequence[nn.Module]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    some = next(layer.bias for layer in layers if layer.bias is not None)
    return torch.cat([some.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


def _merge_dense(layers: Sequence[nn.Linear]) -> nn.Linear:
    sizes = [layer.out_features for layer in layers]
    bias = _merge_bias(layers)
    merged = nn.Linear(layers[0].in_features, sum(sizes), bias=bias is not None, device="meta")
    merged.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if bias is not None:
        merged.bias = nn.Parameter(bias, requires_grad=False)
    for layer, view in zip(layers, merged.weight.detach().split(sizes), strict=True):
        layer.weight = nn.Parameter(view, requires_grad=False)
    return merged


def _merge_quantised(layers: Sequence[Linear]) -> Linear:
    merged, views = merged_weight([layer.weight for layer in layers])
    for layer, view in zip(layers, views, strict=True):
        layer._hold(view)
    return Linear(merged, _merge_bias(layers), layers[0].kernel)


def merged_weight(weights: Sequence[QuantisedWeight]) -> tuple[QuantisedWeight, list[QuantisedWeight]]:
    """The rows of `weights` in one weight, as `fdk.concat` has them, and the weights again as views of its bits.

    All are in the layout `fragments` and alike in format, k and dtypes; every table's range of rows is whole blocks.
    """
    first = weights[0].geometry
    starts = [0, *accumulate(weight.geometry.n for weight in weights)]
    per_range = first.format.is_table and first.format.kind.table != "fixed"
    ends = [start + end for start, w in zip(starts, weights, strict=False) for end in w.geometry.row_ends]
    geometry = Geometry(first.format, starts[-1], first.k, first.dtype, tuple(ends) if per_range else (starts[-1],))
    spare = fragments.spare_groups(first)
    parts = {}
    for name, part in weights[0].parts.items():
        pieces = [weight.parts[name] for weight in weights]
        if name in ("scales", "zeros"):
            stored = [piece[: len(piece) - spare] for piece in pieces]
            parts[name] = torch.cat([*stored, part.new_zeros(spare, fragments.BLOCK)])
        elif name == "table" and not per_range:
            parts[name] = part
        else:
            parts[name] = torch.cat(pieces)
    views = []
    for weight, (start, end) in zip(weights, pairwise(starts), strict=True):
        blocks = slice(start // fragments.BLOCK, end // fragments.BLOCK)
        # Spare rows are read but multiplied by zero, so that they may be the next weight's.
        groups = slice(blocks.start * first.groups, blocks.stop * first.groups + spare)
        own = {name: parts[name][groups] for name in ("scales", "zeros") if name in parts}
        own |= {"table": weight.parts["table"]} if "table" in parts else {}
        views.append(QuantisedWeight(weight.geometry, {"codes": parts["codes"][blocks], **own}, weight.layout))
    return QuantisedWeight(geometry, parts, weights[0].layout), views
