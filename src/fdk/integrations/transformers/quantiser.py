"""`FdkQuantizer`: low-bit layers in a model of transformers while its weights are read."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from fdk.errors import FormatError, UnsupportedError
from fdk.formats import parse
from fdk.integrations.transformers.config import FdkConfig
from fdk.integrations.transformers.saving import SavePretrained
from fdk.models.checkpoint import contents, describe, guard_of, joined, layer_entry, quantisation_of
from fdk.models.config import DTYPES, check_dtype
from fdk.models.precision import set_precision
from fdk.models.room import check_room, folder_room
from fdk.models.tensors import CHECKSUMS, checksum
from fdk.nn import Linear
from fdk.nn.convert import Job, plan_jobs, run_job
from fdk.nn.report import Report
from fdk.packing.layouts import Geometry, canonical_shapes

OLDEST = (5, 17)


class FdkQuantizer(HfQuantizer):
    """Puts fdk.nn.Linear into a model of transformers while it is loaded, one layer at a time."""

    requires_calibration = False

    def __init__(self, quantization_config: FdkConfig, **kwargs) -> None:
        # The model's config holds what was done to it, and the caller's stays what it was.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.layers: dict[str, dict] = {}
        self.jobs: dict[str, Job] = {}
        self.report: Report | None = None
        self.sums: dict[str, str] = {}
        self.gives_tensors = True

    def validate_environment(self, device_map=None, **_) -> None:
        found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        if found < OLDEST:
            raise UnsupportedError(
                f"transformers {transformers.__version__} loads models in a way that fdk does not know; "
                f"pip install -U 'transformers>={OLDEST[0]}.{OLDEST[1]}'"
            )
        if not self.pre_quantized and self.quantization_config.recipe is None:
            raise FormatError("FdkConfig() says how to read a quantised folder, but this one is dense; give bits=4")
        if isinstance(device_map, Mapping):
            _refuse_offload(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        recipe = self.quantization_config.recipe
        dtype = (recipe and recipe.dtype) or dtype
        if dtype not in DTYPES.values():
            raise FormatError(f"dtype {dtype} is not supported; use {', '.join(DTYPES)}")
        return dtype

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_) -> bool:
        return param_name.removesuffix(".weight") in self.jobs and param_name.endswith(".weight")

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return super().param_element_size(model, param_name, param)
        fmt, (n, k) = self.jobs[param_name.removesuffix(".weight")].recipe.format, param.shape
        return fmt.nbytes(n, k, param.element_size()) / max(1, n * k)

    def _process_model_before_weight_loading(
        self, model: nn.Module, dtype: torch.dtype | None = None, device_map=None, checkpoint_files=None, **_
    ) -> None:
        device = _only_device(device_map)
        if self.pre_quantized:
            if device is not None and checkpoint_files:
                stored = {"quantization_config": self.quantization_config.stored}
                folder_room(Path(checkpoint_files[0]).parent, stored, device)
            self._place(model, dtype or model.dtype)
            for file in checkpoint_files or ():
                with safe_open(file, "pt") as opened:
                    self.sums |= json.loads((opened.metadata() or {}).get(CHECKSUMS, "{}"))
        else:
            self._plan(model)
            if device is not None:
                self._check_room(model, device, dtype or model.dtype)

    def _plan(self, model: nn.Module) -> None:
        """Choose the layers to quantise when their weights come; until then they stay what they are."""
        jobs, kept = plan_jobs(model, self.quantization_config.recipe, meta=True)
        tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
        wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
        for job in jobs:
            if len(job.layers) > 1 or any(f"{name}.weight" in tied for name in job.layers):
                kept |= dict.fromkeys(job.layers, "its weight is tied; use fdk.quantise_ on the loaded model")
            elif any(part in job.name.split(".") for part in wide):
                kept[job.name] = "the model keeps it in float32"
            else:
                self.jobs[job.name] = job
        self.report = Report.of(model, kept)

    def _check_room(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        shapes = {name: tuple(job.layers[name].weight.shape) for name, job in self.jobs.items()}
        packed = sum(job.recipe.format.nbytes(*shapes[name], dtype.itemsize) for name, job in self.jobs.items())
        rest = (self.report.parameters - sum(n * k for n, k in shapes.values())) * dtype.itemsize
        check_room(str(model.config.name_or_path), packed + rest, shapes.values(), rest, device)

    def _place(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Replace the layers that are low-bit in the folder by empty ones, to be filled under the same names."""
        folder = Path(str(model.config.name_or_path))
        stored = quantisation_of({"quantization_config": self.quantization_config.stored}, folder)
        modules = dict(model.named_modules())
        prefix = model.base_model_prefix
        for stated, entry in stored["layers"].items():
            candidates = (stated, stated.removeprefix(f"{prefix}."), f"{prefix}.{stated}")
            name = next((name for name in candidates if name in modules), None)
            if name is None:
                # A head that this class of model does not have.
                continue
            model.set_submodule(name, _empty(modules[name], entry, dtype, self.quantization_config.kernel, name))
            self.layers[name] = entry
        if guard := guard_of(name for name, entry in stored["layers"].items() if "same_as" not in entry):
            ignored = rf"^({re.escape(prefix)}\.)?{re.escape(guard.removeprefix(f'{prefix}.'))}$"
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), ignored}

    def get_quantize_ops(self):
        return _operation()(self)

    def quantise(self, model: nn.Module, name: str, dense: Tensor) -> None:
        """Replace the dense layer `name` by the low-bit form of its weight, which has just been read."""
        job = self.jobs[name]
        old = job.layers[name]
        bias = old.bias
        old.bias = None
        old.weight = nn.Parameter(dense, requires_grad=False)
        (new,), layer = run_job(job, dense.device, dense.dtype)
        if bias is not None:
            # It may be read later; then it still lies on the meta device.
            new.bias = nn.Parameter(bias.detach(), requires_grad=False)
            new.bias._is_hf_initialized = getattr(bias, "_is_hf_initialized", False)
        new._is_hf_initialized = bias is None or new.bias._is_hf_initialized
        model.set_submodule(name, new)
        job.layers[name] = None
        self.report.layers.append(layer)
        self.report.quantised += dense.numel()
        self.layers[name] = layer_entry(new.weight, bias is not None, new.sqnr_db)

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        config = self.quantization_config
        _refuse_offload(getattr(model, "hf_device_map", None) or {})
        if self.pre_quantized:
            self._fill(model)
            model.fdk_recipe = config.stored.get("recipe")
        else:
            if missing := [name for name, job in self.jobs.items() if job.layers.get(name) is not None]:
                raise FormatError(unfilled([joined(name, "weight") for name in missing], model))
            model.fdk_recipe, model.fdk_report = config.recipe.to_dict(), self.report
            if self.report.stacked:
                warnings.warn(f"fdk: {self.report.summary}", stacklevel=2)
            config.stored = describe(self.layers, {}, model.fdk_recipe)
        if config.precision is not None:
            set_precision(model, config.precision)
        model.save_pretrained = SavePretrained(model, copy.copy(model))
        return model

    def _fill(self, model: nn.Module) -> None:
        """Let every layer take the tensors that were read; FormatError for those that were not."""
        missing = []
        for name, entry in self.layers.items():
            module = model.get_submodule(name)
            if "same_as" in entry:
                continue
            names = [*canonical_shapes(module.weight.geometry), *(["bias"] if module.bias is not None else [])]
            tensors = {part: module._buffers.get(part, module._parameters.get(part)) for part in names}
            lost = [part for part, t in tensors.items() if t.is_meta or not getattr(t, "_is_hf_initialized", False)]
            missing += [joined(name, part) for part in lost]
            if not lost:
                self._verify(name, tensors, model)
                module.adopt(name)
                module.sqnr_db = entry.get("sqnr_db")
        if missing:
            raise FormatError(unfilled(missing, model))
        for name, entry in self.layers.items():
            if "same_as" in entry:
                bias = model.get_submodule(name)._parameters.get("bias")
                shared = model.get_submodule(entry["same_as"]).weight
                model.set_submodule(name, Linear(shared, bias, self.quantization_config.kernel))

    def _verify(self, name: str, tensors: dict[str, Tensor], model: nn.Module) -> None:
        """FormatError if the codes of a layer are not those that were written; its floats may have been cast."""
        prefix = f"{model.base_model_prefix}."
        for part, tensor in tensors.items():
            names = (joined(n, part) for n in (name, name.removeprefix(prefix), prefix + name))
            expected = next((self.sums[n] for n in names if n in self.sums), None)
            if not tensor.is_floating_point() and expected not in (None, checksum(tensor)):
                raise FormatError(
                    f"{model.config.name_or_path}: {joined(name, part)} is damaged: its checksum does not match; "
                    "copy the folder again"
                )

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        found = contents(model)
        self.quantization_config.stored = describe(found.layers, found.tied, model.fdk_recipe)
        model.config.quantization_config = self.quantization_config
        if not self.gives_tensors:
            return {}, {}
        tensors = dict(found.tensors)
        sums = {name: checksum(tensor) for name, tensor in tensors.items()}
        return tensors, {CHECKSUMS: json.dumps(sums, separators=(",", ":"))}

    @contextmanager
    def without_tensors(self) -> Iterator[None]:
        """While this lasts, transformers' save_pretrained finds no tensors to write; `SavePretrained` writes them."""
        self.gives_tensors = False
        try:
            yield
        finally:
            self.gives_tensors = True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from fdk import dequantise

        dtype = check_dtype(dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear):
                dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                dense.weight = nn.Parameter(dequantise(module.weight).to(dtype), requires_grad=False)
                if module.bias is not None:
                    dense.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
                model.set_submodule(name, dense)
        del model.save_pretrained
        return model


def _only_device(device_map) -> torch.device | None:
    """The device that all of the model goes to; None if there are several, or transformers is to choose."""
    if device_map is None:
        return torch.device("cpu")
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(places) > 1 or (isinstance(place := places.pop(), str) and place.startswith(("auto", "balanced", "seq"))):
        return None
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _empty(module: nn.Module, entry: Mapping, dtype: torch.dtype, kernel: str, name: str) -> nn.Module:
    """The low-bit layer that `entry` describes, on the meta device, in place of the dense `module`."""
    try:
        fmt, (n, k) = parse(entry["format"]), entry["shape"]
        geometry = Geometry(fmt, n, k, dtype, tuple(entry.get("row_ends") or (n,)))
        zeros = DTYPES[entry["zeros"]] if "zeros" in entry else torch.uint8
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"quantization_config: layer {name!r}: {error}; restore config.json") from None
    if not isinstance(module, nn.Linear) or (module.out_features, module.in_features) != (n, k):
        raise FormatError(
            f"quantization_config: layer {name!r} [{n}, {k}] is {module!r} in the model; "
            "config.json is of another model, restore it"
        )
    if "same_as" in entry:
        # Its tensors are another layer's; transformers finds none to read here, but for the bias.
        placeholder = nn.Module()
        bias = nn.Parameter(torch.empty(n, dtype=dtype, device="meta"), requires_grad=False) if entry["bias"] else None
        placeholder.register_parameter("bias", bias)
        return placeholder
    return Linear.empty(geometry, bool(entry.get("bias")), kernel, zeros if zeros == torch.uint8 else dtype)


@cache
def _operation() -> type:
    """The step of transformers' loading in which a weight that was read becomes a low-bit layer."""
    from transformers.core_model_loading import ConversionOps

    class Quantise(ConversionOps):
        def __init__(self, quantizer: FdkQuantizer) -> None:
            self.quantizer = quantizer

        @torch.no_grad()
        def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **_) -> dict[str, Tensor]:
            (value,) = input_dict.values()
            dense = value[0] if isinstance(value, list) else value
            self.quantizer.quantise(model, full_layer_name.removesuffix(".weight"), dense)
            if missing_keys is not None:
                missing_keys.discard(full_layer_name)
            return {}

    return Quantise


def unfilled(names: list[str], model: nn.Module) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{model.config.name_or_path} lacks the tensor {names[0]}{more}, and fdk does not run on what was not read; "
        "copy the whole folder again"
    )


def _refuse_offload(device_map: Mapping) -> None:
    places = {str(place) for place in device_map.values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise UnsupportedError(
            f"device_map puts parts of the model on {' and '.join(sorted(places))}, but fdk's layers run where they "
            "lie; use fewer bits, so that all fits on the GPUs, or device_map='cpu'"
        )
