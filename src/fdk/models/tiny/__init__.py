"""A small byte-level Llama, trained within minutes on text that ships with Python: a real model for real numbers."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fdk.errors import FdkError
from fdk.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rope_theta=10000.0,
)
LENGTH = 128
HELD_OUT = 8
"""Every eighth file is kept for the evaluation."""


def corpus() -> tuple[Tensor, Tensor]:
    """(training, held-out) bytes, uint8, of the modules of this Python's standard library, whole files each."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(files) < 2 * HELD_OUT:
        raise FdkError(f"the standard library's sources are not installed beside {sysconfig.get_paths()['stdlib']}")

    def text(paths: list[Path]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)

    held_out = files[HELD_OUT - 1 :: HELD_OUT]
    return text([path for path in files if path not in held_out]), text(held_out)


def train(
    steps: int = 600,
    batch: int = 16,
    seed: int = 0,
    peak_rate: float = 4e-3,
    progress: Callable[[int, float], None] | None = None,
) -> Llama:
    """The model after `steps` of AdamW on `batch` sequences of 128 bytes, float32; seeded. progress: (step, loss)."""
    text, _ = corpus()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(
                    0, 0.02 if parameter.shape[0] == 256 else parameter.shape[1] ** -0.5, generator=generator
                )
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95))
    warm = max(1, steps // 20)
    for step in range(steps):
        rate = min(1.0, (step + 1) / warm) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = peak_rate * rate
        starts = torch.randint(0, len(text) - LENGTH - 1, (batch, 1), generator=generator)
        window = text[starts + torch.arange(LENGTH + 1)].long()
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if progress:
            progress(step, loss.item())
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats per byte of each held-out sequence, float64 [sequences]."""

    losses: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.losses.mean().item())

    def excess_over(self, other: Score) -> tuple[float, float]:
        """Mean of the paired differences of loss (nats per byte) and its standard error."""
        difference = self.losses - other.losses
        return difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()


@torch.inference_mode()
def evaluate(model: Llama, sequences: int = 512, batch: int = 64) -> Score:
    """The model's loss on `sequences` stretches of 128 bytes spread evenly over the held-out text."""
    _, text = corpus()
    starts = torch.linspace(0, len(text) - LENGTH - 2, sequences).long()
    losses = []
    for chunk in starts.split(batch):
        window = text[chunk[:, None] + torch.arange(LENGTH + 1)].long()
        logits = model(window[:, :-1]).float()
        loss = F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")
        losses.append(loss.double().mean(1))
    return Score(torch.cat(losses))
