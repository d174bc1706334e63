"""Tokens of one sequence, one after the other: greedy, by temperature, or from the likeliest ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from fdk.errors import FdkError
from fdk.models.decode import step_for


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Tokens [b, 1] drawn from logits [b, vocab] divided by `temperature`; 0 takes the most likely ones.

    top_p < 1 draws from the likeliest tokens whose probabilities together reach it, the last of them included
    (nucleus sampling, Holtzman et al. 2020). FdkError for a negative temperature or top_p outside (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise FdkError(f"temperature {temperature} and top_p {top_p}: use at least 0, and more than 0 up to 1")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    if top_p == 1:
        return torch.multinomial(probabilities, 1, generator=generator)
    ordered, order = probabilities.sort(-1, descending=True)
    # What lies before a token decides, so that the likeliest one always stays.
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return order.gather(-1, torch.multinomial(ordered, 1, generator=generator))


def generate(
    model: nn.Module,
    prompt: Collection[int],
    count: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
    kind: str = "auto",
) -> Iterator[int]:
    """Up to `count` tokens after `prompt`, as they are found; ends behind the first one in `stop`.

    model, kind: a Llama or a model of transformers, and the step, as for `decode.step_for`. FdkError for an empty
    prompt or a token that the model does not have.
    """
    vocabulary = model.config.vocab_size
    if not prompt:
        raise FdkError("the prompt has no tokens; give at least one")
    if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
        raise FdkError(f"token {wrong[0]} is not one of the model's {vocabulary}; is this its tokenizer?")
    generator = torch.Generator(model.device).manual_seed(seed)
    step = step_for(model, 1, len(prompt) + count, kind)
    step.prefill(torch.tensor([list(prompt)], device=model.device))
    for index in range(count):
        if temperature > 0:
            with torch.inference_mode():
                step.tokens.copy_(sample(step.logits, temperature, top_p, generator))
        token = int(step.tokens)
        yield token
        if token in stop or index + 1 == count:
            return
        step()
