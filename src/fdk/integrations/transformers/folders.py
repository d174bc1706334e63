"""Folders of any causal model of transformers: loaded whole or not at all, and converted to low bits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch import nn

from fdk.errors import FormatError, UnsupportedError
from fdk.integrations.transformers.config import FdkConfig
from fdk.integrations.transformers.quantiser import unfilled
from fdk.models.config import QuantisationConfig
from fdk.models.folder import copy_companions, resolve
from fdk.models.skeleton import CONFIG, architecture, read_config
from fdk.models.tensors import SHARD_BYTES, check_target, new_folder
from fdk.nn.report import Report


def load_causal(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The causal model of a folder by from_pretrained, low-bit or dense, without progress bars; `dtype` if dense."""
    config = _config(folder)
    transformers.utils.logging.disable_progress_bar()
    # device_map needs accelerate; without it the packed model passes through the host's memory.
    direct = device.type != "cpu" and find_spec("accelerate") is not None
    settings = {"device_map": str(device)} if direct else {}
    if not hasattr(config, "quantization_config"):
        settings["dtype"] = dtype
    return _complete(folder, **settings).to(device)


def _config(folder: Path) -> transformers.PretrainedConfig:
    """The config of a folder; UnsupportedError for an architecture that this transformers does not have."""
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (KeyError, ValueError):
        stored = read_config(folder)
        raise UnsupportedError(
            f"{folder / CONFIG} asks for {architecture(stored, folder / CONFIG)} of type {stored.get('model_type')!r}, "
            f"which transformers {transformers.__version__} does not have; upgrade transformers"
        ) from None


def _complete(folder: Path, **settings) -> nn.Module:
    """from_pretrained that raises FormatError where transformers would go on with random numbers."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    if found["missing_keys"]:
        raise FormatError(unfilled(sorted(found["missing_keys"]), model))
    return model


def convert_folder(
    source: str | Path,
    target: str | Path,
    config: QuantisationConfig,
    *,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    texts: Mapping[str, str] | None = None,
) -> Report:
    """`fdk.models.quantise_folder` for folders whose tensors transformers renames or stacks when it reads them.

    The quantised model is held in memory as a whole, the dense one is not. Returns the report.
    """
    check_target(Path(target), overwrite)
    folder = resolve(source)
    stored = getattr(_config(folder), "dtype", None)
    settings = {"dtype": config.dtype or (torch.float16 if stored == torch.float16 else torch.bfloat16)}
    settings |= {} if device is None else {"device_map": str(device)}
    with warnings.catch_warnings():
        # The report, which the caller prints, says it too.
        warnings.filterwarnings("ignore", message="fdk: ")
        model = _complete(folder, quantization_config=FdkConfig.of(config), **settings)
    with new_folder(Path(target), overwrite) as work:
        model.save_pretrained(work, max_shard_size=shard_bytes)
        copy_companions(folder, work, texts)
    return model.fdk_report
