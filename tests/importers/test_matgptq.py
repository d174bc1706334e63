"""MatGPTQ's checkpoints: golden vectors, data.pt files, packed folders, widths from a text file, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fdk
from fdk import reference, testing
from fdk.cli import main
from fdk.compat import MatGPTQLinear
from fdk.importers.matgptq import from_matgptq, load_packed, read_data, read_unpacked, to_matgptq
from fdk.models.llama import Llama, LlamaConfig

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "matgptq.safetensors")


def stored(**changes) -> dict:
    return {
        "qweight": GOLDEN["master"],
        "scale": GOLDEN["scale"],
        "zero": torch.full((32, 2), 128),
        "perm": None,
    } | changes


@pytest.mark.parametrize("bits", range(2, 9))
def test_values_and_products_are_those_of_the_source(bits: int) -> None:
    weight = from_matgptq(GOLDEN["master"], GOLDEN["scale"], bits=bits, group_size=128)
    assert torch.equal(reference.dequantise(weight, torch.float32), GOLDEN[f"dequantised{bits}"])
    layer = MatGPTQLinear(GOLDEN["master"], GOLDEN["scale"], bits)  # groups of 128, as in the source
    assert torch.equal(layer(GOLDEN["x"]), fdk.linear(GOLDEN["x"], weight))
    layer.set_precision(3)
    assert torch.equal(layer(GOLDEN["x"]), fdk.linear(GOLDEN["x"], weight.at(3)))


def test_the_codes_come_back() -> None:
    back = to_matgptq(from_matgptq(**stored()))
    assert torch.equal(back["qweight"], GOLDEN["master"]) and torch.equal(back["scale"], GOLDEN["scale"])
    assert (back["zero"] == 128).all() and back["perm"] is None
    with pytest.raises(fdk.FormatError, match="has no form in MatGPTQ"):
        to_matgptq(testing.random_weight(fdk.parse("trunc8_g64"), 4, 64))


@pytest.mark.parametrize("shape", [(32, 1), (32,), (1, 32)])
def test_one_scale_per_row_in_every_convention(shape) -> None:
    scale = GOLDEN["scale"][:, :1]
    weight = from_matgptq(GOLDEN["master"], scale.reshape(shape), group_size=-1)
    assert str(weight.format) == "nest8_chan" and torch.equal(weight.parts["scales"], scale)


def test_data_files_are_read_without_unpickling(tmp_path) -> None:
    for layer in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"):
        (tmp_path / layer).mkdir()
        torch.save(stored(perm=torch.arange(256)), tmp_path / layer / "data.pt")
    weights = read_unpacked(tmp_path, bits=4)
    assert list(weights) == ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    for weight in weights.values():
        assert torch.equal(reference.dequantise(weight, torch.float32), GOLDEN["dequantised4"])


class Code:
    """Something that torch.save can only write as a pickle of code."""

    def __reduce__(self):
        return (print, ("unpickled code ran",))


def test_files_with_code_or_without_codes_are_refused(tmp_path, capfd) -> None:
    path = tmp_path / "data.pt"
    torch.save(stored(extra=Code()), path)
    with pytest.raises(fdk.FormatError, match="is no file of plain tensors, and fdk never runs pickled code"):
        read_data(path)
    assert capfd.readouterr().out == ""
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(fdk.FormatError, match="holds no qweight and scale"):
        read_data(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(fdk.FormatError, match=r"data\.pt is (damaged|no file)"):
        read_data(path)
    with pytest.raises(fdk.FormatError, match="does not exist; give the data.pt"):
        read_data(tmp_path / "none.pt")
    with pytest.raises(fdk.FormatError, match="holds no <layer>/data.pt"):
        read_unpacked(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"zero": torch.full((32, 2), 120)}, fdk.UnsupportedError, "proj: zero holds 120, but nested slices round"),
        ({"zero": 0}, fdk.UnsupportedError, "proj: zero holds 0"),
        ({"perm": torch.arange(256).flip(0)}, fdk.UnsupportedError, "proj: perm reorders the columns"),
        ({"qweight": GOLDEN["master"].int()}, fdk.FormatError, "proj: qweight must be uint8"),
        ({"scale": GOLDEN["scale"][:, :1].repeat(1, 3)}, fdk.FormatError, r"proj: scale must be \[32, groups\]"),
        ({"scale": GOLDEN["scale"].T}, fdk.FormatError, r"proj: scale must be \[32, groups\]"),
        ({"bits": 9}, fdk.FormatError, "a slice of 9 bits of nest8 is wider than its 8 bits"),
        ({"group_size": 64}, fdk.FormatError, "scale has 2 groups, but group_size = 64 and k = 256 ask for 4"),
        ({"group_size": -1}, fdk.FormatError, "scale has 2 groups, but group_size = -1"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(change, error, message: str) -> None:
    with pytest.raises(error, match=message):
        from_matgptq(**stored(**change), name="proj")


def packed_folder(folder: Path, **quantisation) -> tuple[Llama, dict]:
    """A small Llama whose linear layers are MatGPTQ's, packed; and its layers' weights."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(64, 128, 96, 1, 4, 2, 64)).half()
    tensors, weights = {}, {}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if isinstance(model.get_submodule(layer), torch.nn.Linear) and layer != "lm_head":
            n, k = tensor.shape
            master = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
            scale = (torch.rand(n, k // 32, generator=generator) / 500 + 1e-3).half()
            tensors |= {f"{layer}.qweight": master, f"{layer}.scales": scale}
            weights[layer] = from_matgptq(master, scale)
        else:
            tensors[name] = tensor.contiguous()
    config = {
        **model.config.to_hf(),
        "quantization_config": {
            "quant_method": "matgptq_quant", "group_size": 32, "master_bitwidth": 8, "inference_bitwidth": 4,
            "modules_to_not_convert": ["lm_head"], "quant_dtype": "int",
        } | quantisation,
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return model, weights


def test_packed_folders_become_models(tmp_path) -> None:
    dense, weights = packed_folder(tmp_path / "packed")
    model = load_packed(tmp_path / "packed")
    for layer, weight in weights.items():
        module = model.get_submodule(layer)
        assert module.weight.format.served == 4
        dense.get_submodule(layer).weight.data = reference.dequantise(weight.at(4), torch.float16)
    tokens = torch.randint(0, 64, (1, 5), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(model(tokens).float(), dense(tokens).float(), rtol=0.05, atol=0.05)

    widths = tmp_path / "widths.txt"
    widths.write_text("".join(f"{layer}: {3 if 'mlp' in layer else 8}\n" for layer in weights))
    mixed = load_packed(tmp_path / "packed", precision=widths)
    assert {mixed.get_submodule(layer).weight.format.served for layer in weights} == {3, 8}
    fdk.save(mixed, tmp_path / "saved")
    assert torch.equal(fdk.load(tmp_path / "saved")(tokens), mixed(tokens))


def test_fdk_convert_keeps_the_codes_and_the_small_files(tmp_path, capsys) -> None:
    _, weights = packed_folder(tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer.json").write_text("{}")
    arguments = ["convert", str(tmp_path / "packed"), "--output", str(tmp_path / "low")]
    assert main(arguments) == 0
    assert "served as nest8s4_g32" in capsys.readouterr().out
    assert (tmp_path / "low" / "tokenizer.json").read_text() == "{}"
    model = fdk.load(tmp_path / "low")
    for layer, weight in weights.items():
        found = model.get_submodule(layer).weight.canonical()
        assert all(torch.equal(found.parts[name], part) for name, part in weight.parts.items())
    assert main(arguments) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--precision", "3"]) == 0
    assert "served as nest8s3_g32" in capsys.readouterr().out
    for wrong, complaint in (("9", "a slice of 9 bits"), ("none.txt", "none.txt")):
        assert main([*arguments, "--overwrite", "--precision", wrong]) == 1
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1
    kept = [module for module in fdk.load(tmp_path / "low").modules() if isinstance(module, fdk.nn.Linear)]
    assert {str(module.weight.format) for module in kept} == {"nest8s3_g32"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quant_method": "gptq"}, fdk.FormatError, "quant_method is 'gptq', not 'matgptq_quant'"),
        ({"master_bitwidth": 6}, fdk.UnsupportedError, "master_bitwidth is 6, but fdk serves nested codes of 8 bits"),
        ({"inference_bitwidth": 9}, fdk.FormatError, "a slice of 9 bits"),
        ({"group_size": 128}, fdk.FormatError, "group_size = 128"),
    ],
)
def test_folders_that_cannot_be_served_are_refused(tmp_path, change, error, message: str) -> None:
    packed_folder(tmp_path / "packed", **change)
    with pytest.raises(error, match=message):
        load_packed(tmp_path / "packed")


def test_incomplete_folders_are_refused(tmp_path) -> None:
    packed_folder(tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    layer = next(name for name in tensors if name.endswith("up_proj.scales"))
    save_file({name: tensor for name, tensor in tensors.items() if name != layer}, path)
    with pytest.raises(fdk.FormatError, match="lacks the tensor .*up_proj.scales"):
        load_packed(tmp_path / "packed")
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, path)
    with pytest.raises(fdk.FormatError, match="lacks the tensor model.norm.weight"):
        load_packed(tmp_path / "packed")
