"""Scale conventions at their edges, and the scale search."""

import pytest
import torch

from fdk.formats import all_formats, parse
from fdk.quantise import base_scales, quantise
from fdk.quantise.scales import round_scales

FORMATS = [str(f) for f in all_formats((32, None)) if f.storage == "plain"]


def scales_of(values, name, method="auto"):
    scales, zeros = base_scales(torch.tensor(values).view(1, 1, -1), parse(name), method)
    return scales.item(), None if zeros is None else zeros.item()


def test_conventions():
    block = [1.0, -3.0, 0.5, 0.5] * 4
    assert scales_of(block, "lut2_g16") == scales_of(block, "lut4_g16", "absmean") == (1.25, None)
    assert scales_of(block, "lut3_g16") == scales_of(block, "nf4_g16") == (3.0, None)
    assert scales_of(block, "lut1_g16", "absmax") == (3.0, None)
    assert scales_of(block, "fp4_g16") == (0.5, None)
    assert scales_of(block, "int4_g16") == (pytest.approx(3 / 7.5), None)
    assert scales_of(block, "uint4_g16") == (pytest.approx(4 / 15), 11)
    assert scales_of(block, "uint8_g16") == (pytest.approx(4 / 255), 191)


@pytest.mark.parametrize("bits", range(3, 9))
def test_symmetric_integers_err_at_most_half_a_step(bits, normal, dequantise):
    weight = normal(64, 256, dtype=torch.float32)
    name = f"int{bits}_g64"
    parts = quantise(weight, name)
    step = parts["scales"].double().repeat_interleave(64, 1)
    # The scale and the quotient are each rounded once to float32.
    assert ((dequantise(parts, name, 256) - weight).abs() <= step * (0.5 + 2.0 ** (bits - 22))).all()


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize(
    ("shift", "zero"), ((0.0, None), (1.0, 0), (-1.0, "top")), ids=("mixed", "all positive", "all negative")
)
def test_unsigned_integers_cover_the_range(bits, shift, zero, normal, dequantise):
    name, weight = f"uint{bits}_g64", normal(64, 256, dtype=torch.float32) + shift
    parts = quantise(weight, name)
    if zero is not None:
        assert (parts["zeros"] == (0 if zero == 0 else (1 << bits) - 1)).all()
    # The zero is rounded, so one end of the range can lie half a step outside of the codes: at most a step off.
    step = parts["scales"].double().repeat_interleave(64, 1)
    assert ((dequantise(parts, name, 256) - weight).abs() <= step * 1.001).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", ("auto", "absmax", "absmean", "search"))
def test_zero_weights_stay_below_the_smallest_scale(name, scale, dtype, dequantise):
    parts = quantise(torch.zeros(2, 64, dtype=dtype), name, scale=scale)
    assert (parts["scales"] > 0).all()
    limit = 6e-8 if dtype == torch.float16 else 6.1e-12
    assert dequantise(parts, name, 64).abs().max() <= limit
    if not parse(name).is_table or parse(name).kind.values:
        assert not dequantise(parts, name, 64).any()


@pytest.mark.parametrize("value", (0.75, -0.75))
@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_weights_are_exact_with_unsigned_integers(bits, value, dequantise):
    weight = torch.full((2, 64), value)
    parts = quantise(weight, f"uint{bits}_g64", scale="absmax")
    assert dequantise(parts, f"uint{bits}_g64", 64).sub(weight).abs().max() <= 0.75 * 2.0**-22


def test_float16_scales_never_round_to_zero():
    tiny = torch.tensor([0.0, 1e-12, 2e-8, 1e-3])
    assert (round_scales(tiny, torch.float16) > 0).all()
    assert round_scales(tiny, torch.bfloat16)[0] == torch.tensor(1e-12).bfloat16()


def block_errors(parts, weight, name, dequantise):
    k = weight.shape[1]
    error = dequantise(parts, name, k) - weight.double()
    return error.square().view(weight.shape[0], parse(name).groups(k), -1).sum(-1)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_search_is_never_worse_for_any_group(name, dtype, normal, laplace, dequantise):
    weight = torch.cat([normal(24, 256, dtype=dtype), laplace(24, 256, dtype=dtype), torch.zeros(1, 256, dtype=dtype)])
    weight[5, 17], weight[6, 33] = 3.0, -40.0
    base = block_errors(quantise(weight, name), weight, name, dequantise)
    searched = block_errors(quantise(weight, name, scale="search"), weight, name, dequantise)
    assert (searched <= base).all()
    # A two-value table at the mean of |w| is optimal already; every other format has something to gain.
    gain = (searched[:-1] / base[:-1]).mean()
    assert gain < 0.999 or name.startswith("lut1")


def test_search_improves_a_fitted_table_too(normal, dequantise):
    weight = normal(64, 512)
    base = block_errors(quantise(weight, "lut3_g64", codebook="kmeans"), weight, "lut3_g64", dequantise)
    parts = quantise(weight, "lut3_g64", codebook="kmeans", scale="search")
    searched = block_errors(parts, weight, "lut3_g64", dequantise)
    assert (searched <= base).all() and searched.sum() < 0.97 * base.sum()
