"""A model of transformers as fdk's Llama: the same modules and tensors in another frame, so that `Step` decodes it."""

from __future__ import annotations

import torch
from torch import nn

from fdk.errors import FormatError, UnsupportedError
from fdk.models.llama import RELATIVES, Llama, LlamaConfig, RMSNorm, inverse_frequencies
from fdk.nn import Linear


def as_llama(model: nn.Module) -> Llama:
    """fdk's Llama around the layers of a loaded Llama, Mistral, Qwen2 or Qwen3 of transformers, for decoding.

    Nothing is copied and nothing of the model is changed, so that its own forward and generate stay what they are;
    drop the result to be back where you were. (`Step` turns the weights of the projections that it merges into views of
    one tensor, in both.) UnsupportedError, with the reason, for other arithmetic or a model on several devices.
    """
    name = type(model).__name__
    if name not in RELATIVES or not hasattr(model, "config"):
        raise UnsupportedError(f"a {name} is not built like {', '.join(RELATIVES)}")
    try:
        config = LlamaConfig.from_hf({**model.config.to_dict(), "architectures": [name]}, f"the config of this {name}")
    except FormatError as error:
        raise UnsupportedError(str(error)) from None
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise UnsupportedError(f"it is spread over {', '.join(sorted(devices))}")
    _check_rotation(model, config)
    llama = Llama.skeleton(config)
    for prefix, module in list(llama.named_modules()):
        if isinstance(module, RMSNorm):
            module.weight = model.get_submodule(prefix).weight
        elif isinstance(module, nn.Linear | nn.Embedding):
            theirs = model.get_submodule(prefix)
            _check_layer(theirs, module, prefix)
            llama.set_submodule(prefix, theirs)
    known = {id(tensor) for tensor in llama.parameters()}
    if other := [name for name, tensor in model.named_parameters() if id(tensor) not in known]:
        raise UnsupportedError(f"it has the parameter {other[0]}, which a Llama does not have")
    return llama


def _check_layer(layer: nn.Module, expected: nn.Module, name: str) -> None:
    kinds = nn.Embedding if isinstance(expected, nn.Embedding) else nn.Linear | Linear
    if not isinstance(layer, kinds) or _sizes(layer) != _sizes(expected):
        raise UnsupportedError(f"its {name} is {layer!r}, not {expected!r}")
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        raise UnsupportedError(f"its {name} has hooks, which would not run")


def _sizes(layer: nn.Module) -> tuple:
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features, layer.bias is not None


def _check_rotation(model: nn.Module, config: LlamaConfig) -> None:
    """UnsupportedError unless queries and keys turn by the angles that the config of fdk's Llama stands for."""
    rotary = getattr(model.model, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    expected = inverse_frequencies(config)
    if frequencies is None or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise UnsupportedError("its rotary embedding has no frequencies, or scales the attention")
    found = frequencies.detach().to("cpu", torch.float32)
    # In bfloat16, to which a cast of the whole model rounds them, they are others at long distances.
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5, atol=0):
        raise UnsupportedError(
            "its rotary frequencies are not those of its config; load it in the dtype that it runs in"
        )
