"""What the decode kernel's configurations are: they fit everywhere, and are as measured to win where that was."""

import itertools
import re
from pathlib import Path

import pytest

from fdk.kernels.cuda import decode_choice, decode_config
from fdk.kernels.cuda.decode_choice import (
    activations,
    digits,
    even_shares,
    many_digits,
    many_tokens,
    places,
    two_places,
)
from fdk.kernels.cuda.decode_choice.case import Case
from fdk.kernels.cuda.decode_config import CUT, INT, ROUNDED, TABLE, UINT_U8, Config, Shape, shared_of_two

SHAPES = [
    (8192, 8192),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (28672, 8192),
    (1024, 4096),
    (100, 101),
    (64, 28672),
]


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (8, 9), (10, 0), (12, 0)], ids="{0[0]}.{0[1]}".format)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n,k", SHAPES)
def test_configurations_fit(n: int, k: int, bits: int, capability: tuple[int, int]) -> None:
    hopper, most_shared = capability >= (9, 0), decode_config.max_shared(capability)
    blocks = -(-n // 64)
    kinds = [decode_config.TABLE, decode_config.INT, decode_config.UINT_U8, decode_config.UINT_FLOAT]
    kinds += [decode_config.CUT] * (bits > 1) + [decode_config.SPARSE_INT, decode_config.SPARSE_TABLE] * (bits == 3)
    for kind in kinds:
        shape = Shape(n, k, bits, 64 if k % 64 == 0 else k, True, kind, bits if kind == decode_config.CUT else 0)
        for m in (1, 2, 3, 8, 16, 32, 64):
            config = decode_choice.choose_config(shape, m, blocks, 132, capability)
            if config is None:
                # x longer than what is left beside the table, or 64 tokens, which capability 9.0 alone serves.
                assert (
                    m * k * 2 > 8 * most_shared // 10
                    or not hopper
                    or (m == 64 and (capability != (9, 0) or shape.sparse))
                )
                continue
            assert m <= config.tokens
            assert not config.digits or shape.allows_digits
            assert not config.indices or shape.allows_indices
            assert config.shared_bytes(shape, hopper) <= most_shared
            assert config.threads <= 1024
            assert shape.allows_stage_units(config.stage_units, config.cluster * config.phases * config.k_warps)
            assert config.phases == 1 or config.steps == 1
            assert config.batch in (1, config.steps)
            assert hopper or config.cluster == 1
            assert hopper or (config.bulk and not config.scales_once and not config.x_sums)
            assert not config.scales_once or config.allows_scales_once(shape)


@pytest.mark.parametrize(
    "kind,bits,n,k,m,sums,once",
    [
        (decode_config.TABLE, 1, 4096, 4096, 2, True, False),
        (decode_config.TABLE, 1, 8192, 8192, 1, False, False),
        (decode_config.TABLE, 1, 8192, 8192, 8, True, False),
        (decode_config.UINT_U8, 4, 4096, 4096, 8, True, False),
        (decode_config.UINT_U8, 4, 8192, 8192, 8, True, True),
        (decode_config.UINT_U8, 4, 28672, 8192, 8, False, False),
        (decode_config.TABLE, 4, 8192, 8192, 1, False, True),
        (decode_config.TABLE, 4, 4096, 4096, 1, False, False),
        (decode_config.TABLE, 8, 4096, 4096, 1, False, True),
        (decode_config.TABLE, 8, 8192, 8192, 8, False, False),  # in pieces for all warps of a slice of k
        (decode_config.TABLE, 8, 14336, 4096, 8, False, True),
        (decode_config.TABLE, 2, 8192, 8192, 1, False, False),
        (decode_config.SPARSE_INT, 3, 8192, 8192, 1, False, True),
    ],
)
def test_sums_and_scales_come_as_measured_to_win(kind, bits, n, k, m, sums, once) -> None:
    config = decode_choice.choose_config(Shape(n, k, bits, 64, True, kind), m, n // 64, 132)
    assert (config.x_sums, config.scales_once) == (sums, once)
    assert config.bulk == (kind != decode_config.SPARSE_INT)


@pytest.mark.parametrize(
    "bits,n,k,m,warps,ring,chunks,wide,half_blocks",
    [
        (1, 8192, 8192, 8, (8, 2), (1, 2), 4, False, False),
        (4, 8192, 8192, 8, (4, 2), (1, 2), 8, True, False),
        (4, 28672, 8192, 8, (2, 7), (2, 1), 4, True, False),
        (8, 28672, 8192, 8, (2, 7), (1, 1), 8, True, False),
        (4, 4096, 14336, 8, (8, 1), (1, 2), 7, False, False),
        (4, 12288, 4096, 8, (4, 3), (1, 2), 1, False, False),
        (2, 14336, 4096, 8, (2, 4), (1, 2), 1, True, True),
        (4, 14336, 4096, 8, (2, 4), (1, 2), 1, True, True),
        (3, 14336, 4096, 8, (2, 4), (1, 2), 4, False, False),
        (8, 14336, 4096, 8, (2, 4), (1, 1), 1, False, True),
        (8, 14336, 4096, 16, (4, 4), (1, 1), 2, True, True),
        (1, 14336, 4096, 16, (2, 4), (1, 4), 4, False, False),
        (4, 16384, 4096, 8, (2, 4), (1, 2), 1, True, False),
    ],
)
def test_eight_and_sixteen_tokens_as_measured_to_win(bits, n, k, m, warps, ring, chunks, wide, half_blocks) -> None:
    config = decode_choice.choose_config(Shape(n, k, bits, 64, True, decode_config.TABLE), m, n // 64, 132)
    assert (config.k_warps, config.row_warps) == warps and (config.stages, config.stage_units) == ring
    assert (config.x_chunks, config.wide, config.half_blocks) == (chunks, wide, half_blocks) and config.uniform
    if bits == 4:
        integers = Shape(n, k, bits, 64, True, decode_config.INT)
        same = n == 28672 or not wide
        assert (decode_choice.choose_config(integers, m, n // 64, 132) == config) == same
    # A launch has a place on a multiprocessor for each of its CTAs.
    assert config.clusters(n // 64) * config.cluster <= 132


@pytest.mark.parametrize("kind", [decode_config.UINT_U8, decode_config.UINT_FLOAT])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize("n,k", SHAPES[:5])
def test_zeros_fill_a_multiprocessor_or_are_alone_on_it(n: int, k: int, m: int, kind: int) -> None:
    config = decode_choice.choose_config(Shape(n, k, 4, 64, True, kind), m, n // 64, 132)
    ahead = config.stages * config.stage_units * config.warps
    assert config.alone or config.warps > 8 or config.blocks * k // 64 // config.cluster <= 2 * ahead


@pytest.mark.parametrize("m", [2, 3, 4])
def test_fewer_tokens_of_zeros_run_as_eight_where_only_those_have_16_warps(m: int) -> None:
    kinds = (decode_config.UINT_U8, decode_config.UINT_FLOAT)
    large, floats = (Shape(8192, 8192, 4, 64, True, kind) for kind in kinds)
    small = Shape(4096, 4096, 4, 64, True, decode_config.UINT_FLOAT)
    assert decode_choice.choose_config(floats, m, 128, 132) == decode_choice.choose_config(floats, 8, 128, 132)
    for shape, blocks in ((large, 128), (small, 64)):
        assert decode_choice.choose_config(shape, m, blocks, 132).tokens == decode_choice.token_tile(m)
    assert decode_choice.choose_config(large, m, 128, 132).warps == 16


@pytest.mark.parametrize(
    "bits,n,k,m,warps,ring",
    [
        (2, 8192, 8192, 1, (8, 1), (2, 2)),
        (2, 28672, 8192, 1, (2, 7), (2, 2)),
        (2, 14336, 4096, 1, (8, 2), (1, 2)),
        (2, 4096, 14336, 1, (8, 1), (2, 2)),
        (2, 4096, 4096, 1, (8, 1), (2, 2)),
        (2, 2048, 4096, 1, (8, 1), (2, 2)),
        (2, 1024, 4096, 1, None, None),
        (1, 4096, 4096, 1, (8, 1), (1, 4)),
        (2, 8192, 8192, 2, None, None),
        (1, 8192, 8192, 1, None, None),
        (4, 8192, 8192, 1, None, None),
    ],
)
def test_codes_are_indices_where_measured_to_win(bits, n, k, m, warps, ring) -> None:
    shape, facts = Shape(n, k, bits, 64, True, decode_config.TABLE), (m, n // 64, 132, (9, 0), decode_config.PLAIN)
    config = decode_choice.choose_config(shape, *facts)
    assert config.indices == (warps is not None)
    if warps:
        assert (config.k_warps, config.row_warps) == warps and (config.stages, config.stage_units) == ring
    # Neither where a device was found to treat equal indices otherwise, nor where none was asked.
    assert decode_choice.choose_config(shape, *facts, False).indices == (bits == 1 and warps is not None)
    assert not decode_choice.choose_config(shape, m, n // 64, 132, (10, 0)).indices


@pytest.mark.parametrize("group", [96, 192, 320, 1024])
@pytest.mark.parametrize("n,k", SHAPES[:5])
def test_groups_that_stages_would_cut_have_configurations(n: int, k: int, group: int) -> None:
    for bits in (1, 2, 4):
        for kind in (decode_config.TABLE, decode_config.INT, decode_config.UINT_U8):
            shape = Shape(n, k, bits, group, True, kind)
            config = decode_choice.choose_config(shape, 1, n // 64, 132)
            assert shape.allows_stage_units(config.stage_units, config.cluster * config.phases * config.k_warps)


def test_tiles_serve_every_count_of_tokens() -> None:
    for m in range(1, 65):
        assert decode_choice.token_tile(m) >= m


def chosen(kind: int, bits: int, m: int, cluster: int, units: int, blocks: int) -> tuple[Shape, Config]:
    """A weight whose CTAs have so many units of so many blocks in clusters of that size, and its configuration."""
    group = 128 if kind in (ROUNDED, CUT) else 64
    rows = 64 * blocks * decode_config.clusters_at_once(132, cluster)
    shape = Shape(rows, 64 * units * cluster, bits, group, True, kind, bits if group == 128 else 0)
    return shape, decode_choice.choose_config(shape, m, rows // 64, 132)


@pytest.mark.parametrize("row", activations.PIECES, ids=str)
def test_every_row_of_pieces_decides_a_product(row: activations.Pieces) -> None:
    for kind in (TABLE, INT):
        _, config = chosen(kind, row.bits, row.tokens, 2, row.units, row.blocks)
        assert config.interleaved and (config.x_chunks, config.x_ahead) == (row.pieces, row.ahead)


GAINS = [(INT, gain) for gain in many_digits.OF_INTEGERS]
GAINS += [(UINT_U8, gain) for gain in many_digits.OF_ZEROS]
GAINS += [(kind, gain) for gain in many_digits.OF_SLICES for kind in (ROUNDED, CUT)]


@pytest.mark.parametrize("kind,gain", GAINS, ids=str)
def test_every_gain_of_many_digits_decides_products(kind: int, gain: many_digits.Gain) -> None:
    for bits, tokens, blocks in itertools.product(gain.bits, gain.tokens, gain.blocks):
        # Of the largest shares some do not fit shared memory.
        found = (chosen(kind, bits, tokens, 2, units, blocks) for units in gain.units)
        assert any(config.many_digits(shape) and config.blocks == blocks for shape, config in found)


@pytest.mark.parametrize("row", places.TWO, ids=str)
def test_every_row_of_two_ctas_decides_a_product(row: places.Two) -> None:
    # Some multiprocessors have no work, as places are held for what comes behind those that have.
    blocks, bits = decode_config.clusters_at_once(132, row.cluster) - 2, 1 if row.digits else 2
    shape = Shape(64 * blocks, 64 * row.units, bits, 64, True, TABLE)
    config = decode_choice.choose_config(shape, 1, blocks, 132)
    assert (config.digits, config.k_warps, config.stages) == (row.digits, row.k_warps, row.stages)
    assert (config.min_ctas, config.hold, config.stage_units) == (2, row.hold, row.stage_units)


@pytest.mark.parametrize("blocks,units", digits.IN_TURN)
def test_every_row_of_blocks_in_turn_decides_products(blocks: int, units: int) -> None:
    for kind, widths in digits.IN_TURN[blocks, units].items():
        for bits in widths:
            _, config = chosen(kind, bits, 1, 1 if units == 64 else 2, units, blocks)
            assert config.digits and config.row_warps == 1 and config.steps == blocks


def test_halves_and_wide_tables_are_chosen_where_they_were_measured() -> None:
    for (tokens, bits), counts in many_tokens.HALVES_OF.items():
        for blocks in counts:
            rows = 64 * (66 * blocks - 40)
            config = decode_choice.choose_config(Shape(rows, 4096, bits, 64, True, TABLE), tokens, rows // 64, 132)
            assert config.half_blocks and config.blocks == blocks
    for (tokens, bits), most in many_tokens.WIDE_UP_TO.items():
        cluster, units = (1, 128) if most == 1 else (2, 64)
        assert chosen(TABLE, bits, tokens, cluster, units, most)[1].wide


@pytest.mark.parametrize(
    "kind,bits,n,k,k_warps,ring",
    [
        (INT, 4, 6144, 4096, 16, (1, 2)),
        (INT, 6, 5120, 5120, 10, (2, 2)),
        (decode_config.UINT_U8, 4, 34816, 5120, 10, (2, 2)),
        (CUT, 4, 19456, 2560, 10, (1, 3)),
        (ROUNDED, 5, 2560, 9728, 16, (1, 2)),
        (ROUNDED, 5, 2560, 4096, 16, (1, 3)),
    ],
)
def test_one_token_of_integers_takes_blocks_in_turn_at_any_size(kind, bits, n, k, k_warps, ring) -> None:
    shape = Shape(n, k, bits, 128, True, kind, bits if kind == CUT else bits - 1 if kind == ROUNDED else 0)
    config = decode_choice.choose_config(shape, 1, n // 64, 132)
    assert config.digits and config.paired and config.alone
    assert (config.k_warps, config.row_warps, config.stage_units, config.stages) == (k_warps, 1, *ring)


# Kind, bits, n, k, m; clusters, blocks of each, whether they share blocks, warps on k: as measured to win.
EVEN = [
    (TABLE, 4, 6144, 4096, 1, (2, 2, True, 8)),
    (TABLE, 4, 5120, 5120, 16, (2, 2, True, 4)),
    (TABLE, 3, 5120, 5120, 8, (4, 3, False, 5)),
    (TABLE, 8, 10240, 5120, 4, (2, 3, True, 4)),
    (TABLE, 4, 5120, 17408, 2, (4, 3, False, 5)),
    (INT, 4, 34816, 5120, 16, (2, 9, True, 1)),
    (TABLE, 2, 51200, 5120, 8, (2, 13, True, 1)),
    (TABLE, 4, 28672, 4096, 4, (1, 4, True, 4)),
    (decode_config.UINT_U8, 4, 10240, 8192, 16, (2, 3, True, 5)),
    (ROUNDED, 5, 24576, 4096, 16, (2, 6, False, 2)),
    (TABLE, 1, 5120, 5120, 2, (4, 3, False, 5)),
    (TABLE, 1, 24576, 4096, 4, (1, 3, False, 4)),
    (INT, 1, 5120, 17408, 8, (4, 3, False, 5)),
    (TABLE, 1, 51200, 5120, 16, (2, 13, False, 1)),
    (TABLE, 6, 20480, 8192, 1, (2, 5, False, 4)),
]


@pytest.mark.parametrize("kind,bits,n,k,m,split", EVEN)
def test_shares_are_even_where_whole_blocks_leave_multiprocessors_idle(kind, bits, n, k, m, split) -> None:
    shape = Shape(n, k, bits, 128, True, kind, bits - 1 if kind == ROUNDED else 0)
    config = decode_choice.choose_config(shape, m, n // 64, 132)
    assert (config.cluster, config.blocks, config.half_blocks, config.k_warps) == split
    assert config.steps == config.phases == 1


@pytest.mark.parametrize(
    "kind,bits,n,k,m",
    [
        (TABLE, 4, 4608, 3584, 16),
        (TABLE, 3, 34816, 5120, 8),
        (TABLE, 1, 34816, 5120, 8),
        (TABLE, 4, 14336, 4096, 16),
        (TABLE, 3, 28672, 8192, 4),
        (TABLE, 4, 20480, 8192, 2),
    ],
)
def test_shares_stay_as_they_are_where_others_were_measured_to_lose(kind, bits, n, k, m) -> None:
    case = Case(Shape(n, k, bits, 64, True, kind), m, n // 64, 132, (9, 0), decode_config.PLAIN, True)
    config = decode_choice.choose_config(case.shape, m, case.blocks, 132)
    assert even_shares.with_even_shares(case, config) == config
    assert not config.half_blocks and config.cluster == 2


@pytest.mark.parametrize("kind,bits", [(ROUNDED, 5), (decode_config.UINT_U8, 4)])
def test_few_tokens_run_as_eight_where_only_those_have_even_shares(kind: int, bits: int) -> None:
    shape = Shape(5120, 5120, bits, 128, True, kind, bits - 1 if kind == ROUNDED else 0)
    assert [decode_choice.choose_config(shape, m, 80, 132).tokens for m in (1, 2, 4, 8)] == [1, 8, 8, 8]


@pytest.mark.parametrize(
    "bits,n,k,m,warps",
    [
        (3, 34816, 5120, 4, (4, 3)),
        (3, 34816, 5120, 2, (4, 4)),
        (6, 35840, 5120, 2, (4, 3)),
        (8, 36864, 4096, 4, (4, 3)),
        (8, 28672, 8192, 2, (2, 7)),
        (7, 29568, 8192, 4, (2, 7)),
        (8, 28672, 8192, 4, (4, 4)),
        (8, 28672, 4096, 2, (4, 4)),
    ],
)
def test_seven_and_nine_blocks_have_whole_steps_where_measured_to_win(bits, n, k, m, warps) -> None:
    config = decode_choice.choose_config(Shape(n, k, bits, 64, True, TABLE), m, n // 64, 132, (9, 0))
    assert (config.k_warps, config.row_warps) == warps


SMALL = [(kind, bits) for kind in (INT, ROUNDED, CUT) for bits in range(2, 9)]


@pytest.mark.parametrize("k,group", [(4096, 128), (4032, 4032)])
@pytest.mark.parametrize("n", [4096, 2560, 2048, 1024])
def test_few_rows_of_small_weights_leave_a_place_for_the_next_launch(n: int, k: int, group: int) -> None:
    for (kind, bits), tokens in itertools.product(SMALL, (2, 4)):
        if kind != INT and group % 128:
            continue
        shape = Shape(n, k, bits, group, True, kind, bits if kind != INT else 0)
        config = decode_choice.choose_config(shape, tokens, n // 64, 132, (9, 0))
        if (kind, bits, tokens, n) == (INT, 3, 4, 1024):
            assert not config.digits  # took 1.1 times as long
            continue
        assert config.many_digits(shape) and (config.cluster, config.k_warps, config.blocks) == (2, 8, 1)
        assert config.stages * config.stage_units <= 4 and shape.allows_stage_units(config.stage_units, 16)
        # Places are held where CTAs of two launches share multiprocessors.
        assert tokens == 2 or config.hold == (0 if config.alone or n <= 2048 else two_places.HOLD)
        if config.min_ctas == 2 and tokens == 4 and n == 4096:
            assert config.shared_bytes(shape) <= shared_of_two((9, 0))


def test_fewer_rows_have_more_ctas_at_work_by_larger_clusters() -> None:
    for kind, bits in SMALL:
        shape = Shape(512, 4096, bits, 128, True, kind, bits if kind != INT else 0)
        config = decode_choice.choose_config(shape, 4, 8, 132, (9, 0))
        assert not config.digits and config.cluster == 8


@pytest.mark.parametrize(
    "kind,bits,n,ring",
    [
        (TABLE, 4, 4096, (2, 1, 2)),
        (INT, 2, 3072, (2, 1, 2)),
        (TABLE, 3, 2560, (1, 2, 2)),
        (ROUNDED, 5, 4096, (1, 2, 2)),
        (CUT, 6, 4096, (1, 2, 2)),
        (ROUNDED, 7, 4096, (1, 1, 1)),
        (TABLE, 8, 4096, (1, 1, 1)),
        (INT, 3, 2048, (2, 1, 1)),
    ],
)
def test_sixteen_tokens_of_small_weights_come_in_two_pieces_where_measured_to_win(kind, bits, n, ring) -> None:
    config = decode_choice.choose_config(Shape(n, 4096, bits, 128, True, kind, 4), 16, n // 64, 132, (9, 0))
    assert (config.stage_units, config.stages, config.x_chunks) == ring


@pytest.mark.parametrize(
    "kind,bits,n,m,held",
    [
        (UINT_U8, 4, 3072, 4, True),
        (UINT_U8, 4, 3072, 8, True),
        (TABLE, 4, 4096, 8, True),
        (TABLE, 3, 4096, 8, False),
        (TABLE, 4, 3072, 4, False),
        (UINT_U8, 4, 1024, 4, False),
    ],
)
def test_idle_ctas_hold_places_of_few_rows_where_measured_to_win(kind, bits, n, m, held) -> None:
    config = decode_choice.choose_config(Shape(n, 4096, bits, 128, True, kind), m, n // 64, 132, (9, 0))
    assert not config.digits and config.hold == two_places.HOLD * held


def test_rules_name_sections_of_the_findings() -> None:
    findings = (Path(__file__).parents[3] / "docs" / "findings.md").read_text(encoding="utf-8")
    sections = re.findall(r"^#+ (.*)$", findings, re.MULTILINE)
    named = set()
    for path in Path(decode_choice.__file__).parent.glob("*.py"):
        docstring = path.read_text(encoding="utf-8").split('"""')[1]
        named |= {" ".join(name.split()) for name in re.findall(r'"([^"]+)"', docstring)}
    assert len(named) > 10
    assert all(any(section.startswith(name) for section in sections) for name in named)
