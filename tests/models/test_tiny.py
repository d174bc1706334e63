"""A real model: trained on Python's own sources, then held-out perplexity at every width and codebook."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import fdk
from fdk.models import QuantisationConfig, quantise, tiny

pytestmark = pytest.mark.slow

WIDTHS = (8, 4, 3, 2, 1)


@pytest.fixture(scope="session")
def trained():
    """The model in float32, and its training losses."""
    losses = []
    return tiny.train(progress=lambda step, loss: losses.append(loss)), losses


@pytest.fixture(scope="session")
def dense(trained):
    return tiny.evaluate(quantise(trained[0], None))


@pytest.fixture(scope="session")
def scores(trained):
    """(bits, codebook) to the score and the report of the quantised model."""
    found = {}
    for bits in WIDTHS:
        for codebook in ("uniform", "kmeans"):
            low = quantise(trained[0], QuantisationConfig(bits, codebook=codebook))
            found[bits, codebook] = tiny.evaluate(low), low.fdk_report
    return found


def noise_floor(model: nn.Module, sqnr_db: float, draws: int = 4) -> float:
    """Standard deviation of the mean loss over random weight errors of this size, nats per byte.

    Quantisation errors are one draw of such noise. What they do to the loss to first order has no preferred sign, so
    two quantisers of this quality differ by sqrt(2) of it by chance alone, however long the text is.
    """
    means = []
    for seed in range(draws):
        noisy = quantise(model, None)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, layer in noisy.named_modules():
                if isinstance(layer, nn.Linear) and name != "lm_head":
                    weight = layer.weight.float()
                    size = weight.square().mean().sqrt() * 10 ** (-sqnr_db / 20)
                    layer.weight.copy_(weight + size * torch.randn(weight.shape, generator=generator))
        means.append(tiny.evaluate(noisy).losses.mean())
    return torch.stack(means).std().item()


def test_training_learned_something(trained, dense):
    _, losses = trained
    counts = torch.bincount(tiny.corpus()[0].long(), minlength=256).double()
    frequency = (counts + 1) / (counts + 1).sum()
    _, text = tiny.corpus()
    by_frequency = math.exp(-frequency[text.long()].log().mean().item())
    assert losses[0] > math.log(256) - 0.5
    # Bytes alone give about 20 here; a model of their order has to do far better than that.
    assert dense.perplexity < by_frequency / 2.5


def test_bfloat16_costs_next_to_nothing(trained, dense):
    excess, error = dense.excess_over(tiny.evaluate(trained[0]))
    # Weights and activations rounded to 8 bits of mantissa: 3e-3 relative, and the loss is stationary to first order.
    assert abs(excess) < 3e-3 + 3 * error


@pytest.mark.parametrize("bits", WIDTHS)
def test_kmeans_is_not_worse_than_uniform(trained, scores, bits):
    (uniform, uniform_report), (kmeans, kmeans_report) = scores[bits, "uniform"], scores[bits, "kmeans"]
    for a, b in zip(kmeans_report.layers, uniform_report.layers, strict=True):
        # The table is fitted on a histogram and rounded to bfloat16: a hundredth of a decibel.
        assert a.error.sqnr_db >= b.error.sqnr_db - 0.01, a.error.name
    excess, error = kmeans.excess_over(uniform)
    # At 8 bits both tables are good beyond what a loss can tell apart; what chance allows is measured.
    chance = noise_floor(trained[0], uniform_report.layers[0].error.sqnr_db) * math.sqrt(2) if bits == 8 else 0.0
    assert excess <= 3 * math.hypot(error, chance)
    if bits in (2, 3):
        assert excess < -3 * error, "at 2 and 3 bits a fitted table must be better, not only not worse"


def test_perplexity_grows_as_bits_go(dense, scores):
    for codebook in ("uniform", "kmeans"):
        perplexity = [dense.perplexity, *(scores[bits, codebook][0].perplexity for bits in WIDTHS)]
        assert perplexity[1] < 1.01 * perplexity[0]
        assert all(a < b for a, b in pairwise(perplexity[1:]))


def test_the_trained_model_survives_the_disk(trained, tmp_path):
    low = quantise(trained[0], QuantisationConfig(4, codebook="kmeans"))
    again = fdk.load(fdk.save(low, tmp_path / "m"))
    assert torch.equal(tiny.evaluate(again, 32).losses, tiny.evaluate(low, 32).losses)


def test_training_is_seeded():
    a, b, c = (tiny.train(3, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
