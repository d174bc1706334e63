"""Run by test_step.py in a process where Triton's interpreter is on: the fused step against the model's own forward."""

from __future__ import annotations

import pytest
import torch

from fdk.kernels.triton import interpreted
from fdk.models import QuantisationConfig
from fdk.models.llama import LlamaConfig
from fdk.models.random import random_llama
from fdk.models.step import Step

pytestmark = pytest.mark.skipif(not interpreted(), reason="run through test_step.py, with TRITON_INTERPRET=1")


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
    ],
)
def test_logits_are_those_of_the_plain_path(changes, plan, length, dtype) -> None:
    settings = config(**changes)
    plan = plan and QuantisationConfig(format=plan)
    model = random_llama(settings, plan, dtype=dtype, seed=1)
    for parameter in model.parameters():
        # Weights of a size that makes attention sharp: with the initial ones every key counts the same.
        if parameter.dim() == 2:
            parameter.data *= 6
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
