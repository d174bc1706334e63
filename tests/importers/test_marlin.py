"""Marlin's packed tensors against its own golden vectors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fdk
from fdk import reference, testing
from fdk.compat import marlin
from fdk.importers.marlin import from_marlin, single_table, to_marlin
from fdk.packing import unpack_codes

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "marlin.safetensors")
CASES = [(group, kind) for group in (128, 64, -1) for kind in ("int4", "lut4")]
TABLE = torch.arange(-8, 8).half()


def case(group: int, kind: str) -> dict[str, torch.Tensor]:
    prefix = f"g{group}.{kind}."
    return {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}


def pair_table(table: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([table[v & 15], table[v >> 4]]) for v in range(256)])


@pytest.mark.parametrize(("group", "kind"), CASES)
def test_codes_and_scales_are_those_of_the_source(group: int, kind: str) -> None:
    golden = case(group, kind)
    weight = from_marlin(golden["B"], golden["s"], None if kind == "int4" else TABLE)
    assert str(weight.format) == f"{kind}_{'chan' if group == -1 else f'g{group}'}"
    assert torch.equal(unpack_codes(weight.parts["codes"], 4, 256), golden["codes"])
    assert torch.equal(weight.parts["scales"], golden["scale"])
    steps = golden["scale"].float().repeat_interleave(256 // golden["scale"].shape[1], 1)
    assert torch.equal(reference.dequantise(weight, torch.float32), (golden["codes"].float() - 8) * steps)


@pytest.mark.parametrize(("group", "kind"), CASES)
def test_the_bytes_come_back(group: int, kind: str) -> None:
    golden = case(group, kind)
    packed = to_marlin(from_marlin(golden["B"], golden["s"], None if kind == "int4" else TABLE))
    assert torch.equal(packed["B"], golden["B"]) and torch.equal(packed["s"], golden["s"])
    assert ("table" in packed) == (kind == "lut4")


def test_pair_tables_are_single_ones() -> None:
    table = torch.randn(16).half()
    golden = case(64, "lut4")
    by_pairs = from_marlin(golden["B"], golden["s"], pair_table(table))
    assert torch.equal(by_pairs.parts["table"], table[None])
    broken = pair_table(table)
    broken[200, 1] += 1
    with pytest.raises(fdk.FormatError, match="proj: entry v of the pair table is not"):
        single_table(broken, "proj")
    with pytest.raises(fdk.FormatError, match=r"\[16\] or, for pairs, \[256, 2\], not \[8\]"):
        single_table(torch.zeros(8))


@pytest.mark.parametrize("group", [128, -1])
def test_the_layer_of_the_source_runs(group: int) -> None:
    golden = case(group, "int4")
    layer = marlin.Layer(256, 512, group)
    layer.load_state_dict({"B": golden["B"], "s": golden["s"]})
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).half()
    weight = from_marlin(golden["B"], golden["s"])
    assert torch.equal(layer(x), fdk.linear(x, weight))
    out = torch.empty(3, 512).half()
    marlin.mul(x, golden["B"], out, golden["s"], torch.zeros(64), 64, 256, 8)
    assert torch.equal(out, layer(x))

    other = marlin.Layer(256, 512, group)
    first = other(x)
    dense = torch.nn.Linear(256, 512, bias=False)
    dense.weight.data = reference.dequantise(weight, torch.float32)
    other.pack(dense, golden["scale"])
    assert torch.equal(other.B, golden["B"]) and torch.equal(other.s, golden["s"])
    assert torch.equal(other(x), layer(x)) and not torch.equal(first, layer(x))


def test_what_does_not_fit_is_refused_by_name() -> None:
    golden = case(128, "int4")
    with pytest.raises(fdk.FormatError, match="proj: B must be int32"):
        from_marlin(golden["B"].short(), golden["s"], name="proj")
    with pytest.raises(fdk.FormatError, match=r"proj: s must be \[k/group, 512\]"):
        from_marlin(golden["B"], golden["s"][:, :256], name="proj")
    with pytest.raises(fdk.FormatError, match="has no form in Marlin"):
        to_marlin(testing.random_weight(fdk.parse("int3_g64"), 256, 128))
    with pytest.raises(fdk.FormatError, match="groupsize = 32 is not one of Marlin's"):
        marlin.Layer(256, 512, 32)
    with pytest.raises(fdk.FormatError, match=r"\[100, 256\] does not fit Marlin"):
        marlin.Layer(256, 100)
    with pytest.raises(fdk.FormatError, match=r"scales \[512, 1\] must be"):
        marlin.Layer(256, 512, 128).pack(torch.nn.Linear(256, 512), golden["scale"][:, :1])
