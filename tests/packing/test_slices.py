"""Shards of every format: cut along n and k, joined again, and held to the dense weight bit for bit."""

from __future__ import annotations

import pytest
import torch

import fdk
from fdk import reference, testing
from fdk.formats import all_formats
from fdk.kernels.cpu.launch import LAYOUT as ROWS16
from fdk.packing.fragments import FRAGMENTS
from fdk.weight import QuantisedWeight, concat

FORMATS = [fmt for fmt in all_formats((16, 32, None)) if fmt.group or fmt.bits in (1, 3, 4, 8)]


def equal(a: QuantisedWeight, b: QuantisedWeight) -> bool:
    return a.geometry == b.geometry and all(torch.equal(a.parts[name], b.parts[name]) for name in a.parts)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_shards_are_the_slices_of_the_dense_weight_and_join_to_it(fmt, dim: int) -> None:
    for world in (1, 2, 3):
        weight = testing.random_weight(fmt, 36, 192, tables=3 if fmt.kind.table == "stored" else 1, seed=world)
        shards = [weight.shard(dim, rank, world) for rank in range(world)]
        dense = reference.dequantise(weight, torch.float64)
        for shard, expected in zip(shards, dense.chunk(world, dim), strict=True):
            assert shard.layout == "canonical" and shard.format == fmt
            assert torch.equal(reference.dequantise(shard, torch.float64), expected)
        assert equal(concat(shards, dim), weight)


@pytest.mark.parametrize("bits", [1, 3, 5, 7])
def test_columns_that_no_byte_ends_are_packed_again(bits: int) -> None:
    weight = testing.random_weight(fdk.parse(f"lut{bits}_chan"), 5, 39)
    shards = [weight.shard(1, rank, 3) for rank in range(3)]
    dense = reference.dequantise(weight)
    assert torch.equal(torch.cat([reference.dequantise(shard) for shard in shards], 1), dense)
    assert equal(concat(shards, 1), weight)


def test_fractional_zeros_go_with_their_groups() -> None:
    weight = testing.random_weight(fdk.parse("uint4_g32"), 4, 128, float_zeros=True)
    assert equal(concat([weight.shard(1, rank, 4) for rank in range(4)], 1), weight)


def test_a_shard_does_not_keep_the_whole_weight_in_memory() -> None:
    weight = testing.random_weight(fdk.parse("lut4_g32"), 8, 64)
    for part in weight.shard(0, 1, 2).parts.values():
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_a_shard_of_a_prepared_weight_is_the_same() -> None:
    weight = testing.random_weight(fdk.parse("lut4_g32"), 32, 64)
    expected = weight.shard(1, 1, 2)
    assert equal(weight.to_layout(ROWS16.name).shard(1, 1, 2), expected)
    assert equal(weight.to_layout(FRAGMENTS.name).shard(1, 1, 2), expected)


@pytest.mark.parametrize(
    ("name", "shape", "dim", "world", "message"),
    [
        (
            "lut4_g64",
            (8, 192),
            1,
            2,
            "q_proj: k / 2 = 96 columns .* not a multiple of the 64 .* use 1 shard, or .* of 32",
        ),
        ("lut4_g64", (8, 256), 1, 8, "k / 8 = 32 columns .* use 4 shards, or quantise with a group of 32"),
        ("int4_g32_sp16of32", (8, 96), 1, 2, "k / 2 = 48 columns .* not a multiple of the 32 .* use 1 shard$"),
        ("int4_chan", (8, 100), 1, 3, "k = 100 cannot be cut into 3 equal shards"),
        ("int4_chan", (9, 64), 0, 2, "q_proj: n = 9 cannot be cut into 2 equal shards"),
        ("int4_chan", (8, 64), 2, 2, "dim = 2 is no dimension"),
    ],
)
def test_what_cannot_be_cut_is_refused(name, shape, dim, world, message) -> None:
    weight = testing.random_weight(fdk.parse(name), *shape)
    with pytest.raises(fdk.FormatError, match=message):
        weight.shard(dim, 0, world, name="q_proj")


def test_ranks_and_ranges_that_do_not_exist_are_refused() -> None:
    weight = testing.random_weight(fdk.parse("lut4_g32"), 8, 64)
    with pytest.raises(fdk.FormatError, match="rank = 2 of world = 2"):
        weight.shard(0, 2, 2)
    with pytest.raises(fdk.FormatError, match="rows 4 to 9 do not exist; there are 8"):
        weight.cut(0, 4, 9)
    with pytest.raises(fdk.FormatError, match="columns 16 to 64 split"):
        weight.cut(1, 16, 64)


def test_only_shards_of_one_weight_join_along_k() -> None:
    first, second = (testing.random_weight(fdk.parse("lut4_chan"), 8, 64, seed=seed) for seed in (0, 1))
    with pytest.raises(fdk.FormatError, match="weight 1 has table of its own"):
        concat([first, second], 1)
    with pytest.raises(fdk.FormatError, match="weight 1 is .* cannot be merged"):
        concat([first, testing.random_weight(fdk.parse("lut4_chan"), 9, 64)], 1)
    shared = QuantisedWeight.from_parts("lut4_chan", 64, second.parts | {"table": first.parts["table"]})
    with pytest.raises(fdk.FormatError, match="weight 1 has scales of its own"):
        concat([first, shared], 1)


def test_equal_neighbouring_tables_are_shared() -> None:
    weight = testing.random_weight(fdk.parse("lut2_g32"), 12, 32)
    other = testing.random_weight(fdk.parse("lut2_g32"), 4, 32, seed=1)
    merged = concat([weight.cut(0, 0, 4), weight.cut(0, 4, 12), other])
    assert merged.geometry.row_ends == (12, 16) and len(merged.parts["table"]) == 2
