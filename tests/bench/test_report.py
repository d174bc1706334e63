"""What the benchmark says about its records besides tables."""

import pytest

from fdk.bench.report import slower_with_fewer_rows


def record(m: int, seconds: float, **other) -> dict[str, object]:
    plain = {"format": "lut4_g64", "provider": "fdk", "dtype": "bf16", "n": 64, "k": 128, "threads": None}
    return plain | {"m": m, "time_p50": seconds, "status": "ok"} | other


def test_products_that_more_rows_are_faster_than_are_named():
    found = slower_with_fewer_rows([record(1, 20.3e-6), record(4, 17e-6), record(8, 16e-6), record(16, 21e-6)])
    assert found == [
        "lut4_g64 fdk, 64 x 128: m=1 takes 20.3 us, m=8 16.0",
        "lut4_g64 fdk, 64 x 128: m=4 takes 17.0 us, m=8 16.0",
    ]


@pytest.mark.parametrize(
    "other", [{"time_p50": 19.95e-6}, {"n": 128}, {"provider": "humming"}, {"status": "failed"}, {"threads": 2}]
)
def test_noise_other_products_and_peers_are_not(other):
    assert slower_with_fewer_rows([record(1, 20.3e-6), record(8, 16e-6, **other)]) == []


def test_peers_do_not_count():
    assert slower_with_fewer_rows([record(1, 2e-5, provider="humming"), record(8, 1e-5, provider="humming")]) == []
