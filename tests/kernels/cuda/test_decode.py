"""The decode kernel beyond the contract suite, on a device or emulated: integer products, ways to split x, routes."""

from dataclasses import replace

import pytest
import torch

from fdk import reference, testing
from fdk.formats import parse
from fdk.kernels import Problem
from fdk.kernels.cuda import KERNEL, _routes, decode, decode_choice, decode_config


def weight_of(where: str, name: str, n: int, k: int, **more):
    return testing.random_weight(parse(name), n, k, device=where, **more).to_layout("fragments")


def inputs(where: str, m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype).to(where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "name",
    [
        "lut1_g64",
        "int1_chan",
        "uint1_g128",
        "int2_g64",
        "uint4_g64",
        "int4_g128",
        "int8_g64",
        "int3_g64",
        "uint5_g128",
        "int6_g64",
        "uint7_g64",
        "nest8s2_g64",
        "nest8s4_g128",
        "nest8_chan",
        "trunc8s3_g64",
        "trunc8s6_g128",
        "int4_g64_sp16of32",
    ],
)
def test_integer_products_are_exact_on_one_hot_inputs(where: str, name: str, m: int, dtype: torch.dtype) -> None:
    n, k = 200, 1152
    weight = weight_of(where, name, n, k, dtype=dtype, seed=m)
    zeros = weight.parts.get("zeros")
    shape = decode_config.shape_of(weight.geometry, None if zeros is None else zeros.dtype)
    if not shape.allows_digits_of(m):
        pytest.skip("four tokens and more: codes alone, not tables or masks")
    config = replace(decode_choice.choose_config(shape, m, 4, 132), digits=True, stage_units=1, stages=2, phases=1)
    config = replace(config, paired=shape.nested or shape.sparse or m > 1, x_chunks=1, x_sums=False)
    plan = decode.Plan(weight, config)
    x = inputs(where, m, k, dtype)
    assert testing.check_product(lambda x, w, b, out: plan(x, b, out), x, weight, None, False) is None
    dense = reference.dequantise(weight)
    for first in range(0, 64, m):
        columns = torch.arange(first, first + m) * 17 % k
        out = testing.poisoned(m, n, dtype, where)
        plan(testing.one_hot_probe(k, columns, dtype, where), None, out)
        assert torch.equal(out, dense[:, columns].T)


@pytest.mark.parametrize("m", [1, 2, 8, 16])
@pytest.mark.parametrize("name", ["lut1_g64", "lut3_g64", "uint4_g64"])
def test_activations_arrive_in_chunks_phases_and_slices(where: str, name: str, m: int) -> None:
    # Whatever part of x a warp waits for has to be there, and nothing may overwrite what another still reads.
    n, k = 320, 4096
    weight = weight_of(where, name, n, k)
    zeros = weight.parts.get("zeros")
    shape = decode_config.shape_of(weight.geometry, None if zeros is None else zeros.dtype)
    base = replace(
        decode_choice.choose_config(shape, m, 5, 132), stage_units=1, stages=2, batch=1, min_ctas=1, digits=False
    )
    x = inputs(where, m, k)
    for cluster, k_warps, row_warps, phases, chunks in (
        (2, 4, 1, 1, 4),
        (2, 2, 2, 1, 2),
        (2, 4, 2, 4, 2),
        (2, 8, 1, 2, 1),
        (1, 16, 1, 4, 1),
        (4, 1, 5, 8, 2),
    ):
        blocks = row_warps if phases > 1 else 2 * row_warps
        config = replace(
            base, cluster=cluster, k_warps=k_warps, row_warps=row_warps, phases=phases, x_chunks=chunks, blocks=blocks
        )
        plan = decode.Plan(weight, config)
        wrong = testing.check_product(lambda x, w, b, out, plan=plan: plan(x, b, out), x, weight, None, False)
        assert wrong is None, (config, wrong)
        first, again = (testing.poisoned(m, n, torch.bfloat16, where) for _ in range(2))
        plan(x, None, first)
        for _ in range(50 if where != "cpu" else 1):
            plan(x, None, again)
            assert torch.equal(first, again), config


@pytest.mark.parametrize("m", [5, 16])
@pytest.mark.parametrize("name", ["lut2_g64", "lut4_g64", "lut8_g64", "uint4_g128"])
def test_clusters_share_blocks_of_rows(where: str, name: str, m: int) -> None:
    # Two clusters write rows of the same block, and tables and the last rows end inside of one.
    n, k = 1000, 1024
    weight = weight_of(where, name, n, k, tables=2 if "lut" in name else 1)
    x, bias = inputs(where, m, k), inputs(where, 1, n)[0]
    for cluster, row_warps in ((2, 4), (1, 2), (2, 3)):
        config = decode_config.Config(
            8 if m < 8 else 16, cluster, 2, row_warps, 1, 1, row_warps, 1, 1, half_blocks=True
        )
        plan = decode.Plan(weight, config)
        wrong = testing.check_product(lambda x, w, b, out, plan=plan: plan(x, b, out), x, weight, bias, False)
        assert wrong is None, (config, wrong)


@pytest.mark.parametrize("m", [1, 8, 40, 64, 65, 200])
def test_every_route_serves_any_number_of_rows(where: str, m: int) -> None:
    weight = weight_of(where, "lut4_g16", 320, 1040, tables=3)
    x, bias = inputs(where, m, 1040), inputs(where, 1, 320)[0]
    possible = _routes(weight.geometry, None, m, weight.device)
    assert {"decode", "dense"} <= {route.name for route in possible}
    for route in possible:
        call = KERNEL._bind(weight, m, (route,))
        wrong = testing.check_product(lambda x, _, b, out, call=call: call(x, b, out), x, weight, bias, route.rounds)
        assert wrong is None, (route, wrong)
    rounds = KERNEL.rounds_weights(Problem(m, weight.geometry, weight.device))
    assert rounds == possible[0].rounds
    assert testing.check_product(KERNEL.linear, x, weight, bias, rounds) is None
