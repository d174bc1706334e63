"""Run by test_interpreter.py in a process where Triton's interpreter is on: a trimmed contract and fuzz set."""

from __future__ import annotations

import random

import pytest
import torch

from fdk import kernels, reference, testing
from fdk.formats import parse
from fdk.kernels.triton import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="run through test_interpreter.py, with TRITON_INTERPRET=1")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# format, dtype, m, n, k, tables, fractional zeros, bias: every width, every kind, and each branch of the source.
CASES = (
    ("lut1_g16", BF16, 1, 40, 192, 3, False, False),
    ("lut1_g64", FP16, 3, 17, 320, 1, False, True),
    ("lut2_g48", BF16, 5, 33, 192, 2, False, True),
    ("lut3_g16", FP16, 1, 40, 192, 3, False, False),
    ("lut4_g64", BF16, 20, 130, 128, 2, False, True),
    ("lut4_chan", BF16, 2, 5, 101, 1, False, False),
    ("lut5_chan", FP16, 1, 20, 33, 1, False, False),
    ("lut6_g112", BF16, 1, 20, 224, 1, False, False),
    ("lut7_g16", FP32, 1, 20, 48, 1, False, False),
    ("lut8_g64", BF16, 1, 40, 640, 2, False, True),
    ("int1_g32", BF16, 1, 20, 96, 1, False, False),
    ("int2_chan", FP32, 3, 20, 7, 1, False, True),
    ("int3_chan", FP16, 1, 20, 17, 1, False, False),
    ("int4_g48", BF16, 1, 40, 192, 1, False, False),
    ("int8_g64", FP16, 1, 33, 320, 1, False, True),
    ("uint1_g16", BF16, 1, 20, 48, 1, False, False),
    ("uint4_g64", BF16, 4, 40, 192, 1, True, True),
    ("uint5_g64", FP16, 1, 20, 64, 1, True, False),
    ("uint8_chan", BF16, 1, 40, 257, 1, False, False),
    ("nf4_chan", FP32, 1, 20, 64, 1, False, False),
    ("lut4_g32", BF16, 1, 5, 5120, 1, False, True),
    ("uint3_chan", FP16, 1, 3, 4133, 1, False, False),
    ("fp4_g16", FP16, 70, 20, 64, 1, False, False),
    ("nest8s2_g16", BF16, 1, 17, 96, 1, False, True),
    ("nest8s3_chan", FP16, 3, 40, 101, 1, False, False),
    ("nest8s4_g64", BF16, 5, 33, 192, 1, False, True),
    ("nest8s5_chan", BF16, 1, 20, 33, 1, False, False),
    ("nest8s7_g48", FP32, 2, 20, 144, 1, False, False),
    ("nest8_g128", FP16, 20, 20, 256, 1, False, False),
    ("trunc8s2_g32", FP32, 1, 20, 64, 1, False, False),
    ("trunc8s4_g64", BF16, 1, 33, 1152, 1, False, True),
    ("trunc8_g16", BF16, 4, 40, 48, 1, False, False),
    ("lut4_g64_sp16of32", BF16, 1, 40, 192, 3, False, True),
    ("lut4_chan_sp16of32", FP16, 5, 33, 96, 2, False, False),
    ("int4_g128_sp16of32", BF16, 20, 33, 256, 1, False, True),
    ("int4_g32_sp16of32", FP32, 1, 5, 1184, 1, False, False),
    ("uint4_g64_sp16of32", FP16, 1, 33, 128, 1, False, False),
    ("uint4_g96_sp16of32", BF16, 3, 17, 192, 1, True, True),
    ("nf4_g64_sp16of32", BF16, 1, 17, 64, 1, False, False),
)


@pytest.mark.parametrize(("fmt", "dtype", "m", "n", "k", "tables", "float_zeros", "with_bias"), CASES)
def test_contract(fmt, dtype, m, n, k, tables, float_zeros, with_bias) -> None:
    weight = testing.random_weight(parse(fmt), n, k, dtype, m, tables=tables, float_zeros=float_zeros)
    check(weight, m, with_bias)


@pytest.mark.parametrize("seed", range(12))
def test_random_problem(seed: int) -> None:
    rng = random.Random(seed)
    bits = rng.choice([1, 2, 3, 4, 8])
    group = rng.choice([16, 32, 48, 64, None])
    k = rng.choice([1, 17, 100, 257]) if group is None else group * rng.choice([1, 2, 3])
    fmt = parse(f"{rng.choice(['lut', 'int', 'uint'])}{bits}_{'chan' if group is None else f'g{group}'}")
    n, m = rng.choice([1, 16, 33, 65]), rng.choice([1, 2, 9, 17])
    weight = testing.random_weight(fmt, n, k, rng.choice([BF16, FP16]), seed, tables=rng.choice([1, 2]))
    check(weight, m, rng.random() < 0.5)


def check(weight, m: int, with_bias: bool) -> None:
    """One-hot products equal the dense weight, a dense product is within the bound and repeats bit for bit."""
    (n, k), dtype = weight.shape, weight.dtype
    kernel = kernels.kernel("triton")
    problem = kernels.Problem(m, weight.geometry, weight.device)
    assert kernels.reason_against(kernel, problem) is None
    generator = torch.Generator().manual_seed(m)
    columns = torch.randperm(k, generator=generator)[:m]
    out = testing.poisoned(len(columns), n, dtype, "cpu")
    kernel.linear(testing.one_hot_probe(k, columns, dtype, "cpu"), weight, None, out)
    assert torch.equal(out, reference.dequantise(weight)[:, columns].T)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if with_bias else None
    wrong = testing.check_product(kernel.linear, x, weight, bias, kernel.rounds_weights(problem))
    assert wrong is None, wrong
    first, second = (testing.poisoned(m, n, dtype, "cpu") for _ in range(2))
    kernel.linear(x, weight, bias, first)
    kernel.linear(x, weight, bias, second)
    assert torch.equal(first, second)


def test_the_check_catches_a_wrong_code() -> None:
    weight = testing.random_weight(parse("lut4_g64"), 20, 64, seed=9)
    broken = testing.random_weight(parse("lut4_g64"), 20, 64, seed=9)
    broken.parts["codes"][5, 7] ^= 0x0F
    kernel = kernels.kernel("triton")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def faulty(x, _, bias, out):
        kernel.linear(x, broken, bias, out)

    assert testing.check_product(faulty, x, weight, None, True) is not None
