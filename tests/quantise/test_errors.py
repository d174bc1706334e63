"""What quantise refuses names the tensor, the value, the place and the remedy."""

import pytest
import torch

from fdk.errors import FormatError, UnsupportedError
from fdk.quantise import quantise, rtn

NAME = "model.layers.3.mlp.up_proj.weight"
GOOD = torch.ones(4, 64)


def with_value(value, row=2, column=37, dtype=torch.bfloat16):
    weight = torch.ones(4, 64, dtype=dtype)
    weight[row, column] = value
    return weight


def refused(match, weight=GOOD, format="lut4_g64", error=FormatError, **options):
    with pytest.raises(error, match=match) as caught:
        quantise(weight, format, name=NAME, **options)
    assert NAME in str(caught.value)


@pytest.mark.parametrize(
    "format", ("lut4_g64", "lut1_g16", "int4_chan", "int2_g64", "uint4_g32", "uint1_g64", "nf4_g64", "fp4_chan")
)
@pytest.mark.parametrize(("value", "text"), ((torch.nan, "nan"), (torch.inf, "inf"), (-torch.inf, "-inf")))
def test_weights_that_are_not_finite(format, value, text):
    refused(rf"\[2, 37\] is {text};.*skip this layer", with_value(value), format)


@pytest.mark.parametrize("options", ({"codebook": "kmeans"}, {"scale": "search"}, {"arithmetic": "source"}), ids=str)
def test_not_finite_on_every_path(options):
    refused(r"\[2, 37\] is nan", with_value(torch.nan), **options)


def test_first_offender_across_chunks(monkeypatch):
    monkeypatch.setattr(rtn, "CHUNK_CPU", 64)
    weight = with_value(torch.nan)
    weight[3, 0] = torch.inf
    refused(r"\[2, 37\] is nan", weight)


def test_scale_beyond_the_storage_dtype():
    weight = torch.ones(4, 128)
    weight[1, 100] = -1e6
    refused(
        r"row 1, columns 64 to 127 \(largest weight 1e\+06\).*torch\.float16.*bfloat16", weight, dtype=torch.float16
    )


@pytest.mark.parametrize(
    ("match", "weight"),
    (
        (r"dtype torch\.int32.*cast", torch.ones(4, 64, dtype=torch.int32)),
        (r"dtype torch\.bool", torch.ones(4, 64, dtype=torch.bool)),
        (r"dtype torch\.complex64", torch.ones(4, 64, dtype=torch.complex64)),
        (r"dtype torch\.float8_e4m3fn", torch.ones(4, 64).to(torch.float8_e4m3fn)),
        (r"shape \[64\].*two dimensions, so reshape", torch.ones(64)),
        (r"shape \[2, 4, 64\]", torch.ones(2, 4, 64)),
        (r"shape \[0, 64\].*skip", torch.ones(0, 64)),
        (r"shape \[4, 0\]", torch.ones(4, 0)),
        (r"sparse", torch.eye(64).to_sparse()),
        (r"is a list", [[1.0]]),
        (r"group 64 does not divide k = 96", torch.ones(4, 96)),
    ),
)
def test_weights_of_the_wrong_form(match, weight):
    refused(match, weight)


def test_meta_weights():
    refused("meta device.*load it", torch.ones(4, 64, device="meta"), error=UnsupportedError)


@pytest.mark.parametrize(
    ("match", "table"),
    (
        (r"entry 2 is nan", torch.tensor([0.0, 1.0, torch.nan])),
        (r"entry 0 is -inf", torch.tensor([-torch.inf, 1.0])),
        (r"1 to 16 values.*shape \[17\]", torch.zeros(17)),
        (r"1 to 16 values.*shape \[0\]", torch.zeros(0)),
        (r"shape \[4, 4\]", torch.zeros(4, 4)),
        (r"torch\.complex64", torch.zeros(4, dtype=torch.complex64)),
    ),
)
def test_tables(match, table):
    refused(match, codebook=table)


def test_table_beyond_the_storage_dtype():
    refused(r"entry 1 is 100000\.0.*range of torch\.float16", codebook=torch.tensor([0.0, 1e5]), dtype=torch.float16)


@pytest.mark.parametrize(
    ("match", "options"),
    (
        (r"unknown scale 'max'; choose one of auto, absmax", {"scale": "max"}),
        (r"unknown codebook 'lloyd'; choose uniform, kmeans", {"codebook": "lloyd"}),
        (r"unknown arithmetic 'half'", {"arithmetic": "half"}),
        (r"stored as torch\.int8; use bfloat16", {"dtype": torch.int8}),
        (r"int4_g64 defines its own values.*lut4", {"format": "int4_g64", "codebook": "kmeans"}),
        (r"nf4_g64 defines its own values", {"format": "nf4_g64", "codebook": torch.zeros(16)}),
        (r"arithmetic='source' exists for lut", {"format": "int4_g64", "arithmetic": "source"}),
        (r"arithmetic='source' exists for lut", {"scale": "search", "arithmetic": "source"}),
    ),
)
def test_options(match, options):
    refused(match, **options)


def test_unknown_format():
    with pytest.raises(FormatError, match="no width of 9 bits"):
        quantise(GOOD, "lut9_g64")
