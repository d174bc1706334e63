"""fdk.save and fdk.load: bit for bit, whole or not at all, and every way a folder can be wrong."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fdk
from fdk.models import QuantisationConfig, quantise
from fdk.models.llama import Llama
from fdk.models.tensors import CHECKSUMS, TensorWriter
from fdk.testing import random_weight


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) and x[name].dtype == y[name].dtype for name in x)


def mixed(llama: Llama) -> Llama:
    overrides = {"q_proj": "int3_g32", "k_proj": "uint4_g16", "v_proj": "nf4_g64", "down_proj": "lut5_chan"}
    return quantise(llama, QuantisationConfig(bits=4, codebook="kmeans", overrides=overrides))


@pytest.fixture
def folder(llama, tmp_path):
    """A saved model."""
    return fdk.save(mixed(llama), tmp_path / "saved")


def edit_config(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder, *words: str, **arguments) -> str:
    """The text of the FormatError of loading `folder`, which must hold the words."""
    with pytest.raises(fdk.FormatError) as error:
        fdk.load(folder, **arguments)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("shard_bytes", [1 << 40, 20_000, 1])
def test_a_llama_comes_back_bit_for_bit(llama, tokens, tmp_path, shard_bytes):
    model = mixed(llama)
    fdk.save(model, tmp_path / "m", shard_bytes=shard_bytes)
    again = fdk.load(tmp_path / "m")
    assert same(model, again)
    assert torch.equal(model(tokens), again(tokens))
    files = [path.name for path in (tmp_path / "m").glob("*.safetensors")]
    assert (len(files) > 1) == (shard_bytes < 1 << 40)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (len(files) > 1)
    stored = [tensor for name in files for tensor in load_file(tmp_path / "m" / name)]
    guard = min(name for name, module in model.named_modules() if isinstance(module, fdk.nn.Linear)) + ".weight"
    assert sorted(stored) == sorted([*model.state_dict(), guard])
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_file_is_an_ordinary_safetensors_file(folder):
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.codes"].dtype == torch.uint8
    assert tensors["model.layers.0.mlp.up_proj.table"].shape == (1, 16)
    assert tensors["model.layers.0.self_attn.k_proj.zeros"].dtype == torch.uint8


def test_a_bare_linear_comes_back(tmp_path):
    for bias in (True, False):
        layer = fdk.from_linear(nn.Linear(48, 20, bias=bias).bfloat16(), "lut3_chan")
        again = fdk.load(fdk.save(layer, tmp_path / f"{bias}"))
        x = torch.randn(2, 48).bfloat16()
        assert same(layer, again)
        assert torch.equal(again(x), layer(x))


def test_any_module_comes_back_given_its_modules(mlp, tmp_path):
    low = quantise(mlp, "lut4_g64")
    fdk.save(low, tmp_path / "m")
    with torch.device("meta"):
        blank = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32, bias=False))
    for modules in (blank, mlp, quantise(mlp, "lut4_g64")):
        again = fdk.load(tmp_path / "m", model=modules)
        assert again is modules
        assert same(low, again)
    refused(tmp_path / "m", "holds a Sequential", "model=")


def test_merged_weights_keep_their_tables(tmp_path):
    weight = random_weight(fdk.parse("lut4_g16"), 40, 64, tables=3)
    layer = fdk.nn.Linear(weight)
    again = fdk.load(fdk.save(layer, tmp_path / "m"))
    assert again.weight.geometry.row_ends == weight.geometry.row_ends
    assert same(layer, again)


def test_fractional_zeros_come_back(tmp_path):
    layer = fdk.nn.Linear(random_weight(fdk.parse("uint4_g16"), 40, 64, float_zeros=True))
    assert same(layer, fdk.load(fdk.save(layer, tmp_path / "m")))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(64, 32), "e": nn.Embedding(8, 64)})
    model["h"] = nn.Linear(64, 8, bias=False)
    model["b"].weight, model["h"].weight = model["a"].weight, model["e"].weight
    low = quantise(model, "lut4_g64")
    fdk.save(low, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert "b.codes" not in stored
    assert {"a.codes", "b.bias", "e.weight"} <= stored.keys()
    assert "h.weight" not in stored
    with torch.device("meta"):
        blank = nn.ModuleDict(
            {"a": nn.Linear(64, 32), "b": nn.Linear(64, 32), "e": nn.Embedding.from_pretrained(torch.empty(8, 64))}
        )
        blank["h"] = nn.Linear(64, 8, bias=False)
    blank["h"].weight = blank["e"].weight
    again = fdk.load(tmp_path / "m", model=blank)
    assert again["a"].weight is again["b"].weight
    assert again["h"].weight is again["e"].weight
    assert same(low, again)


def test_saving_what_was_loaded_writes_the_same_bytes(folder, tmp_path):
    again = fdk.save(fdk.load(folder), tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_no_second_target_and_nothing_foreign_is_replaced(llama, folder, tmp_path):
    model = mixed(llama)
    with pytest.raises(fdk.FormatError, match="already exists; choose another folder, or replace it with overwrite"):
        fdk.save(model, folder)
    fdk.save(quantise(llama, "lut2_g64"), folder, overwrite=True)
    assert str(fdk.load(folder).model.layers[0].mlp.up_proj.weight.format) == "lut2_g64"
    mine = tmp_path / "mine"
    mine.mkdir()
    fdk.save(model, mine)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "precious.txt").write_text("x")
    with pytest.raises(fdk.FormatError, match="was not written by fdk"):
        fdk.save(model, notes, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["mine", "notes", "saved"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
@pytest.mark.parametrize("when", [0, 7])
def test_a_failure_leaves_nothing_and_keeps_the_old(llama, folder, tmp_path, monkeypatch, failure, when):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []
    write = TensorWriter.write

    def fail(self, name, tensor):
        calls.append(name)
        if len(calls) > when:
            raise failure
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", fail)
    kind = failure if isinstance(failure, type) else type(failure)
    with pytest.raises(kind):
        fdk.save(mixed(llama), tmp_path / "new")
    with pytest.raises(kind):
        fdk.save(mixed(llama), folder, overwrite=True)
    assert os.listdir(tmp_path) == ["saved"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_cannot_be_saved_is_refused(llama, tmp_path):
    with pytest.raises(fdk.FormatError, match="no low-bit layer"):
        fdk.save(llama, tmp_path / "m")
    low = mixed(llama)
    low.model.norm.weight = nn.Parameter(torch.empty(64, device="meta"))
    with pytest.raises(fdk.FormatError, match=r"model\.norm\.weight lies on the meta device"):
        fdk.save(low, tmp_path / "m")
    assert not os.listdir(tmp_path)


def test_folders_that_are_none(tmp_path, folder):
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(folder / "config.json", "is a file; give the folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")
    (folder / "config.json").write_text('{"a": 1,,}')
    refused(folder, "config.json is not JSON (line 1, column 9")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json holds list")


def test_weights_of_others_are_refused_by_name(folder):
    edit_config(folder, lambda c: c["quantization_config"].update(quant_method="gptq"))
    refused(folder, "was quantised by 'gptq'", "fdk quantise")
    edit_config(folder, lambda c: c.pop("quantization_config"))
    refused(folder, "not quantised", "fdk quantise")


def test_a_newer_version_is_refused(folder):
    edit_config(folder, lambda c: c["quantization_config"].update(version=2))
    refused(folder, "format version 2, but this fdk reads up to 1", "pip install -U")
    edit_config(folder, lambda c: c["quantization_config"].update(version="1"))
    refused(folder, "version '1'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.update(format="lut9_g64"), ["no width of 9 bits"]),
        (lambda e: e.pop("format"), ["has no 'format'"]),
        (lambda e: e.update(shape=[1]), ["not readable", "'shape': [1]"]),
        (lambda e: e.update(shape=[128, 96]), ["group 64 does not divide k = 96"]),
        (lambda e: e.update(shape=[112, 64]), ["[112, 64]", "[128, 64] in the model"]),
        (lambda e: e.update(format="lut3_g64"), ["codes", "uint8 [128, 24]"]),
        (lambda e: e.update(same_as="nobody"), ["same_as names 'nobody'"]),
        (lambda e: e.update(row_ends=[5, 100]), ["row_ends (5, 100)"]),
        (lambda e: e.update(row_ends=["a"]), ["row_ends is 'a', not a whole number"]),
    ],
)
def test_a_damaged_entry_names_the_layer(folder, change, words):
    name = "model.layers.1.mlp.up_proj"
    edit_config(folder, lambda c: change(c["quantization_config"]["layers"][name]))
    refused(folder, name, *words)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_found(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    refused(folder, "model.safetensors is damaged or truncated", "copy it again")


def test_a_damaged_header_is_found(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[9] = 0xFF
    path.write_bytes(data)
    refused(folder, "model.safetensors is damaged or truncated")


def test_one_flipped_bit_is_found_in_every_tensor(folder):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")[CHECKSUMS]).keys() == header.keys()
    for name, entry in list(header.items())[::5]:
        bad = bytearray(good)
        bad[8 + length + entry["data_offsets"][0]] ^= 1
        path.write_bytes(bad)
        refused(folder, f"model.safetensors: {name} is damaged: its checksum does not match")
    path.write_bytes(good)
    assert fdk.load(folder, verify=False)


def test_missing_and_extra_tensors_are_named(folder):
    edit_tensors(folder, lambda t: t.update({"surplus": torch.zeros(3)}))
    refused(folder, "surplus belongs to no layer", "different models")
    edit_tensors(folder, lambda t: [t.pop("surplus"), t.pop("model.norm.weight")])
    refused(folder, "lacks the tensor model.norm.weight")
    edit_tensors(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.scales"))
    refused(folder, "model.layers.0.mlp.up_proj.scales is missing")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (
            "model.layers.0.mlp.up_proj.codes",
            torch.zeros(128, 31, dtype=torch.uint8),
            ["codes", "uint8 [128, 32]", "[128, 31]"],
        ),
        ("model.layers.0.mlp.up_proj.codes", torch.zeros(128, 32, dtype=torch.int8), ["codes", "int8"]),
        ("model.layers.0.mlp.up_proj.table", torch.zeros(1, 8).bfloat16(), ["table", "[1, 16]"]),
        ("model.layers.0.mlp.up_proj.scales", torch.full((128, 1), torch.inf).bfloat16(), ["scales[0, 0] = inf"]),
        ("model.layers.0.mlp.up_proj.scales", torch.ones(128, 1, dtype=torch.int32), ["int32", "bfloat16"]),
        ("model.norm.weight", torch.ones(63).bfloat16(), ["model.norm.weight", "[63]", "[64]"]),
        ("model.norm.weight", torch.ones(64, dtype=torch.int64), ["model.norm.weight", "int64"]),
    ],
)
def test_wrong_shapes_dtypes_and_values_name_the_tensor(folder, name, tensor, words):
    edit_tensors(folder, lambda t: t.update({name: tensor.contiguous()}))
    refused(folder, *words)


def test_a_layer_that_the_modules_lack(folder, mlp):
    edit_config(
        folder,
        lambda c: c["quantization_config"]["layers"].update(
            nobody={"format": "lut4_g64", "shape": [1, 64], "same_as": "model.layers.0.mlp.up_proj"}
        ),
    )
    refused(folder, "layer 'nobody'", "not in the model")
    refused(folder, "is not in the model", model=mlp)
    refused(folder, "bare Linear", model=nn.Linear(3, 3))


def test_shards_that_do_not_belong_together(llama, tmp_path):
    folder = fdk.save(mixed(llama), tmp_path / "m", shard_bytes=30_000)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    content = json.loads(good)
    lost = next(iter(content["weight_map"]))
    content["weight_map"].pop(lost)
    index.write_text(json.dumps(content))
    refused(folder, lost, "does not list")
    content["weight_map"].update({lost: first.name, "ghost": second.name})
    index.write_text(json.dumps(content))
    refused(folder, "lacks the tensor ghost")
    index.write_text("{}")
    refused(folder, "no weight_map")
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001.bin"}}))
    refused(folder, "names the pickle pytorch_model-00001.bin")
    index.unlink()
    refused(folder, "safetensors files but no model.safetensors.index.json")
    index.write_text(good)
    first.unlink()
    refused(folder, f"{first.name} is missing")


def test_pickled_weights_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pickles (pytorch_model.bin)", "save_pretrained")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "holds no safetensors file")
