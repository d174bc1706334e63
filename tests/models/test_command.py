"""python -m fdk.models on models of a few thousand parameters."""

import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fdk
from fdk.models import quantise
from fdk.models.configs import CUSTOM
from fdk.models.text import calibration_tokens
from fdk.models.tiny import save_dense


@pytest.fixture
def command(monkeypatch, llama, tmp_path):
    """main of the command, with a small custom model, ceilings that cost nothing, and no restart of this process."""
    module = importlib.import_module("fdk.models.__main__")
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setitem(CUSTOM, "custom-llama-mini", llama.config)
    ceilings = type("Ceilings", (), {"read": 1e10})()
    monkeypatch.setattr(module, "Memory", lambda device: type("Memory", (), {"ceilings": lambda self: ceilings})())

    runs = itertools.count()

    def main(*arguments: str) -> tuple[int, list[dict]]:
        folder = tmp_path / f"out-{next(runs)}"  # the files of two runs would come in any order
        status = module.main([*arguments, "--reps", "3", "--output-dir", str(folder), "--device", "cpu"])
        lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
        return status, [json.loads(line) for line in lines]

    main.module = module
    return main


def test_a_sweep_prints_and_records(command, capsys):
    status, found = command("--model", "custom-llama-mini", "--bits", "16", "4", "1", "--batch-size", "1", "2")
    assert status == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out
    assert [(r["format"], r["m"], r["status"]) for r in found] == [
        (name, batch, "ok") for name in ("bf16", "lut4_g64", "lut1_g64") for batch in (1, 2)
    ]
    for record in found:
        assert record["tokens_per_second"] == pytest.approx(record["m"] / record["time_p50"])
        assert record["floor"] == record["bytes_rw"] / record["read_bandwidth"]
        assert record["time_p20"] <= record["time_p50"] <= record["time_p80"]
        assert record["versions"]
    assert found[2]["bytes_rw"] < found[0]["bytes_rw"]
    assert found[2]["share_quantised"] > 0.5


def test_formats_kernels_and_skip(command):
    _, found = command("--model", "custom-llama-mini", "--format", "int4_g32", "nf4_g64", "--skip", "mlp")
    assert [record["format"] for record in found] == ["int4_g32", "nf4_g64"]
    _, found = command("--model", "custom-llama-mini", "--bits", "4", "--kernel", "marlin")
    assert "int4_g64" in [record["format"] for record in found]


def test_a_model_that_does_not_fit_is_skipped_with_the_numbers(command, capsys, monkeypatch):
    monkeypatch.setattr(fdk.device, "memory", lambda device: (10**9, 10**9))
    status, found = command("--model", "custom-llama-31B", "--bits", "16", "1")
    assert status == 0
    assert [record["status"] for record in found] == ["skipped", "skipped"]
    assert "needs 61.3 GB, but 80% of the memory are 0.8 GB; use fewer bits" in capsys.readouterr().out


def test_one_failure_does_not_end_the_sweep(command, capsys, monkeypatch):
    original = command.module.random_llama

    def fail(config, plan, *arguments, **keywords):
        if plan is None:
            raise RuntimeError("the machine coughed")
        return original(config, plan, *arguments, **keywords)

    monkeypatch.setattr(command.module, "random_llama", fail)
    status, found = command("--model", "custom-llama-mini", "--bits", "16", "4")
    assert status == 1
    assert [record["status"] for record in found] == ["failed", "ok"]
    assert "failed: custom-llama-mini bf16, batch 1: RuntimeError: the machine coughed" in capsys.readouterr().out


def test_a_saved_model_decodes(command, llama, tmp_path):
    fdk.save(quantise(llama, "lut3_g64"), tmp_path / "m")
    status, found = command("--model", str(tmp_path / "m"))
    assert status == 0
    assert [(record["format"], record["status"]) for record in found] == [("as stored", "ok")]


def test_a_dense_folder_decodes(command, llama, tmp_path):
    folder = tmp_path / "dense"
    folder.mkdir()
    save_file(llama.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(llama.config.to_hf()))
    status, found = command("--model", str(folder), "--bits", "16", "2", "--codebook", "kmeans")
    assert status == 0
    assert [(record["format"], record["status"]) for record in found] == [("bf16", "ok"), ("lut2_g64", "ok")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "9"], "bits = 9"),
        (["--bits", "four"], "invalid int value"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--model", "./none"], "does not exist"),
        (["--model", "custom-llama-5B"], "there is no such model; choose from custom-llama"),
        (["--kernel", "warp"], "'warp'"),
        (["--block-size", "7"], "block_size = '7'"),
        (["--calibration", "builtin"], "add --target-bits or --max-memory"),
        (["--calibration", "none.txt", "--target-bits", "3"], "--calibration none.txt: there is no such file"),
        (["--target-bits", "nan"], "--target-bits nan"),
    ],
)
def test_a_wrong_command_line_is_one_line(command, capsys, arguments, words):
    try:
        status, _ = command(*arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_group_that_does_not_fit_is_a_skip(command, capsys):
    status, found = command("--model", "custom-llama-mini", "--bits", "4", "--block-size", "48")
    assert status == 0
    assert found[0]["status"] == "skipped"
    assert "group 48 does not divide k = 64" in capsys.readouterr().out


def test_the_default_device_is_what_is_there(command):
    assert command.module.parser().parse_args([]).model == (
        "custom-llama-4B" if torch.cuda.is_available() else "custom-llama-tiny"
    )


def test_steps_beside_each_other(command, capsys, llama, tmp_path):
    """The forward of transformers and the model's own, both over the first 16-bit row."""
    pytest.importorskip("transformers")
    folder = save_dense(llama.bfloat16(), tmp_path / "dense")
    arguments = ("--bits", "16", "4", "--step", "library", "plain")
    status, found = command("--model", str(folder), *arguments)
    assert status == 0
    assert [(r["format"], r["step"]) for r in found] == [
        (name, step) for name in ("bf16", "lut4_g64") for step in ("library", "plain")
    ]
    for record in found:
        assert record["x_bf16"] == pytest.approx(found[0]["time_p50"] / record["time_p50"])
        assert record["bytes_rw"] == found[0 if record["bits"] == 16 else 2]["bytes_rw"]
    assert "lut4_g64 library" in capsys.readouterr().out
    status, found = command("--model", "custom-llama-mini", "--bits", "16", "--step", "library")
    assert status == 0
    assert "name a folder" in found[-1]["reason"]


@pytest.mark.parametrize("budget", [("--target-bits", "3.2"), ("--max-memory", "50KB")])
def test_a_budget_chooses_widths_by_layer(command, capsys, tmp_path, budget):
    status, found = command("--model", "custom-llama-mini", "--block-size", "32", *budget)
    assert status == 0
    name = "lut_g32 in " + {"3.2": "3.2 bits", "50KB": "50KB"}[budget[1]]
    assert [(r["format"], r["status"]) for r in found] == [("bf16", "ok"), (name, "ok")]
    if budget[0] == "--target-bits":
        assert 3.0 < found[1]["bits"] <= 3.2
    else:
        assert 47_000 < found[1]["model_bytes"] <= 50_000
    (path,) = tmp_path.glob("out-*/widths-*.txt")
    out = capsys.readouterr().out
    assert "the optimum" in out
    # The saved widths are those of a second run that is told them.
    status, again = command(
        "--model", "custom-llama-mini", "--block-size", "32", "--bits", "4", "--overrides", str(path)
    )
    assert status == 0
    assert again[-1]["model_bytes"] == found[1]["model_bytes"]


def test_a_budget_of_a_folder(command, tmp_path, llama):
    folder = tmp_path / "dense"
    folder.mkdir()
    save_file(llama.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(llama.config.to_hf()))
    status, found = command("--model", str(folder), "--bits", "16", "--target-bits", "2.9")
    assert status == 0
    assert [record["status"] for record in found] == ["ok", "ok"]
    assert 2.7 < found[1]["bits"] <= 2.9


@pytest.mark.parametrize("stored", [False, True])
def test_a_budget_is_spent_by_errors_on_a_text(command, capsys, tmp_path, llama, stored):
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(str(i * i % llama.config.vocab_size) for i in range(300)))
    model = str(save_dense(llama.bfloat16(), tmp_path / "dense")) if stored else "custom-llama-mini"
    arguments = ("--model", model, "--block-size", "32", "--target-bits", "3.2", "--ids", "--calibration-tokens", "64")
    status, found = command(*arguments, "--calibration", str(ids))
    assert status == 0
    assert "expected KL, nats per token," in capsys.readouterr().out
    assert [(r["status"], r.get("calibration")) for r in found] == [("ok", None), ("ok", str(ids))]
    assert 3.0 < found[1]["bits"] <= 3.2
    # Bytes of the text that is built in are no tokens of so small a vocabulary, and a folder needs a tokenizer for it.
    words = "has no tokenizer.json" if stored else f"is outside the model's vocabulary of {llama.config.vocab_size}"
    status, found = command(*arguments, "--calibration", "builtin")
    assert found[-1]["status"] == "skipped" and words in found[-1]["reason"]


def test_the_text_that_is_built_in_is_read_by_the_models_tokenizer(tmp_path):
    bytes_ = calibration_tokens(Path("builtin"), 50, None, {})
    assert bytes_.dtype == torch.int64 and len(bytes_) == 50
    assert torch.equal(calibration_tokens(Path("builtin"), 50, tmp_path, {"vocab_size": 256}), bytes_)
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"import": 1, "?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    read = calibration_tokens(Path("builtin"), 200, tmp_path, {})
    assert len(read) == 200 and set(read.tolist()) == {0, 1}


def test_a_budget_that_does_not_fit_is_a_skip(command, capsys):
    status, found = command("--model", "custom-llama-mini", "--max-memory", "1KB")
    assert status == 0
    assert found[-1]["status"] == "skipped"
    assert "bytes too small" in capsys.readouterr().out
    assert command("--model", "custom-llama-mini", "--max-memory", "lots")[0] == 2
