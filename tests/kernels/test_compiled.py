"""The torch.compile kernel over a few formats and shapes: every one of them costs seconds of compiling."""

from __future__ import annotations

import pytest
import torch

from fdk import kernels, reference, testing
from fdk.formats import parse

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = (
    ("lut4_g64", torch.bfloat16, 1, 40, 192, 3, False),
    ("lut3_g16", torch.float16, 5, 40, 192, 1, True),
    ("uint4_chan", torch.float32, 3, 17, 101, 1, True),
    ("nest8s4_g64", torch.bfloat16, 1, 17, 192, 1, False),
    ("trunc8s3_chan", torch.float16, 4, 17, 101, 1, True),
)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("fmt", "dtype", "m", "n", "k", "tables", "with_bias"), CASES)
def test_compiled_reference_is_exact_and_within_the_bound(fmt, dtype, m, n, k, tables, with_bias, device) -> None:
    weight = testing.random_weight(parse(fmt), n, k, dtype, seed=m, device=device, tables=tables, float_zeros=True)
    kernel, problem = kernels.kernel("torch.compile"), kernels.Problem(m, weight.geometry, weight.device)
    if reason := kernels.reason_against(kernel, problem):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(m)
    columns = torch.randperm(k, generator=generator)[:m]
    out = testing.poisoned(m, n, dtype, device)
    kernel.linear(testing.one_hot_probe(k, columns, dtype, device), weight, None, out)
    assert torch.equal(out, reference.dequantise(weight)[:, columns.to(device)].T)
    x = torch.randn(m, k, generator=generator).to(dtype).to(device)
    bias = torch.randn(n, generator=generator).to(dtype).to(device) if with_bias else None
    wrong = testing.check_product(kernel.linear, x, weight, bias, kernel.rounds_weights(problem))
    assert wrong is None, wrong


def test_auto_never_chooses_it() -> None:
    weight = testing.random_weight(parse("lut4_g64"), 40, 192)
    assert kernels.names().index("torch.compile") > kernels.names().index("reference")
    assert kernels.choose(kernels.Problem(1, weight.geometry, weight.device)).kernel.name != "torch.compile"
