"""Launches nested.py: tile shapes and arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fdk.formats import Format
from fdk.kernels.triton.config import choose_untuned
from fdk.weight import QuantisedWeight

# Columns at once where there is one token.
_ONE_BK = 1024


def slicing(format: Format) -> tuple[int, int, int, float, float]:
    """(half, shift, top, middle, step): a value is (min((q + half) >> shift, top) - middle) * step."""
    shift, middle = format.bits - format.served, float(1 << (format.served - 1))
    if format.kind.cuts:
        return 0, shift, 255, middle - 0.5, float(1 << shift)
    return 1 << shift >> 1, shift, (1 << format.served) - 1, middle, float(1 << shift)


def launch_nested(x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor, interpreted: bool) -> None:
    """out [m, n] = x [m, k] W^T + bias for a nested weight in the canonical layout, k > 0."""
    from fdk.kernels.triton.nested import nested_product

    geometry, parts, fmt = weight.geometry, weight.parts, weight.format
    (m, k), n = x.shape, geometry.n
    dot = m > 1
    bm, bn, bk, warps = choose_untuned(m, x.element_size(), _ONE_BK)
    planes = parts["planes"]
    whole = planes.shape[2] % 4 == 0 and planes.data_ptr() % 4 == 0
    words = planes.view(torch.uint32) if whole else planes
    nested_product[(-(-n // bn), -(-m // bm) if dot else 1)](
        x,
        words,
        parts["scales"],
        x if bias is None else bias,
        out,
        m,
        n,
        k,
        words.shape[2],
        geometry.groups,
        geometry.group_size,
        *slicing(fmt),
        -(-k // bk),
        PLANES=fmt.read_bits,
        BIAS=bias is not None,
        DOT=dot,
        OCTETS=4 if whole else 1,
        BN=bn,
        BM=bm,
        BK=bk,
        STEPS=-(-k // bk) if interpreted else 0,
        INTERPRETED=interpreted,
        num_warps=warps,
    )
