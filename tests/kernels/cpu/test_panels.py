"""Many rows of x: torch's product on dequantised panels, held to the bound of kernels that round weights."""

from __future__ import annotations

import pytest
import torch

from fdk import kernels, reference, testing
from fdk.formats import parse
from fdk.kernels.cpu import launch

KERNEL = kernels.kernel("cpu")


@pytest.fixture(autouse=True)
def needs_panels() -> None:
    if reason := KERNEL.supports(kernels.Problem(1, testing.random_weight(parse("lut4_g64"), 1, 64).geometry, "cpu")):
        pytest.skip(reason)
    if not launch.by_panels(launch.PANEL_ROWS_OF_X, torch.bfloat16):
        pytest.skip("this machine multiplies many rows directly")


@pytest.mark.parametrize("name", ["lut4_g64", "lut3_g16", "uint4_g32", "int8_chan", "lut1_g48"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_panels_are_within_the_bound(name: str, with_bias: bool, monkeypatch) -> None:
    m, n, k = launch.PANEL_ROWS_OF_X, 150, 192
    weight = testing.random_weight(parse(name), n, k, tables=3, seed=1).to_layout(KERNEL.layout)
    # Several panels, the last one short.
    monkeypatch.setattr(launch, "PANEL_BYTES", 48 * k * 2)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2)).bfloat16()
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).bfloat16() if with_bias else None
    problem = kernels.Problem(m, weight.geometry, weight.device)
    assert KERNEL.rounds_weights(problem)
    wrong = testing.check_product(KERNEL.linear, x, weight, bias, True)
    assert wrong is None, wrong


def test_panels_pass_the_one_hot_probe() -> None:
    weight = testing.random_weight(parse("lut4_g64"), 70, 512, tables=2)
    x = testing.one_hot_probe(512, torch.arange(512), torch.bfloat16, "cpu")
    out = testing.poisoned(512, 70, torch.bfloat16, "cpu")
    KERNEL.linear(x, weight.to_layout(KERNEL.layout), None, out)
    assert torch.equal(out, reference.dequantise(weight).T)


def test_panels_agree_with_the_direct_kernels_below() -> None:
    weight = testing.random_weight(parse("lut4_g64"), 64, 256).to_layout(KERNEL.layout)
    x = torch.randn(launch.PANEL_ROWS_OF_X, 256).bfloat16()
    many = testing.poisoned(len(x), 64, torch.bfloat16, "cpu")
    few = testing.poisoned(len(x) - 1, 64, torch.bfloat16, "cpu")
    KERNEL.linear(x, weight, None, many)
    KERNEL.linear(x[:-1].contiguous(), weight, None, few)
    assert torch.allclose(many[:-1].float(), few.float(), rtol=2**-6, atol=0.3)
