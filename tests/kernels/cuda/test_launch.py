"""Host arithmetic of the decode kernel: the CTAs of a configuration cover every block of rows once."""

import re

import pytest

from fdk import testing
from fdk.formats import parse
from fdk.kernels.cuda import decode, decode_choice, decode_config, jit
from fdk.kernels.cuda.decode_config import Shape


@pytest.mark.parametrize("tables", [1, 3])
def test_ranges_cover_every_block_once(tables: int) -> None:
    weight = testing.random_weight(parse("lut4_g64"), 1000, 256, tables=tables, seed=3).to_layout("fragments")
    shape = decode_config.shape_of(weight.geometry, None)
    config = decode_choice.choose_config(shape, 1, weight.parts["codes"].shape[0], 132)
    params, ctas = decode.params_for(weight, config)
    seen = []
    ends = [params.range[i + 1].first for i in range(tables - 1)] + [ctas // config.cluster]
    for i in range(tables):
        entry = params.range[i]
        for cluster in range(entry.first, ends[i]):
            first = entry.first_block + (cluster - entry.first) * config.blocks
            blocks = range(first, min(first + config.blocks, entry.end_block))
            assert len(blocks) > 0
            seen += blocks
            assert entry.first_row + (blocks[-1] - entry.first_block) * 64 < entry.end_row
    assert seen == list(range(weight.parts["codes"].shape[0]))


@pytest.mark.parametrize("m", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n,k", [(256, 512), (22528, 3072), (28672, 4096), (43008, 6144)])
def test_gated_configurations_take_gate_and_up_together(n: int, k: int, bits: int, m: int) -> None:
    shape, blocks = Shape(n, k, bits, 64, True, decode_config.TABLE), n // 64
    config = decode_choice.choose_config(
        shape, m, blocks, 132, (9, 0), decode_config.Epilogue(squares=96, gated=True, tables=2)
    )
    assert config.blocks % 2 == 0 and config.row_warps % 2 == 0
    assert config.shared_bytes(shape) <= decode_config.MAX_SHARED
    # The kernel's `block_of` and its stride from step to step.
    seen = []
    for first in range(0, blocks, config.blocks):
        for row_warp in range(config.row_warps):
            for step in range(-(-(min(config.blocks, blocks - first) - row_warp) // config.row_warps)):
                seen.append(first // 2 + row_warp // 2 + row_warp % 2 * (n // 128) + step * config.row_warps // 2)
    assert sorted(seen) == list(range(blocks))


def test_shape_of_says_what_the_zeros_are() -> None:
    for float_zeros, kind in ((False, decode_config.UINT_U8), (True, decode_config.UINT_FLOAT)):
        weight = testing.random_weight(parse("uint4_g32"), 64, 64, float_zeros=float_zeros)
        shape = decode_config.shape_of(weight.geometry, weight.parts["zeros"].dtype)
        assert (shape.kind, shape.subs, shape.unit_groups) == (kind, 2, 2)


def test_kinds_are_called_as_in_the_sources() -> None:
    names = re.findall(r"^    ([A-Z_0-9]+),", jit.sources()["kinds.cuh"], re.MULTILINE)
    assert len(names) == 8 and [getattr(decode_config, name) for name in names] == list(range(8))


def test_ranges_are_aligned_as_in_the_sources() -> None:
    assert decode.Params.range.offset % 8 == 0
