"""quantise: every format against a direct transcription of its definition, dtypes, strides, chunks."""

import pytest
import torch

from fdk.formats import all_formats, parse
from fdk.formats.registry import LUT
from fdk.packing.bits import row_bytes, unpack_codes
from fdk.quantise import fixed_table, quantise, rtn, sqnr_db, uniform_table
from fdk.quantise.scales import base_scales, round_scales

FORMATS = [str(f) for f in all_formats((16, 64, None)) if f.storage == "plain"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def by_definition(weight, format, dtype):
    """Codes by argmin over all values of a code in float64, from w / scale in float32."""
    n, k = weight.shape
    blocks = weight.view(n, format.groups(k), -1)
    scales, zeros = base_scales(blocks, format)
    x = (blocks.float() / round_scales(scales, dtype).float()[..., None]).view(n, k)
    if format.is_table:
        table = fixed_table(format, dtype) if format.kind.values else uniform_table(format.bits, dtype)
        return (x.double()[..., None] - table.double()).abs().argmin(-1)
    zero = zeros.repeat_interleave(format.group_size(k), 1).double() if zeros is not None else format.offset
    return (x.double().round() + zero).clamp(0, (1 << format.bits) - 1).long()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_follow_the_definition(name, dtype, normal):
    format, weight = parse(name), normal(6, 192, seed=3, dtype=dtype)
    parts = quantise(weight, name)
    assert parts["codes"].shape == (6, row_bytes(192, format.bits)) and parts["codes"].dtype == torch.uint8
    assert parts["scales"].shape == (6, format.groups(192)) and parts["scales"].dtype == dtype
    optional = {"table": format.is_table, "zeros": format.has_zeros}
    assert set(parts) == {"codes", "scales"} | {key for key, present in optional.items() if present}
    codes = unpack_codes(parts["codes"], format.bits, 192).long()
    assert torch.equal(codes, by_definition(weight, format, dtype))
    if format.is_table:
        assert parts["table"].shape == (1, 1 << format.bits) and parts["table"].dtype == dtype
    if format.has_zeros:
        assert parts["zeros"].shape == parts["scales"].shape and parts["zeros"].dtype == torch.uint8
    assert all(part.is_contiguous() for part in parts.values())


@pytest.mark.parametrize("name", ("lut3_chan", "int5_chan", "uint2_chan", "nf4_chan"))
@pytest.mark.parametrize("k", (1, 7, 33))
def test_odd_rows(name, k, normal, dequantise):
    weight = normal(5, k, dtype=torch.float32)
    parts = quantise(weight, name)
    largest = parts["scales"].double() * 2 ** parse(name).bits
    assert ((dequantise(parts, name, k) - weight).abs() <= largest).all()


@pytest.mark.parametrize(
    "options", ({}, {"codebook": "kmeans"}, {"scale": "search"}, {"arithmetic": "source"}), ids=str
)
def test_chunks_do_not_change_the_result(options, normal, monkeypatch):
    weight = normal(37, 128)
    whole = quantise(weight, "lut3_g32", **options)
    monkeypatch.setattr(rtn, "CHUNK_CPU", 3 * 128)
    chunked = quantise(weight, "lut3_g32", **options)
    assert all(torch.equal(whole[key], chunked[key]) for key in whole)


def test_strides_gradients_and_the_source_are_left_alone(normal):
    weight = normal(128, 48)
    before = weight.clone()
    transposed = quantise(weight.t().requires_grad_(), "lut4_g64")
    assert torch.equal(weight, before)
    expected = quantise(weight.t().contiguous(), "lut4_g64")
    assert all(torch.equal(transposed[key], expected[key]) and not transposed[key].requires_grad for key in expected)


@pytest.mark.parametrize("name", ("lut4_g64", "int4_g64", "uint4_g64", "nf4_g64"))
def test_float64_is_quantised_as_float32(name, normal):
    weight = normal(4, 128, dtype=torch.float32)
    wide, narrow = quantise(weight.double(), name), quantise(weight, name)
    assert all(torch.equal(wide[key], narrow[key]) for key in narrow)


def test_storage_dtype_is_independent_of_the_weight(normal):
    parts = quantise(normal(4, 128, dtype=torch.float32), "nf4_g64", dtype=torch.bfloat16)
    assert parts["scales"].dtype == parts["table"].dtype == torch.bfloat16


def test_short_tables_repeat_their_last_value(normal):
    parts = quantise(normal(4, 64), "lut2_g64", codebook=torch.tensor([-1.0, 0.0, 1.0]))
    assert parts["table"].tolist() == [[-1.0, 0.0, 1.0, 1.0]]
    assert unpack_codes(parts["codes"], 2, 64).max() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("options", ({}, {"codebook": "kmeans"}, {"scale": "search"}), ids=str)
def test_cuda_parts_decode_as_well_as_cpu_parts(options, normal, dequantise):
    weight = normal(64, 1024)
    for name in ("lut4_g64", "int4_g64", "uint4_g64", "nf4_g64"):
        if "codebook" in options and not name.startswith("lut"):
            continue
        parts = quantise(weight.cuda(), name, **options)
        assert all(part.is_cuda for part in parts.values())
        ours = sqnr_db(weight, dequantise({key: part.cpu() for key, part in parts.items()}, name, 1024))
        reference = sqnr_db(weight, dequantise(quantise(weight, name, **options), name, 1024))
        assert abs(ours - reference) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lut4_g64", "int4_g64", "uint4_g64", "nf4_g64", "nest8_g64", "int4_g64_sp16of32"])
def test_cuda_parts_by_largest_weights_are_those_of_the_cpu(name, normal):
    weight = normal(64, 1024)
    expected, got = quantise(weight, name, scale="absmax"), quantise(weight.cuda(), name, scale="absmax")
    assert all(torch.equal(got[part].cpu(), expected[part]) for part in expected)


@pytest.mark.parametrize("fmt", all_formats((32,)), ids=str)
def test_the_default_dtype_changes_nothing(fmt) -> None:
    # Loaders of models set it to the model's while weights are read.
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    codebook = "kmeans" if fmt.kind is LUT else "uniform"
    expected = quantise(dense, fmt, codebook=codebook, scale="search")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = quantise(dense, fmt, codebook=codebook, scale="search")
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(got[name], part) for name, part in expected.items())
