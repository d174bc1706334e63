"""Unrolled loops of the prefill kernel, and what nothing chooses, on the emulated GPU under several schedules."""

from dataclasses import replace

import pytest
import torch

from emulate import SCHEDULES, emulated, unavailable
from fdk import reference, testing
from fdk.formats import parse
from fdk.kernels.cuda import dense
from fdk.kernels.cuda.prefill import Config, Plan

REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

LARGE = Config(256, 2, 4, rounds=True, unrolled=True)
PREPARED = replace(LARGE, prepared=True)
CASES = [
    ("lut4_g64", LARGE),
    ("lut4_g64", Config(256, 2, 4, rounds=True, wide=True, stream=True, unrolled=True, apart=True)),
    ("lut4_g64", Config(256, 2, 4, pair=2, rounds=True, wide=True, stream=True, unrolled=True, apart=True, band=1)),
    ("lut2_g64", Config(256, 2, 4, rounds=True, wide=True, unrolled=True, apart=True)),
    ("lut4_g64", Config(192, 3, 4, rounds=True, wide=True, parts=2, stream=True, unrolled=True)),
    ("uint4_g32", Config(192, 2, 2, split=2, rounds=True, unrolled=True)),
    ("lut4_g64", Config(128, 1, 8, k_groups=2, rounds=True, unrolled=True)),
    ("lut4_g64", Config(96, 1, 4, k_groups=2, split=2, rounds=True, wide=True, unrolled=True)),
    ("lut4_g64", Config(128, 1, 8, k_groups=2, rounds=True, wide=True, unrolled=True, apart=True)),
    ("lut4_g64", Config(256, 2, 4, split=2, rounds=True, wide=True, unrolled=True, apart=True)),
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
    ("uint4_g32", Config(48, 2, 4, k_groups=2, ahead=False, unrolled=True)),
    ("lut1_g128", Config(64, 2, 8, unrolled=True)),
    ("int4_g16", Config(64, 2, 4, k_groups=2, split=2, ahead=False, turns=True, unrolled=True)),
    ("lut3_g64", Config(32, 4, 4, unrolled=True, map_ahead=True)),
    ("lut8_g64", LARGE),
    ("lut4_g64", PREPARED),
    ("uint3_g32", replace(PREPARED, pair=2, stream=True)),
    ("nest8s5_g128", replace(PREPARED, tokens=192, split=2, stages=2)),
    ("lut8_chan", replace(PREPARED, unrolled=False)),
    ("lut4_g64", Config(64, 2, 11, split=5, k_groups=2, ahead=False, turns=True)),
    ("lut4_g64", Config(64, 2, 8, split=3, k_groups=2, ahead=False, turns=True)),
    ("lut1_g64", Config(64, 2, 12, split=4, k_groups=2, ahead=False, turns=True)),
    ("lut4_g64", Config(64, 3, 10, split=7)),
    ("lut4_g64", Config(64, 3, 8, rounds=True, unrolled=True)),
    ("lut1_g64", Config(48, 3, 8, rounds=True, unrolled=True)),
    ("lut4_g64", Config(64, 1, 12, split=2, k_groups=3)),
    ("uint4_g32", Config(48, 4, 8, split=8, ahead=False)),
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


@pytest.mark.parametrize("name", ["lut4_g64", "uint3_g48", "nest8s4_g128", "int4_g64_sp16of32", "lut4_g64_sp16of32"])
def test_operands_are_the_reference_in_another_order(name: str) -> None:
    with emulated(schedule=SCHEDULES[len(name) % len(SCHEDULES)]):
        weight = testing.random_weight(parse(name), 128, 384).to_layout("fragments")
        found = dense.Plan(weight, operands=True).operands()
    # Lane 4g + t holds rows g and g + 8 of columns 2t, 2t + 1 and then of the eight columns behind.
    order = found.view(2, 6, 4, 4, 8, 4, 2, 2, 2).permute(0, 2, 7, 4, 1, 3, 6, 5, 8)
    assert torch.equal(order.reshape(128, 384), reference.dequantise(weight))
