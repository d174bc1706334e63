"""Run by test_step.py in a process where Triton's interpreter is on: the fused step against the model's own forward."""

from __future__ import annotations

import pytest
import torch

import fdk
from fdk.kernels.triton import interpreted
from fdk.models import QuantisationConfig
from fdk.models.decode import LibraryStep, step_for
from fdk.models.llama import LlamaConfig
from fdk.models.random import random_llama
from fdk.models.step import Step

pytestmark = pytest.mark.skipif(not interpreted(), reason="run through test_step.py, with TRITON_INTERPRET=1")


def sharpen(model: torch.nn.Module) -> None:
    """Weights of a size that makes attention sharp: with the initial ones every key counts the same."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data *= 6
        elif "_norm" in name:
            parameter.data *= torch.rand(parameter.shape, generator=generator).to(parameter.dtype) + 1


def config(**changes) -> LlamaConfig:
    fields = {
        "vocab_size": 96,
        "hidden_size": 192,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
    }
    return LlamaConfig(**{**fields, "num_key_value_heads": 2, "head_dim": 32, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("changes", "plan", "length"),
    [
        ({}, None, 20),
        ({"num_key_value_heads": 6, "attention_bias": True}, None, 132),
        ({"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}, "lut4_g64", 132),
        ({"qk_norm": True, "attention_bias": True, "output_bias": False}, "lut4_g64", 20),
    ],
)
def test_logits_are_those_of_the_plain_path(changes, plan, length, dtype) -> None:
    settings = config(**changes)
    plan = plan and QuantisationConfig(format=plan)
    model = random_llama(settings, plan, dtype=dtype, seed=1)
    sharpen(model)
    tokens = torch.randint(0, 96, (2, length - 5), generator=torch.Generator().manual_seed(0))
    plain = model.new_cache(2, length)
    with torch.inference_mode():
        expected = model(tokens, plain, last_only=True)[:, -1]
    step = Step(model, 2, length)
    assert torch.equal(step.prefill(tokens)[:, 0], expected.argmax(-1))
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    for _ in range(5):
        chosen = step.tokens.clone()
        with torch.inference_mode():
            expected = model(chosen, plain, last_only=True)[:, -1]
        step()
        assert (step.logits - expected).abs().max() <= tolerance * expected.abs().max()
        assert torch.equal(step.tokens[:, 0], step.logits.argmax(-1))
    assert torch.allclose(step.cache.keys, plain.keys, atol=tolerance * plain.keys.abs().max().item())
    with pytest.raises(ValueError, match="all are taken"):
        step()


@pytest.mark.parametrize(("batch", "changes"), [(1, {}), (3, {"attention_bias": True, "output_bias": False}), (20, {})])
def test_rows_by_dense_weights_in_the_chain(monkeypatch, batch, changes) -> None:
    monkeypatch.setattr("fdk.models.step._DENSE_ROW", (16, 256, 4))
    monkeypatch.setattr("fdk.models.step._DENSE_ROWS", {16: (64, 128, 4, 3), 64: (32, 128, 4, 3)})
    monkeypatch.setattr("fdk.models.step._DENSE_ROWS_FROM", 0)
    model = random_llama(config(**changes), None, dtype=torch.float32, seed=1)
    sharpen(model)
    step, cache = Step(model, batch, 12), model.new_cache(batch, 12)
    tokens = torch.tensor([[5, 17, 3], [9, 2, 40], [1, 0, 77]])[torch.arange(batch) % 3]
    monkeypatch.setattr("torch.nn.Linear.forward", None)
    with torch.inference_mode():
        for column in tokens.T:
            step.tokens.copy_(column[:, None])
            step()
    monkeypatch.undo()
    with torch.inference_mode():
        expected = model(tokens, cache, last_only=True)[:, -1]
    assert (step.logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("fmt", [None, "lut4_g64"])
def test_models_of_transformers_give_the_tokens_of_their_own_forward(family, fmt) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 96, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes, **heads)
    ).eval()
    sharpen(model)
    if fmt:
        fdk.quantise_(model, fmt)
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
    step, plain = step_for(model, 2, 32), step_for(model, 2, 32, "plain")
    assert isinstance(step, Step) and isinstance(plain, LibraryStep)
    # In float32 the two differ by its rounding alone, so that no token may be another.
    assert torch.equal(step.prefill(tokens), plain.prefill(tokens))
    for _ in range(12):
        assert torch.equal(step(), plain())
        assert (step.logits - plain.logits).abs().max() <= 1e-4 * plain.logits.abs().max()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    # With autograd too, although a step is made in the inference mode.
    assert torch.equal(model(tokens).logits, before)
