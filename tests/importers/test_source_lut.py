"""The source project's packed bytes against its own golden vectors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fdk
from fdk import reference, testing
from fdk.importers.source_lut import from_source, table_of, to_source

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "fdk_lut_packed.safetensors")
CASES = [f"lut{bits}.{table}" for bits in (8, 4, 2, 1) for table in ("uniform", "custom")]


def case(name: str) -> dict[str, torch.Tensor]:
    found = {key.removeprefix(f"{name}."): value for key, value in GOLDEN.items() if key.startswith(f"{name}.")}
    assert {"weight_data", "scale", "byte_lut", "dequantised", "x", "y_fp64"} <= found.keys()
    return found


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_source(name):
    golden = case(name)
    weight = from_source(golden["weight_data"], golden["scale"], golden["byte_lut"])
    assert str(weight.format) == f"{name.split('.')[0]}_g64"
    # The source multiplies table and scale in float32, as the reference does.
    assert torch.equal(reference.dequantise(weight, torch.float32)[::4], golden["dequantised"])


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_source(name):
    golden = case(name)
    weight = from_source(golden["weight_data"], golden["scale"], golden["byte_lut"])
    # The golden product starts from weights rounded to float32: 2^-24 of each term, k of them.
    tolerance = 2.0**-24 * (golden["x"].double().abs() @ reference.dequantise(weight, torch.float64).abs().T)
    assert ((testing.exact(golden["x"], weight) - golden["y_fp64"]).abs() <= tolerance).all()
    y = fdk.linear(golden["x"], weight)
    bound = testing.error_bound(golden["x"], weight, golden["y_fp64"], y.dtype, rounds_weights=True)
    assert testing.violation(y, golden["y_fp64"], bound) is None


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_come_back(name):
    golden = case(name)
    back = to_source(from_source(golden["weight_data"], golden["scale"], golden["byte_lut"]))
    for key in ("weight_data", "scale", "byte_lut"):
        assert torch.equal(back[key], golden[key]), key
    if "lut" in golden:
        assert torch.equal(back["lut"][: golden["lut"].numel()], golden["lut"])


def test_four_bits_have_the_even_element_in_the_high_nibble():
    data = torch.tensor([[0x1F] * 8], dtype=torch.uint8)
    weight = from_source(data, torch.ones(1, 1), torch.arange(16.0))
    assert fdk.dequantise(weight)[0, :2].tolist() == [1.0, 15.0]


def test_what_does_not_fit_is_refused_by_name():
    golden = case("lut4.uniform")
    data, scale, lut = golden["weight_data"], golden["scale"], golden["byte_lut"]
    with pytest.raises(fdk.FormatError, match=r"proj: weight_data must be uint8"):
        from_source(data.int(), scale, lut, "proj")
    with pytest.raises(fdk.FormatError, match=r"proj: scale must be \[96, groups\]"):
        from_source(data, scale[:4], lut, "proj")
    with pytest.raises(fdk.FormatError, match=r"proj: byte_lut must be \[256"):
        from_source(data, scale, lut[:, :1].repeat(1, 3), "proj")
    broken = lut.clone()
    broken[7, 0] = 3.0
    with pytest.raises(fdk.FormatError, match="not the byte form of one table"):
        table_of(broken)
    with pytest.raises(fdk.FormatError, match="2, 4, 16 or 256 values"):
        from_source(data, scale, torch.ones(8), "proj")
    with pytest.raises(fdk.FormatError, match="has no form in the source project"):
        to_source(testing.random_weight(fdk.parse("lut3_g16"), 4, 32))
