"""fdk warmup: kernels of a folder or of described weights, compiled into a cache without a GPU."""

import re
from types import SimpleNamespace

import pytest
import torch

import fdk
from fdk import cli
from fdk.kernels import cuda
from fdk.kernels.cuda import decode, decode_config, jit
from fdk.kernels.cuda.prebuild import Target
from fdk.models import ahead, chain
from fdk.models.llama import Llama, LlamaConfig
from fdk.models.merge import merged_weight
from fdk.models.quantise import quantise

CONFIG = LlamaConfig(96, 128, 256, 2, 4, 2, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("warmup") / "low"
    fdk.save(quantise(Llama(CONFIG).bfloat16(), fdk.models.QuantisationConfig(3, codebook="kmeans")), path)
    return path


@pytest.fixture
def built(monkeypatch, tmp_path):
    """What a compiler was asked for that needs no NVRTC."""
    sources = []

    def build(*source):
        sources.append(source)
        return b"code", ""

    monkeypatch.setattr(jit, "build", build)
    monkeypatch.setattr(jit, "compiler_version", lambda: (13, 0))
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path / "cache"))
    return sources


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["warmup", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_folder_for_a_gpu_elsewhere(capsys, folder, built) -> None:
    status, out, err = run(capsys, "--model", folder, "--arch", "sm_90a", "-m", 1, "16-32", "--batch-size", 1, 2)
    assert (status, err) == (0, "")
    count = int(re.match(r"(\d+) kernels for sm_90a with 132 multiprocessors: \1 compiled in .* 0 were there", out)[1])
    assert count == len(built) and {arch for _, _, arch in built} == {"sm_90a"}
    # Projections alone and merged.
    assert {(d["FDK_N"], d["FDK_K"]) for file, d, _ in built if file == "decode.cuh"} == {
        (128, 128), (64, 128), (256, 128), (128, 256), (512, 128)
    }  # fmt: skip
    # A decoding step of one sequence and of two.
    for key in ("FDK_RESIDUAL", "FDK_GATED"):
        assert {d["FDK_M"] for file, d, _ in built if file == "decode.cuh" and d[key]} == {1, 2}
    assert {d["FDK_HEAD_DIM"] for file, d, _ in built if file == "attend.cuh"} == {32}
    status, out, _ = run(capsys, "--model", folder, "--arch", "sm_90a", "-m", "16-32")
    assert status == 0 and re.search(r": 0 compiled in .* \d+ were there", out) and len(built) == count
    assert run(capsys, "--model", folder, "--arch", "sm_89", "--sms", "58")[0] == 0 and len(built) > count


def test_merged_projections_are_those_of_decoding(folder) -> None:
    kinds = {product[:2] for product in ahead.products(folder, [1])}
    layer = fdk.load(folder).model.layers[0]
    for group in (
        [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
        [layer.mlp.gate_proj, layer.mlp.up_proj],
    ):
        weight, _ = merged_weight([one.weight.to_layout("fragments") for one in group])
        assert (weight.geometry, None) in kinds


def decoder_layers(folder) -> list[chain.Products]:
    """The merged products of every layer of a folder, as `models.step.Step` hands them to `chain.fuse`."""

    def layers():
        for layer in fdk.load(folder).model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            groups = (
                [attention.q_proj, attention.k_proj, attention.v_proj],
                [attention.o_proj],
                [mlp.gate_proj, mlp.up_proj],
                [mlp.down_proj],
            )
            weights = [merged_weight([one.weight.to_layout("fragments") for one in group])[0] for group in groups]
            yield chain.Products(*(SimpleNamespace(weight=weight) for weight in weights))

    return list(layers())


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("target", [Target((9, 0), 132), Target((8, 9), 58)], ids=str)
def test_epilogues_are_those_of_decoding(monkeypatch, folder, target: Target, batch: int) -> None:
    class Plan:
        def __init__(self, weight, config) -> None:
            loaded.append(decode.source(decode_config.shape_of(weight.geometry, None), config, target.capability))
            self.squares, self.config = decode_config.squares_left(weight.shape[0], config), config

    ahead_of_time, loaded = [], []
    monkeypatch.setattr(decode, "Plan", Plan)
    monkeypatch.setattr(chain, "reason_against", lambda layer, rows: None)
    monkeypatch.setattr(cuda, "_device_facts", lambda index: target)
    monkeypatch.setattr(jit, "compile_ahead", ahead_of_time.extend)
    fused = chain.fuse(decoder_layers(folder), batch, 1e-5)
    assert all(fused) and fused[0].qkv.eps == 0 and fused[1].qkv.eps == fused[1].gate_up.eps == 1e-5
    assert fused[0].adds and not fused[1].adds and fused[0].o.eps == 0
    assert fused[1].qkv.plan.config.epilogue.squares == fused[0].down.plan.squares
    assert fused[1].gate_up.plan.config.epilogue.squares == fused[1].o.plan.squares
    found = [source for source in ahead.step_sources(folder, batch, target) if source[0] == "decode.cuh"]
    assert {*map(repr, loaded)} == {*map(repr, ahead_of_time)} == {*map(repr, found)}


def test_described_weights_with_zero_points_of_both_dtypes(capsys, built) -> None:
    assert run(capsys, "--format", "uint4_g64", "--shapes", "128x256", "--arch", "sm_80")[0] == 0
    assert sorted(defines["FDK_KIND"] for _, defines, _ in built) == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to compile"),
        (["--format", "lut4_g64"], "--format and --shapes"),
        (["--format", "lut4_g64", "--shapes", "64"], "not a size"),
        (["--format", "lut4_g64", "--shapes", "64x60", "--arch", "sm_80"], "does not divide k = 60"),
        (["--format", "lut4_g64", "--shapes", "64x64", "--arch", "h100"], "names no architecture"),
        (
            ["--format", "lut4_g64", "--shapes", "64x64", "--dtype", "fp32"],
            "--dtype fp32: the CUDA kernels multiply bf16",
        ),
        (["--format", "lut4_g64", "--shapes", "64x64", "--arch", "sm_75"], "compute capability 8.0"),
        (["--format", "lut4_g64", "--shapes", "64x64", "-m", "9-1"], "-m '9-1'"),
        (["--format", "lut4_g64", "--shapes", "64x64", "--arch", "sm_80", "--sms", "0"], "--sms 0"),
    ],
)
def test_wrong_command_lines(capsys, built, arguments, words) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2 and words in err and err.count("\n") == 1 and built == []


def test_an_architecture_that_the_compiler_does_not_know(capsys, built) -> None:
    status, _, err = run(capsys, "--format", "lut4_g64", "--shapes", "64x64", "--arch", "sm_999")
    assert status == 1 and "compiles for no sm_999a" in err and err.count("\n") == 1 and built == []


def test_a_cache_that_cannot_be_written_to(capsys, built, tmp_path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    status, _, err = run(capsys, "--format", "lut4_g64", "--shapes", "64x64", "--arch", "sm_80")
    assert status == 1 and "cannot be written to; set FDK_CACHE_DIR" in err and built == []
