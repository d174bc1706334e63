"""Models of transformers as fdk's Llama: the same logits from the same tensors, and reasons where it cannot be."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_models import LLAMA3, of_transformers

import fdk
from fdk.errors import UnsupportedError
from fdk.models.adopt import as_llama
from fdk.models.decode import LibraryStep, PlainStep, greedy, step_for
from fdk.models.generate import generate

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

TOKENS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))


CASES = [
    ("Llama", {}),
    ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("Mistral", {"head_dim": None}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen3", {}),
    ("Qwen3", {"attention_bias": True, "head_dim": 32}),
]


@pytest.mark.parametrize(("family", "extra"), CASES)
@pytest.mark.parametrize("fmt", [None, "lut4_g64", "int3_g32"])
def test_logits_and_tokens_are_those_of_its_own_forward(family, extra, fmt):
    model = of_transformers(family, sharp=True, **extra)
    if fmt:
        fdk.quantise_(model, fmt)
    with torch.no_grad():
        expected = model(TOKENS).logits
        got = as_llama(model)(TOKENS)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert isinstance(step_for(model, 2, 60), PlainStep)
    chosen = greedy(model, TOKENS, 12)
    assert torch.equal(chosen, greedy(model, TOKENS, 12, "plain"))
    assert list(generate(model, TOKENS[0].tolist(), 12)) == chosen[0].tolist()


def test_nothing_is_copied_and_the_model_stays_what_it_was():
    model = of_transformers("Qwen3", sharp=True)
    before = {name: (tensor.data_ptr(), type(tensor)) for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    llama = as_llama(model)
    assert {tensor.data_ptr() for tensor in llama.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert {name: (tensor.data_ptr(), type(tensor)) for name, tensor in model.state_dict().items()} == before
    assert [name for name, _ in model.named_modules()] == names


REFUSED = [
    ("Llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'linear'"),
    ("Gemma", {}, "a GemmaForCausalLM is not built like"),
    ("Mixtral", {}, "a MixtralForCausalLM is not built like"),
]


@pytest.mark.parametrize(("family", "extra", "reason"), REFUSED)
def test_other_models_decode_by_their_own_forward_which_is_said_once(family, extra, reason):
    model = of_transformers(family, sharp=True, **extra)
    with pytest.warns(UserWarning, match=f"{family}ForCausalLM is decoded by its own forward: .*{reason}") as said:
        chosen = greedy(model, TOKENS, 5)
    assert len([warning for warning in said if "own forward" in str(warning.message)]) == 1
    assert torch.equal(chosen, greedy(model, TOKENS, 5, "plain"))
    with pytest.raises(UnsupportedError, match=reason):
        step_for(model, 2, 60, "fused")


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_a_sliding_window_is_served_up_to_its_length(family):
    model = of_transformers(family, sharp=True, sliding_window=50, use_sliding_window=True, max_window_layers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(greedy(model, TOKENS, 10), greedy(model, TOKENS, 10, "plain"))
    with pytest.warns(UserWarning, match=r"sees 50 positions \(sliding_window\), but 60 are asked for"):
        step = step_for(model, 2, 60)
    assert isinstance(step, LibraryStep)


def test_a_window_that_is_not_used_is_none():
    for family in ("Llama", "Qwen2"):
        assert as_llama(of_transformers(family, sharp=True, sliding_window=8)).config.sliding_window is None


def test_rounded_frequencies_and_hooks_are_refused():
    model = of_transformers("Llama", sharp=True).to(torch.bfloat16)
    with pytest.raises(UnsupportedError, match="frequencies are not those of its config"):
        as_llama(model)
    model = of_transformers("Llama", sharp=True)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match=r"layers.0.mlp.up_proj has hooks"):
        as_llama(model)


def test_a_long_prompt_is_read_in_chunks(monkeypatch):
    model = of_transformers("Llama", sharp=True)
    whole = greedy(model, TOKENS, 6)
    monkeypatch.setattr("fdk.models.llama.PREFILL_TOKENS", 14)
    assert torch.equal(greedy(model, TOKENS, 6), whole)
