"""Tile shapes and word widths: pure functions, so they are tested without a GPU and without triton."""

from __future__ import annotations

import pytest

from fdk.formats import parse
from fdk.kernels.triton import word_bits
from fdk.kernels.triton.config import choose, choose_vector, split_count
from fdk.packing.layouts import DTYPES, Geometry


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("m", [1, 8, 16, 17, 64, 100, 1024])
def test_tiles_fit_the_codes(bits: int, m: int) -> None:
    for n, k in ((1, 1), (40, 101), (4096, 4096), (8192, 28672)):
        for size in (2, 4):
            config = choose(m, n, k, bits, True, size)
            assert config.bm >= 16 and config.bn * config.bk >= 32 * config.warps
            assert config.bk % 32 == 0 and 1 << (bits * config.pack) <= 256
            assert config.pack * size <= 8
            if config.bm <= 64 and size == 2:
                assert config.bn == 32 * config.warps, "a lane owns a row"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [16, 32, 48, 64, 112, 128])
def test_a_lane_of_the_vector_kernel_shares_a_scale(bits: int, group: int) -> None:
    for n, k in ((1, 1), (40, 112), (4096, 4096), (8192, 28672)):
        for size in (2, 4):
            config = choose_vector(n, k, bits, group, size)
            part = min(config.run, 16 // size)
            assert group % config.run == 0 and config.run // part in (1, 2, 4) and config.bk % config.run == 0
            assert config.run * bits >= 16, "two words of at least a byte, so that a lane has one run"
            assert 1 << (bits * config.pack) <= 256 and config.pack * (4 if config.wide else size) <= 8


def test_splits_cover_k_without_empty_parts() -> None:
    for steps in range(1, 300):
        for wanted in (0, 1, 3, 8, 40):
            parts = split_count(steps, wanted)
            share = -(-steps // parts)
            assert 1 <= parts <= 16 and share * (parts - 1) < steps <= share * parts


def test_words_stay_inside_rows_and_groups() -> None:
    for name, k in (("lut1_g16", 96), ("lut1_g32", 96), ("lut4_g48", 96), ("lut2_chan", 101), ("lut8_g64", 64)):
        geometry = Geometry(parse(name), 4, k, DTYPES[0], (4,))
        width, fmt = word_bits(geometry), geometry.format
        assert -(-k * fmt.bits // 8) % (width // 8) == 0
        assert fmt.group is None or fmt.group % (width // fmt.bits) == 0
    assert word_bits(Geometry(parse("lut4_g64"), 4, 64, DTYPES[0], (4,)), address=2) == 16
