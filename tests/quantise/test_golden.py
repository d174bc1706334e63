"""The source project's own quantiser output, bit for bit."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fdk.packing.bits import unpack_codes
from fdk.quantise import quantise, uniform_table

REPOSITORY = Path(__file__).parents[2]
GOLDEN = load_file(REPOSITORY / "tests" / "data" / "fdk_lut_quantiser.safetensors")
CASES = [(bits, kind) for bits in (8, 4, 2, 1) for kind in ("uniform", "custom")]


def golden(bits, kind):
    return {key: GOLDEN[f"lut{bits}.{kind}.{key}"] for key in ("weight", "weight_data", "scale", "table")}


def codes_msb_first(data, bits):
    """Element e of a byte is bits [8 - bits*(e+1), 8 - bits*e)."""
    fields = [(data >> (8 - bits * (e + 1))) & ((1 << bits) - 1) for e in range(8 // bits)]
    return torch.stack(fields, -1).reshape(data.shape[0], -1)


@pytest.mark.parametrize(("bits", "kind"), CASES)
def test_source_arithmetic_reproduces_codes_and_scales(bits, kind):
    case = golden(bits, kind)
    codebook = "uniform" if kind == "uniform" else case["table"]
    parts = quantise(case["weight"], f"lut{bits}_g64", codebook=codebook, arithmetic="source")
    assert torch.equal(parts["scales"], case["scale"])
    assert torch.equal(parts["table"][0], case["table"])
    assert torch.equal(unpack_codes(parts["codes"], bits, 256), codes_msb_first(case["weight_data"], bits))


@pytest.mark.parametrize("bits", (8, 4, 2, 1))
def test_default_scales_and_table_are_the_source_s(bits):
    case = golden(bits, "uniform")
    parts = quantise(case["weight"], f"lut{bits}_g64")
    assert torch.equal(parts["scales"], case["scale"])
    assert torch.equal(parts["table"][0], case["table"])
    assert torch.equal(uniform_table(bits, torch.bfloat16), case["table"])


@pytest.mark.parametrize(("bits", "kind"), CASES)
def test_exact_arithmetic_never_errs_more_than_the_source(bits, kind):
    case = golden(bits, kind)
    scale = case["scale"].double().repeat_interleave(64, 1)
    table, weight = case["table"].double(), case["weight"].double()
    parts = quantise(case["weight"], f"lut{bits}_g64", codebook=case["table"])
    ours = (table[unpack_codes(parts["codes"], bits, 256).long()] * scale - weight).abs()
    theirs = (table[codes_msb_first(case["weight_data"], bits).long()] * scale - weight).abs()
    # w / scale is rounded to float32 before entries are compared.
    assert (ours <= theirs + 2.0**-23 * weight.abs()).all()


def test_committed_copy_matches_the_original_vectors():
    shared = Path(os.environ.get("FDK_SHARED", REPOSITORY.parent / "shared"))
    original = shared / "vectors" / "fdk_lut.safetensors"
    if not original.exists():
        pytest.skip(f"{original} is not on this machine; the committed copy is under test")
    tensors = load_file(original)
    for key, value in GOLDEN.items():
        if key.endswith(".table"):
            bits = int(key[3])
            assert torch.equal(value, tensors[key.replace(".table", ".byte_lut")][: 1 << bits, -1])
        else:
            assert torch.equal(value, tensors[key])
