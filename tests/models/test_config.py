"""QuantisationConfig: what it accepts, what it says about the rest, its JSON and text forms."""

import json

import pytest
import torch

from fdk import kernels
from fdk.errors import FdkError, FormatError, UnsupportedError
from fdk.models import QuantisationConfig, read_overrides


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"bits": 4, "block_size": 64}, "lut4_g64"),
        ({"bits": 3}, "lut3_g64"),
        ({"bits": "2", "block_size": "32"}, "lut2_g32"),
        ({"bits": 1, "block_size": "chan"}, "lut1_chan"),
        ({"bits": 1, "block_size": None}, "lut1_chan"),
        ({"bits": 1, "block_size": -1}, "lut1_chan"),
        ({"bits": "nf4_g128"}, "nf4_g128"),
        ({"format": "uint5_g16"}, "uint5_g16"),
        ({"bits": 4, "block_size": 128, "kernel": "marlin"}, "int4_g128"),
        ({"bits": 4, "kernel": "marlin-lut"}, "lut4_g64"),
    ],
)
def test_bits_and_names_mean_a_format(arguments, expected):
    config = QuantisationConfig(**arguments)
    assert str(config.format) == expected
    assert str(config.recipe("any.layer").format) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["needs bits", "format="]),
        ({"bits": 9}, ["bits = 9", "1 to 8"]),
        ({"bits": 0}, ["bits = 0"]),
        ({"bits": 4.0}, ["bits = 4.0"]),
        ({"bits": True}, ["bits = True"]),
        ({"bits": 4, "block_size": 24}, ["block_size = 24", "multiple of 16"]),
        ({"bits": 4, "block_size": 0}, ["block_size = 0"]),
        ({"bits": "lut4"}, ["'lut4'", "lut4_g64"]),
        ({"bits": 3, "format": "lut4_g64"}, ["lut4_g64", "bits=3"]),
        ({"bits": 4, "kernel": "fast"}, ["'fast'", "auto", "reference"]),
        ({"bits": 3, "kernel": "marlin"}, ["marlin", "4 bits only"]),
        ({"format": "nf4_g64", "kernel": "marlin"}, ["marlin", "nf4_g64"]),
        ({"bits": 4, "skip": "("}, ["skip = '('", "regular expression"]),
        ({"bits": 4, "codebook": "gauss"}, ["'gauss'", "kmeans"]),
        ({"format": "int4_g64", "codebook": "kmeans"}, ["kmeans", "int4_g64", "lut4"]),
        ({"bits": 4, "scale": "best"}, ["'best'", "absmax"]),
        ({"bits": 4, "dtype": "int8"}, ["'int8'", "bfloat16"]),
        ({"bits": 4, "dtype": torch.float64}, ["float64", "bfloat16"]),
        ({"bits": 4, "overrides": {"[": 2}}, ["overrides = '['", "regular expression"]),
        ({"bits": 4, "overrides": {"mlp": 12}}, ["overrides['mlp']", "12"]),
        ({"bits": 4, "overrides": {"mlp": "lut4"}}, ["overrides['mlp']", "lut4_g64"]),
        ({"bits": 4, "overrides": ["mlp"]}, ["overrides must map"]),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_choices(arguments, words):
    with pytest.raises(FdkError) as error:
        QuantisationConfig(**arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["triton", "torch.compile", "cuda", "cpu"])
def test_a_kernel_of_the_interface_is_accepted_once_it_exists(name):
    if name in kernels.names():
        assert QuantisationConfig(bits=4, kernel=name).recipe("x").kernel == name
    else:
        with pytest.raises(UnsupportedError, match="reference"):
            QuantisationConfig(bits=4, kernel=name)


def test_skip_and_overrides():
    config = QuantisationConfig(
        bits=4, overrides={r"mlp\.": 2, r"mlp\.down": "int8_g32", "v_proj": 16}, skip="^lm_head$|gate"
    )
    assert config.recipe("lm_head") is None
    assert config.recipe("layers.0.mlp.gate_proj") is None
    assert str(config.recipe("layers.0.mlp.up_proj").format) == "lut2_g64"
    assert str(config.recipe("layers.0.mlp.down_proj").format) == "int8_g32"
    assert config.recipe("layers.0.self_attn.v_proj") is None
    assert str(config.recipe("layers.0.self_attn.q_proj").format) == "lut4_g64"


def test_an_override_that_finds_nothing_is_an_error():
    with pytest.raises(FormatError, match=r"'mpl' matches no layer; .*mlp\.up"):
        QuantisationConfig(bits=4, overrides={"mpl": 2}).check_names(["mlp.up", "lm_head"])
    with pytest.raises(FormatError, match=r"lm_head.*skip"):
        QuantisationConfig(bits=4, overrides={"lm_head": 8}).check_names(["mlp.up", "lm_head"])


def test_json_form():
    config = QuantisationConfig(
        bits=3,
        block_size=32,
        codebook="kmeans",
        scale="search",
        overrides={"a": 16, "b": "int4_g64"},
        dtype="fp16",
        skip="",
    )
    again = QuantisationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.dtype == torch.float16
    with pytest.raises(FormatError, match="unknown key 'bit'"):
        QuantisationConfig.from_dict({"bit": 4})


def test_text_form(tmp_path):
    path = tmp_path / "mixed.txt"
    path.write_text("# comment\n\nlayers.0.up: 3   # wide\nlayers.1.up : int8_g32\nlm_head: 16\n")
    assert read_overrides(path) == {r"^layers\.0\.up$": 3, r"^layers\.1\.up$": "int8_g32", "^lm_head$": 16}
    config = QuantisationConfig.from_text(path, bits=4, skip="")
    assert str(config.recipe("layers.0.up").format) == "lut3_g64"
    assert str(config.recipe("layersx0.up").format) == "lut4_g64"
    assert config.recipe("lm_head") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 4\nb 3\n", ["line 2", "'b 3'", "layer.name: bits"]),
        ("a: 12\n", ["line 1", "a", "bits = 12", "16 keeps"]),
        ("\n\na: lut4\n", ["line 3", "a", "'lut4'"]),
        ("a: 4\na: 3\n", ["line 2", "second time"]),
        (": 4\n", ["line 1"]),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, words):
    path = tmp_path / "mixed.txt"
    path.write_text(text)
    with pytest.raises(FormatError) as error:
        read_overrides(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_a_missing_or_binary_text_file_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"none\.txt.*No such file"):
        read_overrides(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="binary"):
        read_overrides(tmp_path / "binary")
