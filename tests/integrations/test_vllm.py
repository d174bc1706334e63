"""vLLM's engine on fdk's layers: the same tokens as the transformers path, the same logits up to rounding.

Needs vLLM: `make test-vllm` sets up an environment with its CPU build. Every engine runs in a process of its own.
FDK_TEST_VLLM holds options of LLM, as JSON, that a machine needs for all engines; FDK_TEST_RECORDS names a file to
which every comparison of an engine with the transformers path is appended.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import fdk
from fdk.bench import records
from fdk.importers.matgptq import load_packed, to_matgptq
from fdk.models import QuantisationConfig
from fdk.models.folder import quantise_folder
from fdk.models.quantise import quantise
from fdk.models.tensors import TensorFiles
from fdk.models.tiny import train
from fdk.nn import Linear
from fdk.packing.bits import pack_codes
from fdk.weight import QuantisedWeight

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; `make test-vllm` sets it up"),
]

WORKER = Path(__file__).with_name("vllm_worker.py")
MEMORY = Path(__file__).with_name("vllm_memory.py")
VOCABULARY = 300
TOKENS = 24
EAGER = {"enforce_eager": True}
TWO = {"enforce_eager": True, "tensor_parallel_size": 2}
# Calls of the plugin, captured as they are: without torch.compile, and with every token of decoding in one graph.
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
on_gpus = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
WAYS = [
    pytest.param(EAGER, id="eager"),
    pytest.param(GRAPHS, id="graphs", marks=on_gpus),
    pytest.param({}, id="compiled"),
    pytest.param(TWO, id="two"),
]
PROMPTS = [[5, 17, 200, 33, 42, 7], [299, 1], [11] * 20]
FORCED = [(37 * i * i + 11 * i + 5) % VOCABULARY for i in range(40)]

# Every family of formats, projections of one layer that differ, and one of them left dense.
MIXED = QuantisationConfig(
    format="lut4_g32",
    codebook="kmeans",
    overrides={
        r"layers\.0\.self_attn\.k_proj": "lut2_g32",
        r"layers\.0\.mlp\.down": "lut3_chan",
        r"layers\.1\.self_attn": "uint4_g32",
        r"layers\.1\.mlp": "int4_g32_sp16of32",
        r"layers\.2\.self_attn\.v_proj": 16,
        r"layers\.2\.mlp\.(gate|up)": "nest8s4_g32",
        r"layers\.2\.mlp\.down": "nf4_g64",
    },
)


def sized(kind: type, folder: Path, **changes) -> Path:
    """A random model with weights large enough for attention and logits to be far from uniform, float32."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    config = kind.config_class(**sizes | changes)
    generator = torch.Generator().manual_seed(0)
    model = kind(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                spread = 0.5 if "embed" in name else 2 * parameter.shape[-1] ** -0.5
                parameter.normal_(0, spread, generator=generator)
            else:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


def skeleton(folder: Path, dtype: torch.dtype = torch.float32):
    """The modules of a folder, without its weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = None
    del config.quantization_config
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def widest(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, its low-bit layers as the dense ones that they stand for. Changes it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            weight = fdk.dequantise(module.weight, torch.float64)
            dense = torch.nn.Linear(*weight.T.shape, bias=module.bias is not None, dtype=torch.float64)
            dense.weight = torch.nn.Parameter(weight)
            if module.bias is not None:
                dense.bias = torch.nn.Parameter(module.bias.double())
            model.set_submodule(name, dense)
    return model.double()


class Expected:
    """Greedy tokens and log probabilities of the transformers path in its dtype, and their distance to float64."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.exact = model.dtype == torch.float32
        self.tokens = []
        with torch.inference_mode():
            for prompt in PROMPTS:
                ids = torch.tensor([prompt])
                for _ in range(TOKENS):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
                self.tokens.append(ids[0, len(prompt) :].tolist())
            forced = torch.tensor([FORCED])
            narrow = model(forced).logits[0, :-1].double().log_softmax(-1)
            self.wide = widest(model)(forced).logits[0, :-1].log_softmax(-1)
        self.rounding = (narrow - self.wide).abs().max().item()
        assert self.rounding > 0
        if self.exact:
            assert self.rounding < 1e-4 * self.wide.abs().max()

    def check(self, got: dict) -> None:
        """Tokens equal, except in 16 bits; log probabilities within the bound of docs/numerics.md, "Two ways"."""
        assert len(got["logprobs"]) == len(self.wide)
        assert all(len(row) >= 20 for row in got["logprobs"])
        wrong = {
            (position, token): abs(value - self.wide[position, int(token)].item())
            for position, row in enumerate(got["logprobs"])
            for token, value in row.items()
        }
        worst, bound = max(wrong, key=wrong.get), 4 * self.rounding
        keep(got, {"tokens_equal": got["tokens"] == self.tokens, "error": wrong[worst], "bound": bound})
        if self.exact:
            assert got["tokens"] == self.tokens
        assert wrong[worst] <= bound, worst


def keep(got: dict, outcome: dict) -> None:
    """Append how an engine compared to the file that FDK_TEST_RECORDS names."""
    path = os.environ.get("FDK_TEST_RECORDS")
    if path and "engine" in got:
        case = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].split()[0]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        entry = {"test": "vllm", "case": case, **got["engine"], **outcome, **records.environment(device)}
        with Path(path).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def serve(tmp_path: Path, folder: Path, options: dict, succeeds: bool = True, **environment: str) -> dict | str:
    """The result of an engine, or what it printed before it failed."""
    needed = options.get("tensor_parallel_size", 1)
    if torch.cuda.is_available() and torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} GPUs, torch sees {torch.cuda.device_count()}")
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    job.write_text(
        json.dumps({"folder": str(folder), "options": options, "prompts": PROMPTS, "tokens": TOKENS, "forced": FORCED})
    )
    # In a file, so that an engine which is stopped leaves what it said.
    log = tmp_path / "engine.log"
    with log.open("w") as file:
        run = subprocess.run(
            [sys.executable, str(WORKER), str(job), str(result)],
            stdout=file, stderr=subprocess.STDOUT, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip
    output = log.read_text(errors="replace")
    assert (run.returncode == 0) == succeeds, output[-6000:]
    return json.loads(result.read_text()) | {"output": output} if succeeds else output


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], tuple[Path, object]]:
    """Folders and what to expect of them, each made once: workshop(name, make) -> (folder, make(folder))."""
    made: dict[str, tuple[Path, object]] = {}

    def get(name: str, make: Callable[[Path], object]) -> tuple[Path, object]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / name
            made[name] = folder, make(folder)
        return made[name]

    return get


def llama(folder: Path, **changes) -> Path:
    return sized(
        transformers.LlamaForCausalLM, folder.with_name(folder.name + "-dense"), attention_bias=True, **changes
    )


def make_mixed(folder: Path) -> Expected:
    quantise_folder(llama(folder), folder, MIXED, dtype=torch.float32)
    return Expected(fdk.load(folder, model=skeleton(folder)))


@pytest.mark.parametrize("options", WAYS)
def test_mixed_formats(workshop, tmp_path, options) -> None:
    folder, expected = workshop("mixed", make_mixed)
    expected.check(serve(tmp_path, folder, options))


def test_the_bound_sees_one_wrong_scale(workshop) -> None:
    folder, expected = workshop("mixed", make_mixed)
    model = fdk.load(folder, model=skeleton(folder))
    expected.check(scored(model, expected.tokens))
    weight = model.model.layers[1].mlp.up_proj.weight.canonical()
    scales = weight.parts["scales"].clone()
    scales[3, 1] *= 1.1
    model.model.layers[1].mlp.up_proj = Linear(QuantisedWeight(weight.geometry, weight.parts | {"scales": scales}))
    with pytest.raises(AssertionError):
        expected.check(scored(model, expected.tokens))


def scored(model: torch.nn.Module, tokens: list) -> dict:
    """What `serve` gives, from the transformers path."""
    with torch.inference_mode():
        best = model(torch.tensor([FORCED])).logits[0, :-1].log_softmax(-1).topk(20)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {"tokens": tokens, "logprobs": [dict(zip(map(str, row), values, strict=True)) for row, values in rows]}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("bfloat16", {}), ("float16", EAGER), pytest.param("bfloat16", GRAPHS, marks=on_gpus)],
    ids=["bfloat16", "float16", "graphs"],
)
def test_half_precision(workshop, tmp_path, dtype, options) -> None:
    def make(folder: Path) -> Expected:
        config = QuantisationConfig(**{**MIXED.to_dict(), "dtype": dtype})
        quantise_folder(llama(folder), folder, config)
        return Expected(fdk.load(folder, model=skeleton(folder, getattr(torch, dtype))))

    folder, expected = workshop(dtype, make)
    expected.check(serve(tmp_path, folder, options | {"dtype": "auto"}))


def make_narrow(folder: Path) -> Expected:
    # One head of keys and values for two processes, a vocabulary that is padded, and a head of low-bit weights.
    config = QuantisationConfig(format="lut8_g32", skip="")
    quantise_folder(llama(folder, num_key_value_heads=1), folder, config, dtype=torch.bfloat16)
    return Expected(fdk.load(folder, model=skeleton(folder)).float())


@pytest.mark.parametrize("options", [EAGER, TWO], ids=["eager", "two"])
def test_repeated_heads_and_a_low_bit_head_and_bfloat16_scales(workshop, tmp_path, options) -> None:
    folder, expected = workshop("narrow", make_narrow)
    expected.check(serve(tmp_path, folder, options))


def make_fused(folder: Path) -> Expected:
    dense = sized(transformers.Phi3ForCausalLM, folder.with_name("fused-dense"))
    quantise_folder(dense, folder, QuantisationConfig(format="lut4_g32", codebook="kmeans"), dtype=torch.float32)
    return Expected(fdk.load(folder, model=skeleton(folder)))


def test_projections_that_are_one_tensor_on_disk(workshop, tmp_path) -> None:
    folder, expected = workshop("fused", make_fused)
    expected.check(serve(tmp_path, folder, TWO))


@pytest.mark.parametrize(
    ("options", "precision"), [(TWO, 4), ({}, {r"self_attn": 6, r"mlp\.down": 3})], ids=["two", "compiled"]
)
def test_nested_folders_at_chosen_precisions(workshop, tmp_path, options, precision) -> None:
    def make(folder: Path) -> None:
        quantise_folder(llama(folder), folder, "nest8_g32", dtype=torch.float32)

    folder, _ = workshop("nested", make)
    model = fdk.load(folder, model=skeleton(folder))
    fdk.set_precision(model, precision)
    extra = {"additional_config": {"fdk": {"precision": precision}}}
    Expected(model).check(serve(tmp_path, folder, options | extra))


def make_matgptq(folder: Path) -> None:
    """A folder as MatGPTQ packs it: uint8 codes and scales in place of the weights of all layers but the head."""
    dense = llama(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    fdk.quantise_(model, "nest8_g32")
    model.config.quantization_config = {
        "quant_method": "matgptq_quant",
        "group_size": 32,
        "master_bitwidth": 8,
        "inference_bitwidth": 4,
        "modules_to_not_convert": ["lm_head"],
    }
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            stored = to_matgptq(module.weight)
            tensors |= {f"{name}.qweight": stored["qweight"], f"{name}.scales": stored["scale"]}
            tensors |= {} if module.bias is None else {f"{name}.bias": module.bias.detach()}
    files = TensorFiles(dense)
    packed = {name.removesuffix(".qweight") + ".weight" for name in tensors}
    tensors |= {name: files.get(name) for name in files if name not in packed and name not in tensors}
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": model.config.quantization_config}))


@pytest.mark.parametrize(("options", "precision"), [(EAGER, None), (TWO, 3)], ids=["eager", "two"])
def test_matgptq_folders_as_they_are(workshop, tmp_path, options, precision) -> None:
    folder, _ = workshop("matgptq", make_matgptq)
    expected = Expected(load_packed(folder, model=skeleton(folder), precision=precision))
    extra = {"additional_config": {"fdk": {"precision": precision}}} if precision else {}
    expected.check(serve(tmp_path, folder, options | extra))


@pytest.mark.parametrize("options", [{}, TWO], ids=["compiled", "two"])
def test_quantised_while_loading(workshop, tmp_path, options) -> None:
    _, dense = workshop("online", llama)
    source = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    expected = Expected(quantise(source, MIXED, dtype=torch.float32))
    settings = {key: value for key, value in MIXED.to_dict().items() if key not in ("dtype", "kernel")}
    expected.check(serve(tmp_path, dense, options | {"quantization": "fdk", "additional_config": {"fdk": settings}}))


def test_layers_of_experts_stay_dense_and_are_said_once(tmp_path) -> None:
    dense = sized(transformers.MixtralForCausalLM, tmp_path / "experts", num_local_experts=4, intermediate_size=128)
    source = transformers.AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, experts_implementation="eager"
    )
    settings = {"format": "lut4_g32", "skip": r"lm_head|gate$"}
    expected = Expected(quantise(source, QuantisationConfig(**settings), dtype=torch.float32))
    got = serve(tmp_path, dense, EAGER | {"quantization": "fdk", "additional_config": {"fdk": settings}})
    expected.check(got)
    assert got["output"].count("layers of experts stay dense") == 1


def make_trained(folder: Path) -> Expected:
    dense = folder.with_name("trained-dense")
    dense.mkdir()
    model = train(steps=60)
    save_file(dict(model.state_dict()), dense / "model.safetensors")
    (dense / "config.json").write_text(json.dumps(model.config.to_hf() | {"dtype": "float32"}))
    quantise_folder(dense, folder, QuantisationConfig(format="lut4_g64", codebook="kmeans"), dtype=torch.float32)
    return Expected(fdk.load(folder, model=skeleton(folder)))


@pytest.mark.parametrize("options", WAYS)
def test_the_trained_model(workshop, tmp_path, monkeypatch, options) -> None:
    for name, tokens in (
        ("PROMPTS", [[100, 101, 102], [10], list(b"import os\n")]),
        ("FORCED", list(b"def f(x):\n" * 4)),
    ):
        monkeypatch.setitem(globals(), name, tokens)
    folder, expected = workshop("trained", make_trained)
    expected.check(serve(tmp_path, folder, options))


def make_stock(folder: Path) -> Expected:
    """A folder of compressed-tensors, 4 bits with zero points."""
    dense = llama(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    fdk.quantise_(model, "uint4_g32")
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            parts = module.weight.canonical().parts
            zeros = pack_codes(parts["zeros"].T.contiguous(), 4).view(torch.int32).T
            for part in parts:
                del tensors[f"{name}.{part}"]
            tensors |= {
                f"{name}.weight_packed": parts["codes"].view(torch.int32),
                f"{name}.weight_scale": parts["scales"],
                f"{name}.weight_zero_point": zeros,
                f"{name}.weight_shape": torch.tensor(module.weight.shape),
            }
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    stored = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    config = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    return Expected(model)


@pytest.mark.parametrize("options", [{}, TWO], ids=["compiled", "two"])
def test_compressed_tensors_on_our_kernels(workshop, tmp_path, options) -> None:
    folder, expected = workshop("stock", make_stock)
    others = "Dynamic4bitLinearKernel,ZentorchWNA16LinearKernel,CPUWNA16LinearKernel"
    expected.check(serve(tmp_path, folder, options, FDK_VLLM_STOCK="1", VLLM_DISABLED_KERNELS=others))


BAD = {
    "a group that two processes would split": (
        {"format": "lut4_g128"}, {}, TWO, r"o_proj: k / 2 = 64 columns a shard are not a multiple of the 128"
    ),
    "a format of a newer fdk": (
        {"format": "lut4_g32"}, {"format": "hexa4_g32"}, EAGER,
        "layer 'model.layers.0.self_attn.q_proj': .*hexa.*pip install -U",
    ),
    "float16 scales under bfloat16 activations": (
        {"format": "lut4_g32", "dtype": "float16"}, {}, EAGER | {"dtype": "bfloat16"},
        "float16, but the model runs in bfloat16, which would round it; serve it with --dtype float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(workshop, tmp_path, case) -> None:
    config, changed, options, message = BAD[case]
    _, dense = workshop("plain", llama)
    folder = tmp_path / "folder"
    quantise_folder(dense, folder, QuantisationConfig(**{"dtype": "float32"} | config))
    if changed:
        stored = json.loads((folder / "config.json").read_text())
        stored["quantization_config"]["layers"]["model.layers.0.self_attn.q_proj"] |= changed
        (folder / "config.json").write_text(json.dumps(stored))
    output = serve(tmp_path, folder, options, succeeds=False)
    assert re.search(message, output), output[-4000:]


def test_a_table_that_a_projection_lacks_is_named(workshop, tmp_path) -> None:
    _, dense = workshop("plain", llama)
    folder, lost = tmp_path / "folder", "model.layers.0.self_attn.k_proj.table"
    quantise_folder(dense, folder, "lut4_g32", dtype=torch.float32)
    files = TensorFiles(folder)
    kept = {name: files.get(name) for name in files if name != lost}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    output = serve(tmp_path, folder, EAGER, succeeds=False)
    assert f"the checkpoint has no tensor {lost}; copy the whole folder again" in output, output[-4000:]


def test_a_folder_of_another_method_is_refused(workshop, tmp_path) -> None:
    folder, _ = workshop("stock", make_stock)
    output = serve(tmp_path, folder, EAGER | {"quantization": "fdk"}, succeeds=False)
    assert re.search(r"model config \(compressed-tensors\) does not match .* \(fdk\)", output), output[-4000:]


@pytest.mark.parametrize("kind", ["stored", "quantised"])
def test_loading_holds_the_packed_model_and_two_dense_tensors(tmp_path, kind) -> None:
    records = tmp_path / "records.jsonl"
    run = subprocess.run(
        [sys.executable, str(MEMORY), str(records), kind, "1024", "8192", "2"],
        capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    found = json.loads(records.read_text())
    assert found["packed"] > 2 * (3 * 8192 + 4 * 1024) * 1024 // 2
    assert found["peak"] <= found["packed"] + found["other"] + 2 * found["largest"], found
    assert found["dense"] == 0
    if "device_held" in found:
        # Less than half of the smallest dense weight is left for rounding up and for what kernels keep.
        assert found["device_held"] < found["packed"] + found["other"] + 1024 * 1024, found
        assert found["device_peak"] <= found["packed"] + found["other"] + 2 * found["largest"], found
