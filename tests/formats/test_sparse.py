"""16:32 sparse formats: the layout's definition, golden vectors of the source, masks that do not fit."""

from __future__ import annotations

import pytest
import torch

import fdk
from fdk import reference, testing
from fdk.formats import all_formats, parse
from fdk.packing.sparse import check_keep, pack_mask, spread_kept, take_kept, unpack_mask
from fdk.weight import QuantisedWeight

SPARSE = [fmt for fmt in all_formats((32, 64, None)) if fmt.sparse]


def random_keep(n: int, k: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(n, k // 32, 32, generator=torch.Generator().manual_seed(seed)).argsort(2)
    return (order < 16).flatten(1)


def test_mask_and_kept_codes_round_trip() -> None:
    keep = random_keep(5, 96)
    values = torch.arange(5 * 96).view(5, 96)
    assert torch.equal(unpack_mask(pack_mask(keep), 96), keep)
    kept = take_kept(values, keep)
    assert kept.shape == (5, 48) and (kept.diff() > 0).all()
    assert torch.equal(spread_kept(kept, keep), values * keep)


def test_a_weight_by_hand() -> None:
    """Columns 1, 3, 5, ... are kept with codes 0 to 15: bytes 0xaa of mask, nibbles in order."""
    parts = {
        "codes": torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8),
        "mask": torch.full((1, 4), 0xAA, dtype=torch.uint8),
        "scales": torch.tensor([[2.0]]),
    }
    dense = reference.dequantise(QuantisedWeight.from_parts("int4_chan_sp16of32", 32, parts))
    assert dense[0, 0::2].eq(0).all() and dense[0, 1::2].tolist() == [2.0 * (code - 8) for code in range(16)]


@pytest.mark.parametrize("fmt", SPARSE, ids=str)
def test_dropped_weights_are_exactly_zero(fmt) -> None:
    weight = testing.random_weight(fmt, 33, 192, tables=2 if fmt.kind.table == "stored" else 1)
    keep = unpack_mask(weight.parts["mask"], 192)
    dense = reference.dequantise(weight)
    assert (dense[~keep] == 0).all() and (dense[keep] != 0).float().mean() > 0.8
    y = fdk.linear(torch.eye(192).bfloat16(), weight)
    assert torch.equal(y, dense.T)


def test_bytes_are_three_bits_a_weight() -> None:
    assert parse("int4_g128_sp16of32").nbytes(64, 1024) == 64 * 1024 * 3 // 8 + 64 * 8 * 2
    weight = testing.random_weight(parse("int4_g128_sp16of32"), 64, 1024)
    assert weight.nbytes == weight.format.nbytes(64, 1024)
    assert weight.to_layout("rows16").nbytes == weight.nbytes


def test_merged_weights_keep_their_masks() -> None:
    weights = [testing.random_weight(parse("lut4_g32_sp16of32"), n, 64, seed=n) for n in (5, 16)]
    merged = fdk.concat(weights)
    assert torch.equal(reference.dequantise(merged), torch.cat([reference.dequantise(w) for w in weights]))


def test_masks_that_keep_other_than_sixteen_are_refused() -> None:
    weight = testing.random_weight(parse("int4_g64_sp16of32"), 4, 128)
    weight.parts["mask"][2, 9] ^= 1
    with pytest.raises(fdk.FormatError, match=r"proj: mask keeps 1[57] of the 32 weights of row 2, columns 64 to 95"):
        QuantisedWeight.from_parts("int4_g64_sp16of32", 128, weight.parts, name="proj")
    with pytest.raises(fdk.FormatError, match="keep keeps 32 of the 32 weights of row 0, columns 0 to 31"):
        check_keep(torch.ones(2, 64, dtype=torch.bool), "keep")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4_g48_sp16of32", "group size 48 cuts blocks of 32 weights"),
        ("int3_g64_sp16of32", "int3 has no 16:32 sparse form; choose int4"),
        ("nest8_g64_sp16of32", "nest8 has no 16:32 sparse form"),
        ("int4_g64_sp8of32", "keeps 8 of 32 weights; fdk keeps 16 of 32"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(fdk.FormatError, match=message):
        parse(name)


def test_k_must_hold_whole_blocks() -> None:
    with pytest.raises(fdk.FormatError, match="k = 48 is not a multiple of 32, of which int4_chan_sp16of32 keeps 16"):
        parse("int4_chan_sp16of32").groups(48)
    assert parse("int4_chan_sp16of32").k_multiple == 32 and parse("int4_g96_sp16of32").k_multiple == 96
