"""Configurations of the prefill kernel that nothing chooses yet, on the emulated GPU under several schedules."""

import pytest
import torch

from emulate import SCHEDULES, emulated, unavailable
from fdk import testing
from fdk.formats import parse
from fdk.kernels.cuda.prefill import Config, Plan

REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

LARGE = Config(256, 2, 4, rounds=True, unrolled=True)
CASES = [
    ("lut4_g64", LARGE),
    ("lut4_g64", Config(256, 2, 4, rounds=True, wide=True, stream=True, unrolled=True, apart=True)),
    ("lut4_g64", Config(256, 2, 4, pair=2, rounds=True, wide=True, stream=True, unrolled=True, apart=True, band=1)),
    ("lut2_g64", Config(256, 2, 4, rounds=True, wide=True, unrolled=True, apart=True)),
    ("lut4_g64", Config(192, 3, 4, rounds=True, wide=True, parts=2, stream=True, unrolled=True)),
    ("uint4_g32", Config(192, 2, 2, split=2, rounds=True, unrolled=True)),
    ("int8_g64", LARGE),
    ("lut8_g64", LARGE),
]


@pytest.mark.parametrize("i", range(len(CASES)))
def test_products(i: int) -> None:
    name, config = CASES[i]
    with emulated(sms=5, schedule=SCHEDULES[i % len(SCHEDULES)]):
        weight = testing.random_weight(parse(name), 448, 1024, tables=2 if "lut" in name else 1).to_layout("fragments")
        plan = Plan(weight, config)
        x, bias = (torch.randn(*size, generator=torch.Generator().manual_seed(1)) for size in ((300, 1024), (448,)))
        run = lambda x, _, bias, out: plan(x, bias, out)  # noqa: E731
        for _ in range(2):
            wrong = testing.check_product(run, x.to(weight.dtype), weight, bias.to(weight.dtype), config.rounds)
            assert wrong is None
