"""From a config.json to the modules of its model on the meta device: shapes without memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fdk.errors import FormatError, UnsupportedError
from fdk.models.llama import ARCHITECTURE, Llama, LlamaConfig
from fdk.models.tensors import read_json

CONFIG = "config.json"
FROM_PRETRAINED = "transformers' AutoModelForCausalLM.from_pretrained after `import fdk`"


def read_config(folder: Path) -> dict:
    """The config.json of a model folder; FormatError if there is no such folder or file."""
    if not folder.exists():
        raise FormatError(f"{folder} does not exist; give the folder of a model")
    if not folder.is_dir():
        raise FormatError(f"{folder} is a file; give the folder that it is in")
    if not (folder / CONFIG).exists():
        raise FormatError(
            f"{folder} has no {CONFIG}, so it is not the folder of a model; give the folder that holds both"
        )
    return read_json(folder / CONFIG)


def architecture(config: dict, where: object) -> str:
    """The class that the config asks for."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise FormatError(f"{where} names no architecture, so its modules are unknown; give them with model=")
    return names[0]


def build(config: dict, folder: Path) -> nn.Module:
    """The model that `config` describes, weights on the meta device: fdk's own Llama, or one of transformers."""
    where = folder / CONFIG
    name = architecture(config, where)
    if name == ARCHITECTURE:
        model = Llama.skeleton(LlamaConfig.from_hf(config, str(where)))
        model.hf_config = {key: value for key, value in config.items() if key != "quantization_config"}
        return model
    try:
        import transformers
    except ImportError:
        raise UnsupportedError(
            f"{where} asks for {name}, which fdk builds with transformers: "
            "pip install 'fused-dequantisation-kernels[transformers]'"
        ) from None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        kind = transformers.CONFIG_MAPPING[plain["model_type"]]
        cls = getattr(transformers, name)
        with torch.device("meta"):
            model = cls(kind.from_dict(plain))
    except (KeyError, AttributeError):
        raise UnsupportedError(
            f"{where} asks for {name} of type {config.get('model_type')!r}, "
            f"which transformers {transformers.__version__} does not have; "
            "upgrade transformers, or give the modules with model="
        ) from None
    model.tie_weights()
    return model


def persistent(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(full name, module, own name, tensor) of every parameter and stored buffer; a shared module once."""
    for prefix, module in model.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), module, name, tensor
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), module, name, tensor


def fill_computed(model: nn.Module, device: torch.device | None) -> None:
    """Give the buffers that no checkpoint holds their values, on `device`, by building their module once more.

    UnsupportedError for a buffer whose module cannot be built from its config alone.
    """
    for prefix, module in model.named_modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if any(module._buffers[name].is_meta for name in names):
            try:
                with torch.device("cpu"):
                    fresh = type(module)(module.config)
                values = {name: fresh._buffers[name] for name in names}
            except (AttributeError, TypeError, KeyError):
                raise UnsupportedError(
                    f"{prefix}.{names[0]} is computed when the model is built, which fdk cannot repeat on its own; "
                    f"build the model in memory and give it with model=, or read it by {FROM_PRETRAINED}"
                ) from None
        else:
            values = {name: module._buffers[name] for name in names}
        for name, value in values.items():
            module._buffers[name] = value if device is None else value.to(device)
