"""How well a model predicts a text, alone and beside another: perplexity, KL divergence, agreement, with intervals.

The unit of sampling is a segment of the text: context starts anew at each, so what the model says of one does not
depend on the others. Neighbouring segments are still alike, since they come from the same page. So segments are
averaged in blocks of neighbours, and the spread of the block means gives the interval (the method of batch means).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdk.errors import FormatError

BLOCKS = 32
FEWEST_BLOCKS = 8
LOGITS_AT_ONCE = 1 << 26
"""Logits compared at once: 256 MB in float32, whatever the vocabulary."""


@dataclass(frozen=True)
class Estimate:
    """A mean over the text and its confidence interval."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Value and limits under an increasing function."""
        return Estimate(*(function(number) for number in (self.value, self.low, self.high)))

    def within(self, low: float, high: float) -> Estimate:
        """The interval cut to what is possible."""
        return Estimate(self.value, max(low, self.low), min(high, self.high))


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5), within 0.001 from 7 degrees on."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def interval(values: Tensor, confidence: float = 0.95) -> Estimate:
    """Mean of `values` [segments], in the order of the text, and its interval from the means of blocks of neighbours.

    Up to 32 blocks of equal length; with b blocks, mean +- t(b - 1) * std(block means) / sqrt(b). FormatError for fewer
    than 8 segments.
    """
    count = len(values)
    if count < FEWEST_BLOCKS:
        raise FormatError(
            f"{count} segments are too few for an interval; give at least {FEWEST_BLOCKS}, by a longer text, shorter "
            "segments (--length) or more of them (--segments)"
        )
    blocks = min(count, BLOCKS)
    size = count // blocks
    means = values.double()[: blocks * size].view(blocks, size).mean(1)
    half = t_quantile((1 + confidence) / 2, blocks - 1) * means.std().item() / math.sqrt(blocks)
    mean = values.double().mean().item()
    return Estimate(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Score:
    """Means over the tokens of each segment, float64 [segments], in the order of the text.

    losses           negative log-likelihood in nats.
    divergence       KL(reference || model) in nats; None without a reference, and so below.
    agreement        share of tokens at which both find the same next token most likely.
    original_losses  those of the reference.
    """

    losses: Tensor
    divergence: Tensor | None = None
    agreement: Tensor | None = None
    original_losses: Tensor | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.losses.mean().item())

    def excess_over(self, other: Score) -> tuple[float, float]:
        """Mean of the paired differences of loss (nats per token) and its standard error."""
        difference = self.losses - other.losses
        return difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()

    def estimates(self, confidence: float = 0.95) -> dict[str, Estimate]:
        """perplexity and, with a reference, its ratio to the reference's, kl (nats per token) and top1 (0 to 1).

        The ratio is that of the same segments, so its interval is much narrower than that of either perplexity.
        """
        found = {"perplexity": interval(self.losses, confidence).map(math.exp)}
        if self.divergence is not None:
            found["perplexity_ratio"] = interval(self.losses - self.original_losses, confidence).map(math.exp)
            found["kl"] = interval(self.divergence, confidence).within(0.0, math.inf)
            found["top1"] = interval(self.agreement, confidence).within(0.0, 1.0)
        return found


def segments(ids: Tensor, length: int, count: int | None = None) -> Tensor:
    """Windows [segments, length + 1] of token ids [tokens]: each next token of the text is predicted once.

    count: at most so many, spread evenly over the text. FormatError if the text is shorter than one.
    """
    available = (len(ids) - 1) // length
    if available < 1:
        raise FormatError(f"the text has {len(ids)} tokens, fewer than one segment of {length} + 1; give a longer one")
    if count is not None and count < available:
        starts = torch.linspace(0, available - 1, count).long() * length
    else:
        starts = torch.arange(available) * length
    return ids[starts[:, None] + torch.arange(length + 1)].long()


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """[b, t, vocab], of fdk's Llama or of a model of transformers."""
    output = model(tokens)
    return getattr(output, "logits", output)


@torch.inference_mode()
def score(
    model: nn.Module,
    windows: Tensor,
    reference: nn.Module | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """The model's score on `windows` [segments, t + 1] of token ids; the last token of each is predicted only.

    reference: the model in 16 bits, of the same vocabulary. Both run on the devices that they lie on, `batch` segments
    at a time. progress: (segments done, segments in all). FormatError for a token outside the vocabulary.
    """
    _check_vocabularies(windows, model, reference)
    losses, divergences, agreements, original = [], [], [], []
    device = next(model.parameters()).device
    for chunk in windows.split(batch):
        tokens = chunk.to(device)
        logits = _logits(model, tokens[:, :-1]).flatten(0, 1)
        others = None
        if reference is not None:
            others = _logits(reference, tokens[:, :-1].to(next(reference.parameters()).device)).flatten(0, 1)
        losses.append(_by_segment(_losses(logits, tokens[:, 1:].flatten()), len(chunk)))
        if others is not None:
            divergence, agreement = _compare(logits, others)
            divergences.append(_by_segment(divergence, len(chunk)))
            agreements.append(_by_segment(agreement, len(chunk)))
            original.append(_by_segment(_losses(others, tokens[:, 1:].flatten().to(others.device)), len(chunk)))
        if progress:
            progress(sum(map(len, losses)), len(windows))
    if reference is None:
        return Score(torch.cat(losses))
    return Score(*(torch.cat(kept) for kept in (losses, divergences, agreements, original)))


def _check_vocabularies(windows: Tensor, model: nn.Module, reference: nn.Module | None) -> None:
    sizes = [getattr(getattr(one, "config", None), "vocab_size", None) for one in (model, reference) if one is not None]
    if len(set(sizes)) > 1:
        raise FormatError(
            f"the reference has a vocabulary of {sizes[1]} and the model one of {sizes[0]}; "
            "give the model that was quantised"
        )
    if sizes[0] is not None and (largest := windows.max().item()) >= sizes[0]:
        raise FormatError(
            f"token {largest} is outside the model's vocabulary of {sizes[0]}; "
            "use the tokenizer that belongs to the model"
        )


def _by_segment(values: Tensor, count: int) -> Tensor:
    """Means of values [count * t] over each segment, on the CPU."""
    return values.view(count, -1).mean(1).cpu()


def _parts(logits: Tensor) -> list[slice]:
    """Slices of logits [tokens, vocab] that are small enough to be compared at once."""
    rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, float64."""
    return torch.cat(
        [F.cross_entropy(logits[part].float(), targets[part], reduction="none").double() for part in _parts(logits)]
    )


def _compare(logits: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Per token, float64: KL(others || logits) and whether both have the same largest entry."""
    divergences, agreements = [], []
    for part in _parts(logits):
        own = F.log_softmax(logits[part].float(), 1)
        theirs = F.log_softmax(others[part].to(own.device).float(), 1)
        divergences.append(F.kl_div(own, theirs, reduction="none", log_target=True).sum(1, dtype=torch.float64))
        agreements.append((own.argmax(1) == theirs.argmax(1)).double())
    return torch.cat(divergences), torch.cat(agreements)


class Calibration:
    """A model's own predictions for a few texts, to hold changes of its weights against.

    tokens  ids [sequences, t]. The predictions, [sequences * t, vocab] in the model's dtype, stay on its device.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module, tokens: Tensor, batch: int = 8) -> None:
        _check_vocabularies(tokens, model, None)
        self.model = model
        self.batches = tokens.to(next(model.parameters()).device).split(batch)
        self._original = [_logits(model, chunk).flatten(0, 1) for chunk in self.batches]

    @torch.inference_mode()
    def divergence(self) -> float:
        """Mean KL(original || the model as it is now) in nats per token."""
        total = tokens = 0
        for chunk, original in zip(self.batches, self._original, strict=True):
            values, _ = _compare(_logits(self.model, chunk).flatten(0, 1), original)
            total, tokens = total + values.sum().item(), tokens + len(values)
        return max(0.0, total / tokens)
