"""The quantisation methods `fdk` and `matgptq_quant`: which layer is what, from the checkpoint's config and settings.

Settings come from `--additional-config '{"fdk": {...}}'` (LLM(additional_config=...)):

    precision    nested layers: bits for all, {regular expression: bits}, or a text file of lines `layer.name: bits`
    any field of QuantisationConfig (format, bits, block_size, codebook, scale, skip, overrides, ...)
                 how a 16-bit checkpoint is quantised while it is loaded (`--quantization fdk`)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import torch

from fdk.errors import FdkError, FormatError, UnsupportedError
from fdk.formats import Format, parse
from fdk.formats.spec import MASTER_BITS
from fdk.importers import matgptq
from fdk.integrations.vllm import interfaces as vllm
from fdk.integrations.vllm.linear import FdkLinearMethod
from fdk.integrations.vllm.sources import Dense, MatGPTQ, Place, Quantising, Source, Stored
from fdk.models.checkpoint import METHOD, check_stored
from fdk.models.config import QuantisationConfig, read_overrides
from fdk.models.precision import widths
from fdk.packing.layouts import Geometry

log = logging.getLogger("fdk.vllm")

PRECISION = "precision"
WHERE = "quantization_config"
# The model's dtype and the kernel that serves it are chosen where the model runs.
_SETTINGS = {PRECISION, *(entry.name for entry in fields(QuantisationConfig))} - {"dtype", "kernel"}
_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)


def settings() -> dict:
    """The plugin's own settings of this run; FormatError for a key that it does not know."""
    extra = vllm.current_config().additional_config
    found = extra.get(METHOD, {}) if isinstance(extra, Mapping) else {}
    if not isinstance(found, Mapping):
        raise FormatError(f"additional_config['fdk'] = {found!r} is not an object of settings such as a format")
    if unknown := sorted(set(found) - _SETTINGS):
        raise FormatError(
            f"additional_config['fdk'] has an unknown key {unknown[0]!r}; known: {', '.join(sorted(_SETTINGS))}"
        )
    return dict(found)


class FdkConfig(vllm.QuantizationConfig):
    """A folder that fdk wrote (`layers`), or a 16-bit one to be quantised while it is loaded (`plan`)."""

    def __init__(self, layers: dict[str, dict] | None = None, plan: QuantisationConfig | None = None) -> None:
        super().__init__()
        self.layers, self.plan = layers, plan
        self._precision: int | dict[str, int] | None = None
        self._widths: dict[str, int] = {}
        self._read_settings = False

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        # None: vLLM then asks for a config without a file, and the settings say the format.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FdkConfig:
        """The config of a saved folder, or a dict of QuantisationConfig's fields for a 16-bit checkpoint."""
        if "layers" in config:
            return cls(layers=dict(check_stored(config, WHERE)["layers"]))
        if plan := {key: value for key, value in config.items() if key != "quant_method"}:
            return cls(plan=QuantisationConfig.from_dict(plan))
        return cls()

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        if self.layers is not None:
            self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        self._take_settings()
        if isinstance(layer, vllm.Experts):
            _say_once("layers of experts stay dense; fdk has no product for them")
            return vllm.UnquantizedExpertsMethod(layer.moe_config)
        linear = isinstance(layer, vllm.LinearBase)
        if not linear and not isinstance(layer, vllm.ParallelLMHead):
            return None
        names = self._names(prefix)
        if not any(self.is_quantised(name) for name in names):
            return vllm.UnquantizedLinearMethod() if linear else None
        return FdkLinearMethod(self, names)

    def _names(self, prefix: str) -> list[str]:
        """What the checkpoint calls the projections of a layer: several where vLLM merges them."""
        parent, dot, own = prefix.rpartition(".")
        merged = self.packed_modules_mapping.get(own)
        if merged is None or self.is_stored(prefix):
            return [prefix]
        return [f"{parent}{dot}{name}" for name in merged]

    def is_stored(self, name: str) -> bool:
        """Whether the checkpoint has low-bit tensors under this very name."""
        return self.layers is not None and name in self.layers

    def is_quantised(self, name: str) -> bool:
        """Whether the layer of this name has a low-bit weight, stored or to be made."""
        return self.is_stored(name) if self.layers is not None else self.plan.recipe(name) is not None

    def _take_settings(self) -> None:
        if self._read_settings:
            return
        self._read_settings = True
        given = settings()
        precision = given.pop(PRECISION, None)
        if precision is not None and not isinstance(precision, int | str | Mapping):
            raise FormatError(
                f"additional_config['fdk']['{PRECISION}'] = {precision!r} is neither bits, nor "
                "{regular expression: bits}, nor the name of a file of lines 'layer.name: bits'"
            )
        if given and not self._quantises:
            raise FormatError(
                f"additional_config['fdk'] asks for {', '.join(given)}, but the checkpoint is quantised already; "
                f"only {PRECISION} can be chosen for it"
            )
        if given:
            self.plan = QuantisationConfig.from_dict({**(self.plan.to_dict() if self.plan else {}), **given})
        if self._quantises and self.plan is None:
            raise FormatError(
                "the checkpoint is not quantised, and nothing says how it should be; "
                """give --additional-config '{"fdk": {"format": "lut4_g64"}}', or serve a folder of `fdk quantise`"""
            )
        if precision is not None and self.layers is not None:
            self._widths = widths(self._nested(), precision)
        elif precision is not None:
            self._precision = read_overrides(precision) if isinstance(precision, str) else precision

    @property
    def _quantises(self) -> bool:
        return self.layers is None

    def _nested(self) -> dict[str, Format]:
        """The stored layers of nested formats; one of an unknown format is reported where it is read."""
        found = {}
        for name, entry in self.layers.items():
            with suppress(FdkError, KeyError, TypeError):
                if (fmt := parse(entry["format"])).is_nested:
                    found[name] = fmt
        return found

    def served(self, name: str, default: int) -> int:
        """The width at which a nested layer is served."""
        if self._precision is None:
            return self._widths.get(name, default)
        if isinstance(self._precision, int):
            return self._precision
        found = [bits for pattern, bits in self._precision.items() if re.search(pattern, name)]
        return found[-1] if found else default

    def _sliced(self, name: str, fmt: Format) -> Format:
        """The format at the width that the settings give a nested layer."""
        return fmt.at(self.served(name, fmt.served)) if fmt.is_nested else fmt

    def source(self, name: str, place: Place, dtype: torch.dtype, device: torch.device) -> Source:
        """What the checkpoint holds of one projection, for this process."""
        if self.layers is None:
            recipe = self.plan.recipe(name)
            if recipe is None:
                return Dense(name, place, dtype, device)
            recipe = replace(recipe, format=self._sliced(name, recipe.format))
            return Quantising(name, recipe, place, dtype, device)
        entry = self.layers.get(name)
        if entry is None:
            return Dense(name, place, dtype, device)
        return Stored(name, self._geometry(name, entry, dtype), place, device)

    def _geometry(self, name: str, entry: dict, dtype: torch.dtype) -> Geometry:
        if "same_as" in entry:
            raise UnsupportedError(
                f"{name} shares its tensors with {entry['same_as']}, which vLLM's loader cannot express; "
                "quantise the model again with one of the two skipped"
            )
        try:
            n, k = (int(size) for size in entry["shape"])
            stored = Geometry(parse(entry["format"]), n, k, dtype, tuple(entry.get("row_ends") or (n,)))
        except FdkError as error:
            raise FormatError(
                f"{WHERE}: layer {name!r}: {error}; if a newer fdk wrote it, "
                "pip install -U fused-dequantisation-kernels"
            ) from None
        except (KeyError, TypeError, ValueError):
            raise FormatError(
                f"{WHERE}: layer {name!r} is not readable: {entry!r:.200}; copy the folder again"
            ) from None
        return replace(stored, format=self._sliced(name, stored.format))


class MatGPTQConfig(FdkConfig):
    """A packed folder of MatGPTQ as it is: 8-bit codes served at one width or at one for each layer."""

    def __init__(self, stored: dict[str, Any] | None = None) -> None:
        super().__init__()
        stored = stored or {}
        master = stored.get("master_bitwidth", MASTER_BITS)
        if master != MASTER_BITS:
            raise UnsupportedError(f"{WHERE}: master_bitwidth is {master}, but fdk serves nested codes of 8 bits only")
        self.bits = stored.get("inference_bitwidth") or MASTER_BITS
        self.group_size = stored.get("group_size")
        self.dense = list(stored.get("modules_to_not_convert") or ("lm_head",))

    def get_name(self) -> str:
        return matgptq.METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatGPTQConfig:
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        self.dense = hf_to_vllm_mapper.apply_list(self.dense)

    @property
    def _quantises(self) -> bool:
        return False

    def is_quantised(self, name: str) -> bool:
        # transformers' rule for modules_to_not_convert: whole components of the name.
        return not any(re.search(rf"(^|\.){re.escape(module)}($|\.)", name) for module in self.dense)

    def source(self, name: str, place: Place, dtype: torch.dtype, device: torch.device) -> Source:
        if not self.is_quantised(name):
            return Dense(name, place, dtype, device)
        return MatGPTQ(name, self.served(name, self.bits), self.group_size, place, dtype, device)


def register_methods() -> None:
    """Register both methods; a plugin of MatGPTQ's own keeps its name."""
    if METHOD not in vllm.METHODS:
        vllm.register_quantization_config(METHOD)(FdkConfig)
    if matgptq.METHOD not in vllm.METHODS:
        vllm.register_quantization_config(matgptq.METHOD)(MatGPTQConfig)
