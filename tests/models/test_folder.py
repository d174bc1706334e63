"""A Hugging Face folder from disk: streamed, quantised, brought back bit for bit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import of_transformers

import fdk
from fdk.models import QuantisationConfig, quantise, quantise_folder
from fdk.models.folder import load_dense, resolve

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")


def write(folder, kind: str = "Llama", dtype=torch.float32, shard="10MB", **extra):
    model = of_transformers(kind, **extra).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    (folder / "README.md").write_text("of the original")
    return model


@pytest.fixture
def source(tmp_path):
    write(tmp_path / "source")
    return tmp_path / "source"


TOKENS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("shard", ["10MB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_folder_equals_the_model_quantised_in_memory(tmp_path, shard, tied):
    write(tmp_path / "source", shard=shard, tie_word_embeddings=tied)
    config = QuantisationConfig(bits=4, codebook="kmeans", overrides={"down": "int3_g32", "v_proj": 16})
    report = quantise_folder(tmp_path / "source", tmp_path / "low", config, shard_bytes=50_000)
    low = fdk.load(tmp_path / "low")
    expected = quantise(load_dense(tmp_path / "source"), config)
    assert low.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in low.state_dict().items())
    assert torch.equal(low(TOKENS), expected(TOKENS))
    assert (low.lm_head.weight is low.model.embed_tokens.weight) == tied
    assert [layer.error for layer in report.layers] == [layer.error for layer in expected.fdk_report.layers]
    assert report.share == expected.fdk_report.share
    assert report.kept == expected.fdk_report.kept
    files = {path.name for path in (tmp_path / "low").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"} <= files
    assert (tmp_path / "low" / "README.md").read_text() != "of the original"
    stored = json.loads((tmp_path / "low" / "config.json").read_text())
    original = json.loads((tmp_path / "source" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
    assert {k: v for k, v in stored.items() if k not in ("dtype", "quantization_config")} == {
        k: v for k, v in original.items() if k != "dtype"
    }
    again = fdk.save(low, tmp_path / "again")
    assert fdk.load(again).state_dict().keys() == low.state_dict().keys()


@pytest.mark.parametrize(("stored", "expected"), [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)])
def test_half_precision_stays_what_it_is(tmp_path, stored, expected):
    write(tmp_path / "source", dtype=stored)
    quantise_folder(tmp_path / "source", tmp_path / "low", "lut4_g64")
    assert {tensor.dtype for tensor in fdk.load(tmp_path / "low").parameters()} == {expected}


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral", "Qwen3"])
def test_other_architectures_come_through_transformers(tmp_path, kind):
    dense = write(tmp_path / "source", kind)
    quantise_folder(tmp_path / "source", tmp_path / "low", "int8_g64", dtype=torch.float32)
    low = fdk.load(tmp_path / "low")
    assert type(low).__name__ == f"{kind}ForCausalLM"
    with torch.no_grad():
        got = low(TOKENS).logits
        expected = quantise(dense, "int8_g64", dtype=torch.float32)(TOKENS).logits
    assert torch.equal(got, expected)
    again = fdk.load(fdk.save(low, tmp_path / "again"))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, got)


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path / "source", "Qwen2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(fdk.UnsupportedError, match=r"Qwen2ForCausalLM.*pip install .*\[transformers\]"):
        quantise_folder(tmp_path / "source", tmp_path / "low", "lut4_g64")
    assert not (tmp_path / "low").exists()


def test_a_llama_needs_no_transformers(source, tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fdk\n"
        f"fdk.models.quantise_folder({str(source)!r}, {str(tmp_path / 'low')!r}, 'lut4_g64')\n"
        f"print(type(fdk.load({str(tmp_path / 'low')!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "Llama", done.stderr


def refused(tmp_path, source, *words: str, config="lut4_g64", **arguments) -> None:
    with pytest.raises(fdk.FdkError) as error:
        quantise_folder(source, tmp_path / "low", config, **arguments)
    for word in words:
        assert word in str(error.value)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(("low", ".low"))]


def edit_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_folders_that_cannot_be_quantised(tmp_path, source):
    edit_config(source, quantization_config={"quant_method": "awq"})
    refused(tmp_path, source, "quantised already, by 'awq'", "original model")
    edit_config(source, quantization_config=None)
    edit_config(source, intermediate_size=96)
    refused(tmp_path, source, "mlp.gate_proj.weight is [128, 64], but config.json asks for [96, 64]")
    edit_config(source, intermediate_size=128, num_hidden_layers=3)
    refused(tmp_path, source, "lacks the tensor model.layers.2")
    edit_config(source, num_hidden_layers=1)
    refused(tmp_path, source, "model.layers.1", "belongs to no layer")
    edit_config(source, num_hidden_layers=2, architectures=["MambaZilla"], model_type="zilla")
    refused(tmp_path, source, "MambaZilla", "'zilla'", "upgrade transformers")
    edit_config(source, architectures=[])
    refused(tmp_path, source, "names no architecture")


def test_bad_weights_name_file_and_tensor(tmp_path, source):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("inf")

    edit_tensors(source, poison)
    refused(tmp_path, source, "model.safetensors: model.layers.1.mlp.up_proj.weight[2, 3] is inf")


def test_values_that_overflow_half_precision_are_refused(tmp_path, source):
    edit_tensors(source, lambda t: t["model.norm.weight"].fill_(1e6))
    refused(tmp_path, source, "model.norm.weight holds 1e+06, which overflows", dtype=torch.float16)


def test_a_layer_that_does_not_fit_is_named_before_anything_is_written(tmp_path, source):
    refused(tmp_path, source, "q_proj [64, 64]: group 48 does not divide k = 64", config="lut4_g48")


def test_the_source_is_not_the_target(source):
    with pytest.raises(fdk.FormatError, match="already exists"):
        quantise_folder(source, source, "lut4_g64")
    with pytest.raises(fdk.FormatError, match="was not written by fdk"):
        quantise_folder(source, source, "lut4_g64", overwrite=True)
    assert load_dense(source)


def test_old_rotary_frequencies_are_left_out(tmp_path, source):
    edit_tensors(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    quantise_folder(source, tmp_path / "low", "lut4_g64")
    assert fdk.load(tmp_path / "low")


def test_ids(tmp_path, source, monkeypatch):
    assert resolve(source) == source
    with pytest.raises(fdk.FormatError, match=r"neither a folder nor in the local Hugging Face cache.*hf download a/b"):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        resolve("a/b")
    for wrong in ("a/b/c", "./nowhere", "a b/c!"):
        with pytest.raises(fdk.FormatError, match=r"does not exist|valid id"):
            resolve(wrong)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(fdk.FormatError, match="ids need huggingface_hub"):
        resolve("a/b")


def test_a_cached_id_is_found_offline(tmp_path, source, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--organisation--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    for path in source.iterdir():
        os.link(path, snapshot / path.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve("organisation/model").samefile(snapshot)
