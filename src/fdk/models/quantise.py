"""quantise: a low-bit copy of a layer or model, the source untouched."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fdk.arguments import check_callable, check_dtype, check_module, shown
from fdk.device import device_of
from fdk.errors import FormatError
from fdk.formats import Format
from fdk.formats.registry import LUT
from fdk.nn.convert import Job, Plan, Progress, as_plan, plan_jobs, run_job
from fdk.nn.report import Report
from fdk.packing.layouts import DTYPES


@torch.no_grad()
def quantise(
    source: nn.Module,
    config: Plan | Format | str | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lut: Tensor | Iterable[float] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `source` with its linear layers quantised as `config` says; the source stays as it is.

    source   a torch.nn.Linear or any module with its weights in memory.
    config   a QuantisationConfig or a format name; None only copies and casts.
    device   of the copy; None: where each tensor lies. Layers are quantised there, one at a time, and the dense
             weights that they replace are never copied as a whole.
    dtype    of the copy and its activations: bfloat16, float16 or float32; None: the config's, else bfloat16.
             Buffers that a checkpoint does not hold (such as rotary frequencies) are moved but not cast.
    lut      a table of at most 2^bits values for every lut layer, in place of the config's codebook.

    The copy carries a `fdk_report`: error, bits and seconds of each layer, the share of parameters quantised, and
    the linear layers that stay dense with the reason. FormatError names layers that their format does
    not fit.
    """
    check_module(source, "source", "give one, or a folder to fdk.models.quantise_folder")
    check_callable(progress, "progress", "(report, done, total)")
    device = device_of(device)
    plan = None if config is None else as_plan(config)
    if dtype is None:
        dtype = (plan.dtype if plan else None) or torch.bfloat16
    check_dtype(dtype, "dtype", DTYPES)
    if lut is not None and plan is None:
        raise FormatError(
            "lut is a table for quantised layers, but config=None only casts; give a config of a lut format"
        )
    jobs, kept = plan_jobs(source, plan) if plan else ([], {})
    if lut is not None:
        table = _table(lut)
        jobs = [_with_table(job, table) for job in jobs]
    report = Report.of(source, kept)
    # deepcopy takes what the memo holds as already copied, so no dense weight is copied first and dropped later.
    memo: dict[int, object] = {}
    for done, job in enumerate(jobs, 1):
        modules, layer = run_job(job, device, dtype)
        for old, new in zip(job.layers.values(), modules, strict=True):
            memo[id(old)] = new
        report.quantised += old.weight.numel()
        report.layers.append(layer)
        if progress:
            progress(layer, done, len(jobs))
    _copy_tensors(source, memo, device, dtype)
    model = copy.deepcopy(source, memo)
    model.fdk_report = report
    model.fdk_recipe = plan.to_dict() if plan else None
    return model


def _table(lut: Tensor | Iterable[float]) -> Tensor:
    try:
        return torch.as_tensor(lut if isinstance(lut, Tensor) or not isinstance(lut, Iterable) else list(lut))
    except (TypeError, ValueError, RuntimeError):
        raise FormatError(f"lut is {shown(lut)}, not a table of numbers; give a 1-D tensor or list of them") from None


def _with_table(job: Job, table: Tensor) -> Job:
    fmt = job.recipe.format
    if fmt.kind is not LUT:
        raise FormatError(f"{job.name or 'the layer'}: {fmt} defines its own values; give lut only with lut formats")
    return Job(job.layers, replace(job.recipe, codebook=table))


def _copy_tensors(source: nn.Module, memo: dict[int, object], device: torch.device | None, dtype: torch.dtype) -> None:
    """Put the copy of every tensor that stays dense into the memo."""
    for prefix, module in source.named_modules():
        if id(module) in memo:
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in memo:
                continue
            if tensor.is_meta:
                raise FormatError(f"{prefix}.{name} lies on the meta device; load the weights first".lstrip("."))
            computed = name in module._non_persistent_buffers_set
            cast = dtype if tensor.is_floating_point() and not computed else tensor.dtype
            data = tensor.detach().to(device or tensor.device, cast, copy=True)
            memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
