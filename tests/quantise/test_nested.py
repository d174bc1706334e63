"""The nested quantiser: exact search, error compensation, what it reports and refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import fdk
from fdk import reference
from fdk.formats import parse
from fdk.packing import unpack_planes
from fdk.quantise import quantise, quantise_nested, sqnr_db
from fdk.quantise.nested import BestCode, default_widths, master_values
from fdk.weight import QuantisedWeight

FORMATS = ("nest8_g64", "trunc8_g64")


def served(parts: dict, name: str, bits: int, k: int) -> torch.Tensor:
    weight = QuantisedWeight.from_parts(parse(name).at(bits), k, parts)
    return reference.dequantise(weight, torch.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("widths", [None, {8: 1.0}, {2: 1.0, 4: 1.0, 8: 1.0}, {3: 0.3, 2: 1.0}], ids=str)
def test_codes_are_the_best_of_all_256(name: str, widths) -> None:
    fmt = parse(name)
    widths = widths or default_widths(fmt)
    best = BestCode(fmt, widths, torch.device("cpu"))
    x = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(1)) * 60, torch.arange(-140.0, 140, 0.5)])
    cost = sum(w * (x.double()[:, None] - master_values(fmt, r)).square() for r, w in widths.items())
    found = cost.gather(1, best.codes(x).long()[:, None])[:, 0]
    least = cost.min(1).values
    # Corners are rounded to float32, so next to one the neighbour may win by as much as that moves it.
    assert ((found - least) <= 1e-4 * (1 + least)).all()
    assert torch.allclose(best.error(x, best.codes(x)).double() * sum(widths.values()), least, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_master_and_slices_reach_their_budgets(name: str, normal) -> None:
    """Measured on normal weights less 0.15 dB; int8, int4 and int2 have 44.5, 19.8 and 7.7 dB there."""
    budget = {"nest8_g64": {2: 7.5, 3: 13.7, 4: 19.8, 8: 43.4}, "trunc8_g64": {2: 8.0, 3: 14.0, 4: 20.1, 8: 44.3}}[name]
    found = quantise_nested(normal(256, 1024, seed=11), name)
    assert all(found.sqnr_db[bits] >= least for bits, least in budget.items()), found.sqnr_db
    widths = sorted(found.sqnr_db)
    assert all(found.sqnr_db[a] < found.sqnr_db[b] for a, b in pairwise(widths))


@pytest.mark.parametrize("name", FORMATS)
def test_reported_ratios_are_those_of_the_reference(name: str, normal) -> None:
    weight = normal(40, 256)
    found = quantise_nested(weight, name, scale="search")
    for bits, ratio in found.sqnr_db.items():
        assert sqnr_db(weight, served(found.parts, name, bits, 256)) == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_widths_move_the_error(name: str, normal) -> None:
    weight = normal(128, 512, seed=3)
    by_two, by_eight = (quantise_nested(weight, name, scale="search", widths={r: 1.0}).sqnr_db for r in (2, 8))
    assert by_two[2] > by_eight[2] + 0.3 and by_eight[8] > by_two[8] + 10


@pytest.mark.parametrize("name", FORMATS)
def test_compensation_lowers_the_error_of_the_output(name: str, normal) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = normal(64, 256, seed=4, dtype=torch.float32)
    x = torch.randn(2000, 16, generator=generator) @ torch.randn(16, 256, generator=generator)
    x += 0.3 * torch.randn(2000, 256, generator=generator)

    def output_db(parts, bits):
        y = x @ weight.T
        return sqnr_db(y, x @ served(parts, name, bits, 256).T)

    for bits in (2, 4):
        rounded = quantise_nested(weight, name, widths={bits: 1.0}, scale="search").parts
        by_x = quantise_nested(weight, name, widths={bits: 1.0}, scale="search", activations=x).parts
        by_h = quantise_nested(weight, name, widths={bits: 1.0}, scale="search", hessian=x.T @ x).parts
        assert output_db(by_x, bits) > output_db(rounded, bits) + 3
        assert output_db(by_h, bits) == pytest.approx(output_db(by_x, bits), abs=0.2)


def test_compensation_does_not_depend_on_the_block_of_columns(normal, monkeypatch) -> None:
    weight, x = normal(16, 192, dtype=torch.float32), torch.randn(400, 192, generator=torch.Generator().manual_seed(0))
    whole = quantise_nested(weight, "nest8_g64", activations=x).parts["planes"]
    monkeypatch.setattr("fdk.quantise.nested.COLUMNS", 7)
    other = quantise_nested(weight, "nest8_g64", activations=x).parts["planes"]
    a, b = unpack_planes(whole, 192).int(), unpack_planes(other, 192).int()
    assert (a != b).float().mean() < 0.01 and (a - b).abs().max() <= 1


def test_the_served_width_plays_no_part(normal) -> None:
    weight = normal(8, 128)
    one, other = quantise(weight, "nest8s3_g64"), quantise(weight, "nest8_g64")
    assert all(torch.equal(one[name], other[name]) for name in ("planes", "scales"))


def test_chunks_do_not_change_the_result(normal, monkeypatch) -> None:
    weight = normal(37, 128)
    whole = quantise(weight, "trunc8_g32", scale="search")
    monkeypatch.setattr("fdk.quantise.nested.CHUNK", 128 * 3)
    assert all(torch.equal(part, whole[name]) for name, part in quantise(weight, "trunc8_g32", scale="search").items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": {9: 1.0}}, "a slice of 9 bits of nest8 is wider"),
        ({"widths": {4: 0.0}}, "proj: the weight of 4 bits is 0.0; give a positive number"),
        ({"widths": {}}, "proj: widths is empty"),
        ({"scale": "best"}, "proj: unknown scale 'best'"),
        ({"hessian": torch.eye(64), "activations": torch.ones(1, 64)}, "proj: give a Hessian or activations, not both"),
        ({"hessian": torch.eye(32)}, r"proj: the Hessian is \[32, 32\], but the layer needs \[64, 64\]"),
        ({"hessian": torch.zeros(64, 64)}, "proj: the Hessian is zero or not finite"),
        ({"hessian": -torch.eye(64) + 2 * torch.ones(64, 64)}, "proj: the Hessian is not positive definite"),
        ({"activations": torch.ones(3, 32)}, r"proj: activations are \[3, 32\], but the layer takes \[..., 64\]"),
    ],
)
def test_bad_options_are_named(options, message: str, normal) -> None:
    with pytest.raises(fdk.FormatError, match=message):
        quantise_nested(normal(4, 64), "nest8_g64", name="proj", **options)


def test_bad_weights_are_named(normal) -> None:
    weight = normal(4, 64)
    weight[2, 5] = float("nan")
    with pytest.raises(fdk.FormatError, match=r"proj\[2, 5\] is nan"):
        quantise(weight, "nest8_g64", name="proj")
    with pytest.raises(fdk.FormatError, match="proj: int4_g64 is not nested; use fdk.quantise.quantise"):
        quantise_nested(normal(4, 64), "int4_g64", name="proj")
