"""QuantisedWeight: what it accepts, refuses, merges and reports."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch

import fdk
from fdk import reference, testing
from fdk.weight import QuantisedWeight, concat, encode_spec, from_spec


def parts(n: int = 8, k: int = 64, bits: int = 4, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {
        "codes": torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8),
        "scales": torch.rand(n, k // 32).to(dtype),
        "table": torch.linspace(-1, 1, 1 << bits).to(dtype),
    }


def test_values_are_scale_times_table_entry() -> None:
    stored = {
        "codes": torch.tensor([[0x10, 0x32]], dtype=torch.uint8),
        "scales": torch.tensor([[2.0]]),
        "table": torch.arange(16.0) * 10,
    }
    weight = QuantisedWeight.from_parts("lut4_chan", 4, stored)
    assert reference.dequantise(weight).tolist() == [[0.0, 20.0, 40.0, 60.0]]
    del stored["table"]
    assert reference.dequantise(QuantisedWeight.from_parts("int4_chan", 4, stored)).tolist() == [[-16, -14, -12, -10]]
    stored["zeros"] = torch.tensor([[3]], dtype=torch.uint8)
    assert reference.dequantise(QuantisedWeight.from_parts("uint4_chan", 4, stored)).tolist() == [[-6, -4, -2, 0]]
    stored["zeros"] = torch.tensor([[0.5]])
    assert reference.dequantise(QuantisedWeight.from_parts("uint4_chan", 4, stored)).tolist() == [[-1, 1, 3, 5]]


def test_short_table_repeats_its_last_entry() -> None:
    stored = parts() | {"table": torch.tensor([-1.0, 0.0, 1.0]).bfloat16()}
    weight = QuantisedWeight.from_parts("lut4_g32", 64, stored)
    assert weight.parts["table"].tolist() == [[-1.0, 0.0] + [1.0] * 14]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"codes": torch.zeros(8, 31, dtype=torch.uint8)},
            r"layer.1: codes .* must be uint8 \[8, 32\], not uint8 \[8, 31\]",
        ),
        ({"codes": torch.zeros(8, 32, dtype=torch.int8)}, r"codes .* not int8"),
        ({"scales": torch.zeros(8, 3).bfloat16()}, r"scales .* must be bfloat16 \[8, 2\], not bfloat16 \[8, 3\]"),
        ({"scales": torch.zeros(8, 2).double()}, "float64 is not supported"),
        ({"table": torch.zeros(17).bfloat16()}, "1 to 16 entries, not 17"),
        ({"table": torch.zeros(16)}, r"table .* must be bfloat16 \[1, 16\], not float32"),
        ({"table": torch.tensor([0.0, float("nan")]).bfloat16()}, r"table\[0, 1\] = nan is not finite"),
        ({"scales": torch.full((8, 2), float("inf")).bfloat16()}, r"scales\[0, 0\] = inf"),
        ({"zeros": torch.zeros(8, 2).bfloat16()}, "stores codes, scales, table, but got"),
        ({"codes": None}, "codes is missing"),
        ({"table": None}, "stores codes, scales, table"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message: str) -> None:
    stored = {name: value for name, value in (parts() | change).items() if value is not None}
    with pytest.raises(fdk.FormatError, match=message):
        QuantisedWeight.from_parts("lut4_g32", 64, stored, name="layer.1")


def test_fixed_tables_cannot_be_altered() -> None:
    stored = parts()
    with pytest.raises(fdk.FormatError, match="table of a nf4_g32 weight is fixed; store other tables as lut4"):
        QuantisedWeight.from_parts("nf4_g32", 64, stored)


@pytest.mark.parametrize("row_ends", [(8, 8), (4,), (9,), (5, 3), (0, 8), ()])
def test_row_ranges_must_cover_the_rows(row_ends) -> None:
    stored = parts() | {"table": torch.zeros(max(1, len(row_ends)), 16).bfloat16()}
    with pytest.raises(fdk.FormatError, match="row_ends"):
        QuantisedWeight.from_parts("lut4_g32", 64, stored, row_ends)


def test_concat_keeps_every_row() -> None:
    for name in ("lut4_g32", "nf4_g32", "int3_g32", "uint4_g32"):
        weights = [testing.random_weight(fdk.parse(name), n, 64, seed=n) for n in (5, 16, 3)]
        merged = concat(weights)
        assert torch.equal(reference.dequantise(merged), torch.cat([reference.dequantise(w) for w in weights]))
        assert merged.geometry.row_ends == ((5, 21, 24) if name == "lut4_g32" else (24,))


def test_concat_refuses_what_does_not_match() -> None:
    first = testing.random_weight(fdk.parse("lut4_g32"), 4, 64)
    for other in (
        testing.random_weight(fdk.parse("lut4_g64"), 4, 64),
        testing.random_weight(fdk.parse("lut4_g32"), 4, 128),
        testing.random_weight(fdk.parse("lut4_g32"), 4, 64, torch.float16),
    ):
        with pytest.raises(fdk.FormatError, match="weight 1 is .* cannot be merged"):
            concat([first, other])
    with pytest.raises(fdk.FormatError, match="at least one"):
        concat([])


def test_dtype_change_is_exact_upwards_and_refuses_overflow() -> None:
    weight = testing.random_weight(fdk.parse("lut4_g32"), 4, 64)
    wide = weight.to(dtype=torch.float32)
    assert torch.equal(reference.dequantise(wide).bfloat16(), reference.dequantise(weight))
    weight.parts["scales"][2, 1] = 1e30
    with pytest.raises(fdk.FormatError, match=r"scales\[2, 1\] = inf is not finite in float16"):
        weight.to(dtype=torch.float16)


def test_copies_do_not_share_the_cache() -> None:
    weight = testing.random_weight(fdk.parse("lut4_g32"), 4, 64)
    fdk.linear(torch.zeros(1, 64).bfloat16(), weight)
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert twin.cache == twin.choices == {} and torch.equal(
            reference.dequantise(twin), reference.dequantise(weight)
        )


def test_a_spec_leads_back_to_the_weight_that_holds_the_tensors() -> None:
    weight = testing.random_weight(fdk.parse("nest8s4_g32"), 4, 64)
    parts, spec = list(weight.parts.values()), encode_spec(weight)
    assert from_spec(spec, parts) is weight
    assert from_spec(encode_spec(weight.at(2)), parts).geometry == weight.at(2).geometry
    other = from_spec(spec, [part.clone() for part in parts])
    assert other is not weight and torch.equal(reference.dequantise(other), reference.dequantise(weight))
    mixed = from_spec(spec, [parts[0], *(part.clone() for part in parts[1:])])
    assert mixed is not weight
    twin = copy.deepcopy(weight)
    assert from_spec(spec, list(twin.parts.values())) is twin
    weight.relayout_("rows16")
    assert from_spec(spec, parts) is not weight
    gone = weakref.ref(weight)
    del weight
    assert gone() is None and from_spec(spec, parts).layout == "canonical"


def test_a_compiled_layer_keeps_what_its_kernel_derived() -> None:
    """Each call of the op would build the weight again, and all that a kernel keeps for it."""
    layer = fdk.from_linear(torch.nn.Linear(64, 8), "lut4_g32")
    seen = []

    def spy(x, weight, *more):
        seen.append(weight)
        return run(x, weight, *more)

    run = fdk.ops.run
    x = torch.zeros(1, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fdk.ops, "run", spy)
        compiled(x), compiled(x)
    assert seen and all(weight is layer.weight for weight in seen)


def test_choices_for_numbers_of_rows_do_not_pile_up(monkeypatch) -> None:
    monkeypatch.setattr(QuantisedWeight, "MOST_CHOICES", 4)
    weight = testing.random_weight(fdk.parse("lut4_g32"), 4, 64)
    for rows in range(1, 10):
        x = torch.ones(rows, 64).bfloat16()
        with torch.no_grad():
            assert torch.equal(fdk.linear(x, weight), fdk.linear(x, weight))
        assert 1 <= len(weight.choices) <= 4


def test_bits_per_weight_counts_scales_and_tables() -> None:
    weight = testing.random_weight(fdk.parse("lut4_g64"), 64, 256)
    assert weight.bits_per_weight == 4 + 16 / 64 + 16 * 16 / (64 * 256)
    assert weight.nbytes * 8 == weight.bits_per_weight * 64 * 256
