"""The fused decoding step: merged weights are views, the chain is the plain path's arithmetic, reasons are given."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import fdk
from fdk import testing
from fdk.errors import UnsupportedError
from fdk.formats import parse
from fdk.kernels.cuda import attend
from fdk.models import QuantisationConfig, chain
from fdk.models.decode import PlainStep, greedy, step_for, time_steps
from fdk.models.llama import LlamaConfig
from fdk.models.merge import Beside, merge_, merged_weight
from fdk.models.random import random_llama
from fdk.models.step import Step, chunk_of, reason_against

CASES = Path(__file__).with_name("interpreted_step.py")


@pytest.mark.slow
def test_the_step_in_the_interpreter(pass_in_the_interpreter) -> None:
    pass_in_the_interpreter(CASES)


@pytest.mark.parametrize("fmt", ["lut3_g64", "lut4_g16", "nf4_g64", "int4_g64", "uint2_g64", "lut1_chan"])
@pytest.mark.parametrize("k", [192, 208])
def test_merged_weights_are_the_concatenation_and_keep_their_parts_as_views(fmt, k) -> None:
    fmt = parse(fmt if k % (parse(fmt).group or 1) == 0 else fmt.partition("_")[0] + "_g16")
    originals = [testing.random_weight(fmt, n, k, seed=n) for n in (128, 64, 192)]
    merged, views = merged_weight([weight.to_layout("fragments") for weight in originals])
    expected = fdk.concat(originals)
    assert merged.geometry.ranges[-1][1] == 384 and merged.canonical().parts.keys() == expected.parts.keys()
    assert torch.equal(fdk.dequantise(merged), fdk.dequantise(expected))
    storage = merged.parts["codes"].untyped_storage().data_ptr()
    for view, original in zip(views, originals, strict=True):
        assert view.parts["codes"].untyped_storage().data_ptr() == storage
        parts = view.canonical().parts
        assert all(torch.equal(part, parts[name]) for name, part in original.parts.items())


def test_dense_projections_become_views_and_others_stay_beside_each_other() -> None:
    first, second = nn.Linear(32, 64), nn.Linear(32, 128, bias=False)
    x = torch.randn(3, 32)
    expected = torch.cat([first(x), second(x)], -1)
    merged = merge_([first, second])
    assert torch.equal(merged(x), torch.cat([first(x), second(x)], -1))
    assert torch.allclose(merged(x), expected, atol=1e-5)
    assert second.weight.data_ptr() == merged.weight[64:].data_ptr()
    low = fdk.from_linear(nn.Linear(32, 64), QuantisationConfig(bits=4, block_size=32, dtype=torch.float32))
    beside = merge_([first, low])
    assert isinstance(beside, Beside)
    assert torch.equal(beside(x), torch.cat([first(x), low(x)], -1))


@pytest.mark.parametrize("length", [1, 64, 100, 1000, 8192, 40000, 131072])
@pytest.mark.parametrize("heads", [1, 8, 512, 4096])
def test_chunks_cover_the_cache_with_few_splits(length, heads) -> None:
    chunk = chunk_of(length, heads)
    assert chunk & (chunk - 1) == 0 and chunk >= 64
    assert -(-length // chunk) <= 64


def test_a_model_that_cannot_be_fused_says_why_and_decodes_plainly(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = random_llama(small_config(), None)
    if find_spec("triton") is not None:
        assert reason_against(model) == "it lies on cpu, not on a CUDA device"
    with pytest.raises(UnsupportedError, match=r"cannot decode this model: .*; call the model itself"):
        Step(model, 1, 8)
    assert isinstance(step_for(model, 1, 8), PlainStep)
    assert "power of two" in (reason_against(random_llama(small_config(head_dim=24), None)) or "triton power of two")
    assert "Sequential" in reason_against(nn.Sequential())


def test_layers_without_epilogues_say_why() -> None:
    dense = nn.Linear(64, 128, bias=False)
    low = {dtype: fdk.from_linear(dense, QuantisationConfig(4, 64, dtype=dtype)) for dtype in ("bf16", "fp16")}
    assert "not a quantised" in chain.reason_against(dense, 1)
    assert "float16, in which" in chain.reason_against(low["fp16"], 1)
    assert "lies on cpu" in chain.reason_against(low["bf16"], 1)
    products = chain.Products(*[low["bf16"]] * 4)
    assert chain.fuse([products, products], 1, 1e-5) == [None, None]


def small_config(**changes) -> LlamaConfig:
    fields = {
        "vocab_size": 512,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }
    return LlamaConfig(**{**fields, "num_key_value_heads": 2, "head_dim": 64, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [None, "lut4_g64", "lut4_g64 kmeans", "lut1_g64", "uint3_g32"])
@pytest.mark.parametrize(("batch", "length"), [(1, 80), (3, 300), (20, 150)])
def test_the_graph_follows_the_plain_path(plan, batch, length) -> None:
    config = None
    if plan:
        name, _, codebook = plan.partition(" ")
        config = QuantisationConfig(format=name, codebook=codebook or "uniform")
    model = random_llama(small_config(), config, "cuda", seed=2)
    tokens = torch.randint(0, 512, (batch, length - 40), generator=torch.Generator().manual_seed(0)).cuda()
    step, plain = Step(model, batch, length), PlainStep(model, batch, length)
    assert all((layer is not None) == (plan is not None) for layer in step.fused)
    follows(step, plain, tokens, 40)


def follows(step: Step, plain: PlainStep, tokens: torch.Tensor, steps: int) -> None:
    """The same logits as the plain path after the same tokens, but for roundings; the same tokens when repeated."""
    step.prefill(tokens)
    plain.prefill(tokens)
    for _ in range(steps):
        plain.tokens = step.tokens.clone()
        plain()
        step()
        # Both round every value to bfloat16 a few dozen times on the way, in another order.
        assert (step.logits - plain.logits).abs().max() <= 32 * 2.0**-8 * plain.logits.abs().max()
    step.prefill(tokens)
    first = [step().clone() for _ in range(steps)]
    step.prefill(tokens)
    assert all(torch.equal(step(), token) for token in first)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [2, 8])
def test_attention_of_several_clusters_a_head(monkeypatch, splits) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs clusters, of compute capability 9.0")
    choose = attend.choose_config
    monkeypatch.setattr(attend, "choose_config", lambda *facts: replace(choose(*facts), cluster=2, splits=splits))
    model = random_llama(small_config(), QuantisationConfig(format="lut4_g64"), "cuda", seed=2)
    tokens = torch.randint(0, 512, (1, 900), generator=torch.Generator().manual_seed(0)).cuda()
    step = Step(model, 1, 1000)
    assert step.workspace is not None
    follows(step, PlainStep(model, 1, 1000), tokens, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 7, 40])
@pytest.mark.parametrize("plan", [None, "lut4_g64"])
def test_rows_by_dense_weights(monkeypatch, plan, batch) -> None:
    monkeypatch.setattr("fdk.models.step._DENSE_ROWS_FROM", 0)
    model = random_llama(small_config(vocab_size=1003), plan and QuantisationConfig(format=plan), "cuda", seed=2)
    tokens = torch.randint(0, 512, (batch, 20), generator=torch.Generator().manual_seed(0)).cuda()
    follows(Step(model, batch, 60), PlainStep(model, batch, 60), tokens, 30)


@pytest.mark.gpu
def test_greedy_decoding_is_fused_on_a_gpu() -> None:
    model = random_llama(small_config(), QuantisationConfig(format="lut4_g64"), "cuda", seed=2)
    tokens = torch.randint(0, 512, (2, 9)).cuda()
    assert isinstance(step_for(model, 2, 16), Step)
    assert greedy(model, tokens, 5).shape == (2, 5)
    assert len(time_steps(model, 2, 4)) == 4
