"""fdk generate and python -m fdk.models on folders of transformers' architectures."""

from __future__ import annotations

import importlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import of_transformers

from fdk import cli
from fdk.models import read_overrides

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

PROMPT = [33, 34, 35, 1, 2, 3]


def write(folder, family: str, **extra):
    model = of_transformers(family, sharp=True, **{"eos_token_id": 95, **extra})
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "Gemma", "Mixtral"])
@pytest.mark.parametrize("quantised", [False, True])
def test_generate_continues_with_models_of_transformers(capsys, tmp_path, family, quantised):
    folder = write(tmp_path / "model", family)
    if quantised:
        status, out, _ = run(capsys, "quantise", folder, "--output", tmp_path / "low")
        assert status == 0 and ("dense in stacked experts" in out) == (family == "Mixtral")
        folder = tmp_path / "low"
    capsys.readouterr()
    generate = ["generate", folder, "--ids", *PROMPT, "--tokens", "8", "--device", "cpu"]
    status, out, err = run(capsys, *generate)
    assert status == 0 and 1 <= len(out.split()) <= 8
    assert err.count("is decoded by its own forward") == (family in ("Gemma", "Mixtral"))
    status, out, err = run(capsys, *generate, "--step", "plain")
    assert status == 0 and 1 <= len(out.split()) <= 8 and "own forward" not in err
    status, drawn, _ = run(capsys, *generate, "--temperature", "1.5", "--top-p", "0.9")
    assert status == 0 and drawn


@pytest.mark.parametrize("family", ["Qwen2", "Mixtral"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_budgets_and_eval_of_models_of_transformers(capsys, tmp_path, family, calibrated):
    folder = write(tmp_path / "model", family)
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(str(i * i % 95) for i in range(200)))
    arguments = ["--target-bits", "3.3", *(["--calibration", ids, "--ids"] if calibrated else [])]
    status, out, err = run(capsys, "quantise", folder, "--output", tmp_path / "low", *arguments)
    assert status == 0, err
    assert ("expected KL" in out) == calibrated
    layers = read_overrides(tmp_path / "low" / "widths.txt")
    assert len(layers) == (8 if family == "Mixtral" else 14)
    stored = json.loads((tmp_path / "low" / "config.json").read_text())["quantization_config"]["layers"]
    assert {f"^{re.escape(name)}$": int(entry["format"][3]) for name, entry in stored.items()} == layers
    evaluate = ["eval", tmp_path / "low", "--reference", folder, "--text", ids, "--ids", "--length", "16"]
    status, out, err = run(capsys, *evaluate)
    assert status == 0, err
    kl = float(re.search(r"mean KL to the reference, nats per token +(\S+)", out)[1])
    assert kl > 1e-3
    status, out, _ = run(capsys, "eval", folder, *evaluate[2:])
    assert status == 0
    assert re.search(r"mean KL to the reference, nats per token +0 ", out)


def test_a_folder_that_lacks_a_tensor_is_refused(capsys, tmp_path):
    folder = write(tmp_path / "model", "Mixtral")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for command in (["quantise", folder, "--output", tmp_path / "low"], ["generate", folder, "--ids", 1]):
        status, _, err = run(capsys, *command)
        assert status == 1 and "lacks the tensor model.norm.weight" in err
    assert not (tmp_path / "low").exists()


def test_the_end_of_a_text_is_that_of_generation_config(capsys, tmp_path):
    folder = write(tmp_path / "model", "Qwen2")
    (folder / "generation_config.json").write_text('{"eos_token_id": ' + str(list(range(96))) + "}")
    status, out, _ = run(capsys, "generate", folder, "--ids", 5, "--tokens", "8", "--device", "cpu")
    assert status == 0 and len(out.split()) == 1


def test_the_whole_model_benchmark_takes_them_too(capsys, tmp_path, monkeypatch):
    module = importlib.import_module("fdk.models.__main__")
    monkeypatch.setattr(module, "rebind", lambda *_: None)
    folder = write(tmp_path / "model", "Qwen3")
    arguments = ["--model", str(folder), "--bits", "16", "4", "--reps", "3", "--device", "cpu"]
    assert module.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    assert "lut4_g64" in capsys.readouterr().out
