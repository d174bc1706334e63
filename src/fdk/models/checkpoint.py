"""save and load: a folder with config.json and safetensors, bit for bit.

config.json                      the model's own config, and quantization_config = {quant_method "fdk", version,
                                 layers {name: {format, shape, bias, zeros?, row_ends?, same_as?, sqnr_db?}}, tied,
                                 recipe?}
model.safetensors, or shards     <layer>.codes .scales .table .zeros .bias, canonical; every other tensor as it is;
                                 and the guard, see `guard_of`
README.md                        the model card
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fdk.arguments import as_integer, as_path, check_module
from fdk.device import device_of
from fdk.errors import FdkError, FormatError
from fdk.formats import parse
from fdk.models.card import write_card
from fdk.models.llama import Llama
from fdk.models.skeleton import CONFIG, FROM_PRETRAINED, build, fill_computed, persistent, read_config
from fdk.models.tensors import SHARD_BYTES, Spec, TensorFiles, TensorWriter, check_target, new_folder
from fdk.nn import Linear, ParallelLinear
from fdk.packing.layouts import Geometry, canonical_dtypes, canonical_shapes, check_canonical
from fdk.weight import QuantisedWeight, check_values

VERSION = 1
METHOD = "fdk"
GUARD: Spec = (torch.uint8, (0,))


class OtherNames(FormatError):
    """The tensors of a folder are not called as in the modules; transformers may know how to convert them."""


def joined(prefix: str, name: str) -> str:
    """`prefix.name`, without the dot for the outermost module."""
    return f"{prefix}.{name}" if prefix else name


def guard_of(layers: Iterable[str]) -> str | None:
    """Name of the empty tensor that stands where a dense model has the weight of the first of these low-bit layers.

    transformers without fdk knows no codes, so it would fill the layers with random numbers and go on with a warning.
    At a tensor of another shape than the weight's it stops. None for a single layer, which only fdk reads.
    """
    first = min(layers, default="")
    return joined(first, "weight") if first else None


def layer_entry(weight: QuantisedWeight, bias: bool, sqnr_db: float | None) -> dict:
    """What quantization_config says of a layer. The kernel is not in it: it is chosen where the model runs."""
    entry: dict = {"format": str(weight.format), "shape": list(weight.shape), "bias": bias}
    zeros = weight.parts.get("zeros")
    if zeros is not None and zeros.dtype != torch.uint8:
        entry["zeros"] = str(zeros.dtype).removeprefix("torch.")
    if weight.format.is_table and len(weight.geometry.row_ends) > 1:
        entry["row_ends"] = list(weight.geometry.row_ends)
    if sqnr_db is not None and math.isfinite(sqnr_db):
        entry["sqnr_db"] = round(sqnr_db, 3)
    return entry


def part_specs(weight: QuantisedWeight) -> dict[str, Spec]:
    """dtype and shape of the canonical parts, in any layout of the weight and without converting it."""
    geometry = weight.geometry
    zeros = torch.uint8
    if geometry.format.has_zeros:
        stored = weight.parts.get("zeros")
        zeros = stored.dtype if stored is not None else weight.canonical().parts["zeros"].dtype
    dtypes = canonical_dtypes(geometry, zeros)
    return {name: (dtypes[name], shape) for name, shape in canonical_shapes(geometry).items()}


def describe(layers: dict[str, dict], tied: dict[str, str], recipe: dict | None = None) -> dict:
    """The quantization_config of a folder; `recipe`: what was asked for, `QuantisationConfig.to_dict`, if known."""
    from fdk import __version__

    stored = {"quant_method": METHOD, "version": VERSION, "fdk_version": __version__, "layers": layers, "tied": tied}
    return stored if recipe is None else {**stored, "recipe": recipe}


def write_config(folder: Path, config: dict) -> None:
    """config.json, indented as people and diffs like it."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save(model: nn.Module, path: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a model with low-bit layers to the folder `path`, which `fdk.load` brings back bit for bit.

    model        an fdk.nn.Linear, fdk's Llama, a transformers model, or any module whose state is its parameters
                 and buffers. Dense tensors are stored as they are; tied ones once.
    overwrite    replace a folder that fdk has written.
    shard_bytes  size above which the tensors are spread over several files.

    The folder appears whole or not at all: everything is written to a temporary name beside it and renamed at the
    end. FormatError if the target exists, or the model has tensors on the meta device or no low-bit layer.
    """
    path = as_path(path, "path")
    check_module(model, "model", "give one, such as fdk.nn.Linear(weight)")
    if as_integer(shard_bytes, "shard_bytes") < 1:
        raise FormatError(f"shard_bytes = {shard_bytes} holds nothing; give a number of bytes, such as {SHARD_BYTES}")
    check_target(path, overwrite)
    found = contents(model)
    if not found.layers:
        raise FormatError(
            "the model has no low-bit layer to save; quantise it first, or use safetensors for a dense one"
        )
    with new_folder(path, overwrite) as work:
        with TensorWriter(work, found.specs, shard_bytes) as writer:
            for name, tensor in found.tensors:
                writer.write(name, tensor)
            writer.finish()
        stored = describe(found.layers, found.tied, recipe_of(model))
        write_config(work, {**_model_config(model), "quantization_config": stored})
        if "" not in found.layers:
            write_card(work, stored)
    return path


def recipe_of(model: nn.Module) -> dict | None:
    """The recipe that the model was quantised by or read with; None if that is not known."""
    return getattr(model, "fdk_recipe", None)


def _model_config(model: nn.Module) -> dict:
    """The part of config.json that says how to build the modules."""
    if isinstance(model, Llama):
        dtype = str(model.dtype).removeprefix("torch.")
        return {**(getattr(model, "hf_config", None) or model.config.to_hf()), "dtype": dtype}
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        values = json.loads(json.dumps(config.to_dict(), default=str))
        return {**values, "architectures": [type(model).__name__]}
    return {"fdk_module": type(model).__name__}


@dataclass(frozen=True)
class Contents:
    """What a model's folder is to hold: `layers` and `tied` of its quantization_config, and its tensors by name.

    `tensors` can be drawn once, in the order of `specs`; a layer's parts are made canonical when they are.
    """

    layers: dict[str, dict]
    tied: dict[str, str]
    specs: dict[str, Spec]
    tensors: Iterator[tuple[str, Tensor]]


def contents(model: nn.Module) -> Contents:
    """The contents of a folder for `model`; FormatError for what a folder of fdk cannot hold."""
    layers: dict[str, dict] = {}
    tied: dict[str, str] = {}
    specs: dict[str, Spec] = {}
    sources: dict[str, tuple[Tensor | Linear, str]] = {}
    first_weight: dict[int, str] = {}
    first_tensor: dict[int, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ParallelLinear):
            raise FormatError(
                f"{prefix or 'the model'} is shard {module.rank} of {module.world}; save the whole model, "
                "and cut it after loading"
            )
        if isinstance(module, Linear):
            entry = layer_entry(module.weight, module.bias is not None, module.sqnr_db)
            first = first_weight.setdefault(id(module.weight), prefix)
            if first != prefix:
                entry["same_as"] = first
            else:
                for name, spec in part_specs(module.weight).items():
                    specs[joined(prefix, name)] = spec
                    sources[joined(prefix, name)] = (module, name)
            layers[prefix] = entry
        elif type(module).get_extra_state is not nn.Module.get_extra_state:
            raise FormatError(
                f"{prefix or 'the model'} keeps extra state in Python, which a checkpoint of fdk does not hold"
            )
    for name, module, own, tensor in persistent(model):
        if isinstance(module, Linear) and own != "bias":
            continue
        if tensor.is_meta:
            raise FormatError(f"{name} lies on the meta device, so there is nothing to save; load the weights first")
        first = first_tensor.setdefault(id(tensor), name)
        if first != name:
            tied[name] = first
            continue
        specs[name] = (tensor.dtype, tuple(tensor.shape))
        sources[name] = (tensor, own)
    if guard := guard_of(name for name, entry in layers.items() if "same_as" not in entry):
        specs[guard] = GUARD
        sources[guard] = (torch.empty(GUARD[1], dtype=GUARD[0]), "weight")
    return Contents(layers, tied, specs, _draw(sources))


def _draw(sources: dict[str, tuple[Tensor | Linear, str]]) -> Iterator[tuple[str, Tensor]]:
    current, parts = None, {}
    for name, (source, own) in sources.items():
        if isinstance(source, Linear):
            if source is not current:
                current, parts = source, source.weight.canonical().parts
            yield name, parts[own]
        else:
            yield name, source.detach()


@dataclass(frozen=True)
class LayerSpec:
    """What a folder says of one low-bit layer."""

    geometry: Geometry
    bias: bool
    same_as: str | None
    sqnr_db: float | None


def quantisation_of(config: dict, folder: Path) -> dict:
    """The quantization_config of a folder that fdk wrote; FormatError names the tool that wrote another."""
    where = folder / CONFIG
    stored = config.get("quantization_config")
    if stored is None:
        raise FormatError(
            f"{where} describes a model that is not quantised; run `fdk quantise {folder} --output ...` first"
        )
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method != METHOD:
        raise FormatError(
            f"{folder} was quantised by {method or 'an unnamed tool'!r}, whose weights fdk does not read; "
            "quantise the original model with `fdk quantise`"
        )
    return check_stored(stored, where)


def check_stored(stored: dict, where: object) -> dict:
    """A quantization_config of fdk's, if this version reads it; FormatError, naming `where`, if not."""
    version = stored.get("version")
    if not isinstance(version, int) or version < 1:
        raise FormatError(
            f"{where}: quantization_config has version {version!r}, not a number from 1 to {VERSION}; restore the file"
        )
    if version > VERSION:
        raise FormatError(
            f"{where} has format version {version}, but this fdk reads up to {VERSION}; "
            "upgrade with pip install -U fused-dequantisation-kernels"
        )
    if not isinstance(stored.get("layers"), dict) or not isinstance(stored.get("tied", {}), dict):
        raise FormatError(f"{where}: quantization_config lists no layers; restore the file")
    return stored


def layer_specs(stored: dict, files: TensorFiles) -> dict[str, LayerSpec]:
    """The low-bit layers of a folder, checked against the tensors' headers."""
    specs = {}
    for name, entry in stored["layers"].items():
        where = f"{files.folder / CONFIG}: layer {name!r}"
        try:
            fmt = parse(entry["format"])
            n, k = (int(size) for size in entry["shape"])
            if n < 0 or k < 0:
                raise FormatError(f"shape {entry['shape']} is negative")
            first = entry.get("same_as")
            owner = name if first is None else first
            if first is not None and "same_as" in stored["layers"].get(first, {"same_as": None}):
                raise FormatError(f"same_as names {first!r}, which is not a layer of its own")
            scales = joined(owner, "scales")
            if scales not in files:
                raise FormatError(f"its tensor {scales} is missing from {files.folder}")
            ends = tuple(entry.get("row_ends") or (n,))
            geometry = Geometry(fmt, n, k, files.spec(scales)[0], ends)
            canonical_shapes(geometry)
            specs[name] = LayerSpec(geometry, bool(entry.get("bias")), first, entry.get("sqnr_db"))
        except FdkError as error:
            raise FormatError(f"{where}: {error}; restore the folder from the original") from None
        except KeyError as error:
            raise FormatError(f"{where} has no {error}; restore the file from the original") from None
        except (TypeError, ValueError, AttributeError):
            raise FormatError(f"{where} is not readable: {entry!r:.200}; restore the file from the original") from None
    return specs


def load(
    path: str | Path, device: torch.device | str | None = None, model: nn.Module | None = None, *, verify: bool = True
) -> nn.Module:
    """The model in a folder that `fdk.save` or `fdk quantise` wrote, bit for bit, in evaluation mode.

    device   where its tensors go; None: the CPU, mapped from the files where the layout allows.
    model    the modules to fill, dense, on any device or "meta"; changed in place and returned. Needed unless the
             folder holds a single layer, a Llama, or an architecture of an installed transformers.
    verify   compare every tensor with its checksum.

    Nothing is unpickled. FormatError names the file, the tensor or layer, the value and the remedy if the folder is
    incomplete, damaged, of a newer version or of another tool, or does not fit the modules.
    """
    folder = as_path(path, "path")
    if model is not None:
        check_module(model, "model", "give the modules to fill, or leave it out")
    device = device_of(device)
    config = read_config(folder)
    stored = quantisation_of(config, folder)
    files = TensorFiles(folder)
    layers = layer_specs(stored, files)
    if "" in layers and model is None:
        _check_names(files, _layer_names("", layers[""]), None)
        return _read_layer(files, "", layers[""], device, verify).eval()
    built = model is None
    if built:
        if "fdk_module" in config:
            raise FormatError(
                f"{folder} holds a {config['fdk_module']}, whose modules fdk does not know; give them with model="
            )
        model = build(config, folder)
    elif isinstance(model, nn.Linear | Linear):
        raise FormatError(
            f"{folder} holds layers of a model, which a bare {type(model).__name__} cannot take; give the model"
        )
    model.fdk_recipe = stored.get("recipe")
    try:
        return fill(model, files, layers, stored.get("tied", {}), device, verify)
    except OtherNames as error:
        if built and not isinstance(model, Llama):
            raise OtherNames(f"{error}, or read it by {FROM_PRETRAINED}") from None
        raise


def fill(
    model: nn.Module,
    files: TensorFiles,
    layers: dict[str, LayerSpec],
    tied: dict[str, str],
    device: torch.device | None,
    verify: bool,
) -> nn.Module:
    """Put the tensors of `files` into `model`, in place, after all names and shapes have been checked."""
    modules = dict(model.named_modules(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, module in modules.items():
        aliases.setdefault(id(module), []).append(name)
    for name, spec in layers.items():
        _check_module(modules.get(name), name, spec, files)
    expected: set[str] = set()
    for name, spec in layers.items():
        expected |= _layer_names(name, spec)
    replaced = {id(modules[name]) for name in layers}
    dense: dict[int, list[tuple[str, nn.Module, str]]] = {}
    tensors: dict[int, Tensor] = {}
    for name, module, own, tensor in persistent(model):
        if id(module) not in replaced:
            dense.setdefault(id(tensor), []).append((name, module, own))
            tensors[id(tensor)] = tensor
    slots: dict[str, list[tuple[nn.Module, str]]] = {}
    for key, holders in dense.items():
        names = [name for name, _, _ in holders]
        first = next((name for name in names if name in files), tied.get(names[0], names[0]))
        slots.setdefault(first, []).extend((module, own) for _, module, own in holders)
        expected.add(first)
        if first in files:
            _check_dense(files, first, tensors[key])
    _check_names(files, expected, guard_of(name for name, spec in layers.items() if spec.same_as is None))

    for name, spec in layers.items():
        if spec.same_as is None:
            _replace(model, aliases[id(modules[name])], _read_layer(files, name, spec, device, verify))
    for name, spec in layers.items():
        if spec.same_as is not None:
            shared = model.get_submodule(spec.same_as).weight
            bias = _read(files, joined(name, "bias"), device, verify) if spec.bias else None
            _replace(model, aliases[id(modules[name])], Linear(shared, bias))
    for name, holders in slots.items():
        value = _read(files, name, device, verify)
        parameter = nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value
        for module, own in holders:
            if own in module._parameters:
                module._parameters[own] = parameter
            else:
                module._buffers[own] = value
    fill_computed(model, device)
    return model.eval()


def _replace(model: nn.Module, names: list[str], module: Linear) -> None:
    for name in names:
        model.set_submodule(name, module)


def _layer_names(name: str, spec: LayerSpec) -> set[str]:
    own = set() if spec.same_as is not None else {joined(name, part) for part in canonical_shapes(spec.geometry)}
    return own | ({joined(name, "bias")} if spec.bias else set())


def _check_names(files: TensorFiles, expected: set[str], guard: str | None) -> None:
    if missing := sorted(expected - set(files)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OtherNames(f"{files.folder} lacks the tensor {missing[0]}{more}; copy the whole folder again")
    if extra := sorted(set(files) - expected - {guard}):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise OtherNames(
            f"{files.where(extra[0])}{more} belongs to no layer of the model; "
            f"the weights and {CONFIG} are of different models"
        )


def _check_module(module: nn.Module | None, name: str, spec: LayerSpec, files: TensorFiles) -> None:
    geometry = spec.geometry
    where = f"{files.folder / CONFIG}: layer {name!r} [{geometry.n}, {geometry.k}]"
    if module is None:
        raise FormatError(f"{where} is not in the model; the folder and the modules are of different models")
    if not isinstance(module, nn.Linear | Linear):
        raise FormatError(
            f"{where} is a {type(module).__name__} in the model, not a Linear; give the modules that were saved"
        )
    if (module.out_features, module.in_features) != (geometry.n, geometry.k):
        raise FormatError(
            f"{where} is [{module.out_features}, {module.in_features}] in the model; "
            "the weights and the modules are of different models"
        )


def _check_dense(files: TensorFiles, name: str, expected: Tensor) -> None:
    dtype, shape = files.spec(name)
    if shape != tuple(expected.shape) or dtype.is_floating_point != expected.is_floating_point():
        raise FormatError(
            f"{files.where(name)} is {dtype} {list(shape)}, "
            f"but the model needs {expected.dtype} {list(expected.shape)}; "
            "the weights and the modules are of different models"
        )


def _read(files: TensorFiles, name: str, device: torch.device | None, verify: bool) -> Tensor:
    tensor = files.get(name, verify)
    return tensor if device is None else tensor.to(device)


def _read_layer(files: TensorFiles, name: str, spec: LayerSpec, device: torch.device | None, verify: bool) -> Linear:
    geometry = spec.geometry
    parts = {}
    for part in canonical_shapes(geometry):
        full = joined(name, part)
        if full not in files:
            raise FormatError(
                f"{files.folder} lacks the tensor {full} of a {geometry.format} layer; copy the whole folder again"
            )
        parts[part] = _read(files, full, device, verify)
    try:
        check_canonical(geometry, parts)
        check_values(geometry, parts)
    except FormatError as error:
        where = files.where(joined(name, "scales")).removesuffix(".scales")
        raise FormatError(f"{where}: {error}; copy the folder again") from None
    weight = QuantisedWeight(geometry, parts)
    bias = None
    if spec.bias:
        bias = _read(files, joined(name, "bias"), device, verify)
        if bias.shape != (geometry.n,) or bias.dtype != geometry.dtype:
            raise FormatError(
                f"{files.where(joined(name, 'bias'))} is {bias.dtype} {list(bias.shape)}, "
                f"but the layer needs {geometry.dtype} [{geometry.n}]; copy the folder again"
            )
    layer = Linear(weight, bias)
    layer.sqnr_db = spec.sqnr_db
    return layer
