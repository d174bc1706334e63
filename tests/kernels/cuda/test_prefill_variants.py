"""Unrolled loops of the prefill kernel, and what nothing chooses, on the emulated GPU under several schedules."""

from dataclasses import replace

import pytest
import torch

from emulate import SCHEDULES, emulated, unavailable
from fdk import testing
from fdk.formats import parse
from fdk.kernels.cuda.prefill import Plan
from fdk.kernels.cuda.prefill_config import Config

REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

LARGE = Config(256, 2, 4, rounds=True, unrolled=True)
CASES = [
    ("lut4_g64", LARGE),
    ("lut4_g64", Config(256, 2, 4, rounds=True, stream=True, unrolled=True)),
    ("lut4_g64", Config(256, 2, 4, pair=2, rounds=True, stream=True, unrolled=True)),
    ("lut2_g64", Config(192, 2, 4, rounds=True, wide=True, unrolled=True)),
    ("lut4_g64", Config(192, 3, 4, rounds=True, wide=True, parts=2, stream=True, unrolled=True)),
    ("uint4_g32", Config(192, 2, 2, split=2, rounds=True, unrolled=True)),
    ("lut4_g64", Config(128, 1, 8, k_groups=2, rounds=True, unrolled=True)),
    ("lut4_g64", Config(96, 1, 4, k_groups=2, split=2, rounds=True, wide=True, unrolled=True)),
    ("lut4_g64", Config(256, 2, 4, split=2, rounds=True, unrolled=True)),
    ("lut4_g64", Config(16, 2, 8, split=2, k_groups=2, wide=True, unrolled=True)),
    ("lut8_g128", Config(16, 4, 4, unrolled=True)),
    ("uint4_g32", Config(32, 1, 8, k_groups=2, unrolled=True)),
    ("lut1_g64", Config(64, 2, 2, unrolled=True)),
    ("int8_g64", LARGE),
    ("lut4_g64", Config(192, 2, 4, rounds=True, wide=True, unrolled=True)),
    ("int4_g128", Config(160, 2, 4, rounds=True, wide=True, stream=True, unrolled=True)),
    ("int8_g64", replace(LARGE, pair=2, stream=True)),
    ("lut4_chan", Config(96, 1, 8, k_groups=2, split=2, unrolled=True)),
    ("lut1_g64", Config(64, 4, 8, rounds=True, unrolled=True)),
    ("uint3_g32", Config(48, 2, 8, k_groups=2, split=2, rounds=True, unrolled=True)),
    ("nest8s4_g64", Config(64, 2, 8, k_groups=2, rounds=True, unrolled=True)),
    ("lut6_g64", Config(192, 2, 4, rounds=True, unrolled=True)),
    ("lut4_g64", Config(64, 1, 8, k_groups=2, unrolled=True)),
    ("uint4_g32", Config(48, 2, 4, k_groups=2, unrolled=True)),
    ("lut1_g128", Config(64, 2, 8, unrolled=True)),
    ("int4_g16", Config(64, 2, 4, k_groups=2, split=2, turns=True, unrolled=True)),
    ("lut3_g64", Config(32, 4, 4, unrolled=True)),
    ("lut8_g64", LARGE),
    ("lut4_g64", Config(64, 2, 11, split=5, k_groups=2, turns=True)),
    ("lut4_g64", Config(64, 2, 8, split=3, k_groups=2, turns=True)),
    ("lut1_g64", Config(64, 2, 12, split=4, k_groups=2, turns=True)),
    ("lut4_g64", Config(64, 3, 10, split=7)),
    ("lut4_g64", Config(64, 3, 8, rounds=True, unrolled=True)),
    ("lut1_g64", Config(48, 3, 8, rounds=True, unrolled=True)),
    ("lut4_g64", Config(64, 1, 12, split=2, k_groups=3)),
    ("uint4_g32", Config(48, 4, 8, split=8)),
    ("lut4_g64", Config(192, 2, 4, split=2, rounds=True, wide=True, unrolled=True)),
    ("lut3_g64", Config(192, 2, 4, split=2, rounds=True)),
    ("lut4_g64", Config(96, 2, 4, split=2, rounds=True, wide=True)),
    ("lut2_g64", Config(64, 2, 8, k_groups=2, split=2, rounds=True, unrolled=True)),
    ("lut5_g64", Config(256, 2, 4, rounds=True, stream=True, unrolled=True)),
    ("lut1_g64", Config(256, 2, 4, pair=2, rounds=True)),
    ("int4_g64", Config(64, 2, 11, split=5, k_groups=2, turns=True)),
    ("lut4_g64", Config(128, 2, 7, split=3, rounds=True)),
    ("lut4_g64", Config(128, 2, 4, split=3, rounds=True, wide=True, unrolled=True)),
    ("lut4_g64", Config(192, 2, 4, split=3, rounds=True, wide=True)),
    ("int4_g64", Config(256, 2, 4, split=3, rounds=True)),
    ("lut3_g64", Config(256, 2, 2, split=3, rounds=True, unrolled=True)),
    ("uint4_g32", Config(96, 1, 4, split=3, k_groups=2, rounds=True, unrolled=True)),
    ("lut4_g64", Config(16, 2, 8, split=3, k_groups=2, unrolled=True)),
    ("lut4_g64", Config(64, 2, 8, split=3, k_groups=2, rounds=True, unrolled=True)),
    ("int4_g16", Config(64, 2, 4, split=3, k_groups=2, turns=True, unrolled=True)),
    ("lut4_g64", Config(64, 2, 8, k_groups=2, split=2, rounds=True, unrolled=True, codes_ahead=True)),
    ("lut1_g64", Config(64, 4, 4, rounds=True, unrolled=True, codes_ahead=True)),
    ("int4_g128", Config(128, 1, 8, k_groups=2, rounds=True, unrolled=True, codes_ahead=True)),
    ("lut4_g64", Config(192, 2, 4, rounds=True, wide=True, stream=True, unrolled=True, codes_ahead=True)),
    ("uint4_g32", Config(32, 2, 8, k_groups=2, unrolled=True, codes_ahead=True)),
    ("lut8_g64", Config(16, 4, 4, unrolled=True, codes_ahead=True)),
    ("lut4_g64", Config(128, 2, 6, split=3, rounds=True, wide=True, unrolled=True, codes_ahead=True)),
    ("nest8s4_g64", Config(64, 2, 8, k_groups=2, rounds=True, unrolled=True, codes_ahead=True)),
    ("lut4_g64", Config(256, 2, 4, rounds=True, stream=True, fetch_sums=True, unrolled=True)),
    ("lut4_g64", Config(192, 3, 4, rounds=True, wide=True, parts=2, stream=True, fetch_sums=True)),
    ("int8_g64", Config(128, 2, 5, rounds=True, stream=True, fetch_sums=True)),
    ("int4_g64", Config(160, 3, 4, rounds=True, wide=True, stream=True, fetch_sums=True)),
    ("lut4_g64", Config(128, 2, 4, rounds=True, wide=True, stream=True, fetch_sums=True, unrolled=True)),
    ("lut4_g64", Config(256, 2, 4, pair=2, rounds=True, stream=True, fetch_sums=True, unrolled=True)),
    ("lut4_g64", Config(192, 3, 4, pair=2, rounds=True, wide=True, parts=2, stream=True, fetch_sums=True)),
    ("int8_g64", Config(128, 2, 5, pair=2, rounds=True, stream=True, fetch_sums=True)),
    ("lut8_g64", Config(256, 2, 4, pair=2, rounds=True, stream=True, unrolled=True, codes_ahead=True)),
    ("lut8_g64", Config(256, 2, 4, pair=2, rounds=True, unrolled=True, codes_ahead=True)),
    ("int4_g64", Config(96, 3, 6, pair=2, rounds=True, wide=True, stream=True)),
    ("lut4_g64", Config(128, 3, 6, split=4, rounds=True, unrolled=True)),
    ("lut4_g64", Config(192, 3, 4, split=4, rounds=True, parts=2)),
    ("lut4_g64", Config(96, 3, 6, split=4, rounds=True, wide=True, unrolled=True)),
    ("lut4_g64", Config(64, 2, 8, split=5, k_groups=2, rounds=True, unrolled=True)),
    ("lut2_g64", Config(32, 3, 8, split=4, unrolled=True)),
]


@pytest.mark.parametrize("i", range(len(CASES)))
def test_products(i: int) -> None:
    name, config = CASES[i]
    with emulated(sms=max(5, config.cluster), schedule=SCHEDULES[i % len(SCHEDULES)]):
        weight = testing.random_weight(parse(name), 448, 1024, tables=2 if "lut" in name else 1).to_layout("fragments")
        plan = Plan(weight, config)
        x, bias = (torch.randn(*size, generator=torch.Generator().manual_seed(1)) for size in ((300, 1024), (448,)))
        run = lambda x, _, bias, out: plan(x, bias, out)  # noqa: E731
        for _ in range(2):
            wrong = testing.check_product(run, x.to(weight.dtype), weight, bias.to(weight.dtype), config.rounds)
            assert wrong is None
