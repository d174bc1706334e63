"""fdk's Llama against transformers', and its cache against itself."""

import pytest
import torch
from small_models import LLAMA3

from fdk.errors import FormatError, UnsupportedError
from fdk.models import QuantisationConfig, quantise
from fdk.models.configs import CUSTOM
from fdk.models.decode import greedy, model_bytes, time_steps
from fdk.models.folder import load_dense
from fdk.models.llama import Llama, LlamaConfig, inverse_frequencies
from fdk.models.random import estimated_bytes, random_llama

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "llama3": LLAMA3,
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(
    "extra", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24}]
)
def test_logits_are_those_of_transformers(tmp_path, rope, extra):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=ROPES[rope],
        **extra,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Larger than the initial weights, so that attention is far from uniform and every part matters.
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    theirs.save_pretrained(tmp_path)
    ours = load_dense(tmp_path)
    tokens = torch.randint(0, 96, (2, 100))
    with torch.no_grad():
        expected, wide = theirs(tokens).logits, theirs.double()(tokens).logits
        got = ours(tokens)
    # Both round in float32; neither may be further from float64 than a few times the other.
    rounding = (expected - wide).abs().max()
    assert 0 < rounding < 1e-4 * wide.abs().max()
    assert (got - wide).abs().max() <= 4 * rounding
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_the_cache_changes_nothing(llama, tokens):
    with torch.no_grad():
        whole = llama(tokens)
        cache = llama.new_cache(2, tokens.shape[1])
        pieces = [llama(part, cache) for part in tokens.split([3, 1, 4, 1], dim=1)]
    # Products of other shapes may sum in another order: float32 rounding of sums of 128 terms through two layers.
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 128 * 2.0**-24 * 8 * whole.abs().max()
    with pytest.raises(ValueError, match=r"holds 9 positions, but 9 \+ 1"):
        llama(tokens[:, :1], cache)


def test_greedy_takes_the_most_likely_token_each_time(llama, tokens):
    chosen = greedy(llama, tokens, 5)
    with torch.no_grad():
        logits = llama(torch.cat([tokens, chosen], 1))[:, tokens.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1), chosen)
    assert len(time_steps(llama, 2, 3)) == 3


def test_the_custom_models_have_the_sizes_of_their_names():
    assert {name: round(config.parameters / 1e9, 1) for name, config in CUSTOM.items()} == {
        "custom-llama-tiny": 0.1,
        "custom-llama-4B": 3.9,
        "custom-llama-12B": 11.5,
        "custom-llama-31B": 30.6,
    }
    for config in CUSTOM.values():
        model = Llama.skeleton(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters
        assert LlamaConfig.from_hf(config.to_hf()) == config


def test_a_random_model_depends_on_its_seed_alone_and_is_quantised_on_the_way(llama):
    config = llama.config
    dense, low = random_llama(config, None, seed=3), random_llama(config, _plan(), seed=3)
    expected = quantise(dense, _plan()).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in low.state_dict().items())
    other = random_llama(config, None, seed=4)
    assert not torch.equal(dense.lm_head.weight, other.lm_head.weight)
    assert low.fdk_report.share == quantise(dense, _plan()).fdk_report.share


def _plan() -> QuantisationConfig:
    return QuantisationConfig(bits=4)


def test_bytes_are_counted_once(llama):
    size = model_bytes(llama)
    everything = sum(parameter.numel() for parameter in llama.parameters()) * 4
    assert size.total == everything
    assert size.embedding == llama.model.embed_tokens.weight.numel() * 4
    low = random_llama(llama.config, _plan())
    largest_dense = 2 * 2 * 64 * 128
    difference = model_bytes(low).total - (estimated_bytes(llama.config, _plan()) - largest_dense)
    # The layout of the kernels may add a header to each of the 14 layers.
    assert 0 <= difference <= 14 * 256


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_size": None}, FormatError, "no hidden_size"),
        ({"vocab_size": "many"}, FormatError, "vocab_size = 'many'"),
        ({"num_key_value_heads": 3}, FormatError, "not a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, FormatError, "head_dim = 7 is odd"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, UnsupportedError, "rope type 'yarn'"),
    ],
)
def test_a_config_that_is_not_this_llama_is_refused(llama, change, error, words):
    with pytest.raises(error, match=words):
        LlamaConfig.from_hf({**llama.config.to_hf(), **change})


def test_an_incomplete_llama3_rope_is_refused(llama):
    config = LlamaConfig.from_hf({**llama.config.to_hf(), "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    with pytest.raises(FormatError, match="no 'low_freq_factor'"):
        inverse_frequencies(config)
