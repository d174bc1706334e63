"""Scores against their definitions, and intervals that hold the truth as often as they promise."""

import math
from dataclasses import replace

import pytest
import torch

from fdk.errors import FormatError
from fdk.models import quantise
from fdk.models.evaluate import Calibration, interval, score, segments, t_quantile
from fdk.models.llama import Llama


def windows(count=6, length=12, vocab=96, seed=0):
    return torch.randint(0, vocab, (count, length + 1), generator=torch.Generator().manual_seed(seed))


def test_scores_are_what_they_are_called(llama):
    low, tokens = quantise(llama, "lut3_g32", dtype=torch.float32), windows()
    with torch.no_grad():
        p = llama(tokens[:, :-1]).double().log_softmax(-1)
        q = low(tokens[:, :-1]).double().log_softmax(-1)
    losses = -q.gather(2, tokens[:, 1:, None]).squeeze(2).mean(1)
    divergence = (p.exp() * (p - q)).sum(-1).mean(1)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    for batch in (1, 4, 8):
        found = score(low, tokens, llama, batch=batch)
        # float32 softmax over 96 entries: a few roundings of 2^-24 of numbers around log 96.
        torch.testing.assert_close(found.losses, losses, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.divergence, divergence, rtol=0, atol=1e-5)
        assert torch.equal(found.agreement, agreement)
    assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    torch.testing.assert_close(found.original_losses, score(llama, tokens).losses)


def test_a_model_agrees_with_itself(llama):
    found = score(llama, windows(), llama)
    assert found.divergence.abs().max() < 1e-6
    assert found.agreement.min() == 1
    assert score(llama, windows()).divergence is None


def test_logits_are_compared_in_pieces(llama, monkeypatch):
    low = quantise(llama, "lut2_g32", dtype=torch.float32)
    whole = score(low, windows(), llama)
    monkeypatch.setattr("fdk.models.evaluate.LOGITS_AT_ONCE", 96 * 5)
    pieces = score(low, windows(), llama)
    torch.testing.assert_close(pieces.losses, whole.losses)
    torch.testing.assert_close(pieces.divergence, whole.divergence)


def test_models_of_transformers_are_scored_alike(llama):
    transformers = pytest.importorskip("transformers")
    config = llama.config.to_hf()
    config.pop("architectures")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    theirs.load_state_dict(llama.state_dict())
    found = score(theirs, windows(), llama)
    assert found.divergence.max() < 1e-6
    torch.testing.assert_close(found.losses, score(llama, windows()).losses)


def test_calibration_is_the_divergence_from_the_model_as_it_was(llama):
    tokens = windows()[:, :-1]
    with torch.no_grad():
        before = llama(tokens).double().log_softmax(-1)
    own = Calibration(llama, tokens, batch=4)
    assert own.divergence() < 1e-6
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.5)
        after = llama(tokens).double().log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean().item()
    assert own.divergence() == pytest.approx(expected, rel=1e-4)


def test_segments_predict_every_token_once():
    ids = torch.arange(100)
    found = segments(ids, 9)
    assert found.shape == (11, 10)
    assert found[:, 1:].flatten().tolist() == list(range(1, 100))
    some = segments(ids, 9, 4)
    assert some[0, 0] == 0
    assert some[-1, -1] == 99
    assert set(some[:, 0].tolist()) <= set(found[:, 0].tolist())
    with pytest.raises(FormatError, match="fewer than one segment"):
        segments(torch.arange(9), 9)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 7, 2.36462), (0.975, 31, 2.03951), (0.995, 7, 3.49948), (0.995, 31, 2.74404), (0.95, 15, 1.75305)],
)
def test_t_quantiles_are_those_of_the_tables(probability, freedom, expected):
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=2e-3)
    assert t_quantile(1 - probability, freedom) == pytest.approx(-expected, abs=2e-3)


def alike(count, likeness, generator, trials):
    """[trials, count] values with mean 0 of which neighbours correlate by `likeness` (an autoregression)."""
    noise = torch.randn(trials, count, generator=generator, dtype=torch.float64)
    values = noise.clone()
    for i in range(1, count):
        values[:, i] = likeness * values[:, i - 1] + math.sqrt(1 - likeness**2) * noise[:, i]
    return values


@pytest.mark.parametrize(("count", "likeness"), [(16, 0.0), (512, 0.0), (512, 0.5)])
def test_intervals_hold_the_truth_as_often_as_they_say(count, likeness):
    trials = 2000
    values = alike(count, likeness, torch.Generator().manual_seed(0), trials)
    held = sum(found.low <= 0 <= found.high for found in map(interval, values)) / trials
    # Chance is 0.005 (one standard deviation); likeness of neighbouring blocks costs another 0.015 at most.
    assert 0.92 < held < 0.97


def test_neighbours_that_are_alike_widen_the_interval():
    values = alike(512, 0.8, torch.Generator().manual_seed(0), 500)
    held = sum(found.low <= 0 <= found.high for found in map(interval, values)) / 500
    alone = sum(abs(v.mean()) <= 1.96 * v.std() / math.sqrt(512) for v in values) / 500
    assert alone < 0.6, "an interval that ignores likeness must fail here, or the test shows nothing"
    assert held > 0.85


def test_estimates_stay_within_what_is_possible(llama):
    found = score(quantise(llama, "lut8_g32", dtype=torch.float32), windows(8), llama).estimates()
    assert found["kl"].low >= 0
    assert found["top1"].high <= 1
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high
    ratio = found["perplexity_ratio"]
    assert ratio.high - ratio.low < found["perplexity"].high / found["perplexity"].low - 1
    assert set(score(llama, windows(8)).estimates()) == {"perplexity"}


def test_more_confidence_is_a_wider_interval():
    values = torch.randn(64, generator=torch.Generator().manual_seed(1))
    narrow, wide = interval(values, 0.9), interval(values, 0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_too_few_segments_have_no_interval(llama):
    with pytest.raises(FormatError, match="7 segments are too few"):
        score(llama, windows(7)).estimates()


def test_another_vocabulary_is_named(llama):
    with pytest.raises(FormatError, match="token 96 is outside the model's vocabulary of 96"):
        score(llama, torch.full((1, 4), 96))
    with pytest.raises(FormatError, match="vocabulary of 50 and the model one of 96"):
        score(llama, windows(vocab=50), Llama(replace(llama.config, vocab_size=50)).eval())
