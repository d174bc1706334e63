"""What README.md and docs/ show is run: every block of Python as it stands, every command line through its parser."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
import torch

import fdk

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMES = "info|explain|quantise|convert|eval|generate|warmup|bench|serve-bench|plot"
COMMAND = re.compile(rf"(?:^|[`\s])((?:fdk (?:{NAMES})|python -m fdk\.)[^`\n]*)")


def blocks(language: str) -> list:
    """(page, text) of every block in a language, named by the page and line it begins in."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[2], id=f"{page.name}:{line}"))
    return found


def model_folder(folder: Path) -> None:
    """A Llama of transformers with random weights, as small as its formats allow."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def surroundings(code: str) -> dict[str, object]:
    """What the text around a block says is there: layers, a model, activations, tokens."""
    device = "cuda" if '"cuda"' in code else "cpu"
    dense = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Linear(256, 128))
    nested = fdk.models.QuantisationConfig(format="nest8_g128")
    low = fdk.models.QuantisationConfig(format="lut4_g64")
    found = {
        "fdk": fdk, "torch": torch, "dense": dense, "ids": torch.tensor([[5, 6, 7]]),
        "layer": fdk.from_linear(torch.nn.Linear(128, 64, dtype=torch.bfloat16), nested),
        "up": fdk.from_linear(torch.nn.Linear(128, 256, dtype=torch.bfloat16), low),
        "down": fdk.from_linear(torch.nn.Linear(256, 128, dtype=torch.bfloat16), low),
        "x": torch.randn(1, 128, dtype=torch.bfloat16, device=device),
    }  # fmt: skip
    if Path("FOLDER").exists():
        from transformers import AutoModelForCausalLM

        config = fdk.FdkConfig(4)
        found["model"] = AutoModelForCausalLM.from_pretrained("FOLDER", quantization_config=config)
    return found


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"))
def test_a_block_of_python_runs_as_it_stands(code, tmp_path, monkeypatch, request):
    if '"cuda"' in code and not torch.cuda.is_available():
        pytest.skip("the block names a CUDA device, and torch sees none")
    monkeypatch.chdir(tmp_path)
    if "FOLDER" in code or "custom_generate" in code:
        model_folder(Path("FOLDER"))
    if "Parallel" in code:
        request.getfixturevalue("one_process")
    exec(compile(code, "block", "exec"), surroundings(code))


def commands() -> list:
    """Every command line of fdk with arguments that a page shows, without what a shell makes of it."""
    found = {}
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            for match in COMMAND.finditer(line):
                words = shlex.split(match[1].replace("\\", ""), comments=True)
                words = list(takewhile(lambda word: word not in ("|", "&&", ";"), words))
                given = words[2 if words[0] == "fdk" else 3 :]
                # The flags of fdk.bench.native are read by the program that it builds.
                if given and given != ["--help"] and words[2] != "fdk.bench.native":
                    found.setdefault(shlex.join(words), pytest.param(words, id=f"{page.name}: {shlex.join(words)}"))
    return list(found.values())


class Parsed(BaseException):
    """The command line is understood; nothing is to be done."""


@pytest.mark.parametrize("words", commands())
def test_a_command_line_is_understood(words, monkeypatch):
    real, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse_known_args(self, *arguments, **keywords):
        nonlocal depth
        depth += 1
        found, unknown = real(self, *arguments, **keywords)
        depth -= 1
        # The parser of a subcommand is called by that of the whole command.
        if depth == 0:
            assert not unknown, f"{shlex.join(unknown)} is unknown"
            raise Parsed
        return found, unknown

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    name, arguments = ("fdk.cli", words[1:]) if words[0] == "fdk" else (words[2], words[3:])
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    with pytest.raises(Parsed):
        module.main(arguments)


def test_named_sets_that_pages_show_exist():
    from fdk.bench.variants.named import SETS

    shown = []
    for page in PAGES:
        # What findings show has been answered, and is gone.
        if page.name != "findings.md":
            for match in re.finditer(r"fdk\.bench\.variants --set ((?:[\w-]+ ?)+)", page.read_text(encoding="utf-8")):
                shown += [name for name in match[1].split() if not name.startswith("-")]
    assert shown, "no page shows how a named set is tried"
    assert set(shown) <= {*SETS, "NAME"}
