"""Quality budgets: SQNR on normal weights, per format, with groups of 64."""

import math

import pytest
import torch

from fdk.formats import all_formats
from fdk.quantise import quantise, sqnr_db

# E[max |w|^2] of 64 standard normals, by simulation.
MEAN_SQUARE_MAXIMUM = 6.92
NAMES = [str(f) for f in all_formats((64,)) if f.storage == "plain"]


def budget(name):
    """dB that the default must reach: uniform noise of the step where that holds, else measured less 0.1 dB."""
    measured = {
        "lut1": 4.46, "lut2": 6.17, "int1": 2.02, "int2": 7.70, "int3": 13.15,
        "uint1": 2.20, "uint2": 8.16, "uint3": 14.20, "nf4": 20.72, "fp4": 19.52,
    }  # fmt: skip
    stem = name.split("_")[0]
    if stem in measured:
        return measured[stem] - 0.1
    bits = int(stem[-1])
    # A step is 2 max / (2^bits - 1), its noise step^2 / 12; bfloat16 entries cost up to 0.3 dB at 8 bits.
    step = 2 / (2**bits - 1)
    return -10 * math.log10(MEAN_SQUARE_MAXIMUM * step**2 / 12) - (0.35 if bits == 8 else 0.2)


@pytest.mark.parametrize("name", NAMES)
def test_default_reaches_its_budget(name, normal, dequantise):
    weight = normal(256, 2048, seed=11)
    assert sqnr_db(weight, dequantise(quantise(weight, name), name, 2048)) >= budget(name)


@pytest.mark.parametrize("name", NAMES)
def test_search_beats_the_default(name, normal, dequantise):
    weight = normal(64, 1024, seed=12)
    plain = sqnr_db(weight, dequantise(quantise(weight, name), name, 1024))
    searched = sqnr_db(weight, dequantise(quantise(weight, name, scale="search"), name, 1024))
    assert searched >= plain if name.startswith("lut1") else searched > plain + 0.05


@pytest.mark.parametrize("distribution", ("normal", "laplace"))
@pytest.mark.parametrize("bits", range(1, 9))
def test_kmeans_beats_uniform(bits, distribution, request, dequantise):
    weight, name = request.getfixturevalue(distribution)(128, 2048, seed=13), f"lut{bits}_g64"
    uniform = sqnr_db(weight, dequantise(quantise(weight, name), name, 2048))
    kmeans = sqnr_db(weight, dequantise(quantise(weight, name, codebook="kmeans"), name, 2048))
    # One bit: the uniform table +-1 at the mean of |w| is the optimum of a symmetric distribution.
    assert kmeans > uniform - 1e-3 if bits == 1 else kmeans > uniform + 0.5


def test_exact_arithmetic_has_no_mean_error(normal, dequantise):
    weight = normal(256, 4096, seed=14)
    error = dequantise(quantise(weight, "lut4_g64"), "lut4_g64", 4096) - weight.double()
    # The mean of N errors of standard deviation d has standard deviation d / sqrt(N).
    assert error.mean().abs() <= 6 * error.std() / math.sqrt(error.numel())
    source = dequantise(quantise(weight, "lut4_g64", arithmetic="source"), "lut4_g64", 4096) - weight.double()
    assert source.mean().abs() > error.mean().abs()


def test_measures_in_decibel():
    weight = torch.tensor([[3.0, 4.0]])
    assert sqnr_db(weight, weight) == math.inf
    assert sqnr_db(weight, weight * 1.1) == pytest.approx(20, abs=1e-5)
    assert sqnr_db(torch.zeros(1, 2), weight) == -math.inf
