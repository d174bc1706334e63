"""The fdk command: what it prints, its exit status, one line for every error."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import fdk
from fdk import cli
from fdk.models.checkpoint import write_config
from fdk.models.llama import Llama, LlamaConfig
from fdk.models.tensors import TensorWriter

SMALL = LlamaConfig(96, 64, 128, 2, 4, 2, 16)


@pytest.fixture
def source(tmp_path):
    """A dense Llama on disk, written without transformers."""
    torch.manual_seed(0)
    return write(tmp_path / "source", SMALL)


def write(folder, config: LlamaConfig):
    folder.mkdir()
    state = Llama(config).bfloat16().state_dict()
    with TensorWriter(folder, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        writer.finish()
    write_config(folder, config.to_hf())
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_quantise_info_and_load(capsys, tmp_path, source):
    status, out, err = run(
        capsys, "quantise", source, "--output", tmp_path / "low", "--bits", "3", "--codebook", "kmeans"
    )
    assert (status, err) == (0, "")
    assert re.search(r"^model\.layers\.1\.mlp\.down_proj +64 x 128 +lut3_g64 +3\.\d+ +\d\d\.\d ", out, re.MULTILINE)
    assert "kept dense: lm_head: skipped by the configuration" in out
    assert "14 layers" in out
    assert fdk.load(tmp_path / "low")(torch.arange(4)[None]).shape == (1, 4, 96)
    status, out, err = run(capsys, "info", tmp_path / "low")
    assert (status, err) == (0, "")
    assert "LlamaForCausalLM, 14 low-bit layers" in out
    chosen = r"^the first of 14 layers: lut3_g64 \[64, 64\] torch.bfloat16 times 1 row on \w+:\n  \w+  chosen"
    assert re.search(chosen, out, re.MULTILINE)
    assert "decoding: " in out
    status, out, _ = run(capsys, "info", source)
    assert status == 0
    assert "dense LlamaForCausalLM" in out


@pytest.fixture
def with_tokenizer(source):
    """The dense Llama with a tokenizer of single characters."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: transformers)")
    letters = {chr(32 + i): i for i in range(95)} | {"[UNK]": 95}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(source / "tokenizer.json"))
    return source


def test_generate_streams_text_or_ids(capsys, tmp_path, with_tokenizer):
    ids = ["--ids", *map(str, (33, 34, 35)), "--tokens", "6", "--device", "cpu"]
    status, out, err = run(capsys, "generate", with_tokenizer, *ids)
    assert status == 0 and re.fullmatch(r"3 tokens read and 1 found in [\d.]+ s, then [\d.]+ tokens/s\n", err)
    tokens = [int(token) for token in out.split()]
    assert len(tokens) == 6
    text = ["--prompt", "ABC", "--tokens", "6", "--device", "cpu"]
    status, out, _ = run(capsys, "generate", with_tokenizer, *text)
    assert status == 0 and out == "".join("[UNK]" if i == 95 else chr(32 + i) for i in tokens) + "\n"
    # The tokenizer goes along when the model is quantised, and a draw depends on the seed alone.
    assert run(capsys, "quantise", with_tokenizer, "--output", tmp_path / "low")[0] == 0
    drawn = [
        run(capsys, "generate", tmp_path / "low", *text, "--temperature", "2", "--seed", seed)[1] for seed in "112"
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    (tmp_path / "low" / "config.json").write_text(json.dumps({**config, "eos_token_id": list(range(96))}))
    status, out, err = run(capsys, "generate", tmp_path / "low", *ids)
    assert (status, len(out.split())) == (0, 1) and "tokens/s" not in err


def test_generate_says_what_is_wrong(capsys, source):
    for arguments, status, words in (
        (["--prompt", "A"], 1, "has no tokenizer.json; copy the original model's there, or give token ids with --ids"),
        (["--ids", "96", "--device", "cpu"], 1, "token 96 is not one of the model's 96"),
        (["--ids", "1", "--tokens", "0"], 2, "--tokens 0: at least 1"),
        (["--ids", "1", "--top-p", "0"], 2, "--top-p 0.0: a share above 0 and up to 1"),
        (["--ids", "1", "--temperature", "nan"], 2, "--temperature nan: a number from 0 on"),
        (["--ids", "1", "--seed", "-1"], 2, "--seed -1: a number from 0 to 2^64 - 1"),
        ([], 2, "one of the arguments --prompt --ids is required"),
    ):
        got, out, err = run(capsys, "generate", source, *arguments)
        assert (got, out) == (status, "") and words in err and err.count("\n") == 1


def test_overrides_format_and_overwrite(capsys, tmp_path, source):
    (tmp_path / "mixed.txt").write_text("model.layers.0.mlp.up_proj: 8\n")
    low = ["quantise", source, "--output", tmp_path / "low"]
    assert run(capsys, *low, "--format", "int4_g32", "--overrides", tmp_path / "mixed.txt", "--dtype", "fp16")[0] == 0
    layers = json.loads((tmp_path / "low" / "config.json").read_text())["quantization_config"]["layers"]
    assert layers["model.layers.0.mlp.up_proj"]["format"] == "lut8_g32"
    assert layers["model.layers.1.mlp.up_proj"]["format"] == "int4_g32"
    status, _, err = run(capsys, *low)
    assert status == 1
    assert "--overwrite" in err
    assert run(capsys, *low, "--overwrite", "--skip", "mlp", "--shard-size", "0.00001")[0] == 0
    assert len(list((tmp_path / "low").glob("*.safetensors"))) > 1


def test_info_of_the_machine(capsys):
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    for word in (fdk.__version__, torch.__version__, "CPU", "CUDA", "reference", *fdk.kernels.names()):
        assert word in out


def test_explain(capsys):
    status, out, _ = run(capsys, "explain", "--format", "lut4_g64", "-m", "1", "-n", "4096", "-k", "4096")
    assert status == 0
    assert "lut4_g64 [4096, 4096]" in out
    assert "chosen" in out
    for name in fdk.kernels.names():
        assert name in out


def test_explain_describes_a_product_that_no_machine_has_room_for(capsys):
    status, out, _ = run(capsys, "explain", "--format", "lut4_g64", "-m", "1000000", "-n", str(1 << 36), "-k", "4096")
    assert status == 0 and f"[{1 << 36}, 4096]" in out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["frob"], 2, ["invalid choice: 'frob'", "--help"]),
        (["quantise"], 2, ["--output", "fdk quantise --help"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--bits", "9"], 2, ["bits = 9", "1 to 8"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--bits", "four"], 2, ["--bits four", "1 to 8", "--format"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--bits", ""], 2, ["--bits", "1 to 8"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--format", ""], 2, ["'' is not a format name"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--target-bits", "nan"], 2, ["--target-bits nan", "positive"]),
        (
            ["quantise", "{source}", "--output", "{tmp}/x", "--target-bits", "3", "--calibration-tokens", "0"],
            2,
            ["--calibration-tokens 0", "at least 1"],
        ),
        (["info", ""], 1, ["has no config.json"]),
        (["info", "--frob"], 2, ["--frob", "fdk info --help"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--block-size", "24"], 2, ["'24'", "multiple of 16"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--format", "lut4"], 2, ["'lut4'", "lut4_g64"]),
        (
            ["quantise", "{source}", "--output", "{tmp}/x", "--format", "lut4_g64", "--bits", "4"],
            2,
            ["--format stands for"],
        ),
        (["quantise", "{source}", "--output", "{tmp}/x", "--overrides", "{tmp}/none"], 2, ["none", "No such file"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--device", "tpu"], 2, ["'tpu'", "cpu or cuda"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--shard-size", "0"], 2, ["--shard-size 0"]),
        (["quantise", "{source}", "--output", "{tmp}/x", "--block-size", "48"], 1, ["group 48 does not divide k = 64"]),
        (["quantise", "{tmp}/none", "--output", "{tmp}/x"], 1, ["does not exist"]),
        (["quantise", "{tmp}", "--output", "{tmp}/x"], 1, ["has no config.json"]),
        (["quantise", "{source}", "--output", "{source}/config.json/x"], 1, ["config.json is a file; choose another"]),
        (
            ["quantise", "{source}", "--output", "/proc/fdk/x"],
            1,
            ["/proc/fdk/x cannot be made", "choose another folder"],
        ),
        (["info", "{tmp}/none"], 1, ["does not exist"]),
        (["explain", "--format", "lut9_g64", "-n", "8", "-k", "64"], 2, ["no width of 9 bits"]),
        (["explain", "--format", "lut4_g64", "-n", "8", "-k", "60"], 2, ["does not divide k = 60"]),
        (["explain", "--format", "lut4_g64", "-n", "0", "-k", "64"], 2, ["-n 0"]),
        (["explain", "--format", "lut4_g64", "-n", "8", "-k", "64", "--dtype", "int"], 2, ["'int'", "bfloat16"]),
        (["explain", "--format", "lut4_g64", "-n", "8", "-k", "64", "--kernel", "warp"], 2, ["'warp'", "reference"]),
    ],
)
def test_an_error_is_one_line_with_its_remedy(capsys, tmp_path, source, monkeypatch, arguments, status, words):
    monkeypatch.delenv("FDK_DEBUG", raising=False)
    filled = [argument.format(source=source, tmp=tmp_path) for argument in arguments]
    got, _, err = run(capsys, *filled)
    assert got == status
    assert err.count("\n") == 1
    assert err.startswith("fdk")
    for word in words:
        assert word in err
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_debug_shows_where(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FDK_DEBUG", "1")
    status, _, err = run(capsys, "info", tmp_path / "none")
    assert status == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("fdk info: ")


def test_a_defect_is_one_line_too(capsys, monkeypatch):
    monkeypatch.delenv("FDK_DEBUG", raising=False)
    monkeypatch.setattr("fdk.cli.info.machine_info", lambda: 1 / 0)
    status, _, err = run(capsys, "info")
    assert status == 1
    assert err == "fdk info: ZeroDivisionError: division by zero (a defect of fdk; FDK_DEBUG=1 shows where)\n"


def test_an_interrupt_that_became_another_error_is_still_one(monkeypatch, capsys, tmp_path):
    """Torch makes a ValueError of what a handler raises inside some of its functions."""

    def swallow(*arguments, **more):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise ValueError("could not determine the shape")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("fdk.models.folder.quantise_folder", swallow)
    try:
        source = write(tmp_path / "source", LlamaConfig(96, 64, 128, 1, 4, 2, 16))
        assert cli.main(["quantise", str(source), "--output", str(tmp_path / "low"), "--block-size", "32"]) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number):
    source = write(tmp_path / "source", LlamaConfig(96, 512, 2048, 12, 4, 2, 128))
    command = [
        sys.executable,
        "-m",
        "fdk",
        "quantise",
        str(source),
        "--output",
        str(tmp_path / "low"),
        "--scale",
        "search",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".low.partial-*/*.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err == "fdk quantise: interrupted; nothing half-written was kept\n"
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "words", ["fdk info", "fdk.bench -n 64 -k 64 -b 4 -m 1 --device cpu", "fdk.models --bits 16 --reps 2 --device cpu"]
)
def test_a_closed_pipe_is_no_error_message(tmp_path, words):
    command = f"{sys.executable} -m {words} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert "Error" not in done.stderr
    if words == "fdk info":
        assert done.stderr == ""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 384000000000 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_no_defect(capsys, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr("fdk.cli.info.machine_info", fail)
    assert run(capsys, "info") == (1, "", "fdk info: out of memory; free some, use a smaller model, or ask for less\n")


def test_rich_is_used_on_a_terminal_only(tmp_path, source):
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "fdk", "quantise", str(source), "--output", str(tmp_path / "low")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    seen = b""
    try:
        while chunk := os.read(leader, 4096):
            seen += chunk
    except OSError:
        pass  # The terminal ends when the process does.
    assert process.wait() == 0, seen
    assert "┃" in seen.decode()
    assert "14/14" in seen.decode()


def test_bench_reads_its_own_flags(capsys):
    status, out, err = run(capsys, "bench", "--profile", "nonsense")
    assert status == 2
    assert "nonsense" in out + err
