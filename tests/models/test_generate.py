"""Sampling and generation: the nucleus is that of the definition, generation is greedy, wrong input is named."""

from __future__ import annotations

import pytest
import torch

from fdk.errors import FdkError
from fdk.models.decode import greedy
from fdk.models.generate import generate, sample


def test_draws_follow_the_probabilities_inside_the_nucleus():
    probabilities = torch.tensor([0.4, 0.1, 0.3, 0.2])
    logits = (probabilities.log() * 2).expand(20000, 4)
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in ((1.0, (0, 1, 2, 3)), (0.85, (0, 2, 3)), (0.5, (0, 2)), (0.1, (0,))):
        drawn = sample(logits, 2.0, top_p, generator)[:, 0]
        expected = torch.zeros(4)
        expected[list(kept)] = probabilities[list(kept)] / probabilities[list(kept)].sum()
        share = torch.bincount(drawn, minlength=4) / 20000
        # Five standard deviations of a share of 20000 draws.
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 20000).sqrt()).all()
    assert (sample(logits, 0.0, 1.0) == 0).all()
    for wrong in ((-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(FdkError, match="temperature"):
            sample(logits, *wrong)


def test_generation_is_greedy_decoding_and_stops(llama, tokens):
    prompt = tokens[0].tolist()
    expected = greedy(llama, tokens[:1], 6)[0].tolist()
    assert list(generate(llama, prompt, 6)) == expected
    assert list(generate(llama, prompt, 6, stop=[expected[2]])) == expected[: expected.index(expected[2]) + 1]
    drawn = [list(generate(llama, prompt, 20, temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(FdkError, match="no tokens"):
        next(generate(llama, [], 1))
    with pytest.raises(FdkError, match="token 96 is not one of the model's 96"):
        next(generate(llama, [1, 96], 1))
