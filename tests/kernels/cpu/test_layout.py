"""rows16: the library and its torch twin write the same bytes, and both give the canonical parts back."""

from __future__ import annotations

import pytest
import torch

from fdk import testing
from fdk.formats import all_formats, parse
from fdk.kernels.cpu import library
from fdk.kernels.cpu.launch import LAYOUT
from fdk.packing.rows16 import Rows16, sizes

TWIN = Rows16()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def weights():
    for fmt in all_formats((16, 48, 64, None)):
        for n, k in ((45, 192), (1, 48 if fmt.group == 48 else 64), (64, 384)):
            yield testing.random_weight(fmt, n, k, torch.bfloat16, seed=n, tables=3)
        if fmt.has_zeros:
            yield testing.random_weight(fmt, 20, 192, torch.float32, seed=1, float_zeros=True)
        if fmt.group is None:
            yield testing.random_weight(fmt, 33, 101 * fmt.k_multiple, torch.float16, seed=2, tables=2)


def test_library_and_twin_agree_byte_for_byte() -> None:
    if library.library() is None:
        pytest.skip(library.why_not())
    for weight in weights():
        native, twin = (layout.pack(weight.geometry, weight.parts) for layout in (LAYOUT, TWIN))
        assert torch.equal(native["data"], twin["data"]), weight
        for layout in (LAYOUT, TWIN):
            again = layout.unpack(weight.geometry, native)
            assert list(again) == list(weight.parts), weight
            assert all(same_bits(again[name], part) for name, part in weight.parts.items()), (layout, weight)


def test_scale_bits_survive() -> None:
    weight = testing.random_weight(parse("int4_g16"), 17, 32)
    weight.parts["scales"][0, 0] = -0.0
    weight.parts["scales"][1, 1] = 2.0**-133  # subnormal in bfloat16
    for layout in (LAYOUT, TWIN):
        again = layout.unpack(weight.geometry, layout.pack(weight.geometry, weight.parts))
        assert same_bits(again["scales"], weight.parts["scales"])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [16, 48, 64])
def test_codes_take_exactly_their_bits(bits: int, group: int) -> None:
    """n a multiple of 16 and k of two groups: nothing but codes, scales and zeros, up to a cache line a block."""
    n, k = 64, 384
    weight = testing.random_weight(parse(f"uint{bits}_g{group}"), n, k)
    data = weight.to_layout(LAYOUT.name).parts["data"]
    exact = n * k * bits // 8 + n * (k // group) * 3
    assert exact <= data.numel() < exact + 64 * (n // 16)
    assert sizes(weight.geometry, torch.uint8).k_padded == k


def test_zeros_keep_their_dtype_without_elements() -> None:
    for float_zeros, dtype in ((False, torch.uint8), (True, torch.float16)):
        weight = testing.random_weight(parse("uint3_g32"), 8, 64, torch.float16, float_zeros=float_zeros)
        assert weight.to_layout(LAYOUT.name).parts["zeros"].dtype == dtype
        assert weight.to_layout(LAYOUT.name).parts["zeros"].numel() == 0
