"""fdk inside transformers: quantised on the fly, saved, read again, and stopped where something is missing."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import of_transformers

import fdk
from fdk import cli
from fdk.errors import FdkError, FormatError, UnsupportedError
from fdk.models import QuantisationConfig, quantise, quantise_folder
from fdk.models.checkpoint import guard_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

# Few different shapes, because every one of them is compiled.
GPU_SIZES = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
IDS = torch.arange(14).view(2, 7)


def write(folder: Path, family: str = "Llama", shard: str = "10MB", dtype=torch.bfloat16, **extra) -> Path:
    model = of_transformers(family, **{"pad_token_id": 0, "eos_token_id": 95, **extra}).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def read(folder: Path, config=None, **settings):
    # None would erase what the folder says of its quantisation.
    settings |= {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source")


def equal_states(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_fly_saved_and_read_again(tmp_path, family):
    source = write(tmp_path / "source", family, shard="40KB")
    config = {"bits": 4, "codebook": "kmeans", "overrides": {"down": "int3_g32", "v_proj": 16}}
    low = read(source, fdk.FdkConfig(**config))
    expected = quantise(read(source), QuantisationConfig(**config))
    assert equal_states(low, expected)
    assert low.fdk_report.share == expected.fdk_report.share
    assert torch.equal(low(IDS).logits, expected(IDS).logits)

    low.save_pretrained(tmp_path / "low", max_shard_size="20KB")
    assert len(list((tmp_path / "low").glob("*.safetensors"))) > 2
    again = read(tmp_path / "low")
    assert equal_states(low, again)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(low.generate(IDS, **settings), again.generate(IDS, **settings))
    # The same folder as those of fdk.save and fdk quantise, and read by fdk.load.
    assert equal_states(fdk.load(tmp_path / "low", model=read(source)), low)
    fdk.save(again, tmp_path / "saved")
    quantise_folder(source, tmp_path / "streamed", QuantisationConfig(**config))
    folders = [tmp_path / name for name in ("low", "saved", "streamed")]
    tensors = [{k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()} for folder in folders]
    stored = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in folders]
    for other, description in zip(tensors[1:], stored[1:], strict=True):
        assert tensors[0].keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in tensors[0].items())
        assert description == stored[0]


def test_the_model_card_says_what_was_done_and_how_to_load(tmp_path, source):
    low = read(source, fdk.FdkConfig(format="lut3_g32", codebook="kmeans"))
    low.save_pretrained(tmp_path / "low")
    read(tmp_path / "low").save_pretrained(tmp_path / "again")
    quantise_folder(source, tmp_path / "streamed", QuantisationConfig(format="lut3_g32", codebook="kmeans"))
    for folder in ("low", "again", "streamed"):
        card = (tmp_path / folder / "README.md").read_text()
        worst = min(layer.error.sqnr_db for layer in low.fdk_report.layers if "up_proj" in layer.name)
        assert "import fdk" in card and "codebook: `kmeans`" in card
        assert f"| `model.layers.*.mlp.up_proj` | `lut3_g32` | 2 | 3.516 | {worst:.1f} |" in card


LOAD = "AutoModelForCausalLM.from_pretrained({folder!r})"
ORDERS = {
    "fdk first": "import fdk; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.__name__; import fdk",
    "FdkConfig alone": "from fdk import FdkConfig; from transformers import AutoModelForCausalLM",
}


def fresh(code: str, fails: bool = False, **environment: str) -> str:
    """Output of a new process; errors and all if it is to fail."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert (run.returncode != 0) == fails, run.stderr
    return run.stdout + run.stderr if fails else run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_fresh_process_reads_the_folder_in_any_order_of_imports(tmp_path, source, order):
    low = read(source, fdk.FdkConfig(4))
    low.save_pretrained(tmp_path / "low")
    code = f"{ORDERS[order]}; m = {LOAD.format(folder=str(tmp_path / 'low'))}; import torch; "
    total = fresh(code + "print(m(torch.arange(14).view(2, 7)).logits.double().sum().item())")
    assert float(total) == low(IDS).logits.double().sum().item()


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["lut4_g64", "int8_g64", "nest8_g64"])
def test_without_fdk_transformers_stops_at_the_guard(tmp_path, source, fmt):
    quantise_folder(source, tmp_path / "low", fmt)
    load = LOAD.format(folder=str(tmp_path / "low"))
    output = fresh(f"from transformers import AutoModelForCausalLM; {load}", fails=True)
    assert "MISMATCH" in output
    assert "Unknown quantization type, got fdk" in output


def test_the_guard_names_the_first_layer_however_they_are_ordered():
    assert guard_of(["b.c", "a.d"]) == guard_of(["a.d", "b.c"]) == "a.d.weight"
    assert guard_of([""]) is guard_of([]) is None


@pytest.mark.parametrize("part", ["codes", "scales", "table"])
def test_a_tensor_that_was_not_read_is_refused(tmp_path, source, part):
    quantise_folder(source, tmp_path / "low", "lut4_g64")
    file = tmp_path / "low" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=rf"lacks the tensor model.layers.1.mlp.up_proj.{part}, .*copy the whole"):
        read(tmp_path / "low")


@pytest.mark.parametrize("way", ["fdk", "transformers"])
def test_a_flipped_bit_is_named(tmp_path, source, way):
    if way == "fdk":
        quantise_folder(source, tmp_path / "low", "lut4_g64")
    else:
        read(source, fdk.FdkConfig(4)).save_pretrained(tmp_path / "low")
    codes = read(tmp_path / "low").model.layers[1].mlp.up_proj.state_dict()["codes"]
    file = tmp_path / "low" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[data.index(codes.numpy().tobytes()) + 5] ^= 16
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"model.layers.1.mlp.up_proj.codes is damaged: its checksum does not match"):
        read(tmp_path / "low")


def test_a_dense_weight_that_is_missing_is_refused(source):
    file = source / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks the tensor model.layers.1.mlp.up_proj.weight"):
        read(source, fdk.FdkConfig(4))


def test_overrides_from_a_text_file_and_skip(tmp_path, source):
    (tmp_path / "widths.txt").write_text("model.layers.0.mlp.up_proj: 2\nmodel.layers.1.mlp.up_proj: int5_g16\n")
    low = read(source, fdk.FdkConfig(3, 32, overrides=tmp_path / "widths.txt", skip="q_proj"))
    formats = {
        name: str(module.weight.format) for name, module in low.named_modules() if isinstance(module, fdk.nn.Linear)
    }
    assert formats["model.layers.0.mlp.up_proj"] == "lut2_g32"
    assert formats["model.layers.1.mlp.up_proj"] == "int5_g16"
    assert formats["lm_head"] == "lut3_g32"
    assert not any("q_proj" in name for name in formats)
    assert low.generate(IDS, max_new_tokens=2).shape == (2, 9)
    low.save_pretrained(tmp_path / "low")
    assert equal_states(read(tmp_path / "low"), low)
    with pytest.raises(FormatError, match="matches no layer"):
        read(source, fdk.FdkConfig(3, overrides={"nowhere": 2}))


@pytest.mark.parametrize("skip", ["", "^lm_head$"])
def test_tied_embeddings_stay_one_dense_tensor(tmp_path, skip):
    source = write(tmp_path / "source", "Qwen2", tie_word_embeddings=True)
    low = read(source, fdk.FdkConfig(4, skip=skip))
    assert low.lm_head.weight is low.model.embed_tokens.weight
    low.save_pretrained(tmp_path / "low")
    again = read(tmp_path / "low")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert equal_states(low, again)
    assert torch.equal(fdk.load(tmp_path / "low", model=read(source))(IDS).logits, low(IDS).logits)


def test_the_precision_of_a_nested_model_is_chosen_at_load(tmp_path, source):
    low = read(source, fdk.FdkConfig(format="nest8_g64", precision=3))
    assert {m.weight.format.served for m in low.modules() if isinstance(m, fdk.nn.Linear)} == {3}
    low.save_pretrained(tmp_path / "low")
    with pytest.warns(UserWarning, match="loading attributes"):
        wide = read(tmp_path / "low", fdk.FdkConfig(precision={"": 8, "mlp": 4}))
    served = {name: m.weight.format.served for name, m in wide.named_modules() if isinstance(m, fdk.nn.Linear)}
    assert {bits for name, bits in served.items() if "mlp" in name} == {4}
    assert {bits for name, bits in served.items() if "mlp" not in name} == {8}
    fdk.set_precision(low, 8)
    fdk.set_precision(wide, 8)
    assert torch.equal(low(IDS).logits, wide(IDS).logits)


@pytest.mark.parametrize("fmt", ["uint3_g32", "nf4_g64", "int4_g64_sp16of32"])
def test_other_formats_come_back(tmp_path, source, fmt):
    low = read(source, fdk.FdkConfig(format=fmt))
    low.save_pretrained(tmp_path / "low")
    assert equal_states(read(tmp_path / "low"), low)


def test_fractional_zeros_keep_their_type(tmp_path, source):
    low = read(source, fdk.FdkConfig(format="uint3_g32"))
    layer = low.model.layers[0].mlp.up_proj
    parts = dict(layer.weight.canonical().parts)
    parts["zeros"] = parts["zeros"].to(torch.bfloat16) + 0.5
    low.model.layers[0].mlp.up_proj = fdk.nn.Linear(fdk.QuantisedWeight.from_parts("uint3_g32", 64, parts))
    low.save_pretrained(tmp_path / "low")
    assert equal_states(read(tmp_path / "low"), low)


def test_a_body_without_its_head_is_read(tmp_path, source):
    quantise_folder(source, tmp_path / "low", "lut4_g64")
    body = transformers.AutoModel.from_pretrained(tmp_path / "low")
    assert isinstance(body.layers[0].mlp.up_proj, fdk.nn.Linear)
    assert torch.equal(body(IDS).last_hidden_state, read(tmp_path / "low").model(IDS).last_hidden_state)


def test_another_dtype_can_be_asked_for(tmp_path, source):
    low = read(source, fdk.FdkConfig(4, dtype="float32"))
    assert low.dtype == low.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    quantise_folder(source, tmp_path / "low", "lut4_g64")
    wide = read(tmp_path / "low", dtype=torch.float32)
    assert wide.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert wide(IDS).logits.dtype == torch.float32


def test_a_mixture_says_what_share_stays_dense(tmp_path):
    source = write(tmp_path / "source", "Mixtral", num_local_experts=4)
    with pytest.warns(UserWarning, match=r"dense in stacked experts"):
        low = read(source, fdk.FdkConfig(4))
    experts = sum(p.numel() for p in low.parameters() if p.dim() == 3)
    assert experts and low.fdk_report.stacked == experts
    low.save_pretrained(tmp_path / "low")
    assert torch.equal(read(tmp_path / "low")(IDS).logits, low(IDS).logits)


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed (extra: transformers)")
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(tmp_path, source, device_map):
    low = read(source, fdk.FdkConfig(4), device_map=device_map)
    low.save_pretrained(tmp_path / "low")
    assert equal_states(read(tmp_path / "low", device_map=device_map), low)


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed (extra: transformers)")
def test_offload_is_refused_by_name(source):
    with pytest.raises(UnsupportedError, match="on cpu and disk, but fdk's layers run where they lie"):
        read(source, fdk.FdkConfig(4), device_map={"model": "cpu", "lm_head": "disk"})


def test_bad_configs_say_what_is_wrong(source, tmp_path):
    with pytest.raises(FormatError, match="give bits=4"):
        read(source, fdk.FdkConfig())
    with pytest.raises(FormatError, match="bits = 9"):
        fdk.FdkConfig(9)
    quantise_folder(source, tmp_path / "low", "lut4_g64")
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (tmp_path / "low" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="version 99"):
        read(tmp_path / "low")


def test_what_does_not_fit_is_refused_before_it_is_read(source, monkeypatch):
    monkeypatch.setattr("fdk.device.memory", lambda device: (1 << 40, 50_000))
    with pytest.raises(FdkError, match=r"needs 0.00 GB on cpu, .* more than 90% of what is free"):
        read(source, fdk.FdkConfig(8))


def test_the_callers_config_stays_what_it_was(source):
    config = fdk.FdkConfig(4)
    before = config.to_dict()
    read(source, config)
    assert config.to_dict() == before
    assert before["quant_method"] == "fdk" and json.loads(config.to_json_string()) == before


def test_back_to_dense_layers(source):
    low = read(source, fdk.FdkConfig(4))
    expected = low(IDS).logits
    dense = low.dequantize()
    assert not any(isinstance(module, fdk.nn.Linear) for module in dense.modules())
    assert (dense(IDS).logits - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.slow
def test_it_compiles_without_breaks(source):
    low = read(source, fdk.FdkConfig(4))
    with torch.no_grad():
        expected = low(IDS, use_cache=False).logits
        compiled = torch.compile(low, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_fdks_decoding_gives_the_same_tokens(tmp_path, family):
    source = write(tmp_path / "source", family, dtype=torch.float32)
    low = read(source, fdk.FdkConfig(4))
    prompt = torch.randint(1, 95, (2, 11), generator=torch.Generator().manual_seed(0))
    for settings in (
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.5},
        {"do_sample": True, "top_p": 0.8, "temperature": 0.7, "top_k": 20},
    ):
        torch.manual_seed(1)
        expected = low.generate(prompt, max_new_tokens=12, **settings)
        torch.manual_seed(1)
        assert torch.equal(low.generate(prompt, max_new_tokens=12, custom_generate=fdk.decode, **settings), expected)
    stop = int(low.generate(prompt, max_new_tokens=3, do_sample=False)[0, -1])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": stop}
    expected = low.generate(prompt, **settings)
    assert torch.equal(low.generate(prompt, custom_generate=fdk.decode, **settings), expected)
    with pytest.raises(UnsupportedError, match="one beam"):
        low.generate(prompt, num_beams=2, custom_generate=fdk.decode)


def test_tokens_go_to_a_streamer_as_they_come(source):
    low = read(source, fdk.FdkConfig(4, dtype="float32"))
    seen = []
    streamer = SimpleNamespace(
        put=lambda tokens: seen.extend(tokens.flatten().tolist()), end=lambda: seen.append("end")
    )
    tokens = low.generate(IDS[:1] + 1, max_new_tokens=6, custom_generate=partial(fdk.decode, streamer=streamer))
    assert seen == [*tokens[0].tolist(), "end"]


def test_another_precision_is_another_decoding(source):
    low = read(source, fdk.FdkConfig(format="nest8_g64", dtype="float32"))
    prompt = torch.randint(1, 95, (1, 11), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    for bits in (8, 2, 4):
        fdk.set_precision(low, bits)
        expected = low.generate(prompt, **settings)
        assert torch.equal(low.generate(prompt, custom_generate=fdk.decode, **settings), expected)


@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_a_model_that_is_let_go_is_gone_at_once(tmp_path, family):
    low = read(write(tmp_path / "source", family), fdk.FdkConfig(4))
    low.generate(IDS + 1, max_new_tokens=2, custom_generate=fdk.decode)
    low.save_pretrained(tmp_path / "low")
    gc.collect()
    layer = weakref.ref(low.model.layers[0].mlp.up_proj)
    gc.disable()
    try:
        del low
        assert layer() is None
    finally:
        gc.enable()


def test_copies_save_themselves(tmp_path, source):
    low = read(source, fdk.FdkConfig(4))
    other = copy.deepcopy(low)
    with torch.no_grad():
        other.model.norm.weight.fill_(3)
    other.save_pretrained(tmp_path / "other")
    assert (read(tmp_path / "other").model.norm.weight == 3).all()
    assert (tmp_path / "other" / "README.md").exists()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_is_saved_over(tmp_path, source):
    low = read(source, fdk.FdkConfig(4))
    low.save_pretrained(tmp_path / "low", max_shard_size="20KB")
    shards = names(tmp_path / "low")
    again = read(tmp_path / "low")
    # Onto the files that it was read from, which it may have mapped: into one, and into several again.
    for size in ("50GB", 20_000):
        again.save_pretrained(tmp_path / "low", max_shard_size=size)
        assert equal_states(fdk.load(tmp_path / "low", model=read(source)), low)
        again = read(tmp_path / "low")
        assert equal_states(again, low)
        if size == "50GB":
            assert {name for name in names(tmp_path / "low") if "safetensors" in name} == {"model.safetensors"}
    assert names(tmp_path / "low") == shards


def test_a_save_that_fails_changes_nothing(tmp_path, source, monkeypatch):
    low = read(source, fdk.FdkConfig(4))
    low.save_pretrained(tmp_path / "low")
    before = {path.name: path.read_bytes() for path in (tmp_path / "low").iterdir()}

    def fail(*_) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fdk.models.tensors.TensorWriter.finish", fail)
    with pytest.raises(OSError, match="no space left"):
        read(source, fdk.FdkConfig(3)).save_pretrained(tmp_path / "low")
    assert {path.name: path.read_bytes() for path in (tmp_path / "low").iterdir()} == before
    with pytest.raises(FormatError, match="is a file; give a folder"):
        low.save_pretrained(source / "config.json")


def test_what_is_pushed_is_saved_by_fdk(tmp_path, source, monkeypatch):
    low = read(source, fdk.FdkConfig(4))
    pushed = []
    monkeypatch.setattr(type(low), "push_to_hub", lambda model, name, **settings: pushed.append((name, settings)))
    low.save_pretrained(tmp_path / "low", push_to_hub=True, commit_message="four bits")
    ((name, settings),) = pushed
    assert name == "low" and settings["commit_message"] == "four bits"
    assert equal_states(read(tmp_path / "low"), low)


def test_a_variant_is_written_by_transformers(tmp_path, source):
    low = read(source, fdk.FdkConfig(4))
    low.save_pretrained(tmp_path / "low", variant="four")
    assert "model.four.safetensors" in names(tmp_path / "low")
    assert equal_states(read(tmp_path / "low", variant="four"), low)


@pytest.mark.parametrize("tool", ["gptq", "awq", "compressed-tensors"])
def test_folders_of_other_tools_are_named(capsys, source, tool):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": tool, "bits": 4}})
    )
    capsys.readouterr()
    commands = (["info", source], ["generate", source, "--ids", 1], ["quantise", source, "--output", source / "low"])
    for command in commands:
        assert cli.main([str(part) for part in command]) == 1
        err = capsys.readouterr().err
        assert f"{tool!r}" in err and "original model" in err and err.count("\n") == 1
