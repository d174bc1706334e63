"""Greedy decoding, and what a step costs: seconds, bytes."""

from __future__ import annotations

import inspect
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fdk.errors import UnsupportedError
from fdk.models.adopt import as_llama
from fdk.models.llama import Llama, left_padding
from fdk.models.step import PADDED, Step, reason_against
from fdk.nn import Linear


class PlainStep:
    """`step.Step` by the model's own forward, on any device: `tokens` [b, 1] go in, and are then the next ones."""

    def __init__(self, model: Llama, batch: int, length: int) -> None:
        self.model, self.batch, self.length = model, batch, length

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start again with tokens [b, t]; the most likely next tokens [b, 1]. mask [b, t]: 0 where there is none."""
        self.cache = self.model.new_cache(self.batch, self.length)
        self.logits = self.model.prefill(tokens, self.cache, mask)
        self.tokens = self.logits.argmax(-1, keepdim=True)
        return self.tokens

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Feed `tokens`; the most likely next ones [b, 1]."""
        self.logits = self.model(self.tokens, self.cache, last_only=True)[:, -1]
        self.tokens = self.logits.argmax(-1, keepdim=True)
        return self.tokens


class LibraryStep:
    """`PlainStep` by the forward of any causal model of transformers, on the cache that it makes for itself."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def prefill(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start again with tokens [b, t]; the most likely next tokens [b, 1]. mask [b, t]: 0 for what is not seen.

        UnsupportedError if the last token of a prompt is not seen.
        """
        if mask is not None and not mask[:, -1].all():
            raise UnsupportedError(
                "a prompt ends in padding, behind which no model can go on; pad on the left (padding_side='left' of "
                "the tokenizer)"
            )
        self.cache, self.tokens, self.mask = None, tokens, mask
        return self()

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Feed `tokens`; the most likely next ones [b, 1]."""
        output = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True, **self._masked())
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]
        self.tokens = self.logits.argmax(-1, keepdim=True)
        return self.tokens

    def _masked(self) -> dict[str, Tensor]:
        """The mask over all positions so far, with the new ones, and the places of `tokens` among those it shows."""
        if self.mask is None:
            return {}
        if self.cache is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        masked = {"attention_mask": self.mask}
        if self.takes_positions:
            places = (self.mask.long().cumsum(1) - 1).clamp(min=0)
            masked["position_ids"] = places[:, -self.tokens.shape[1] :]
        return masked


AnyStep = Step | PlainStep | LibraryStep


def step_for(model: nn.Module, batch: int, length: int, kind: str = "auto", mask: Tensor | None = None) -> AnyStep:
    """The step that decodes `model`: "fused" (`step.Step`), "plain", its own forward, or "auto", the first that can.

    model: a Llama, or a model of transformers. If `as_llama` takes it, it is decoded as a Llama; otherwise, and for
    "plain", by its own forward, and a warning says why.
    mask: of the prompts [b, t], if some are shorter: 0 where there is no token. "fused" does not serve them.
    """
    if not isinstance(model, Llama):
        if kind == "plain":
            return LibraryStep(model)
        try:
            model = _masked_llama(model, length, mask)
        except UnsupportedError as reason:
            if kind == "fused":
                raise
            warnings.warn(f"{type(model).__name__} is decoded by its own forward: {reason}", stacklevel=2)
            return LibraryStep(model)
    if kind == "fused" and mask is not None:
        raise UnsupportedError(f"the fused step cannot decode these prompts: {PADDED}; use the plain one")
    if kind == "plain" or (kind == "auto" and reason_against(model) is not None):
        return PlainStep(model, batch, length)
    if mask is not None:
        warnings.warn(f"prompts are decoded without a CUDA graph: {PADDED}", stacklevel=2)
        return PlainStep(model, batch, length)
    return Step(model, batch, length)


def _masked_llama(model: nn.Module, length: int, mask: Tensor | None) -> Llama:
    """`as_llama`; UnsupportedError also for a cache that is too long, or a mask that is not of padding on the left."""
    llama = as_llama(model)
    llama.check_length(length)
    if mask is not None:
        left_padding(mask)
    return llama


def greedy(model: nn.Module, tokens: Tensor, steps: int, kind: str = "auto", mask: Tensor | None = None) -> Tensor:
    """The `steps` most likely tokens [b, steps] after tokens [b, t], one at a time on a static cache.

    mask [b, t]: 0 where a shorter prompt has no token.
    """
    step = step_for(model, tokens.shape[0], tokens.shape[1] + steps, kind, mask)
    chosen = [step.prefill(tokens, mask).clone()]
    chosen += [step().clone() for _ in range(steps - 1)]
    return torch.cat(chosen, 1)


def time_steps(
    model: Llama, batch: int, steps: int, prompt: int = 16, seed: int = 0, kind: str = "auto"
) -> list[float]:
    """Seconds of each of `steps` greedy steps after a random prompt; two steps before them warm up."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    step = step_for(model, batch, prompt + steps + 2, kind)
    step.prefill(tokens)
    if model.device.type == "cuda":
        return _time_on_gpu(step, steps, model.device)
    seconds = []
    for index in range(steps + 2):
        start = time.perf_counter()
        step()
        if index >= 2:
            seconds.append(time.perf_counter() - start)
    return seconds


def _time_on_gpu(step: AnyStep, steps: int, device: torch.device) -> list[float]:
    """Seconds between the ends of steps that follow each other without waiting for the host, as in generation."""
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 2)]
        for event in events:
            step()
            event.record()
        torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events[1:])]


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
