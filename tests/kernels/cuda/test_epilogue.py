"""Products with an epilogue: each value within what its roundings explain, every element written."""

from dataclasses import replace

import pytest
import torch

import fdk
from fdk import reference, testing
from fdk.formats import parse
from fdk.kernels.cuda import KERNEL, prebuild
from fdk.kernels.cuda.decode_config import Epilogue

FORMATS = ["lut1_g64", "lut3_g32", "lut4_g64", "int4_g64", "int8_chan", "uint4_g48", "uint4_g64"]
EPS = 1e-5
BF16 = testing.UNIT_ROUNDOFF[torch.bfloat16]


def reasonable(where: str, shape: tuple[int, int]) -> None:
    """Skips products as large as models have where they would take minutes."""
    if where == "cpu" and shape[0] * shape[1] > 1 << 20:
        pytest.skip("too large for an emulated device")


def weight_of(where: str, name: str, n: int, k: int, **more):
    return testing.random_weight(parse(name), n, k, device=where, **more).to_layout("fragments")


def inputs(where: str, m: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16().to(where)


def float32_bound(x: torch.Tensor, weight, y: torch.Tensor) -> torch.Tensor:
    """The bound of a product before its result is rounded."""
    return testing.error_bound(x, weight, y, torch.bfloat16) - 1.01 * BF16 * y.abs()


@pytest.mark.parametrize("shape", [(70, 960), (3072, 3072)])
@pytest.mark.parametrize("m", [1, 5, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_residual_sum_and_the_next_norm(where: str, name: str, m: int, shape: tuple[int, int]) -> None:
    reasonable(where, shape)
    n, k = shape
    weight = weight_of(where, name, n, k, seed=m)
    x, before, gamma, bias = (
        inputs(where, m, k),
        inputs(where, m, n, 1) * 16,
        inputs(where, 1, n, 2)[0],
        inputs(where, 1, n, 3)[0],
    )
    expected = testing.exact(x, weight, bias) + before.double()
    bound = float32_bound(x, weight, testing.exact(x, weight)) + 1.01 * BF16 * expected.abs()
    bound += 2.0**-22 * (expected.abs() + bias.double().abs() + before.double().abs())
    plan = KERNEL.chained(weight, m, Epilogue(residual=True))
    runs = []
    for _ in range(3):
        residual, out = before.clone(), testing.poisoned(m, n, torch.bfloat16, where)
        squares = torch.full((m, plan.squares), torch.nan, device=where)
        plan(x, bias, out, residual=residual, gamma=gamma, squares_out=squares)
        runs.append((residual, out, squares))
        assert testing.violation(residual, expected, bound) is None
        assert torch.equal(out, (residual.float() * gamma.float()).bfloat16())
        padded = torch.nn.functional.pad(residual.double(), (0, -n % 64))
        parts = padded.square().view(m, plan.squares, -1).sum(2)
        # Up to 32 positive terms, added in a tree of five levels after one rounding of each square.
        assert ((squares - parts).abs() <= 6 * 2.0**-24 * parts).all()
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_between_others(where: str, name: str, m: int) -> None:
    weight = weight_of(where, name, 192, 960, seed=m, tables=3 if "lut" in name else 1)
    plan = KERNEL.chained(weight, m, Epilogue(chained=True))
    run = lambda x, _, bias, out: plan(x, bias, out)  # noqa: E731
    assert testing.check_product(run, inputs(where, m, 960), weight, inputs(where, 1, 192, 3)[0], False) is None


def norms(where: str, m: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums of squares [m, count] of each row, and what they add up to in float64."""
    squares = torch.rand(m, count, generator=torch.Generator().manual_seed(m)).to(where) * 64
    return squares, squares.double().sum(1, keepdim=True)


@pytest.mark.parametrize("count", [6, 96])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_of_what_is_still_to_be_normalised(where: str, name: str, m: int, count: int) -> None:
    n, k = (5120, 3072) if count == 96 else (200, 960)
    reasonable(where, (n, k))
    weight = weight_of(where, name, n, k, seed=m, tables=3 if "lut" in name else 1)
    x, bias = inputs(where, m, k), inputs(where, 1, n, 3)[0]
    squares, total = norms(where, m, count)
    scale = (total / k + EPS).rsqrt()
    expected = testing.exact(x, weight) * scale + bias.double()
    bound = float32_bound(x, weight, expected) * scale + 1.01 * BF16 * expected.abs()
    # The sum of squares and the root of it: a rounding for each addition of a lane and of the tree, four for the rest.
    bound += (count / 32 + 10) * 2.0**-23 * ((expected - bias.double()).abs() + bias.double().abs() + expected.abs())
    plan = KERNEL.chained(weight, m, Epilogue(squares=count))
    out = testing.poisoned(m, n, torch.bfloat16, where)
    plan(x, bias, out, squares=squares, eps=EPS)
    assert testing.violation(out, expected, bound) is None


@pytest.mark.parametrize("shape", [(640, 960), (22528, 3072)])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_gate_times_up(where: str, name: str, m: int, shape: tuple[int, int]) -> None:
    reasonable(where, shape)
    n, k = shape
    halves = [weight_of(where, name, n // 2, k, seed=seed) for seed in (m, m + 50)]
    merged = fdk.concat(halves).to_layout("fragments")
    x, bias = inputs(where, m, k), inputs(where, 1, n, 3)[0]
    squares, total = norms(where, m, 96)
    scale = (total / k + EPS).rsqrt()
    exact = [testing.exact(x, half) * scale + b.double() for half, b in zip(halves, bias.split(n // 2), strict=True)]
    error = [
        float32_bound(x, half, y) * scale + 16 * 2.0**-23 * (y.abs() + b.double().abs())
        for half, y, b in zip(halves, exact, bias.split(n // 2), strict=True)
    ]
    gate, up = exact
    silu = gate * gate.sigmoid()
    # The slope of silu is at most 1.1; the fast exponential is off by 2 + 1.16 |gate| units in the last place.
    bound = 1.1 * error[0] * (up.abs() + error[1]) + silu.abs() * error[1]
    bound += (8 + 1.2 * gate.abs()) * 2.0**-23 * (silu * up).abs() + 1.01 * BF16 * (silu * up).abs() + 2.0**-126
    tables = len(merged.geometry.row_ends)
    plan = KERNEL.chained(merged, m, Epilogue(squares=96, gated=True, tables=tables))
    assert plan.config.epilogue.tables == (2 if merged.format.is_table else 1)
    out = testing.poisoned(m, n // 2, torch.bfloat16, where)
    plan(x, bias, out, squares=squares, eps=EPS)
    assert testing.violation(out, silu * up, bound) is None


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_operands_ahead_of_activations(where: str, ahead: int, monkeypatch) -> None:
    choose, used = prebuild.chain_config, []

    def chosen(*problem):
        config = choose(*problem)
        one_step = replace(config, blocks=config.row_warps, batch=1, stage_units=1, stages=min(2, config.stages))
        used.append(replace(one_step, ahead=ahead))
        return used[-1]

    if where != "cpu" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("chosen on compute capability 9.0")
    monkeypatch.setattr(prebuild, "chain_config", chosen)
    test_residual_sum_and_the_next_norm(where, "lut4_g64", 1, (70, 960))
    test_a_product_between_others(where, "lut4_g64", 1)
    test_a_product_of_what_is_still_to_be_normalised(where, "lut4_g64", 1, 6)
    test_gate_times_up(where, "lut4_g64", 1, (640, 960))
    assert used and all(config.steps == 1 for config in used)


def test_a_wrong_norm_is_caught(where: str) -> None:
    weight = weight_of(where, "lut4_g64", 128, 512)
    x, (squares, total) = inputs(where, 2, 512), norms(where, 2, 96)
    out = testing.poisoned(2, 128, torch.bfloat16, where)
    KERNEL.chained(weight, 2, Epilogue(squares=96))(x, None, out, squares=squares, eps=EPS)
    dense = reference.dequantise(weight, torch.float64)
    for factor, right in ((1.0, True), (1.01, False)):
        scale = (total * factor / 512 + EPS).rsqrt()
        expected = x.double() @ dense.T * scale
        bound = float32_bound(x, weight, expected) * scale + 1.02 * BF16 * expected.abs()
        assert (testing.violation(out, expected, bound) is None) == right
