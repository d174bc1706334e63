"""`FdkConfig`: the quantization_config of from_pretrained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from fdk.errors import FormatError
from fdk.formats import Format
from fdk.models.checkpoint import METHOD
from fdk.models.config import QuantisationConfig, read_overrides
from fdk.nn.convert import DEFAULT_SKIP

_OWN = ("quant_method", "version", "fdk_version", "layers", "tied")


class FdkConfig(QuantizationConfigMixin):
    """`quantization_config` of from_pretrained: how to quantise a dense model, or how to read a folder of fdk.

    bits, block_size, format, kernel, skip, codebook, scale, dtype: as for `fdk.models.QuantisationConfig`.
    overrides   {regular expression: format name or bits}, or a text file of lines `layer.name: bits`.
    precision   of nested formats: the width to serve, {regular expression: width}, or such a file; see
                `fdk.set_precision`.

    For a folder that is quantised already, only kernel and precision count. FormatError names a wrong field.
    """

    def __init__(
        self,
        bits: int | str | None = None,
        block_size: int | str | None = 64,
        *,
        format: Format | str | None = None,
        kernel: str = "auto",
        skip: str = DEFAULT_SKIP,
        codebook: str = "uniform",
        scale: str = "auto",
        overrides: Mapping[str, str | int] | str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        precision: int | Mapping[str, int] | str | Path | None = None,
    ) -> None:
        self.quant_method = METHOD
        self.kernel = kernel
        self.precision = precision
        self.stored: dict | None = None
        self.recipe: QuantisationConfig | None = None
        if bits is None and format is None:
            return
        if overrides is not None and not isinstance(overrides, Mapping):
            overrides = read_overrides(overrides)
        self.recipe = QuantisationConfig(
            bits,
            block_size,
            kernel,
            skip,
            format,
            codebook,
            scale,
            overrides or {},
            dtype,
        )

    @classmethod
    def of(cls, recipe: QuantisationConfig) -> FdkConfig:
        """The same as `recipe` says."""
        config = cls(kernel=recipe.kernel)
        config.recipe = recipe
        return config

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """From the quantization_config of a folder, or from this class's own arguments."""
        values = dict(config_dict)
        if values.get("quant_method", METHOD) != METHOD:
            raise FormatError(f"quant_method {values['quant_method']!r} is not {METHOD!r}; use its own config class")
        if "layers" in values:
            config = cls()
            config.stored = values
        else:
            config = cls(**{key: value for key, value in values.items() if key not in _OWN})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The quantization_config of config.json; before a model is loaded by it, the recipe."""
        if self.stored is not None:
            return copy.deepcopy(self.stored)
        recipe = self.recipe.to_dict() if self.recipe else {}
        precision = {} if self.precision is None else {"precision": _plain(self.precision)}
        return {"quant_method": METHOD, **recipe, **precision}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What counts of this config where the folder brings its own."""
        return {"kernel": self.kernel, "precision": self.precision}


def _plain(precision) -> int | str | dict:
    if isinstance(precision, Mapping):
        return dict(precision)
    return precision if isinstance(precision, int) else str(precision)
