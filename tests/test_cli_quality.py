"""fdk eval, and fdk quantise with a budget: what they print, write and refuse."""

import errno
import importlib
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file

import fdk
from fdk import cli
from fdk.models import read_overrides
from fdk.models.llama import Llama, LlamaConfig
from fdk.models.tiny import save_dense

TEXT = "def twice(x):\n    return x + x\n" * 12


@pytest.fixture
def folder(tmp_path):
    """A dense Llama of bytes on disk."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(256, 64, 128, 2, 4, 2, 16)).bfloat16()
    with torch.no_grad():
        # Predictions of a fresh model are so even that rounding in bfloat16 changes the likeliest token.
        model.lm_head.weight.mul_(8)
    return save_dense(model, tmp_path / "dense")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def values(out: str) -> dict[str, list[float]]:
    """Rows of the table that `fdk eval` prints: value, from, to."""
    rows = re.findall(r"^(\D+?) +([\d.e+-]+) +([\d.e+-]+) +([\d.e+-]+)$", out, re.MULTILINE)
    return {name: [float(x) for x in numbers] for name, *numbers in rows}


def test_a_model_of_bytes_reads_and_writes_text_without_a_tokenizer(capsys, tmp_path, folder):
    assert run(capsys, "quantise", folder, "--output", tmp_path / "low")[0] == 0
    for model in (folder, tmp_path / "low"):
        status, out, _ = run(capsys, "generate", model, "--prompt", "d\u00e9f", "--tokens", "6", "--device", "cpu")
        ids = run(capsys, "generate", model, "--ids", *"d\u00e9f".encode(), "--tokens", "6", "--device", "cpu")[1]
        expected = bytes(map(int, ids.split())).decode(errors="replace").rstrip("\ufffd")
        assert status == 0 and out == f"{expected}\n"


def test_eval_of_a_quantised_model_beside_its_original(capsys, tmp_path, folder, text):
    assert run(capsys, "quantise", folder, "--output", tmp_path / "low", "--bits", "2")[0] == 0
    status, out, err = run(
        capsys, "eval", tmp_path / "low", "--text", text, "--reference", folder, "--length", "32", "--output-dir",
        tmp_path / "out",
    )  # fmt: skip
    assert (status, err) == (0, "")
    found = values(out)
    assert list(found) == [
        "perplexity", "perplexity over the reference's", "mean KL to the reference, nats per token",
        "same most likely token as the reference",
    ]  # fmt: skip
    for value, low, high in found.values():
        assert low <= value <= high
    assert found["mean KL to the reference, nats per token"][0] > 1e-3
    assert "352 tokens in 11 segments of 32" in out
    (path,) = (tmp_path / "out").glob("*.jsonl")
    record = json.loads(path.read_text())
    assert record["test"] == "eval"
    assert record["perplexity"] == pytest.approx(found["perplexity"][0], rel=1e-4)


def test_a_model_against_itself(capsys, folder, text):
    status, out, _ = run(capsys, "eval", folder, "--text", text, "--reference", folder, "--length", "16")
    assert status == 0
    found = values(out)
    assert found["same most likely token as the reference"] == [1, 1, 1]
    assert found["perplexity over the reference's"] == [1, 1, 1]


def test_ids_in_place_of_text(capsys, tmp_path, folder, text):
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(map(str, TEXT.encode())))
    arguments = ("--length", "16", "--segments", "10")
    _, expected, _ = run(capsys, "eval", folder, "--text", text, *arguments)
    status, out, _ = run(capsys, "eval", folder, "--text", ids, "--ids", *arguments)
    assert status == 0
    assert values(out) == values(expected) != {}
    assert "160 tokens in 10 segments" in out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--length", "0"), 2, "--length 0: at least 1"),
        (("--confidence", "1.5"), 2, "--confidence 1.5"),
        (("--length", "64"), 1, "5 segments are too few"),
        (("--length", "4000"), 1, "text.py: the text has 372 tokens, fewer than one segment"),
        (("--segments", "0"), 2, "--segments 0: at least 1"),
        (("--ids",), 1, "something other than token ids"),
        (("--reference", "./nowhere"), 1, "does not exist"),
    ],
)
def test_eval_says_what_is_wrong(capsys, folder, text, arguments, status, words):
    found, out, err = run(capsys, "eval", folder, "--text", text, *arguments)
    assert (found, out) == (status, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_missing_text_or_tokenizer_is_named(capsys, tmp_path, folder, text):
    _, _, err = run(capsys, "eval", folder, "--text", tmp_path / "none.txt")
    assert f"cannot read {tmp_path / 'none.txt'}" in err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    _, _, err = run(capsys, "eval", folder, "--text", text)
    assert "has no tokenizer.json" in err
    assert "--ids" in err


@pytest.mark.parametrize("calibrated", [False, True])
def test_quantise_within_target_bits(capsys, tmp_path, folder, text, calibrated):
    calibration = ("--calibration", text) if calibrated else ()
    arguments = ("--target-bits", "3.3", "--codebook", "kmeans", "--block-size", "32", *calibration)
    status, out, err = run(capsys, "quantise", folder, "--output", tmp_path / "low", *arguments)
    assert (status, err) == (0, "")
    mean = float(re.search(r"14 layers at ([\d.]+) bits a weight", out)[1])
    assert 3.0 < mean <= 3.3
    assert ("expected KL" in out) == calibrated
    widths = read_overrides(tmp_path / "low" / "widths.txt")
    assert len(widths) == 14
    model = fdk.load(tmp_path / "low")
    stored = {name: layer.weight.format.bits for name, layer in model.named_modules() if hasattr(layer, "weight")
              and hasattr(layer.weight, "format")}  # fmt: skip
    assert {f"^{re.escape(name)}$": bits for name, bits in stored.items()} == widths
    assert len(set(stored.values())) > 1
    # The saved table gives the same model once more.
    options = ("--overrides", tmp_path / "low" / "widths.txt", "--codebook", "kmeans", "--block-size", "32")
    run(capsys, "quantise", folder, "--output", tmp_path / "again", *options)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("low", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_quantise_within_a_size(capsys, tmp_path, folder):
    status, out, _ = run(capsys, "quantise", folder, "--output", tmp_path / "low", "--max-memory", "110KB")
    assert status == 0
    assert re.search(r"model of 0\.0001\d* GB", out)
    tensors = load_file(tmp_path / "low" / "model.safetensors")
    assert 105_000 < sum(tensor.nbytes for tensor in tensors.values()) <= 110_000


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--target-bits", "3", "--max-memory", "8GB"), 2, "give one"),
        (("--target-bits", "3", "--bits", "4"), 2, "--bits has no meaning beside a budget"),
        (("--max-memory", "much"), 2, "'much' is not a size"),
        (("--widths", "2", "3"), 2, "add --target-bits or --max-memory"),
        (("--together",), 2, "add --target-bits or --max-memory"),
        (("--target-bits", "3", "--widths", "9"), 2, "--widths 9"),
        (("--target-bits", "0.5"), 1, "is below 1."),
        (("--max-memory", "70KB"), 1, "bytes too small"),
    ],
)
def test_a_budget_that_makes_no_sense(capsys, tmp_path, folder, arguments, status, words):
    found, _, err = run(capsys, "quantise", folder, "--output", tmp_path / "low", *arguments)
    assert found == status
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "low").exists()


def test_the_small_model_is_trained_for_its_folder_alone(capsys, tmp_path):
    command = importlib.import_module("fdk.models.tiny.__main__")
    arguments = ["--steps", "2", "--only-train", "--folder", str(tmp_path / "m"), "--output-dir", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    assert "656,256 parameters" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run(capsys, "generate", tmp_path / "m", "--prompt", "import", "--tokens", "3", "--device", "cpu")[0] == 0
    assert command.main(arguments) == 2
    assert "--folder that does not exist yet" in capsys.readouterr().err


def test_an_interrupted_training_is_one_line(capsys, monkeypatch, tmp_path):
    command = importlib.import_module("fdk.models.tiny.__main__")

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    assert command.main(["--only-train", "--folder", str(tmp_path / "m")]) == 130
    assert capsys.readouterr().err == "fdk.models.tiny: interrupted; nothing half-written was kept\n"
    assert not (tmp_path / "m").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_the_training(capsys, monkeypatch, tmp_path):
    command = importlib.import_module("fdk.models.tiny.__main__")
    monkeypatch.setattr(command, "train", lambda *arguments: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert command.main(["--only-train", "--folder", str(tmp_path / "file" / "m")]) == 2
    assert "file is a file; choose another folder" in capsys.readouterr().err


def test_a_full_disk_names_the_folder_and_leaves_nothing(capsys, monkeypatch, tmp_path, folder):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fdk.models.tensors.TensorWriter.write", full)
    status, _, err = run(capsys, "quantise", folder, "--output", tmp_path / "low")
    assert status == 1 and not (tmp_path / "low").exists()
    assert err == (
        f"fdk quantise: No space left on device: {tmp_path / 'low'}; free some space, or choose another folder; "
        "nothing half-written was kept\n"
    )
