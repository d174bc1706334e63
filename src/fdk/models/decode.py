"""Greedy decoding, and what a step costs: seconds, bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdk.models.llama import Llama
from fdk.nn import Linear


@torch.inference_mode()
def greedy(model: Llama, tokens: Tensor, steps: int) -> Tensor:
    """The `steps` most likely tokens [b, steps] after tokens [b, t], one at a time on a static cache."""
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + steps)
    chosen = []
    for _ in range(steps):
        tokens = model(tokens, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
        chosen.append(tokens)
    return torch.cat(chosen, 1)


@torch.inference_mode()
def time_steps(model: Llama, batch: int, steps: int, prompt: int = 16, seed: int = 0) -> list[float]:
    """Seconds of each of `steps` greedy steps after a random prompt; two steps before them warm up."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    cache = model.new_cache(batch, prompt + steps + 3)
    tokens = model(tokens, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
    seconds = []
    for index in range(steps + 2):
        _wait(model.device)
        start = time.perf_counter()
        tokens = model(tokens, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
        _wait(model.device)
        if index >= 2:
            seconds.append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Bytes:
    """Memory of a model: `linear` and `other` are read by every step, `embedding` is not (b rows of it are)."""

    linear: int
    other: int
    embedding: int

    @property
    def total(self) -> int:
        return self.linear + self.other + self.embedding

    @property
    def per_step(self) -> int:
        """Bytes of weights that a decoding step must read: its floor, keys and values left out."""
        return self.linear + self.other


def model_bytes(model: nn.Module) -> Bytes:
    """Bytes that the model's tensors take, shared ones once. A tied embedding counts as the head that it serves."""
    linear = other = embedding = 0
    seen: set[int] = set()
    for module in sorted(model.modules(), key=lambda module: isinstance(module, nn.Embedding)):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            size = tensor.numel() * tensor.element_size()
            if isinstance(module, nn.Embedding):
                embedding += size
            elif isinstance(module, Linear | nn.Linear):
                linear += size
            else:
                other += size
    return Bytes(linear, other, embedding)
