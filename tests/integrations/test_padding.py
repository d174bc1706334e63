"""Prompts of several lengths in one batch: padded on the left, and decoded to the tokens that generate finds."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_models import of_transformers

import fdk
from fdk.errors import UnsupportedError
from fdk.models import decode
from fdk.models.adopt import as_llama
from fdk.models.decode import LibraryStep, PlainStep, greedy, step_for
from fdk.models.step import Step

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
LENGTHS = (21, 1, 8, 20)
GREEDY = {"max_new_tokens": 12, "do_sample": False}
WINDOW = {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0}


def make(family: str, head: str = "ForCausalLM", **extra):
    return of_transformers(family, head, sharp=True, **{"pad_token_id": 0, "eos_token_id": 95, **extra})


def padded(lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts [b, t] with 0 before the shorter ones, and their mask."""
    longest = max(lengths)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(1, 95, mask.shape, generator=torch.Generator().manual_seed(0))
    return tokens * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", [None, "lut4_g64"])
def test_a_padded_batch_has_the_tokens_of_generate(family, fmt):
    model = make(family)
    if fmt:
        fdk.quantise_(model, fmt)
    prompts, mask = padded()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in (GREEDY, {**GREEDY, "repetition_penalty": 1.5}, {**GREEDY, "do_sample": True, "top_p": 0.8}):
            torch.manual_seed(1)
            expected = model.generate(prompts, attention_mask=mask, **settings)
            torch.manual_seed(1)
            found = model.generate(prompts, attention_mask=mask, custom_generate=fdk.decode, **settings)
            assert torch.equal(found, expected)
    # generate infers the mask where it is not given, and there is a batch for which the mask decides.
    assert torch.equal(
        model.generate(prompts, custom_generate=fdk.decode, **GREEDY),
        model.generate(prompts, attention_mask=mask, **GREEDY),
    )
    seen = model.generate(prompts, attention_mask=torch.ones_like(mask), custom_generate=fdk.decode, **GREEDY)
    assert not torch.equal(seen, model.generate(prompts, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_prompt_do_not_depend_on_its_padding(family):
    model = make(family)
    prompts, mask = padded()
    longest = prompts.shape[1]
    llama = as_llama(model)
    for kind in ("auto", "plain"):
        step = step_for(model, len(LENGTHS), longest + 4, kind, mask)
        assert isinstance(step, PlainStep if kind == "auto" else LibraryStep)
        step.prefill(prompts, mask)
        fed = [step.logits]
        for _ in range(3):
            step()
            fed.append(step.logits)
        chosen = greedy(model, prompts, 4, kind, mask)
        for row, length in enumerate(LENGTHS):
            alone = torch.cat([prompts[row : row + 1, longest - length :], chosen[row : row + 1]], 1)
            with torch.no_grad():
                expected = llama(alone)[0, length - 1 : -1]
            found = torch.stack([logits[row] for logits in fed])
            # As for as_llama without padding: sums of other lengths, in float32.
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_long_padded_prompt_is_read_in_chunks(monkeypatch):
    model = make("Llama")
    prompts, mask = padded()
    whole = greedy(model, prompts, 6, mask=mask)
    # Three positions at a time, so that whole chunks of some prompts are padding.
    monkeypatch.setattr("fdk.models.llama.PREFILL_TOKENS", 12)
    assert torch.equal(greedy(model, prompts, 6, mask=mask), whole)
    assert torch.equal(greedy(model, prompts, 6, "plain", mask), whole)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_beyond_a_sliding_window_the_own_forward_takes_the_mask(family):
    model = make(family, **WINDOW)
    prompts, mask = padded()
    expected = model.generate(prompts, attention_mask=mask, **GREEDY)
    with pytest.warns(UserWarning, match=r"own forward: a token sees 24 positions"):
        found = model.generate(prompts, attention_mask=mask, custom_generate=fdk.decode, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["Gemma", "GPT2", "Bloom"])
def test_other_models_take_the_mask_too(family):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4} if family in ("GPT2", "Bloom") else {}
    model = make(family, "LMHeadModel" if family == "GPT2" else "ForCausalLM", **sizes)
    prompts, mask = padded()
    expected = model.generate(prompts, attention_mask=mask, **GREEDY)
    with pytest.warns(UserWarning, match="decoded by its own forward"):
        found = model.generate(prompts, attention_mask=mask, custom_generate=fdk.decode, **GREEDY)
    assert torch.equal(found, expected)


def test_a_mask_that_is_not_padding_goes_to_the_own_forward():
    model = make("Llama")
    prompts, mask = padded()
    hidden = torch.where(torch.arange(mask.shape[1]) == 15, 0, mask)
    expected = model.generate(prompts, attention_mask=hidden, **GREEDY)
    elsewhere = pytest.warns(UserWarning, match="own forward: its prompts are masked elsewhere than at their beginning")
    with elsewhere:
        found = model.generate(prompts, attention_mask=hidden, custom_generate=fdk.decode, **GREEDY)
    assert torch.equal(found, expected)
    with elsewhere, pytest.raises(UnsupportedError, match="ends in padding, .*padding_side='left'"):
        model.generate(prompts, attention_mask=mask.flip(1), custom_generate=fdk.decode, **GREEDY)
    with pytest.raises(UnsupportedError, match="one of its prompts has no tokens"):
        greedy(as_llama(model), prompts, 2, mask=mask * torch.tensor([1, 0, 1, 1])[:, None])


def test_the_graph_is_left_for_padded_prompts_which_is_said_once(monkeypatch):
    model = make("Llama")
    prompts, mask = padded()
    monkeypatch.setattr(decode, "reason_against", lambda model: None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            found = model.generate(prompts, attention_mask=mask, custom_generate=fdk.decode, **GREEDY)
    assert ["without a CUDA graph: they are padded" in str(warning.message) for warning in said] == [True]
    assert torch.equal(found, model.generate(prompts, attention_mask=mask, **GREEDY))
    with pytest.raises(UnsupportedError, match="the fused step cannot decode these prompts: they are padded"):
        step_for(model, len(LENGTHS), 40, "fused", mask)
    with pytest.raises(UnsupportedError, match="Step cannot decode these prompts: they are padded"):
        Step.prefill(None, prompts, mask)


REFUSED = {
    "position_ids of your own": {"position_ids": torch.arange(21).expand(4, 21) + 3},
    "inputs_embeds": {"inputs_embeds": torch.ones(4, 21, 64), "input_ids": None},
    "past_key_values that hold something": None,
}


@pytest.mark.parametrize("what", REFUSED)
def test_inputs_that_the_loop_would_drop_are_refused(what):
    model = make("Llama")
    prompts, _ = padded((21, 21, 21, 21))
    inputs = REFUSED[what]
    if inputs is None:
        cache = transformers.DynamicCache(config=model.config)
        model(prompts[:, :5], past_key_values=cache)
        inputs = {"past_key_values": cache}
    with pytest.raises(UnsupportedError, match=f"does not hand {what} on to the model"):
        model.generate(**{"input_ids": prompts, **inputs}, custom_generate=fdk.decode, **GREEDY)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_beams": 2}, "not beam search"),
        ({"num_beams": 2, "do_sample": True}, "not beam sample"),
        ({"dola_layers": "high"}, "not dola generation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "not contrastive search"),
        ({"return_dict_in_generate": True}, "not a dictionary of outputs"),
    ],
)
def test_other_ways_to_search_are_refused_by_name(settings, what):
    with pytest.raises(UnsupportedError, match=what):
        make("Llama").generate(padded()[0], custom_generate=fdk.decode, **{**GREEDY, **settings})


def test_an_encoder_is_refused():
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedError, match="what its encoder has read"):
        model.generate(padded()[0], custom_generate=fdk.decode, decoder_start_token_id=0, **GREEDY)
