"""CUDA kernels on the emulated GPU of emulate/: results, accesses, barriers and orders, without a device.

FDK_TEST_EMULATED_GPU=1 runs every case under every schedule, at every number of rows and on both architectures; without
it each case takes one of each in turn.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from functools import cache

import pytest
import torch

from emulate import SCHEDULES, EmulationError, Schedule, device, emulated, unavailable
from fdk import reference, testing
from fdk.formats import all_formats, parse
from fdk.kernels import Problem, reason_against
from fdk.kernels.cuda import KERNEL, _routes, decode, decode_choice, decode_config, jit, prefill, prefill_config

REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

WIDE = os.environ.get("FDK_TEST_EMULATED_GPU") == "1"
HOPPER, AMPERE = (9, 0), (8, 0)
MORE = tuple(Schedule("random", copies, seed) for seed in range(2, 8) for copies in ("at once", "random"))
"""What shows in few orders only needs many of them."""


def turns(cases: list, **choices: tuple) -> list:
    """The cases, each with every combination of choices if WIDE, else each with another one."""
    combined = list(itertools.product(*choices.values()))
    assert WIDE or math.gcd(23, len(combined)) == 1
    return [
        (case, *chosen)
        for i, case in enumerate(cases)
        for chosen in (combined if WIDE else [combined[23 * i % len(combined)]])
    ]


def inputs(m: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shape_of(weight) -> decode_config.Shape:
    zeros = weight.parts.get("zeros")
    return decode_config.shape_of(weight.geometry, None if zeros is None else zeros.dtype)


def check(call, m: int, weight, rounds: bool, bias: bool = False, one_hot: bool = True) -> None:
    """A random product within its bound, and a weight's own columns bit for bit."""
    n, k = weight.shape
    added = inputs(1, n, weight.dtype, 7)[0] if bias else None
    run = lambda x, _, bias, out: call(x, bias, out)  # noqa: E731
    assert testing.check_product(run, inputs(m, k, weight.dtype), weight, added, rounds) is None
    if one_hot:
        columns = torch.randperm(k, generator=torch.Generator().manual_seed(m))[:m]
        out = testing.poisoned(len(columns), n, weight.dtype, "cpu")
        call(testing.one_hot_probe(k, columns, weight.dtype, "cpu"), None, out)
        assert torch.equal(out, reference.dequantise(weight)[:, columns].T)


FORMATS = [str(fmt) for fmt in all_formats((16, 48, 64, None) if WIDE else (64,))]
FORMATS += (
    []
    if WIDE
    else ["lut4_g16", "lut3_g32", "lut5_g48", "uint4_g16", "uint3_g48", "lut4_chan", "int8_chan", "uint8_chan"]
)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    "name,m,schedule,capability,dtype",
    turns(FORMATS, m=(1, 2, 5, 8, 16), schedule=SCHEDULES, capability=(HOPPER, AMPERE), dtype=DTYPES),
)
def test_every_format(name: str, m: int, schedule: Schedule, capability, dtype) -> None:
    with emulated(capability, schedule=schedule):
        weight = testing.random_weight(parse(name), 40 if m == 1 else 100, 192, dtype, seed=3, tables=3)
        problem = Problem(m, weight.geometry, weight.device)
        if reason := reason_against(KERNEL, problem):
            pytest.skip(reason)
        weight = weight.to_layout(KERNEL.layout)
        found = next(r for r in _routes(weight.geometry, torch.uint8, m, weight.device) if r.name == "decode")
        check(KERNEL._bind(weight, m, (found,)), m, weight, found.rounds, bias=m == 5)


def config(tokens: int, cluster: int, k_warps: int, row_warps: int, blocks: int, **more) -> decode_config.Config:
    plain = decode_config.Config(tokens, cluster, k_warps, row_warps, 1, 1, blocks, 1, 1)
    return replace(plain, **more)


# Clusters, chunks, phases and slices; rings of several stages and units; sums kept over steps; integer products.
CONFIGS = [
    ("lut4_g64", config(1, 1, 8, 1, 2, stages=2, batch=2)),
    ("lut4_g64", config(1, 2, 4, 1, 3, batch=3)),
    ("lut4_g64", config(1, 2, 4, 2, 4, stages=3)),
    ("lut2_g64", config(2, 4, 2, 1, 1, stage_units=2)),
    ("lut3_g64", config(4, 8, 1, 2, 2)),
    ("lut3_g64", config(8, 2, 4, 2, 2, phases=2)),
    ("uint4_g64", config(8, 1, 4, 1, 1, phases=2)),
    ("lut1_g64", config(16, 2, 2, 2, 2, x_chunks=2)),
    ("lut4_g64", config(16, 2, 1, 5, 5, x_chunks=4)),
    ("int4_g64", config(32, 1, 4, 1, 1, x_chunks=2)),
    ("int8_g128", config(64, 4, 1, 2, 2)),
    ("lut1_g64", config(1, 1, 4, 1, 1, digits=True)),
    ("int2_g64", config(1, 2, 4, 1, 2, digits=True, stages=2)),
    ("uint4_g64", config(2, 1, 8, 1, 1, digits=True, paired=True, stages=2)),
    ("int8_g64", config(1, 2, 4, 2, 2, digits=True)),
]

# How codes, scales and sums of activations come to a warp, by themselves and together.
OPTIONS = [
    ("lut4_g64", config(1, 2, 4, 1, 2, bulk=False, stages=2, batch=2)),
    ("lut3_g64", config(8, 2, 4, 2, 2, bulk=False, stages=2)),
    ("lut1_g64", config(1, 1, 4, 1, 1, bulk=False, stage_units=4, digits=True)),
    ("nest8s4_g64", config(1, 1, 4, 1, 1, bulk=False, stages=2)),
    ("lut4_g64", config(1, 2, 4, 2, 2, scales_once=True, stages=2, stage_units=2)),
    ("lut3_g128", config(1, 2, 4, 1, 1, scales_once=True)),
    ("lut4_chan", config(1, 1, 4, 1, 1, scales_once=True, bulk=False)),
    ("int4_g64_sp16of32", config(1, 1, 4, 1, 1, scales_once=True, bulk=False, stages=2)),
    ("lut1_g64", config(1, 1, 4, 1, 1, scales_once=True, digits=True, stage_units=4)),
    ("lut1_g64", config(1, 2, 4, 1, 1, x_sums=True, stages=2)),
    ("lut1_g16", config(8, 2, 2, 2, 2, x_sums=True)),
    ("uint4_g64", config(16, 2, 4, 1, 1, x_sums=True)),
    ("uint1_g64", config(32, 1, 4, 1, 1, x_sums=True)),
    ("lut1_g64", config(16, 2, 4, 2, 2, x_sums=True, x_chunks=2)),
    ("lut1_g64", config(16, 2, 2, 2, 2, octets=True, x_chunks=2)),
    ("lut1_g64", config(8, 2, 2, 2, 2, x_sums=True, x_chunks=4)),
    ("lut4_g64", config(8, 2, 2, 3, 3, half_blocks=True, stage_units=2, uniform=True)),
    ("lut8_g64", config(16, 1, 4, 2, 2, half_blocks=True, wide=True)),
    ("uint2_g128", config(8, 2, 2, 2, 2, half_blocks=True, stages=2)),
    ("int1_g64", config(8, 1, 4, 1, 1, octets=True, stages=2)),
    ("lut4_g64", config(1, 1, 4, 1, 1, ahead=1)),
    ("lut3_g64", config(1, 1, 4, 2, 3, batch=2, stages=2, ahead=2, uniform=True)),
    ("lut8_g128", config(1, 2, 4, 1, 1, scales_once=True, ahead=3)),
    ("int4_g64_sp16of32", config(1, 2, 4, 3, 3, digits=True, paired=True, bulk=False, stages=2, ahead=1)),
    ("nest8s4_g128", config(1, 1, 4, 1, 2, batch=2, digits=True, paired=True, uniform=True, stage_units=2, ahead=2)),
    ("lut1_g16", config(32, 1, 4, 2, 2, octets=True)),
    ("lut1_chan", config(1, 2, 4, 1, 2, octets=True, batch=2)),
    ("lut4_g64", config(16, 2, 2, 2, 2, uniform=True, stages=2, x_chunks=2)),
    ("lut1_g64", config(16, 2, 1, 5, 5, uniform=True, octets=True, x_chunks=2)),
    ("lut4_g64", config(16, 2, 2, 2, 2, uniform=True, wide=True, phases=2)),
    ("lut2_g64", config(8, 2, 2, 2, 2, x_chunks=2, x_ahead=1)),
    ("lut4_g64", config(16, 2, 2, 2, 2, interleaved=True, x_chunks=2, x_ahead=1, uniform=True)),
    ("lut3_g128", config(8, 1, 2, 2, 2, interleaved=True, x_chunks=4, x_ahead=2, stages=2)),
    ("lut1_g64", config(16, 2, 2, 2, 2, interleaved=True, octets=True, selected=1, x_chunks=2)),
    ("lut8_g64", config(16, 2, 2, 2, 2, interleaved=True, phases=2)),
    ("lut2_g64", config(16, 2, 2, 2, 2, interleaved=True, phases=4, x_buffers=3)),
    ("lut1_g64", config(8, 1, 4, 1, 1, interleaved=True, octets=True, phases=4, x_buffers=2)),
    ("nest8s4_g128", config(16, 2, 2, 2, 2, interleaved=True)),
    ("int1_g64", config(8, 1, 4, 1, 1, octets=True, selected=2)),
    ("uint4_g64", config(8, 1, 4, 1, 1, uniform=True, stages=2)),
    ("lut3_g64", config(1, 2, 4, 1, 1, uniform=True, scales_once=True)),
    ("int2_g64", config(1, 2, 4, 1, 2, uniform=True, digits=True, stages=2)),
    ("uint4_g64", config(1, 1, 4, 1, 1, scales_once=True, x_sums=True)),
    ("uint2_g128", config(8, 2, 4, 1, 1, scales_once=True, stages=2)),
    ("uint8_g64", config(2, 1, 4, 1, 1, scales_once=True, bulk=False, stages=2)),
    ("uint4_g64", config(1, 1, 4, 1, 1, scales_once=True, digits=True, stages=1, stage_units=2)),
    ("lut4_g64", config(1, 2, 4, 1, 2, wide=True, stages=2)),
    ("lut2_g64", config(8, 1, 4, 2, 2, wide=True, stage_units=2)),
    ("lut8_g64", config(1, 1, 4, 1, 1, wide=True, bulk=False, scales_once=True)),
    ("nest8s2_g64", config(1, 1, 4, 1, 1, digits=True, stage_units=2)),
    ("nest8s3_g128", config(1, 1, 8, 2, 2, digits=True, stages=2, scales_once=True)),
    ("nest8s5_g64", config(2, 2, 4, 1, 1, digits=True, paired=True, stages=2)),
    ("nest8_chan", config(1, 1, 4, 1, 2, digits=True, stages=3)),
    ("trunc8s2_g128", config(1, 1, 4, 2, 2, digits=True, stage_units=4)),
    ("trunc8s4_g64", config(1, 2, 4, 1, 1, digits=True, bulk=False, stages=2)),
    ("trunc8s7_g64", config(2, 1, 4, 1, 1, digits=True, paired=True)),
    ("lut1_g64", config(1, 1, 4, 1, 1, digits=True, paired=True, uniform=True, stage_units=4)),
    ("lut1_g64", config(1, 2, 2, 2, 2, digits=True, paired=True, scales_once=True, late=True, stage_units=2)),
    ("lut1_g64", config(1, 2, 8, 1, 3, digits=True, paired=True, uniform=True, late=True, stages=2, batch=3)),
    ("lut1_g64", config(1, 2, 2, 3, 3, digits=True, paired=True, uniform=True, stage_units=4)),
    ("lut1_g128", config(2, 1, 3, 1, 1, digits=True, paired=True)),
    ("int2_g64", config(1, 1, 4, 2, 2, digits=True, paired=True, bulk=False, stage_units=2, stages=2)),
    ("uint4_g64", config(1, 1, 4, 1, 1, digits=True, paired=True, uniform=True, late=True, stages=2)),
    ("uint8_g64", config(2, 2, 4, 1, 1, digits=True, paired=True)),
    ("int8_chan", config(1, 1, 4, 1, 1, digits=True, paired=True)),
    ("nest8s4_g64", config(1, 1, 4, 1, 2, digits=True, paired=True, stages=2)),
    ("lut2_g64", config(1, 1, 4, 1, 1, indices=True, stage_units=4)),
    ("lut2_g128", config(2, 2, 4, 2, 4, indices=True, stage_units=2, stages=2)),
    ("int2_chan", config(1, 2, 2, 2, 3, indices=True, stages=3, batch=2, late=True)),
    ("lut2_g64", config(1, 1, 4, 1, 1, indices=True, stage_units=2, scales_once=True, bulk=False)),
    ("lut1_g64", config(1, 1, 4, 1, 1, indices=True, stage_units=4)),
    ("uint2_g64", config(1, 1, 4, 1, 1, indices=True, stage_units=4)),
    ("uint2_g128", config(2, 1, 4, 1, 2, indices=True, stage_units=2, stages=2)),
    ("uint1_g64", config(1, 2, 2, 1, 2, indices=True, stage_units=4)),
    ("lut1_g64", config(2, 2, 4, 1, 2, indices=True, stages=4)),
    ("int1_g128", config(1, 1, 2, 4, 4, indices=True, stages=2, stage_units=2, phases=1)),
    ("lut1_g64", config(2, 1, 4, 1, 1, indices=True, stages=2, phases=2, stage_units=2)),
    ("int4_g64_sp16of32", config(1, 1, 4, 1, 1, digits=True, stages=2)),
    ("int4_g128_sp16of32", config(2, 2, 4, 1, 2, digits=True, bulk=False)),
    ("int4_g64_sp16of32", config(1, 1, 8, 1, 1, digits=True, paired=True, scales_once=True, stage_units=2)),
    # Integer products for four and eight tokens: scales of one unit and of two, x kept and loaded twice.
    ("nest8s2_g128", config(4, 1, 8, 1, 1, digits=True, paired=True, uniform=True, stage_units=2)),
    ("nest8s3_g64", config(4, 2, 4, 1, 2, digits=True, paired=True, uniform=True, stage_units=2, batch=2)),
    ("nest8s4_g128", config(4, 2, 2, 2, 2, digits=True, paired=True, stage_units=2, scales_once=True)),
    ("nest8_g128", config(8, 2, 4, 2, 2, digits=True, paired=True, uniform=True, stages=2)),
    ("nest8s6_chan", config(8, 1, 2, 2, 4, digits=True, paired=True, stage_units=4)),
    ("trunc8s2_g128", config(8, 1, 1, 1, 1, digits=True, paired=True, stage_units=2, stages=2)),
    ("trunc8s7_g64", config(4, 1, 3, 1, 2, digits=True, paired=True, stages=2)),
    ("int1_g64", config(4, 1, 4, 1, 1, digits=True, paired=True, stage_units=2, late=True)),
    ("int2_g128", config(8, 2, 4, 2, 2, digits=True, paired=True, uniform=True, stage_units=2)),
    ("int4_g64", config(4, 2, 8, 1, 3, digits=True, paired=True, batch=3)),
    ("int8_g128", config(4, 4, 2, 1, 1, digits=True, paired=True, bulk=False, stage_units=2)),
    ("int8_g64", config(8, 1, 1, 3, 3, digits=True, paired=True)),
    ("uint4_g128", config(4, 1, 4, 2, 2, digits=True, paired=True, stage_units=4)),
    ("uint2_g64", config(8, 2, 4, 1, 1, digits=True, paired=True, scales_once=True, stages=2)),
    ("uint1_g64", config(4, 1, 16, 1, 1, digits=True, paired=True)),
    ("nest8s5_g128", config(8, 2, 2, 2, 2, digits=True, paired=True, stage_units=2)),
    ("uint4_g64", config(4, 1, 4, 1, 2, digits=True, paired=True, uniform=True)),
    ("nest8s2_g128", config(2, 2, 2, 2, 2, digits=True, paired=True, stage_units=2)),
    ("int2_g64", config(2, 1, 3, 1, 2, digits=True, paired=True, uniform=True, stages=2)),
    ("int4_g128", config(2, 1, 1, 1, 1, digits=True, paired=True, stage_units=4)),
]


@pytest.mark.parametrize("case,schedule", turns(CONFIGS + OPTIONS, schedule=SCHEDULES))
def test_decode_configurations(case, schedule: Schedule) -> None:
    name, chosen = case
    with emulated(sms=2, schedule=schedule):
        weight = testing.random_weight(parse(name), 300, 1024, tables=2 if "lut" in name else 1)
        weight = weight.to_layout(KERNEL.layout)
        m = max(1, chosen.tokens - chosen.tokens // 4)
        check(decode.Plan(weight, chosen), m, weight, False, bias=chosen.tokens == 8)


# Two and four values: of one size, far apart, one of them zero, all equal, and normal quantiles.
VALUES = {
    2: [[-1, -0.33, 0.33, 1], [1e-6, 1e3, -2e-6, -1e3], [0, 1e-20, 1e20, -1], [0.5, 0.5, 0.5, 0.5]],
    1: [[-1, 1], [1e-6, 1e3], [0, -1e20], [0.5, 0.5]],
}


LARGE = ["nest8s2_g128 16384", "nest8_g128 16384", "trunc8s7_g128 16384", "nest8s4_chan 8192", "int4_g64_sp16of32 8192"]


@pytest.mark.parametrize("name", LARGE)
def test_large_slices_by_integer_products(name: str) -> None:
    """What is chosen for square weights, on five blocks of them: the bound, one-hot inputs, integers exactly."""
    name, k = name.split()[0], int(name.split()[1])
    with emulated(sms=2, schedule=SCHEDULES[len(name) % 3]):
        weight = testing.random_weight(parse(name), 320, k)
        chosen = decode_choice.choose_config(replace(shape_of(weight), n=k), 1, k // 64, 132)
        assert chosen.digits
        weight.parts["scales"][64:] = 1
        weight = weight.to_layout(KERNEL.layout)
        plan = decode.Plan(weight, chosen)
        check(plan, 1, weight, False)
        x = torch.randint(-4, 5, (1, k), generator=torch.Generator().manual_seed(2)).to(weight.dtype)
        out = testing.poisoned(1, 320, weight.dtype, "cpu")
        plan(x, None, out)
        assert torch.equal(out[:, 64:], testing.exact(x, weight)[:, 64:].to(weight.dtype))


# By integer products, indices, 16 warps, wide tables and held places: format, n, k, rows of x.
CHOSEN = [
    "uint2_g64 14336 4096 1",
    "uint4_g64 4096 14336 1",
    "int8_g64 4096 14336 1",
    "uint2_g64 4096 4096 1",
    "uint2_g64 28672 8192 1",
    "lut2_g64 4096 4096 1",
    "lut2_g64 4096 14336 1",
    "lut2_g64 8192 8192 1",
    "lut1_g64 8192 8192 1",
    "lut8_g64 4096 4096 1",
    "int4_g64 14336 4096 1",
    "int8_g64 14336 4096 1",
    "lut3_g64 14336 4096 1",
    "int4_g64_sp16of32 20480 5120 1",
    "lut1_g64 4096 14336 1",
    "lut8_g64 4096 14336 1",
    "lut4_g64 20480 5120 1",
    "trunc8s2_g128 8192 8192 1",
    "lut1_g64 14336 4096 2",
    "lut1_g64 28672 8192 2",
    "nest8s2_g128 14336 4096 1",
    "nest8s4_g128 4096 14336 1",
    "nest8_g128 28672 8192 1",
    "nest8s4_g128 20480 5120 1",
    "nest8s2_g128 4096 4096 4",
    "nest8s4_g128 4096 4096 4",
    "nest8_g128 2560 4096 4",
    "trunc8s6_g128 1024 4096 4",
    "int3_g64 3072 4096 2",
    "int6_g64 4096 4032 4",
    "uint4_g64 4096 4096 2",
    "nest8s4_g128 8192 8192 4",
    "nest8_g128 8192 8192 3",
    "nest8s3_g128 8192 8192 2",
    "int2_g64 8192 8192 2",
    "nest8s4_g128 28672 8192 4",
    "int8_g64 8192 8192 4",
    "trunc8s6_g128 8192 8192 4",
    "nest8s4_g128 8192 8192 16",
    "nest8s4_g128 4096 4096 16",
    "lut4_g64 4096 4096 16",
    "uint4_g64 8192 8192 2",
    "uint2_g64 8192 8192 4",
    "uint4_g64 28672 8192 8",
    "uint2_g64 4096 4096 4",
    "lut4_g64 8192 8192 4",
    "lut2_g64 28672 8192 8",
    "lut4_g64 28672 8192 8",
    "lut8_g64 28672 8192 8",
    "lut1_g64 8192 8192 8",
    "lut4_g64 14336 4096 8",
    "lut8_g64 14336 4096 16",
    "lut1_g64 14336 4096 16",
]


@pytest.mark.parametrize("problem", CHOSEN)
def test_what_is_chosen_for_large_weights(problem: str) -> None:
    """On the rows of one or two CTAs, beside two without work."""
    name, n, k, m = problem.split()
    n, k, m = int(n), int(k), int(m)
    with emulated(sms=4, schedule=SCHEDULES[len(problem) % 3]):
        shape = shape_of(testing.random_weight(parse(name), 64, k))
        chosen = decode_choice.choose_config(replace(shape, n=n), m, n // 64, 132)
        weight = testing.random_weight(parse(name), 64 * chosen.blocks + 40, k).to_layout(KERNEL.layout)
        check(decode.Plan(weight, chosen, asked=True), m, weight, False)


@pytest.mark.parametrize("cluster", [1, 2])
def test_ctas_without_work_hold_their_places_and_do_no_more(cluster: int) -> None:
    with emulated(sms=6, schedule=SCHEDULES[cluster]):
        weight = testing.random_weight(parse("lut4_g64"), 100, 512).to_layout(KERNEL.layout)
        plan = decode.Plan(weight, config(1, cluster, 2, 1, 1, stages=2, late=True, hold=800))
        assert plan.grid == 6 > 2 * cluster
        check(plan, 1, weight, False)


@pytest.mark.parametrize("bits,m,stage_units", [(1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 4)])
def test_tables_of_any_range_are_what_indices_select(bits: int, m: int, stage_units: int) -> None:
    with emulated(sms=2, schedule=SCHEDULES[bits]):
        weight = testing.random_weight(parse(f"lut{bits}_g64"), 250, 512, tables=4)
        weight.parts["table"].copy_(torch.tensor(VALUES[bits]))
        weight = weight.to_layout(KERNEL.layout)
        plan = decode.Plan(weight, config(m, 1, 2, 1, 2, indices=True, stage_units=stage_units))
        check(plan, m, weight, False)
        run = lambda x, _, bias, out: plan(x, bias, out)  # noqa: E731
        for seed in range(5):
            x = inputs(m, 512, seed=seed) * torch.logspace(-8, 8, 512).to(torch.bfloat16)
            assert testing.check_product(run, x, weight, None, False) is None


@pytest.mark.parametrize("largest", [1e-32, math.nan, math.inf])
@pytest.mark.parametrize("name,m", [("lut1_g64", 1), ("int4_g64", 2), ("int2_g64", 4), ("nest8s4_g64", 8)])
def test_integer_products_at_the_ends_of_the_range(name: str, m: int, largest: float) -> None:
    with emulated():
        weight = testing.random_weight(parse(name), 64, 512).to_layout(KERNEL.layout)
        call = decode.Plan(weight, config(m, 1, 2, 1, 1, digits=True, paired=m > 1))
        x = inputs(m, 512)
        if math.isfinite(largest):
            run = lambda x, _, bias, out: call(x, bias, out)  # noqa: E731
            assert testing.check_product(run, x * largest, weight, None, False) is None
        else:
            x[0, 77] = largest
            out = testing.poisoned(m, 64, weight.dtype, "cpu")
            call(x, None, out)
            assert not out[0].isfinite().any() and out[1:].isfinite().all()


@pytest.mark.parametrize("name", ["lut4_g64", "uint3_g48", "nest8s4_g128"])
def test_dense_weights(name: str) -> None:
    with emulated(schedule=SCHEDULES[len(name) % 3]):
        weight = testing.random_weight(parse(name), 100, 384, tables=2 if "lut" in name else 1).to_layout(KERNEL.layout)
        assert torch.equal(KERNEL.dequantise(weight), reference.dequantise(weight))


# Configuration, file, text and what takes its place: each must be noticed under at least one schedule.
SELECTED = config(1, 1, 4, 1, 1, indices=True, stage_units=2)
ALONE, CLUSTERED = config(8, 1, 4, 1, 1, stages=2), config(8, 2, 4, 1, 1, stages=2)
TURNS = prefill_config.Config(64, 1, 7, k_groups=2, rounds=True)
CUT = prefill_config.Config(64, 2, 3, rounds=True, stream=True)
SLICED = prefill_config.Config(64, 2, 4, split=2, rounds=True)
FAULTS = {
    "no barrier behind the table": (ALONE, "decode.cuh", "__syncthreads();  // table and barriers are ready\n", ";\n"),
    "no wait for weights": (ALONE, "decode.cuh", "                    w.wait(stage, parity);\n", ""),
    "no barrier before sums": (ALONE, "decode.cuh", "BATCH == 1) {\n            __syncthreads();", "BATCH == 1) {"),
    "a slice of k is not added": (
        ALONE,
        "decode.cuh",
        "kw = 1; kw < K_WARPS; ++kw) sum +=",
        "kw = 2; kw < K_WARPS; ++kw) sum +=",
    ),
    "slices of k overlap": (
        ALONE,
        "decode.cuh",
        "STAGE_UNITS : units * k_warp / K_WARPS;",
        "STAGE_UNITS : (units * k_warp - 1) / K_WARPS;",
    ),
    "no wait for the kernel in front": (
        ALONE,
        "decode.cuh",
        "if constexpr (AHEAD < 2 && !X_FIRST) wait_for_previous_kernel();",
        "",
    ),
    "no wait in front of activations that are asked for first": (
        SELECTED,
        "decode.cuh",
        "        wait_for_previous_kernel();\n        activations.load();\n",
        "        activations.load();\n",
    ),
    "no wait for the cluster": (
        CLUSTERED,
        "decode.cuh",
        "if (!MET_EARLY && (!COUNTED_SUMS || step == 0)) cluster_wait();",
        "",
    ),
    "no wait for sums": (CLUSTERED, "decode.cuh", "            barrier_wait(sums_barrier, 0);\n", ";\n"),
    "too few bytes expected": (CLUSTERED, "decode.cuh", "ROW_WARPS * 64 * M * 4);", "ROW_WARPS * 64 * M * 4 - 16);"),
    "a wrong entry of the table": (
        CLUSTERED,
        "dequantise.cuh",
        "__shfl_sync(0xffffffffu, value, code)",
        "__shfl_sync(0xffffffffu, value, code - (code == 5))",
    ),
    "no wait for cp.async": (replace(ALONE, bulk=False), "shape.cuh", "            copy_wait<STAGES - 1>();\n", ""),
    "no scales behind the first stage": (
        replace(ALONE, scales_once=True),
        "decode.cuh",
        "w.prefetch(ahead, stage, stage == 0, WholeBlock{});",
        "w.prefetch(ahead, stage, false, WholeBlock{});",
    ),
    "the neighbour's index": (SELECTED, "indices.cuh", "32 - 7);", "32 - 5);"),
    "the scales of another unit": (SELECTED, "indices.cuh", "lane % SLOTS * 64", "(lane + 1) % SLOTS * 64"),
    "another lane's table values": (SELECTED, "indices.cuh", "t / 2 != g % 2 ? 0", "t / 2 == g % 2 ? 0"),
    "rows past the end": (
        CLUSTERED,
        "epilogue.cuh",
        "written && !others && n < (GATED ? N / 2 : range.end_row)",
        "written",
    ),
    "rows of the cluster that shares a block": (
        config(8, 2, 2, 2, 2, half_blocks=True),
        "epilogue.cuh",
        "written && !others",
        "written",
    ),
    "no barrier of a warp before a refill": (
        ALONE,
        "shape.cuh",
        "            __syncwarp();\n            prefetch",
        "prefetch",
    ),
    "no wait for activations": (
        ALONE,
        "decode.cuh",
        "                    wait_for_activations(p, smem, phase, unit - first_unit, cta_unit + phase * units,"
        " units, warp, lane);\n",
        "",
    ),
    "activations of a later phase in use": (
        config(8, 1, 4, 1, 1, stages=2, interleaved=True, phases=4, x_buffers=2),
        "activations.cuh",
        "    if (phase >= X_BUFFERS) barrier_wait",
        "    if (phase < 0) barrier_wait",
    ),
    "activations of the next phase in use": (
        replace(ALONE, k_warps=2, row_warps=2, blocks=2, stages=1, phases=4),
        "decode.cuh",
        "                __syncthreads();\n                prepare_phase",
        "                prepare_phase",
    ),
    "no wait for a stage": (
        TURNS,
        "prefill.cuh",
        "                barrier_wait(barriers.full(at.stage), at.parity);\n",
        "",
    ),
    "a stage is filled too early": (
        TURNS,
        "prefill_producer.cuh",
        "if (round > 0) barrier_wait(barriers.empty(turn.stage), turn.parity ^ 1);",
        "",
    ),
    "a stage is given back too early": (TURNS, "prefill_units.cuh", "if constexpr (!LATE) wgmma_wait<1>();", ""),
    "a stage of the other k group": (
        TURNS,
        "prefill.cuh",
        "if constexpr (STAGES % K_GROUPS != 0) barrier_wait",
        "if (false) barrier_wait",
    ),
    "sums of other slices are not waited for": (
        SLICED,
        "prefill.cuh",
        "if constexpr (Smem::MEETING_BARRIERS > 0) barrier_wait(barriers.arrived",
        "if (false) barrier_wait(barriers.arrived",
    ),
    "sums are sent to a ring in use": (
        SLICED,
        "prefill_sums.cuh",
        "        barrier_wait(barriers.loops_done(), 0);\n",
        "",
    ),
    "sums of another k group are not waited for": (
        TURNS,
        "prefill.cuh",
        "if constexpr (SPLIT == 1) named_barrier(WARPGROUPS + 1, CONSUMERS);",
        "",
    ),
    "no wait for a share": (CUT, "prefill.cuh", "while (read_flag(flag(other)) == 0) {", "while (false) {"),
    "flags are left behind": (CUT, "prefill.cuh", "                        set_flag(flag(other), 0);\n", ""),
    "no fence in front of wgmma": (CUT, "prefill_units.cuh", "    wgmma_fence();\n", ""),
}


# What nothing orders is noticed in every order, also where it does no harm.
RACES = (
    "no barrier behind the table",
    "no wait for weights",
    "no barrier before sums",
    "no wait for the cluster",
    "no barrier of a warp before a refill",
    "no wait for activations",
    "activations of the next phase in use",
    "no wait for a stage",
    "a stage is filled too early",
    "slices of k do not meet",
)


def noticed(chosen: decode_config.Config | prefill_config.Config, schedule: Schedule) -> bool:
    """Whether a product by a configuration is wrong, or an error."""
    m, plan_of = (8, decode.Plan) if isinstance(chosen, decode_config.Config) else (64, prefill.Plan)
    with emulated(sms=4, schedule=schedule):
        indices = isinstance(chosen, decode_config.Config) and chosen.indices
        m = 1 if indices else m
        weight = testing.random_weight(parse("lut2_g64" if indices else "lut4_g64"), 296, 1024).to_layout(KERNEL.layout)
        try:
            plan = decode.Plan(weight, chosen, asked=True) if indices else plan_of(weight, chosen)
            run = lambda x, _, bias, out: plan(x, bias, out)  # noqa: E731
            return testing.check_product(run, inputs(m, 1024), weight, None, m > 8) is not None
        except EmulationError:
            return True


@pytest.mark.parametrize("chosen", [ALONE, CLUSTERED, TURNS, CUT, SLICED, SELECTED])
def test_without_a_fault_nothing_is_noticed(chosen) -> None:
    assert not any(noticed(chosen, schedule) for schedule in (*SCHEDULES, *MORE))


@pytest.mark.parametrize("right", [True, False])
def test_a_device_is_asked_for_equal_indices_and_served_without(right: bool, monkeypatch) -> None:
    _, file, old, new = FAULTS["the neighbour's index"]
    sources = jit.sources()
    monkeypatch.setattr(
        jit, "sources", lambda: sources if right else {**sources, file: sources[file].replace(old, new)}
    )
    monkeypatch.setattr(device, "_kernel", cache(device._kernel.__wrapped__))
    with emulated(sms=4) as gpu:
        weight = testing.random_weight(parse("lut2_g64"), 100, 1024).to_layout(KERNEL.layout)
        plans = [decode.Plan(weight, SELECTED) for _ in range(2)]
        assert [plan.config.indices for plan in plans] == [right, right]
        assert len(gpu.executed) == 1
        check(plans[0], 1, weight, False)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault: str, monkeypatch) -> None:
    chosen, file, old, new = FAULTS[fault]
    sources = jit.sources()
    assert old in sources[file], f"{file} has changed where this fault is planted; plant it in the new text"
    monkeypatch.setattr(jit, "sources", lambda: {**sources, file: sources[file].replace(old, new)})
    monkeypatch.setattr(device, "_kernel", cache(device._kernel.__wrapped__))
    assert any(noticed(chosen, schedule) for schedule in (*SCHEDULES, *MORE))
    if fault in RACES:
        assert all(noticed(chosen, schedule) for schedule in SCHEDULES)
