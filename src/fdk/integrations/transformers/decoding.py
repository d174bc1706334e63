"""`decode`: the loop that takes the place of generate's, one CUDA graph a token where that can be."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdk.errors import UnsupportedError
from fdk.models.decode import AnyStep, LibraryStep, step_for
from fdk.nn import Linear

# Caches of `decode` grow in steps, so that a slightly longer generation does not need another graph.
_LENGTHS = 256
# What generate prepares for every model and this loop follows, or which changes nothing but the way.
_SETTINGS = ("position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position", "synced_gpus")

# An assistant finds the same tokens, only sooner.
_MODES = ("greedy_search", "sample", "assisted_generation")

_steps: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Kept:
    """A step that `decode` has made, for prompts and answers of `length` tokens together at most."""

    step: AnyStep
    batch: int
    length: int
    weights: tuple
    """What it decodes with: another width, device or weight makes it another model's."""


@torch.inference_mode()
def decode(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer=None,
    **model_kwargs,
) -> Tensor:
    """The decoding loop for `model.generate(..., custom_generate=fdk.decode)`: one CUDA graph a token.

    input_ids [b, t] to tokens [b, t + new], greedy or sampled, with the processors and criteria that generate prepared.
    Models that fdk's Llama does not cover, and those on a CPU, are decoded as `fdk.models.decode.step_for` says. The
    step stays for the next call, until `forget(model)`. generate does not hand its streamer on to a loop of others;
    give it as `functools.partial(fdk.decode, streamer=streamer)`.

    Prompts of several lengths are padded on the left, by generate's attention_mask; they are decoded without a graph,
    which is said once. UnsupportedError for beams, other outputs than tokens, and inputs that this loop does not hand
    on to the model: embeddings, images, a cache that holds something, positions of one's own.
    """
    mode = generation_config.get_generation_mode().value
    if mode not in _MODES or generation_config.return_dict_in_generate:
        what = "a dictionary of outputs" if mode in _MODES else mode.replace("_", " ")
        raise UnsupportedError(
            f"fdk.decode returns the tokens of one beam, greedy or sampled, not {what}; leave custom_generate out"
        )
    # Were it an argument of its own, generate would pass it twice.
    mask = model_kwargs.pop("attention_mask", None)
    mask = None if mask is None or mask.all() else mask
    _check_inputs(model, input_ids, mask, model_kwargs)
    batch = input_ids.shape[0]
    step = _step(model, batch, stopping_criteria.max_length or generation_config.max_length, mask)
    padding = generation_config._pad_token_tensor
    unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    tokens = input_ids
    if streamer is not None:
        streamer.put(input_ids.cpu())
    step.prefill(input_ids, mask)
    while True:
        scores = logits_processor(tokens, step.logits.to(torch.float32, copy=True))
        if generation_config.do_sample:
            chosen = torch.multinomial(torch.softmax(scores, -1), 1)
        else:
            chosen = scores.argmax(-1, keepdim=True)
        if padding is not None:
            chosen = torch.where(unfinished[:, None], chosen, padding)
        tokens = torch.cat([tokens, chosen], 1)
        if streamer is not None:
            streamer.put(chosen[:, 0].cpu())
        unfinished &= ~stopping_criteria(tokens, scores)
        if not unfinished.any():
            break
        step.tokens.copy_(chosen)
        step()
    if streamer is not None:
        streamer.end()
    return tokens


def _check_inputs(model: nn.Module, input_ids: Tensor, mask: Tensor | None, others: dict[str, Any]) -> None:
    """UnsupportedError for inputs by which generate's own loop would find other tokens than this one."""
    refused = [name for name, value in others.items() if name not in _SETTINGS and value is not None]
    if getattr(model.config, "is_encoder_decoder", False):
        refused.append("what its encoder has read")
    cache = others.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        refused.append("past_key_values that hold something")
    if not (refused or _usual_positions(others.get("position_ids"), input_ids, mask)):
        refused.append("position_ids of your own")
    if refused:
        raise UnsupportedError(
            f"fdk.decode does not hand {', '.join(refused)} on to the model; leave custom_generate=fdk.decode out"
        )


def _usual_positions(found: Tensor | None, input_ids: Tensor, mask: Tensor | None) -> bool:
    """Whether position_ids [..., b, t] count the tokens of every prompt from 0."""
    if found is None:
        return True
    mask = torch.ones_like(input_ids) if mask is None else mask
    expected = mask.long().cumsum(1) - 1
    return found.shape[-1] == mask.shape[1] and bool(((found == expected) | (mask == 0)).all())


def _step(model: nn.Module, batch: int, length: int, mask: Tensor | None) -> AnyStep:
    if mask is not None:
        # Nothing of it is worth keeping, and a graph for prompts without padding stays.
        return step_for(model, batch, length, mask=mask)
    kept = _steps.get(model)
    if kept and kept.batch == batch and kept.length >= length and kept.weights == _weights(model):
        return kept.step
    # The old step's merged weights go before the new one's come.
    _steps.pop(model, None)
    kept = None
    window = getattr(model.config, "sliding_window", None) or length
    longest = max(length, min(-(-length // _LENGTHS) * _LENGTHS, window))
    step = step_for(model, batch, longest)
    if not isinstance(step, LibraryStep):
        _steps[model] = Kept(step, batch, longest, _weights(model))
    return step


def _weights(model: nn.Module) -> tuple:
    low = [module.weight for module in model.modules() if isinstance(module, Linear)]
    where = tuple(parameter.data_ptr() for parameter in model.parameters())
    return (*((weight.format, *(part.data_ptr() for part in weight.parts.values())) for weight in low), *where)


def forget(model: nn.Module) -> None:
    """Drop the step that `decode` keeps of a model, with its cache and graph."""
    _steps.pop(model, None)
