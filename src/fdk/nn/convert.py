"""From torch.nn.Linear to fdk.nn.Linear: one layer, or every layer of a model in place."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fdk.arguments import check_callable, check_module, shown
from fdk.errors import FormatError, UnsupportedError
from fdk.formats import Format, parse
from fdk.formats.registry import INT, LUT
from fdk.nn.linear import Linear
from fdk.nn.report import LayerReport, Report, measure
from fdk.quantise import quantise
from fdk.weight import QuantisedWeight

DEFAULT_SKIP = r"^lm_head$"


@dataclass(frozen=True)
class Recipe:
    """How one layer is quantised.

    codebook   lut formats: "uniform", "kmeans", a tensor of at most 2^bits values, or "int": the codes and scales
               of the int format of the same width, behind a table of its values (-2^(bits-1) to 2^(bits-1) - 1).
    scale      as for `fdk.quantise.quantise`.
    dtype      of scales and table, and so of the activations; None: the layer's own.
    """

    format: Format
    codebook: str | Tensor = "uniform"
    scale: str = "auto"
    kernel: str = "auto"
    dtype: torch.dtype | None = None


class Plan(Protocol):
    """What `quantise_` needs of a configuration; `fdk.models.QuantisationConfig` is one."""

    dtype: torch.dtype | None

    def recipe(self, name: str) -> Recipe | None:
        """How the layer called `name` is quantised; None if it stays dense."""

    def check_names(self, names: list[str]) -> None:
        """FormatError if the plan speaks of layers that the model does not have."""

    def to_dict(self) -> dict:
        """The plan in JSON values, for the folder of the quantised model."""


@dataclass(frozen=True)
class OneFormat:
    """The plan behind a bare format name: every layer alike, except a head called lm_head."""

    format: Format
    dtype: torch.dtype | None = None

    def recipe(self, name: str) -> Recipe | None:
        return None if re.search(DEFAULT_SKIP, name) else Recipe(self.format)

    def check_names(self, names: list[str]) -> None:
        pass

    def to_dict(self) -> dict:
        return {"format": str(self.format), "skip": DEFAULT_SKIP}


def as_plan(config: Plan | Format | str) -> Plan:
    """A plan from a configuration, a Format or a format name."""
    if isinstance(config, str | Format):
        return OneFormat(parse(config))
    if isinstance(config, Recipe) or not hasattr(config, "recipe"):
        raise FormatError(
            f"config = {shown(config)} is not a configuration; give a QuantisationConfig or a name such as 'lut4_g64'"
        )
    return config


def quantise_weight(
    dense: Tensor, recipe: Recipe, name: str = "weight", dtype: torch.dtype | None = None
) -> QuantisedWeight:
    """The low-bit form of a dense [n, k], on its device. `dtype` goes before the recipe's."""
    fmt, dtype = recipe.format, dtype or recipe.dtype
    if isinstance(recipe.codebook, str) and recipe.codebook == "int":
        integers = Format(INT, fmt.bits, fmt.group)
        parts = quantise(dense, integers, dtype=dtype, scale=recipe.scale, name=name)
        values = torch.arange(1 << fmt.bits, device=dense.device) - integers.offset
        parts["table"] = values.to(parts["scales"].dtype)
    else:
        # Only stored tables have a codebook to choose.
        codebook = recipe.codebook if fmt.kind is LUT else "uniform"
        parts = quantise(dense, fmt, dtype=dtype, codebook=codebook, scale=recipe.scale, name=name)
    return QuantisedWeight.from_parts(fmt, dense.shape[1], parts, name=name)


def from_linear(linear: nn.Linear, config: Plan | Recipe | Format | str, name: str = "linear") -> Linear:
    """`linear` with its weight quantised; the layer given stays as it is.

    config: a QuantisationConfig (its skip expression does not apply), a format name, or a Recipe. The scales take
    the config's dtype, or the layer's own, and so does the bias. The result carries its `LayerError` as `.error`.
    FormatError, naming `name`, for a layer that cannot be replaced or a weight that the format cannot hold.
    """
    if reason := reason_to_keep(linear):
        raise FormatError(f"{name} cannot be replaced: {reason}")
    if linear.weight.is_meta:
        raise FormatError(f"{name} lies on the meta device; load the weights first")
    if isinstance(config, Recipe):
        recipe = config
    else:
        recipe = as_plan(config).recipe("")
        if recipe is None:
            raise FormatError(f"{name}: the configuration leaves this layer dense; give one with bits below 16")
    weight = linear.weight.detach()
    quantised = quantise_weight(weight, recipe, name)
    error = measure(name, weight, quantised)
    return wrap(quantised, linear, recipe, error)


def wrap(weight: QuantisedWeight, linear: nn.Linear, recipe: Recipe, error) -> Linear:
    """The module around a weight, with the bias and mode of the layer that it replaces."""
    bias = None if linear.bias is None else linear.bias.detach().to(weight.device, weight.dtype, copy=True)
    module = Linear(weight, bias, recipe.kernel)
    module.error, module.sqnr_db = error, error.sqnr_db
    return module.train(linear.training)


def reason_to_keep(module: nn.Module) -> str | None:
    """Why a linear layer cannot be replaced by fdk.nn.Linear; None if it can."""
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__} is not a torch.nn.Linear"
    if type(module).forward is not nn.Linear.forward:
        return f"its class {type(module).__name__} has a forward of its own, which fdk.nn.Linear would not run"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "torch.nn.MultiheadAttention reads its weight directly"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which would be lost; remove them first"
    return None


@dataclass
class Job:
    """One weight to quantise: the layers that hold it, by name (several if they are tied), and how."""

    layers: dict[str, nn.Linear]
    recipe: Recipe

    @property
    def name(self) -> str:
        return next(iter(self.layers))


def plan_jobs(
    model: nn.Module,
    plan: Plan,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    meta: bool = False,
) -> tuple[list[Job], dict[str, str]]:
    """What to quantise and what stays dense with the reason; everything is checked before any weight is touched.

    meta: the weights may lie on the meta device, to be read later. FormatError names layers that their format does
    not fit, of those that are alike the first few, and tied layers that are told to differ.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plan.check_names(list(linears))
    kept: dict[str, str] = {}
    jobs: dict[int, Job] = {}
    misfits: dict[str, list[str]] = {}
    for name, module in linears.items():
        recipe = plan.recipe(name)
        if recipe is None or (filter_fn is not None and not filter_fn(module, name)):
            kept[name] = "skipped by the configuration" if recipe is None else "skipped by the filter"
            continue
        if module.weight.is_meta and not meta:
            misfits.setdefault("lies on the meta device; load the weights first", []).append(name or "the layer")
            continue
        if reason := reason_to_keep(module):
            kept[name] = reason
            continue
        try:
            recipe.format.groups(module.in_features)
        except FormatError as error:
            where = f"{name or 'the layer'} {[*module.weight.shape]}:"
            misfits.setdefault(str(error), []).append(where)
            continue
        job = jobs.setdefault(id(module.weight), Job({}, recipe))
        if job.recipe is not recipe and job.recipe != recipe:
            reason = (
                f"shares its weight with {job.name}, but one is to be {recipe.format} and the other "
                f"{job.recipe.format}; give both the same override"
            )
            misfits.setdefault(reason, []).append(name)
        job.layers[name] = module
    if misfits:
        raise FormatError("; ".join(_misfit(reason, layers) for reason, layers in misfits.items()))
    for key, holder in _other_holders(model, jobs):
        for name in jobs.pop(key).layers:
            kept[name] = f"its weight is shared with {holder}, which stays dense"
    return list(jobs.values()), kept


def _misfit(reason: str, layers: list[str]) -> str:
    """What is wrong with the first layer, and how many others it is wrong with: a model has hundreds that are alike."""
    first, *others = layers
    if not others:
        return f"{first} {reason}"
    some = ", ".join(name.rstrip(":") for name in others[:2])
    more = f" and {len(others) - 2} more" if len(others) > 2 else ""
    return f"{first} {reason}; so with {some}{more}"


def _other_holders(model: nn.Module, jobs: dict[int, Job]) -> Iterator[tuple[int, str]]:
    """(weight, first parameter) for every weight to be quantised that something else holds too."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            job = jobs.get(id(parameter))
            if job and id(parameter) not in seen and not any(module is layer for layer in job.layers.values()):
                seen.add(id(parameter))
                yield id(parameter), f"{prefix}.{name}".lstrip(".")


def run_job(job: Job, device: torch.device | None, dtype: torch.dtype | None) -> tuple[list[Linear], LayerReport]:
    """Quantise one weight on `device`; one module for each layer that holds it, all around the same weight."""
    start = time.perf_counter()
    name = f"{job.name}.weight".lstrip(".")
    dense = next(iter(job.layers.values())).weight.detach()
    dense = dense if device is None else dense.to(device)
    weight = quantise_weight(dense, job.recipe, name, dtype)
    error = replace(measure(name, dense, weight), name=job.name)
    try:
        modules = [wrap(weight, layer, job.recipe, error) for layer in job.layers.values()]
    except UnsupportedError as reason:
        raise UnsupportedError(f"{name}: {reason}") from None
    return modules, LayerReport(error, time.perf_counter() - start, tuple(job.layers)[1:])


Progress = Callable[[LayerReport, int, int], None]


def quantise_(
    model: nn.Module,
    config: Plan | Format | str,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Replace the linear layers of `model` in place by fdk.nn.Linear, one at a time. Returns the report.

    config     a QuantisationConfig or a format name. Its dtype, if it has one, becomes the model's; otherwise
               every layer keeps its own, so that the model runs as before.
    filter_fn  (module, name) -> whether to quantise that layer, on top of what the config skips.
    progress   called with (report of the layer, layers done, layers in all).

    Tied linear layers share one low-bit weight; a layer tied to something else stays dense, as do subclasses with
    a forward of their own: `report.kept` says why. The model also carries the report as `fdk_report`. Every layer
    is checked before the first is changed: FormatError names those that the format does not fit.
    """
    plan = as_plan(config)
    check_module(model, "model")
    check_callable(filter_fn, "filter_fn", "(module, name) -> bool")
    check_callable(progress, "progress", "(report, done, total)")
    if isinstance(model, nn.Linear):
        raise FormatError("a bare Linear cannot be replaced in place; use fdk.from_linear(linear, config)")
    jobs, kept = plan_jobs(model, plan, filter_fn)
    report = Report.of(model, kept)
    if plan.dtype is not None:
        model.to(plan.dtype)
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    for done, job in enumerate(jobs, 1):
        report.quantised += next(iter(job.layers.values())).weight.numel()
        modules, layer = run_job(job, None, None)
        for old, new in zip(job.layers.values(), modules, strict=True):
            for name in aliases[id(old)]:
                model.set_submodule(name, new)
        # The last reference to the dense layer goes before the next one is quantised.
        job.layers.clear()
        del old
        report.layers.append(layer)
        if progress:
            progress(layer, done, len(jobs))
    model.fdk_report, model.fdk_recipe = report, plan.to_dict()
    return report
