"""What may be wrong with a model folder, as its user meets it: one line that names it and says what to do."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_models import of_transformers

import fdk
from fdk import cli
from fdk.errors import FdkError, FormatError, UnsupportedError

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

load = transformers.AutoModelForCausalLM.from_pretrained


def write(folder: Path, family: str = "Llama", **extra) -> Path:
    model = of_transformers(family, **{"pad_token_id": 0, "eos_token_id": 95, **extra})
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def with_config(folder: Path, target: Path, **changes) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.fixture
def fdk_command(capsys):
    """(status, output, errors) of an fdk command."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        return (cli.main([str(argument) for argument in arguments]), *capsys.readouterr())

    return run


@pytest.fixture
def models(capsys, monkeypatch, tmp_path):
    """(status, output, errors, records) of python -m fdk.models on a CPU, without a restart of this process."""
    module = importlib.import_module("fdk.models.__main__")
    monkeypatch.setattr(module, "rebind", lambda *_: None)
    ceilings = type("Ceilings", (), {"read": 1e10})()
    monkeypatch.setattr(module, "Memory", lambda device: type("Memory", (), {"ceilings": lambda self: ceilings})())

    def run(*arguments) -> tuple[int, str, str, list[dict]]:
        out = tmp_path / "records"
        shutil.rmtree(out, ignore_errors=True)
        capsys.readouterr()
        fixed = ["--device", "cpu", "--reps", "2", "--output-dir", str(out)]
        status = module.main([*map(str, arguments), *fixed])
        found = [json.loads(line) for path in out.glob("*.jsonl") for line in path.read_text().splitlines()]
        return (status, *capsys.readouterr(), found)

    return run


def commands(folder: Path, tmp_path: Path) -> list[tuple]:
    """Every command of fdk that takes a model folder."""
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(str(i % 90) for i in range(6000)))
    return [
        ("info", folder),
        ("generate", folder, "--ids", "1"),
        ("quantise", folder, "--output", tmp_path / "never"),
        ("quantise", folder, "--output", tmp_path / "never", "--target-bits", "3.3"),
        ("eval", folder, "--text", ids, "--ids"),
    ]


def refused(fdk_command, folder: Path, tmp_path: Path, *words: str) -> None:
    """Every command fails by one line with these words, and leaves no folder."""
    for command in commands(folder, tmp_path):
        status, _, err = fdk_command(*command)
        assert status == 1 and err.count("\n") == 1, (command, err)
        assert all(word in err for word in words), (command, err)
    assert not (tmp_path / "never").exists()


def test_an_architecture_that_nobody_has(fdk_command, models, tmp_path):
    folder = with_config(write(tmp_path / "m"), tmp_path / "new", architectures=["FooForCausalLM"], model_type="foo")
    refused(fdk_command, folder, tmp_path, "FooForCausalLM of type 'foo'", "upgrade transformers")
    status, out, _, found = models("--model", folder, "--bits", "4")
    assert status == 0 and found[0]["status"] == "skipped"
    assert "upgrade transformers" in out


@pytest.mark.parametrize(("family", "extra"), [("Gemma", {}), ("Mixtral", {"num_local_experts": 4})])
def test_an_architecture_that_fdk_does_not_decode_takes_the_plain_path(fdk_command, models, tmp_path, family, extra):
    folder = write(tmp_path / "m", family, **extra)
    status, out, err = fdk_command("quantise", folder, "--output", tmp_path / "low")
    assert status == 0 and "AutoModelForCausalLM.from_pretrained" in out
    assert ("83.9% dense in stacked experts" in out) == (family == "Mixtral")
    for arguments in (("--model", folder, "--bits", "16", "4"), ("--model", tmp_path / "low")):
        status, out, err, found = models(*arguments, "--batch-size", "1", "2")
        assert status == 0 and {record["status"] for record in found} == {"ok"}, out
        assert err.count(f"{family}ForCausalLM is decoded by its own forward") == 1
        assert all(record["x_floor"] is None and record["tokens_per_second"] > 0 for record in found)
    with pytest.raises(FdkError, match=r"read it by transformers' AutoModelForCausalLM.from_pretrained after `import"):
        fdk.load(tmp_path / "low")


@pytest.mark.parametrize("tool", ["gptq", "bitsandbytes", None])
def test_a_folder_of_another_tool(fdk_command, models, tmp_path, tool):
    stored = {"bits": 4, "group_size": 64, "load_in_4bit": True, **({} if tool is None else {"quant_method": tool})}
    folder = with_config(write(tmp_path / "m"), tmp_path / "theirs", quantization_config=stored)
    name = repr(tool or "an unnamed tool")
    refused(fdk_command, folder, tmp_path, name, "original model")
    _, out, _, found = models("--model", folder)
    assert found[0]["status"] == "skipped" and name in out and "original model" in out
    with pytest.raises(FormatError, match=name):
        fdk.load(folder)


def test_a_folder_of_ggufs(fdk_command, tmp_path):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    refused(fdk_command, folder, tmp_path, "GGUF", "original model")


def test_a_model_that_does_not_fit(fdk_command, models, tmp_path, monkeypatch):
    folder = write(tmp_path / "m")
    assert fdk_command("quantise", folder, "--output", tmp_path / "low", "--bits", "8")[0] == 0
    monkeypatch.setattr("fdk.device.memory", lambda device: (1 << 40, 70_000))
    words = ("more than 90% of what is free there", "at 3 bits a weight or fewer it would fit (fdk quantise --bits 3)")
    for command in (("generate", folder, "--ids", "1"), ("generate", tmp_path / "low", "--ids", "1")):
        status, _, err = fdk_command(*command)
        assert status == 1 and all(word in err for word in words)
    for path in (folder, tmp_path / "low"):
        _, out, _, found = models("--model", path, "--bits", "16")
        assert found[0]["status"] == "skipped" and all(word in out for word in words)
    for settings in ({"quantization_config": fdk.FdkConfig(8)}, {}):
        with pytest.raises(FdkError, match="at 3 bits a weight or fewer it would fit"):
            load(folder if settings else tmp_path / "low", **settings)


def test_tied_embeddings_stay_dense_and_are_named(fdk_command, models, tmp_path):
    folder = write(tmp_path / "m", "Qwen2", tie_word_embeddings=True)
    status, out, _ = fdk_command("quantise", folder, "--output", tmp_path / "low", "--skip", "")
    assert status == 0
    assert "kept dense: lm_head: its weight is shared with model.embed_tokens.weight, which stays dense" in out
    assert fdk_command("generate", tmp_path / "low", "--ids", "1", "--tokens", "2")[0] == 0
    assert models("--model", tmp_path / "low")[3][0]["status"] == "ok"


def test_a_tokenizer_that_is_missing(fdk_command, models, tmp_path):
    folder = write(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 400)
    ids = tmp_path / "numbers.txt"
    ids.write_text(" ".join(str(i % 90) for i in range(6000)))
    budget = ("quantise", folder, "--output", tmp_path / "low", "--target-bits", "3.3")
    for command in (
        ("generate", folder, "--prompt", "Once"),
        ("eval", folder, "--text", text),
        (*budget, "--calibration", text),
    ):
        status, _, err = fdk_command(*command)
        assert status == 1 and err.count("\n") == 1
        assert "has no tokenizer.json; copy the original model's there, or give token ids with --ids" in err
    assert not (tmp_path / "low").exists()
    for command in (
        ("generate", folder, "--ids", "1", "--tokens", "2"),
        ("eval", folder, "--text", ids, "--ids"),
        (*budget, "--calibration", ids, "--ids", "--calibration-tokens", "64"),
    ):
        assert fdk_command(*command)[0] == 0
    arguments = ("--model", folder, "--bits", "4", "--target-bits", "3.3", "--calibration")
    assert "no tokenizer.json" in models(*arguments, text)[1]
    assert models(*arguments, ids, "--ids", "--calibration-tokens", "64")[3][0]["status"] == "ok"


def test_a_conversion_that_was_killed_is_cleared_away(fdk_command, tmp_path):
    """Of the kind that transformers makes too; what an interrupt leaves is in tests/test_cli.py."""
    folder = write(tmp_path / "m", "Mixtral", num_local_experts=4)
    (tmp_path / ".low.partial-0123abcd").mkdir()
    (tmp_path / ".low.partial-0123abcd" / "model.safetensors").write_bytes(b"half")
    assert fdk_command("quantise", folder, "--output", tmp_path / "low")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"m", "low"}
    status, _, err = fdk_command("quantise", folder, "--output", tmp_path / "low")
    assert status == 1 and "already exists; choose another folder" in err


def test_an_architecture_that_nobody_has_in_python(tmp_path):
    from fdk.integrations.transformers import load_causal

    folder = with_config(write(tmp_path / "m"), tmp_path / "new", architectures=["FooForCausalLM"], model_type="foo")
    with pytest.raises(UnsupportedError, match="which transformers .* does not have; upgrade transformers"):
        load_causal(folder, torch.device("cpu"), torch.bfloat16)
