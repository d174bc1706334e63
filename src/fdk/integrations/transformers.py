"""fdk as a quantisation method of transformers: from_pretrained, on the fly or from a folder, and save_pretrained.

Importing this module registers the method "fdk" and imports transformers; `import fdk` does it as soon as transformers
is there. The folder is that of `fdk.save` (see models/checkpoint.py): the parts of a layer have its names, so that
transformers loads them without a conversion.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fdk.errors import FormatError, UnsupportedError
from fdk.formats import Format, parse
from fdk.models.card import write_card
from fdk.models.checkpoint import METHOD, contents, describe, guard_of, joined, layer_entry, quantisation_of
from fdk.models.config import DTYPES, QuantisationConfig, check_dtype, read_overrides
from fdk.models.decode import AnyStep, LibraryStep, step_for
from fdk.models.folder import copy_companions, resolve
from fdk.models.precision import set_precision
from fdk.models.room import check_room
from fdk.models.tensors import CHECKSUMS, SHARD_BYTES, check_target, checksum, new_folder
from fdk.nn import Linear
from fdk.nn.convert import DEFAULT_SKIP, Job, plan_jobs, run_job
from fdk.nn.report import Report
from fdk.packing.layouts import Geometry, canonical_shapes

try:
    import transformers
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"{error}; pip install 'fused-dequantisation-kernels[transformers]'") from None

OLDEST = (5, 17)
# Caches of `decode` grow in steps, so that a slightly longer generation does not need another graph.
_LENGTHS = 256
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
        if self.pre_quantized:
            self._place(model, dtype or model.dtype)
            for file in checkpoint_files or ():
                with safe_open(file, "pt") as opened:
                    self.sums |= json.loads((opened.metadata() or {}).get(CHECKSUMS, "{}"))
        else:
            self._plan(model)
            if (device := _only_device(device_map)) is not None:
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
                raise FormatError(_unfilled([joined(name, "weight") for name in missing], model))
            model.fdk_recipe, model.fdk_report = config.recipe.to_dict(), self.report
            if self.report.stacked:
                warnings.warn(f"fdk: {self.report.summary}", stacklevel=2)
            config.stored = describe(self.layers, {}, model.fdk_recipe)
        if config.precision is not None:
            set_precision(model, config.precision)
        model.save_pretrained = SaveWithCard(model, copy.copy(model))
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
            raise FormatError(_unfilled(missing, model))
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
        layers, tied, _, drawn = contents(model)
        tensors = dict(drawn)
        self.quantization_config.stored = describe(layers, tied, model.fdk_recipe)
        model.config.quantization_config = self.quantization_config
        sums = {name: checksum(tensor) for name, tensor in tensors.items()}
        return tensors, {CHECKSUMS: json.dumps(sums, separators=(",", ":"))}

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


class SaveWithCard:
    """A model's save_pretrained, and after it the model card, for which transformers has no place.

    It knows the model weakly, so that a model that is let go is gone at once. A second frame around the same modules
    stands in for it in `from_pretrained(...).save_pretrained(...)`, where nothing else holds the model any more.
    """

    def __init__(self, model: nn.Module, stand_in: nn.Module | None = None) -> None:
        self.model, self.stand_in = weakref.ref(model), stand_in

    def __call__(self, save_directory, *args, **kwargs) -> None:
        model = self.model()
        model = self.stand_in if model is None else model
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_card(Path(save_directory), model.config.quantization_config.to_dict())

    def __reduce__(self) -> tuple:
        # A copy of the model gets one of its own.
        return SaveWithCard, (self.model(),)


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


def _unfilled(names: list[str], model: nn.Module) -> str:
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


def load_causal(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The causal model of a folder by from_pretrained, low-bit or dense, without progress bars; `dtype` if dense."""
    transformers.utils.logging.disable_progress_bar()
    # device_map needs accelerate; without it the packed model passes through the host's memory.
    direct = device.type != "cpu" and find_spec("accelerate") is not None
    settings = {"device_map": str(device)} if direct else {}
    if not hasattr(transformers.AutoConfig.from_pretrained(folder), "quantization_config"):
        settings["dtype"] = dtype
    return _complete(folder, **settings).to(device)


def _complete(folder: Path, **settings) -> nn.Module:
    """from_pretrained that raises FormatError where transformers would go on with random numbers."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    if found["missing_keys"]:
        raise FormatError(_unfilled(sorted(found["missing_keys"]), model))
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
    stored = getattr(transformers.AutoConfig.from_pretrained(folder), "dtype", None)
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
    give it as `functools.partial(fdk.decode, streamer=streamer)`. UnsupportedError for padded prompts, beams and other
    outputs than tokens.
    """
    # Were it an argument of its own, generate would pass it twice.
    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is not None and not attention_mask.all():
        raise UnsupportedError(
            "fdk.decode takes prompts without padding; generate from one at a time, or of one length"
        )
    if generation_config.num_beams != 1 or generation_config.return_dict_in_generate:
        raise UnsupportedError("fdk.decode returns the tokens of one beam; leave custom_generate out for anything else")
    batch = input_ids.shape[0]
    step = _step(model, batch, stopping_criteria.max_length or generation_config.max_length)
    padding = generation_config._pad_token_tensor
    unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    tokens = input_ids
    if streamer is not None:
        streamer.put(input_ids.cpu())
    step.prefill(input_ids)
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


def _step(model: nn.Module, batch: int, length: int) -> AnyStep:
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


if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(FdkConfig)
    auto.register_quantizer(METHOD)(FdkQuantizer)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (FdkConfig,)

__all__ = ["FdkConfig", "FdkQuantizer", "decode", "forget"]
