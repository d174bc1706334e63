"""The choice between decoding, prefill and dense weights: pure arithmetic, anywhere."""

import pytest

from fdk.kernels.cuda import decode_config, routes
from fdk.kernels.cuda.decode_config import Shape

SHAPES = [(4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336), (5120, 5120), (28672, 8192), (1024, 1024)]
DEVICES = [(9, 0), (8, 0), (10, 0)]


def best(shape: Shape, m: int, capability: tuple[int, int] = (9, 0)) -> routes.Route:
    return routes.routes(shape, m, (-(-shape.n // 64),), 132, capability)[0]


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("bits,served", [(1, 0), (4, 0), (8, 0), (3, 2), (8, 8), (3, -1)])
def test_no_cliff_between_neighbours(bits: int, served: int, n: int, k: int, capability: tuple[int, int]) -> None:
    kind = decode_config.SPARSE_INT if served < 0 else decode_config.ROUNDED if served else decode_config.TABLE
    shape = Shape(n, k, bits, 64, True, kind, max(served, 0))
    times = {m: best(shape, m, capability).us for m in {*range(1, 200), *(int(200 * 1.1**i) for i in range(40))}}
    ordered = sorted(times)
    for m in ordered:
        assert times[m] <= 1.05 * min(times[other] for other in ordered if m <= other <= 1.1 * m + 1), m


@pytest.mark.parametrize("n,k", SHAPES)
def test_one_token_decodes_and_everything_has_dense_weights_behind_it(n: int, k: int) -> None:
    shape = Shape(n, k, 4, 64, True, decode_config.TABLE)
    assert best(shape, 1).name == "decode"
    for m in (1, 100, 8192):
        assert "dense" in {route.name for route in routes.routes(shape, m, (-(-n // 64),), 132, (8, 0))}


def test_many_rows_of_sparse_integers_are_multiplied_as_dense_ones_on_hopper() -> None:
    for n, k in ((4096, 4096), (8192, 8192), (20480, 5120)):
        shape = Shape(n, k, 3, 64, True, decode_config.SPARSE_INT)
        assert [best(shape, m).name for m in (1, 8, 64, 256, 2048)] == [
            "decode",
            "decode",
            "spread",
            "spread",
            "spread",
        ]
        assert best(shape, 2048).rounds and best(shape, 2048).config.fresh
    table = Shape(8192, 8192, 3, 64, True, decode_config.SPARSE_TABLE)
    for other, capability in ((shape, (8, 0)), (shape, (10, 0)), (table, (9, 0))):
        assert "spread" not in {found.name for found in routes.routes(other, 2048, (other.n // 64,), 132, capability)}


def test_one_token_of_eight_bit_integers_takes_integer_products() -> None:
    route = best(Shape(8192, 8192, 8, 64, True, decode_config.INT), 1)
    assert route.name == "decode" and route.config.digits


def test_wgmma_is_for_hopper_alone() -> None:
    shape = Shape(4096, 4096, 4, 64, True, decode_config.TABLE)
    for capability in ((8, 0), (8, 9), (10, 0)):
        assert "prefill" not in {route.name for route in routes.routes(shape, 1024, (64,), 132, capability)}


def test_activations_too_long_for_shared_memory_go_the_dense_way() -> None:
    shape = Shape(64, 1 << 21, 8, 1 << 21, True, decode_config.TABLE)
    assert [route.name for route in routes.routes(shape, 1, (1,), 132, (8, 0))] == ["dense"]


def test_rows_of_a_decode_launch_cover_m() -> None:
    shape = Shape(4096, 4096, 4, 64, True, decode_config.TABLE)
    for m in (1, 7, 64, 65, 130):
        route = next(r for r in routes.routes(shape, m, (64,), 132, (9, 0)) if r.name == "decode")
        assert route.rows == min(m, 64) and route.config.tokens >= route.rows


@pytest.mark.parametrize("capability", [*DEVICES, (8, 9), (12, 0)])
@pytest.mark.parametrize("bits,kind", [(1, decode_config.TABLE), (4, decode_config.UINT_U8), (8, decode_config.TABLE)])
def test_rows_that_launches_leave_over_are_served_too(bits: int, kind: int, capability: tuple[int, int]) -> None:
    # Of 53248 activations a token some numbers of rows fit shared memory where fewer do not.
    shape = Shape(16384, 53248, bits, 64, True, kind)
    for m in (1, 2, 3, 7, 8, 9, 33, 65, 71):
        for route in routes.routes(shape, m, (256,), 132, capability):
            assert route.us > 0 and 0 < route.rows <= m
        left = m
        for route in routes.launched(shape, m, (256,), 132, capability):
            left %= route.rows
        assert left == 0
