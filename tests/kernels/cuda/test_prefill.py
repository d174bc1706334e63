"""The prefill kernel: configurations and launch arithmetic anywhere, its code with NVRTC, its products on a GPU."""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch

from fdk import testing
from fdk.formats import parse
from fdk.kernels.cuda import decode_config, prefill, prefill_choice, prefill_config
from fdk.kernels.cuda.decode_config import Shape
from fdk.kernels.cuda.prefill_config import Config

SHAPES = [(8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336), (5120, 5120), (28672, 8192), (100, 104), (64, 128)]
KINDS = (decode_config.TABLE, decode_config.INT, decode_config.UINT_U8)
ROWS = (1, 8, 16, 33, 64, 65, 96, 128, 200, 256, 300, 384, 512, 768, 1000, 2048, 8192)

# One of every way that the kernel splits its work, at the widest tile that `choose` gives it.
CONFIGS = [
    Config(64, 2, 4, k_groups=1),
    Config(64, 1, 4, k_groups=2, split=2),
    Config(32, 2, 4, k_groups=2),
    Config(32, 2, 4, k_groups=2, turns=True),
    Config(256, 2, 4, rounds=True),
    Config(256, 2, 4, pair=2, rounds=True),
    Config(192, 2, 4, split=2, rounds=True),
    Config(128, 1, 4, k_groups=2, rounds=True),
    Config(64, 2, 4, k_groups=2, turns=True, rounds=True),
    Config(64, 3, 4, split=2),
    Config(128, 3, 4, rounds=True),
    Config(32, 4, 4, turns=True),
    Config(64, 4, 4, turns=True, rounds=True),
    Config(256, 2, 4, pair=2, rounds=True, stream=True),
    Config(192, 3, 4, rounds=True, parts=2, stream=True),
    Config(128, 3, 4, rounds=True, stream=True),
    Config(256, 2, 4, rounds=True, unrolled=True),
    Config(192, 2, 4, split=2, rounds=True, unrolled=True),
    Config(128, 1, 4, k_groups=2, rounds=True, unrolled=True),
    Config(256, 2, 4, pair=2, rounds=True, stream=True, unrolled=True),
    Config(192, 3, 4, rounds=True, parts=2, stream=True, unrolled=True),
    Config(64, 1, 8, k_groups=2, split=2, unrolled=True),
    Config(32, 2, 4, k_groups=2, turns=True, unrolled=True),
    Config(64, 2, 4, unrolled=True),
    Config(256, 2, 4, split=2, rounds=True),
    Config(64, 2, 4, k_groups=2, split=2, rounds=True, unrolled=True),
    Config(256, 2, 4, rounds=True, stream=True, unrolled=True),
    Config(256, 2, 4, rounds=True, stream=True, unrolled=True, fetch_sums=True),
    Config(192, 3, 4, rounds=True, parts=2, stream=True, fetch_sums=True),
    Config(32, 3, 8, split=4, unrolled=True),
    Config(64, 2, 8, split=5, k_groups=2, rounds=True, unrolled=True),
    Config(128, 3, 4, split=4, rounds=True, unrolled=True),
]


def chosen(shape: Shape, m: int) -> Config:
    config = prefill_choice.choose(shape, m, (-(-shape.n // 64),), 132)
    assert config is not None
    return config


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n,k", SHAPES)
def test_configurations_fit(n: int, k: int, bits: int) -> None:
    for kind in KINDS:
        for group in (32, 64, k):
            shape = Shape(n, k, bits, group if k % group == 0 else k, True, kind)
            for m in ROWS:
                config = chosen(shape, m)
                assert config.shared_bytes(shape) <= decode_config.MAX_SHARED
                assert config.stages >= 2 * config.k_groups and config.threads <= 1024
                assert config.tokens % (8 * config.pair) == 0 and (config.pair == 1 or config.split == 1)
                assert shape.units >= 2 * config.split * config.k_groups or config.split * config.k_groups == 1
                assert config.rounds == (m > prefill_choice.EXACT_TOKENS and shape.groups > 1)
                assert fits(shape, config)


def test_loops_are_unrolled_where_that_was_measured_to_win() -> None:
    table = Shape(8192, 8192, 4, 64, True, decode_config.TABLE)
    assert chosen(table, 384) == Config(192, 2, 4, rounds=True, wide=True, unrolled=True, codes_ahead=True)
    halves = Config(128, 2, 4, split=2, rounds=True, wide=True, unrolled=True, codes_ahead=True)
    assert chosen(table, 128) == halves and chosen(replace(table, n=4096, k=14336), 256) == halves
    # Eight stages of two k groups leave no room for a wide table, and four are too few.
    assert chosen(replace(table, n=4096, k=4096), 256) == Config(128, 1, 8, k_groups=2, rounds=True, unrolled=True)
    for kind, ahead in ((decode_config.TABLE, True), (decode_config.INT, False)):
        paired = Config(256, 2, 4, pair=2, rounds=True, unrolled=True, codes_ahead=ahead)
        assert chosen(replace(table, bits=8, kind=kind), 1024) == paired
    assert chosen(table, 16) == Config(16, 2, 16, split=2, k_groups=2, wide=True, unrolled=True)
    assert chosen(table, 64) == Config(64, 2, 8, split=2, k_groups=2, rounds=True, unrolled=True)
    assert chosen(replace(table, bits=6), 1024).unrolled and chosen(replace(table, group=32), 128).unrolled
    for shape, m in ((table, 1024), (replace(table, group=32), 384), (replace(table, k=8128), 384)):
        assert not chosen(shape, m).unrolled
    # Registers do not last for eight units of other widths in a row.
    for bits, unrolled in ((4, True), (5, False)):
        assert chosen(replace(table, n=28672, bits=bits), 64).unrolled == unrolled
    three = chosen(replace(table, n=28672, k=4096), 384)
    # Cut tiles gain nothing, so that larger ones stay ahead.
    assert chosen(replace(table, n=28672), 768).tokens == 256
    assert three.blocks == 3 and not three.unrolled


def test_pairs_share_activations_where_that_was_measured_to_win() -> None:
    table = Shape(8192, 8192, 4, 64, True, decode_config.TABLE)
    wide, long = replace(table, n=14336, k=4096), replace(table, n=4096, k=14336)
    # Tiles in two waves and more; tables of 1 and 2 bits from four waves on.
    assert [chosen(table, m).pair for m in (384, 512, 768, 1024)] == [1, 1, 2, 2]
    assert [chosen(replace(table, bits=2), m).pair for m in (768, 1024)] == [1, 1]
    assert [chosen(replace(long, bits=1), m).pair for m in (2048, 4096)] == [1, 2]
    for shape, m in ((wide, 1024), (wide, 3072), (replace(wide, bits=1), 1024), (replace(table, n=28672), 96)):
        assert chosen(shape, m).stream and chosen(shape, m).pair == 2
    # 27 tiles of three blocks would be 28 in pairs.
    assert prefill_config.row_tiles((80,), Config(192, 3, 4)) == 27
    for m in range(16, 4096, 16):
        config = chosen(replace(table, n=5120, k=5120), m)
        assert config.pair == 1 or config.blocks == 2


# bits, n, k, m; whether tiles are cut: as measured, each product behind its own calls.
WHOLE_OR_CUT = [
    (4, 8192, 8192, 2048, False),
    (4, 8192, 8192, 8192, True),
    (4, 5120, 5120, 1024, True),
    (4, 5120, 5120, 1536, False),
    (4, 14336, 4096, 384, False),
    (4, 14336, 4096, 1024, True),
    (4, 14336, 4096, 4096, False),
    (4, 28672, 8192, 512, True),
    (4, 28672, 8192, 1024, False),
    (8, 14336, 4096, 512, False),
    (8, 28672, 8192, 512, True),
    (8, 28672, 8192, 2048, False),
]


@pytest.mark.parametrize("bits,n,k,m,cut", WHOLE_OR_CUT)
def test_tiles_are_cut_where_that_was_measured_to_win(bits: int, n: int, k: int, m: int, cut: bool) -> None:
    config = chosen(Shape(n, k, bits, 64, True, decode_config.TABLE), m)
    assert config.stream == cut and config.pair == 2


# n, k, m; tokens and blocks of a tile: as measured to win over the next larger one.
NARROW = [
    (4096, 4096, 40, (40, 1)),
    (4096, 4096, 132, (72, 1)),
    (4096, 4096, 194, (104, 1)),
    (5120, 5120, 88, (88, 3)),
    (8192, 8192, 257, (144, 2)),
    (8192, 8192, 528, (176, 3)),
    (14336, 4096, 823, (208, 2)),
    (4096, 14336, 1189, (240, 2)),
]


@pytest.mark.parametrize("n,k,m,tile", NARROW)
def test_tiles_have_as_many_tokens_as_are_there(n: int, k: int, m: int, tile: tuple[int, int]) -> None:
    config = chosen(Shape(n, k, 4, 64, True, decode_config.TABLE), m)
    assert (config.tokens, config.blocks) == tile


def test_tiles_that_cannot_be_halved_are_neither_paired_nor_cut() -> None:
    for m in range(33, 1200, 7):
        config = chosen(Shape(28672, 8192, 4, 64, True, decode_config.TABLE), m)
        assert config.tokens % 16 == 0 or (config.pair == 1 and not config.stream)


@pytest.mark.parametrize(
    "n,k,planes,group,m,stages",
    [
        (4096, 14336, 8, 128, 32, 16),
        (4096, 4096, 3, 64, 32, 16),
        (28672, 8192, 4, 64, 32, 8),
        (28672, 8192, 5, 128, 32, None),  # these spill
        (4096, 14336, 5, 32, 32, None),  # not measured
        (8192, 8192, 5, 128, 16, 16),
        (8192, 8192, 6, 128, 16, 8),
        (8192, 8192, 3, 128, 32, 16),
        (8192, 8192, 4, 128, 32, 8),
        (8192, 8192, 5, 128, 32, 8),
        (14336, 4096, 7, 128, 32, 16),
        (16384, 16384, 5, 128, 16, 16),
        (16384, 16384, 3, 128, 16, 8),  # four blocks
    ],
)
def test_loops_of_slices_are_unrolled_over_the_stages_measured_to_win(n, k, planes, group, m, stages) -> None:
    config = chosen(Shape(n, k, planes, group, True, decode_config.CUT, planes), m)
    assert config.unrolled == (stages is not None) and (stages is None or config.stages == stages)
    assert not config.wide and not config.rounds


def test_k_is_cut_into_more_slices_where_two_leave_multiprocessors_idle() -> None:
    table = Shape(5120, 5120, 4, 64, True, decode_config.TABLE)
    for m in (32, 64, 96, 128, 160):
        config = chosen(table, m)
        assert (config.blocks, config.split, config.tokens) == (3, 4, m)
    assert chosen(table, 16).split == 2  # the decode kernel's
    assert (chosen(table, 192).split, chosen(table, 224).split) == (1, 2)
    # 40 clusters of three CTAs are more than are resident, 36 are not.
    assert chosen(replace(table, n=4608, k=4096), 256).split == 3
    for n, k, m in ((4096, 4096, 128), (8192, 8192, 64), (4096, 14336, 192)):
        assert chosen(replace(table, n=n, k=k), m).split == 2


def test_sums_come_through_the_ring_where_that_was_measured_to_win() -> None:
    table = Shape(14336, 4096, 4, 64, True, decode_config.TABLE)
    for shape, m in ((table, 1024), (replace(table, n=28672), 512), (replace(table, n=5120, k=5120), 1024)):
        assert chosen(shape, m).fetch_sums and not chosen(replace(shape, bits=3), m).fetch_sums
    # Not beside activations that take half of the second-level cache.
    for shape, m in ((table, 8192), (replace(table, n=8192, k=8192), 8192)):
        assert chosen(shape, m).stream and chosen(shape, m).pair == 2 and not chosen(shape, m).fetch_sums


def test_what_is_not_served() -> None:
    shape = Shape(4096, 4096, 4, 64, True, decode_config.UINT_FLOAT)
    assert "fractional" in prefill_choice.unsupported(shape, (64,))
    assert "masks" in prefill_choice.unsupported(Shape(4096, 4096, 3, 64, True, decode_config.SPARSE_INT), (64,))
    assert "multiple of 8" in prefill_choice.unsupported(Shape(4096, 4100, 4, 4100, True, decode_config.INT), (64,))
    assert "tables" in prefill_choice.unsupported(Shape(4096, 4096, 4, 64, True, decode_config.TABLE), (1,) * 17)
    assert prefill_choice.choose(shape, 64, (64,), 132) is None
    assert prefill_choice.predict_us(shape, 64, (64,), 132) is None
    assert prefill_choice.choose(Shape(4096, 4096, 4, 64, True, decode_config.INT), 0, (64,), 132) is None


@pytest.mark.parametrize("n,k", [(8192, 8192), (100, 104)])
def test_any_number_of_multiprocessors_can_start_a_cluster(n: int, k: int) -> None:
    blocks = (-(-n // 64),)
    for group, m, sms in itertools.product((64, k), (1, 64, 300, 2048), range(1, 201)):
        shape = Shape(n, k, 4, group if k % group == 0 else k, True, decode_config.TABLE)
        config = prefill_choice.choose(shape, m, blocks, sms)
        assert config.cluster <= sms
        tiles = prefill_config.row_tiles(blocks, config) * -(-m // config.tokens)
        clusters, streamed = prefill_config.clusters_and_streamed(shape, config, tiles, sms)
        assert clusters >= 1 and 0 <= streamed <= tiles


@pytest.mark.parametrize("n,k", SHAPES[:6])
def test_predicted_time_grows_with_rows(n: int, k: int) -> None:
    shape = Shape(n, k, 4, 64, True, decode_config.TABLE)
    for m in range(16, 8192, 8):
        now, later = (prefill_choice.predict_us(shape, rows, (n // 64,), 132) for rows in (m, m + m // 10))
        assert now <= 1.05 * later, (m, now, later)


def test_whole_tiles_fill_all_clusters() -> None:
    shape = Shape(4096, 4096, 4, 64, True, decode_config.TABLE)
    for pair, tiles in itertools.product((1, 2), (1, 5, 64, 66, 132, 133, 448, 5000)):
        config = Config(256, 2, 4, pair=pair, rounds=True, stream=True)
        clusters, streamed = prefill_config.clusters_and_streamed(shape, config, tiles, 132)
        assert 1 <= clusters <= 132 // pair and min(tiles, clusters) <= streamed < 2 * clusters + (tiles < clusters)
        assert (tiles - streamed) % clusters == 0


@pytest.mark.parametrize("tables", [1, 3])
def test_row_tiles_cover_every_block_once(tables: int) -> None:
    weight = testing.random_weight(parse("lut4_g64"), 1000, 256, tables=tables, seed=3).to_layout("fragments")
    config = Config(64, 2, 4, pair=2)
    params = prefill.params_for(weight, config)
    step, seen = config.blocks * config.pair, []
    ends = [params.range[i + 1].first for i in range(tables - 1)] + [params.row_tiles]
    for i in range(tables):
        entry = params.range[i]
        for tile in range(entry.first, ends[i]):
            first = entry.first_block + (tile - entry.first) * step
            blocks = range(first, min(first + step, entry.end_block))
            assert len(blocks) > 0
            seen += blocks
    assert seen == list(range(weight.parts["codes"].shape[0]))
    assert prefill.Params.x_map.offset == 0 and prefill.Params.codes.offset == 128


def check_code(compiled, problems: list[tuple[Shape, Config]]) -> None:
    sources = [("prefill.cuh", config.defines(shape), "sm_90a") for shape, config in problems]
    for (shape, config), result in zip(problems, compiled(sources), strict=True):
        assert result.spilled == 0, (shape, config)
        # The compiler says so where it makes wgmma wait for each other.
        assert "C75" not in result.log, (shape, config, result.log)
        assert result.registers * config.threads <= 65536, (shape, config)


def fits(shape: Shape, config: Config) -> bool:
    alternating = 2 * config.k_groups
    ragged = config.split > 1 and config.parts == 1  # slices leave an unrolled loop at any unit
    if config.unrolled and (
        config.stages % alternating or (not ragged and shape.units % (config.stages * config.split))
    ):
        return False
    with contextlib.suppress(ValueError):
        return config.shared_bytes(shape) <= decode_config.MAX_SHARED
    return False


def fitting(shape: Shape, config: Config) -> Config | None:
    found = [filled for s in range(2, 13) if fits(shape, filled := replace(config, stages=s))]
    return found[-1] if found else None


def test_every_way_to_split_four_bits_compiles_without_spills(compiled) -> None:
    shapes = Shape(4096, 4096, 4, 64, True, decode_config.TABLE), Shape(200, 992, 4, 32, False, decode_config.UINT_U8)
    check_code(compiled, [(shape, fitting(shape, config)) for config in CONFIGS for shape in shapes])


@pytest.mark.slow
@pytest.mark.parametrize("served", range(2, 9))
def test_every_slice_compiles_without_spills(compiled, served: int) -> None:
    problems = []
    for bits, kind in ((min(8, served + 1), decode_config.ROUNDED), (served, decode_config.CUT)):
        for group, m in ((32, 64), (128, 16), (128, 256), (4096, 8192)):
            shape = Shape(4096, 4096, bits, group, (served + kind) % 2 > 0, kind, served)
            problems.append((shape, chosen(shape, m)))
    check_code(compiled, problems)


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_variant_compiles_without_spills(compiled, bits: int) -> None:
    problems = []
    for kind in KINDS:
        for group in (32, 128, 4096):
            shape = Shape(4096, 4096, bits, group, (bits + kind) % 2 > 0, kind)
            problems += [(shape, chosen(shape, m)) for m in (16, 64, 256, 8192)]
    check_code(compiled, problems)


FORMATS = [
    ("lut4_g64", 320, 1024, {"tables": 3}),
    ("lut4_g32", 200, 992, {}),
    ("int4_g128", 256, 768, {"dtype": torch.float16}),
    ("uint4_g64", 192, 512, {}),
    ("int4_chan", 129, 776, {}),
    ("lut1_g64", 128, 512, {}),
    ("uint1_g32", 128, 544, {"dtype": torch.float16}),
    ("lut2_g64", 192, 1024, {"dtype": torch.float16}),
    ("lut3_g16", 192, 1024, {}),
    ("uint5_g64", 192, 576, {}),
    ("lut6_g128", 192, 640, {}),
    ("int7_g64", 192, 576, {}),
    ("lut8_g48", 192, 960, {}),
    ("nest8s2_g64", 192, 1024, {"dtype": torch.float16}),
    ("nest8s4_g32", 200, 992, {}),
    ("nest8_g128", 192, 640, {}),
    ("trunc8s3_g64", 192, 576, {"dtype": torch.float16}),
    ("trunc8s7_chan", 129, 776, {}),
]


@pytest.mark.parametrize("name,n,k,more", FORMATS, ids=[f[0] for f in FORMATS])
def test_products(where: str, name: str, n: int, k: int, more: dict) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the prefill kernel needs compute capability 9.0")
    weight = testing.random_weight(parse(name), n, k, device=where, **more).to_layout("fragments")
    zeros = weight.parts.get("zeros")
    shape = decode_config.shape_of(weight.geometry, None if zeros is None else zeros.dtype)
    place = [f[0] for f in FORMATS].index(name)
    # An emulated device takes seconds for what a real one does in a millisecond: some configurations for each format.
    configs, rows, repeats = (
        (CONFIGS, (1, 17, 200, 300), 20) if where != "cpu" else (CONFIGS[place % 6 :: 6], (17, 200), 0)
    )
    for config in configs:
        if shape.units < 2 * config.split * config.k_groups:
            continue
        wide = replace(config, wide=prefill_choice._wide(shape, config))
        filled = fitting(shape, wide) or fitting(shape, config)
        if filled is None and config.unrolled:
            continue
        plan = prefill.Plan(weight, filled)
        for m in rows:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(weight.dtype).to(where)
            bias = torch.randn(n, device=where).to(weight.dtype) if m % 2 else None
            rounds = config.rounds and shape.groups > 1
            found = testing.check_product(lambda x, _, b, out, plan=plan: plan(x, b, out), x, weight, bias, rounds)
            assert found is None, (config, m, found)
            if not repeats:
                continue
            first, again = (testing.poisoned(m, n, weight.dtype, where) for _ in range(2))
            plan(x, bias, first)
            wrong = torch.zeros((), dtype=torch.int64, device=where)
            for _ in range(repeats):
                plan(x, bias, again.fill_(float("nan")))
                wrong += (again != first).any()
            assert int(wrong) == 0, (config, m)


@pytest.mark.gpu
def test_shares_meet_apart_in_streams_and_graphs() -> None:
    """Launches that run at the same time must not take each other's flags or sums."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the prefill kernel needs compute capability 9.0")
    weight = testing.random_weight(parse("lut4_g64"), 1920, 1024, device="cuda:0").to_layout("fragments")
    config = Config(128, 3, 4, rounds=True, stream=True)
    plan = prefill.Plan(weight, fitting(decode_config.shape_of(weight.geometry, None), config))
    x = torch.randn(2, 300, 1024, device="cuda:0").to(weight.dtype)
    expected = testing.poisoned(600, 1920, weight.dtype, "cuda:0").view(2, 300, 1920)
    for i in range(2):
        plan(x[i], None, expected[i])
    out, graphs = torch.empty_like(expected), []
    for i in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(5):
                plan(x[i], None, out[i])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(4)]
    eager = torch.empty_like(expected)
    torch.cuda.synchronize()
    for _ in range(50):
        out.fill_(float("nan"))
        eager.fill_(float("nan"))
        torch.cuda.synchronize()
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                graphs[i].replay()
            with torch.cuda.stream(streams[2 + i]):
                for _ in range(5):
                    plan(x[i], None, eager[i])
        torch.cuda.synchronize()
        assert torch.equal(out, expected) and torch.equal(eager, expected)


@pytest.mark.gpu
def test_without_memory_for_sums_tiles_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the prefill kernel needs compute capability 9.0")
    weight = testing.random_weight(parse("lut4_g64"), 1920, 1024, device="cuda:0").to_layout("fragments")
    config = Config(128, 3, 4, rounds=True, stream=True)
    plan = prefill.Plan(weight, fitting(decode_config.shape_of(weight.geometry, None), config))
    x = torch.randn(300, 1024, device="cuda:0").to(weight.dtype)
    out, whole = (testing.poisoned(300, 1920, weight.dtype, "cuda:0") for _ in range(2))
    expected = torch.empty_like(out)
    plan(x, None, expected)

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("none left")

    prefill._warn_of_sums.cache_clear()
    with monkeypatch.context() as patched, pytest.warns(RuntimeWarning, match="no memory is left"):
        patched.setattr(torch, "empty", full)
        plan(x, None, whole)
    plan(x, None, out)
    assert torch.equal(out, expected)
    assert testing.check_product(lambda x, _, b, o: o.copy_(whole), x, weight, None, True) is None
