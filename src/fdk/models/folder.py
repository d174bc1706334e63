"""A Hugging Face model folder to a quantised one, a tensor at a time, and how a folder or id is found."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fdk.arguments import as_path, check_callable
from fdk.device import device_of
from fdk.errors import FormatError
from fdk.formats import Format
from fdk.models.card import write_card
from fdk.models.checkpoint import GUARD, OtherNames, describe, guard_of, joined, layer_entry, write_config
from fdk.models.llama import Llama
from fdk.models.skeleton import CONFIG, build, fill_computed, persistent, read_config
from fdk.models.tensors import INDEX, PICKLED, SHARD_BYTES, Spec, TensorFiles, TensorWriter, check_target, new_folder
from fdk.nn.convert import Job, Plan, as_plan, plan_jobs, quantise_weight
from fdk.nn.report import LayerReport, Report, measure
from fdk.packing.layouts import Geometry, canonical_dtypes, canonical_shapes

# Files that are not carried along: weights in any form, and what describes the original.
_LEFT = (".safetensors", *PICKLED, ".h5", ".msgpack", ".onnx", ".gguf", ".py", ".md")
LARGEST_COPY = 256 << 20


def resolve(name: str | Path) -> Path:
    """The folder of a model: `name` itself, or where the local Hugging Face cache keeps the model of that id.

    Nothing is downloaded. FormatError says how to get a model that is not there.
    """
    path = as_path(name, "the model")
    if path.exists():
        return path
    parts = str(name).split("/")
    if len(parts) > 2 or not all(parts) or str(name).startswith((".", "~")):
        raise FormatError(f"{name} does not exist; give the folder of a model, or an id such as organisation/model")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise FormatError(
            f"{name} is not a folder here; it may be an id in the Hugging Face cache, but ids need huggingface_hub: "
            "pip install 'fused-dequantisation-kernels[transformers]'"
        ) from None
    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except HFValidationError:
        raise FormatError(f"{name} is neither a folder nor a valid id; give the folder of a model") from None
    except (LocalEntryNotFoundError, FileNotFoundError):
        raise FormatError(
            f"{name} is neither a folder nor in the local Hugging Face cache, and fdk downloads nothing; "
            f"fetch it with `hf download {name}`, then run this again"
        ) from None


@dataclass(frozen=True)
class Source:
    """A dense model on disk: its config, its modules on the meta device, its tensors."""

    folder: Path
    config: dict
    model: nn.Module
    files: TensorFiles
    held: dict[str, str]
    """Tensor in the files that each tensor of the model is read from; tied ones from one."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the largest part: bfloat16 or float16 stay, wider ones become bfloat16."""
        floats = [self.files.spec(name)[0] for name in self.files]
        return torch.float16 if floats and floats.count(torch.float16) * 2 > len(floats) else torch.bfloat16


def open_source(folder: Path) -> Source:
    """Open a dense model folder; FormatError if it is incomplete, damaged, quantised, or not of its config.

    OtherNames if it lacks a tensor, or has one too many, and the modules are not fdk's own.
    """
    config = read_config(folder)
    if (stored := config.get("quantization_config")) is not None:
        tool = stored.get("quant_method", "an unnamed tool") if isinstance(stored, dict) else "an unnamed tool"
        raise FormatError(f"{folder} is quantised already, by {tool!r}; give the folder of the original model")
    files = TensorFiles(folder)
    model = build(config, folder)
    holders: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, _, _, tensor in persistent(model):
        holders.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    held = {}
    for key, names in holders.items():
        present = [name for name in names if name in files]
        if not present:
            raise (FormatError if isinstance(model, Llama) else OtherNames)(
                f"{folder} lacks the tensor {names[0]} that its {CONFIG} asks for; copy the whole folder again"
            )
        if files.spec(present[0])[1] != tuple(tensors[key].shape):
            raise FormatError(
                f"{files.where(present[0])} is {list(files.spec(present[0])[1])}, but {CONFIG} asks for "
                f"{list(tensors[key].shape)}; the weights and {CONFIG} are of different models"
            )
        for other in present[1:]:
            if not torch.equal(files.get(present[0]), files.get(other)):
                raise FormatError(
                    f"{files.where(other)} differs from {present[0]}, to which {CONFIG} ties it; correct {CONFIG}"
                )
        held.update(dict.fromkeys(names, present[0]))
    known = {name for names in holders.values() for name in names}
    # Old Llama checkpoints store the rotary frequencies, which follow from the config.
    extra = [name for name in files if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise (FormatError if isinstance(model, Llama) else OtherNames)(
            f"{files.where(extra[0])} belongs to no layer of the model that {CONFIG} describes; correct {CONFIG}"
        )
    return Source(folder, config, model, files, held)


def load_dense(folder: Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a dense folder, in `dtype` (None: as stored), evaluation mode."""
    device = device_of(device)
    source = open_source(folder)
    read: dict[str, nn.Parameter] = {}
    for name, module, own, _ in list(persistent(source.model)):
        held = source.held[name]
        if held not in read:
            tensor = source.files.get(held)
            cast = dtype if dtype and tensor.is_floating_point() else tensor.dtype
            read[held] = nn.Parameter(tensor.to(device or "cpu", cast), requires_grad=False)
        if own in module._parameters:
            module._parameters[own] = read[held]
        else:
            module._buffers[own] = read[held].detach()
    fill_computed(source.model, device)
    return source.model.eval()


@torch.no_grad()
def quantise_folder(
    source: str | Path,
    target: str | Path,
    config: Plan | Format | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    texts: Mapping[str, str] | None = None,
    progress: Callable[[LayerReport, int, int], None] | None = None,
) -> Report:
    """Quantise the model in the folder (or cached id) `source` into the new folder `target`. Returns the report.

    Tensors are mapped, quantised on `device` and written one at a time: memory is one dense tensor and its low-bit
    form. dtype: of scales and dense tensors; None: the config's, else float16 or bfloat16 as the source stores most.
    Tokenizer and other small files are copied; `texts` are files to add, by name. `target` appears whole or not at all.
    """
    target = as_path(target, "target")
    check_callable(progress, "progress", "(report, done, total)")
    check_target(target, overwrite)
    folder = resolve(source)
    if target.resolve() == folder.resolve():
        raise FormatError(f"{target} is the source itself; choose another folder for the output")
    plan, device = as_plan(config), device_of(device)
    opened = open_source(folder)
    dtype = dtype or plan.dtype or opened.dtype
    jobs, kept = plan_jobs(opened.model, plan, meta=True)
    report = Report.of(opened.model, kept)
    specs, dense, tied = _announce(opened, jobs, dtype)
    if guard := guard_of(job.name for job in jobs):
        specs[guard] = GUARD
    layers: dict[str, dict] = {}
    with new_folder(target, overwrite) as work:
        with TensorWriter(work, specs, shard_bytes) as writer:
            for done, job in enumerate(jobs, 1):
                layer, entries = _write_layer(opened, job, dtype, device, writer)
                layers.update(entries)
                report.layers.append(layer)
                report.quantised += layer.error.shape[0] * layer.error.shape[1]
                if progress:
                    progress(layer, done, len(jobs))
            if guard:
                writer.write(guard, torch.empty(GUARD[1], dtype=GUARD[0]))
            for name in dense:
                writer.write(name, _cast(opened.files.get(opened.held[name]), specs[name][0], name))
            writer.finish()
        stored = {key: value for key, value in opened.config.items() if key != "torch_dtype"}
        quantisation = describe(layers, tied, plan.to_dict())
        write_config(work, {**stored, "dtype": str(dtype).removeprefix("torch."), "quantization_config": quantisation})
        if layers:
            write_card(work, quantisation)
        copy_companions(folder, work, texts)
    return report


def _announce(source: Source, jobs: list[Job], dtype: torch.dtype) -> tuple[dict[str, Spec], list[str], dict[str, str]]:
    """(specs of all tensors to write, names of the dense ones, tied names) before any is read."""
    specs: dict[str, Spec] = {}
    quantised: set[str] = set()
    for job in jobs:
        first = next(iter(job.layers.values()))
        geometry = Geometry(job.recipe.format, first.out_features, first.in_features, dtype, (first.out_features,))
        dtypes = canonical_dtypes(geometry)
        for part, shape in canonical_shapes(geometry).items():
            specs[joined(job.name, part)] = (dtypes[part], shape)
        quantised.update(joined(name, "weight") for name in job.layers)
    dense, tied, first_of = [], {}, {}
    for name, _, _, tensor in persistent(source.model):
        if name in quantised:
            continue
        first = first_of.setdefault(id(tensor), name)
        if first != name:
            tied[name] = first
            continue
        stored = source.files.spec(source.held[name])[0]
        specs[name] = (dtype if stored.is_floating_point else stored, tuple(tensor.shape))
        dense.append(name)
    return specs, dense, tied


def _write_layer(
    source: Source, job: Job, dtype: torch.dtype, device: torch.device | None, writer: TensorWriter
) -> tuple[LayerReport, dict[str, dict]]:
    start = time.perf_counter()
    weight_name = joined(job.name, "weight")
    dense = source.files.get(source.held[weight_name])
    dense = dense if device is None else dense.to(device)
    where = f"{source.files.where(source.held[weight_name])}"
    weight = quantise_weight(dense, job.recipe, where, dtype)
    error = replace(measure(job.name, dense, weight), name=job.name)
    for part, tensor in weight.parts.items():
        writer.write(joined(job.name, part), tensor)
    entries = {}
    for name, layer in job.layers.items():
        entries[name] = layer_entry(weight, layer.bias is not None, error.sqnr_db)
        if name != job.name:
            entries[name]["same_as"] = job.name
    return LayerReport(error, time.perf_counter() - start, tuple(job.layers)[1:]), entries


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(dtype)
    if cast is not tensor and cast.is_floating_point() and not cast.isfinite().all() and tensor.isfinite().all():
        raise FormatError(
            f"{name} holds {tensor.abs().max().item():.4g}, which overflows {dtype}; choose another --dtype"
        )
    return cast


def copy_companions(folder: Path, work: Path, texts: Mapping[str, str] | None = None) -> None:
    """Copy tokenizer, generation settings, licence and the like; then write `texts` by name."""
    for path in sorted(folder.iterdir()):
        taken = path.name in (CONFIG, INDEX) or path.name.startswith(".") or path.name.endswith(".index.json")
        if path.is_file() and not taken and path.suffix not in _LEFT and path.stat().st_size <= LARGEST_COPY:
            shutil.copyfile(path, work / path.name)
    for name, text in (texts or {}).items():
        (work / name).write_text(text, encoding="utf-8")
