"""Widths of a model's layers under a budget of bits or bytes: the least error that fits.

Every layer is quantised to every width on offer and its error measured: with calibration tokens the KL divergence of
the model's predictions with that layer alone quantised, otherwise the squared error of its weights relative to their
square. The errors of layers add up to first order (the linearity theorem of HIGGS, Malinovskii et al., 2024), so what
is minimised is their sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from fdk import reference
from fdk.errors import FormatError
from fdk.formats import Format
from fdk.formats.registry import LUT
from fdk.models.allocate import Allocation, allocate
from fdk.models.checkpoint import joined
from fdk.models.config import DENSE_BITS, QuantisationConfig
from fdk.models.evaluate import Calibration
from fdk.models.folder import load_dense, open_source
from fdk.models.skeleton import persistent
from fdk.nn.convert import Job, plan_jobs, quantise_weight
from fdk.nn.report import measure
from fdk.weight import QuantisedWeight

WIDTHS = tuple(range(1, 9))
CALIBRATION_LENGTH = 512
MEASURED_BITS = 4
"""Wider layers change predictions by less than rounding to 16 bits does; there the divergence at 4 bits is scaled by
the error of the weights, to which it is proportional when small."""
_ALIKE = re.compile(r"(?:\b([qkv])_proj|\b(gate|up)_proj)$")
_SUMMED = ("nbytes", "errors", "relative")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class LayerOptions:
    """What a layer may become: formats (None: it stays dense), the bytes of each and the error that it makes.

    relative: squared error of the weights over their square; `errors` are the same, or divergences where calibrated.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    formats: tuple[Format | None, ...]
    nbytes: tuple[int, ...]
    errors: tuple[float, ...]
    relative: tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """The widths chosen for a model. `config` is the configuration given, with an override for every layer."""

    config: QuantisationConfig
    layers: tuple[LayerOptions, ...]
    allocation: Allocation
    other_bytes: int
    calibrated: bool
    """Whether errors are nats per token; otherwise they are relative squared errors of weights."""

    @property
    def formats(self) -> dict[str, Format | None]:
        """Layer name to format; None: dense."""
        found = {}
        for layer, i in zip(self.layers, self.allocation.chosen, strict=True):
            found.update(dict.fromkeys(layer.names, layer.formats[i]))
        return found

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the weights of the layers, scales and tables included."""
        return 8 * self.allocation.cost / sum(n * k for n, k in (layer.shape for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model, without what a run needs beside it."""
        return self.allocation.cost + self.other_bytes

    @property
    def summary(self) -> str:
        """One line."""
        found = self.allocation
        gap = (found.error - found.bound) / found.error if found.error else 0.0
        proof = "the optimum" if found.exact else f"at most {gap:.2%} above the optimum"
        what = "expected KL, nats per token," if self.calibrated else "sum of relative errors of weights"
        advice = "" if self.calibrated else "; with --calibration (a text, or builtin) they are errors of predictions"
        return (
            f"{len(self.layers)} layers at {self.bits_per_weight:.3f} bits a weight, model of "
            f"{self.nbytes / 1e9:.4g} GB; {what} {found.error:.4g}, {proof}{advice}"
        )

    def rows(self) -> Iterable[tuple[str, str, str, str, str]]:
        """Cells of the table: layer, shape, format, bits a weight, error."""
        for layer, i in zip(self.layers, self.allocation.chosen, strict=True):
            (n, k), fmt = layer.shape, layer.formats[i]
            bits = 8 * layer.nbytes[i] / (n * k)
            name = ", ".join(name or "(the layer)" for name in layer.names)
            yield name, f"{n} x {k}", "dense" if fmt is None else str(fmt), f"{bits:.3f}", f"{layer.errors[i]:.2e}"

    def text(self) -> str:
        """Lines `layer.name: bits`, which `fdk.models.read_overrides` and --overrides take."""
        lines = [f"# {self.summary}"]
        for name, fmt in self.formats.items():
            plain = fmt is not None and fmt.kind is LUT and fmt.group == self.config.format.group
            lines.append(f"{name}: {DENSE_BITS if fmt is None else fmt.bits if plain else fmt}")
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write `text` to a file, whole or not at all. Returns its path."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(self.text(), encoding="utf-8")
        partial.replace(path)
        return path


COLUMNS = ("layer", "shape", "format", "bits", "error")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """The options of every layer of a model, from which widths are chosen for any budget in a moment."""

    config: QuantisationConfig
    layers: tuple[LayerOptions, ...]
    other_bytes: int
    calibrated: bool
    widths_named: bool

    def by_weights(self) -> Measured:
        """The same by the errors of the weights alone."""
        layers = tuple(replace(layer, errors=layer.relative) for layer in self.layers)
        return replace(self, layers=layers, calibrated=False)

    def together(self) -> Measured:
        """The same, where query, key and value projections of a block get one format, and so do gate and up."""
        groups: dict[tuple, list[LayerOptions]] = {}
        for layer in self.layers:
            name = _ALIKE.sub(lambda match: "qkv" if match[1] else "gate_up", layer.names[0])
            groups.setdefault((name, layer.shape[1], layer.formats), []).append(layer)
        return replace(self, layers=tuple(map(_beside, groups.values())))

    def choose(self, target_bits: float | None = None, max_bytes: int | None = None) -> Choice:
        """The widths of least error within one of the two budgets, as `choose_widths` describes them."""
        if (target_bits is None) == (max_bytes is None):
            raise FormatError("give target_bits or max_bytes, one of the two")
        if target_bits is not None and not math.isfinite(target_bits):
            raise FormatError(f"target_bits = {target_bits} is not a number of bits; give one such as 3.5")
        weights = sum(n * k for n, k in (layer.shape for layer in self.layers))
        budget = int(target_bits * weights / 8) if max_bytes is None else max_bytes - self.other_bytes
        layers, found = self.layers, None
        if not (self.widths_named or self.calibrated):
            wider = tuple(map(_without_one_bit, self.layers))
            if found := _allocate(wider, budget):
                layers = wider
        found = found or _allocate(layers, budget)
        if found is None:
            self._refuse(target_bits, max_bytes, budget, weights)
        overrides = dict(self.config.overrides)
        for layer, i in zip(layers, found.chosen, strict=True):
            fmt = layer.formats[i]
            overrides |= {f"^{re.escape(name)}$": DENSE_BITS if fmt is None else fmt for name in layer.names}
        config = QuantisationConfig.from_dict({**self.config.to_dict(), "overrides": overrides})
        return Choice(config, layers, found, self.other_bytes, self.calibrated)

    def _refuse(self, target_bits: float | None, max_bytes: int | None, budget: int, weights: int) -> NoReturn:
        least = sum(min(layer.nbytes) for layer in self.layers)
        if max_bytes is None:
            raise FormatError(
                f"target_bits = {target_bits} is below {8 * least / weights:.3f}, what the narrowest widths take with "
                "scales and tables; ask for more, or take larger blocks or narrower widths"
            )
        raise FormatError(
            f"a model of {max_bytes:,} bytes is {least - budget:,} bytes too small: {self.other_bytes:,} stay dense "
            f"and the narrowest widths take {least:,}; ask for more, quantise more layers (skip) or take larger blocks"
        )


def measure_model(
    model: nn.Module,
    config: QuantisationConfig,
    *,
    widths: Sequence[int] | None = None,
    calibration: Tensor | None = None,
    weight_of: Callable[[Job], Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> Measured:
    """What every layer of `model` costs and errs at every width. Arguments and errors: `choose_widths`."""
    jobs, _ = plan_jobs(model, config, meta=True)
    if not jobs:
        raise FormatError("no layer is quantised, so there is nothing to choose; see the configuration's skip")
    own = None if calibration is None else Calibration(model, calibration)
    weight_of = weight_of or (lambda job: next(iter(job.layers.values())).weight.detach())
    layers = []
    for done, job in enumerate(jobs, 1):
        layers.append(measure_options(job, config, widths, weight_of(job), own, dtype))
        if progress:
            progress(job.name, done, len(jobs))
    other = other_bytes(model, jobs, dtype)
    return Measured(config, tuple(layers), other, own is not None, widths is not None)


def choose_widths(
    model: nn.Module,
    config: QuantisationConfig,
    *,
    target_bits: float | None = None,
    max_bytes: int | None = None,
    widths: Sequence[int] | None = None,
    calibration: Tensor | None = None,
    weight_of: Callable[[Job], Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    together: bool = False,
    progress: Progress | None = None,
) -> Choice:
    """Widths for the layers of `model` that `config` quantises, so that the sum of their errors is least.

    config       the format's kind and group, codebook, scale and skipped layers; its width plays no part. Layers that
                 an override finds keep what it says.
    target_bits  mean of the stored bits of those layers' weights, scales and tables included.
    max_bytes    bytes of the whole model; what stays dense counts in `dtype`. Give either this or target_bits.
    widths       bits on offer, of 1 to 8 and 16 for a layer that stays dense. None: 1 to 8, of which 1 only where the
                 budget needs it or calibration measures it, since the error of its weights says too little.
    calibration  token ids [s, t]; the model is run on them once for every layer and width up to 4 bits, its weights
                 replaced one at a time and put back. None: errors of weights alone, and the model may lie on the meta
                 device if `weight_of` reads the weight of a job.
    dtype        of scales, tables and of what stays dense.
    together     give query, key and value projections of a block one format, and gate and up one, so that they can be
                 merged into one product each.
    progress     (layer, layers done, layers in all).

    FormatError for a budget below the narrowest widths, with the number of bytes or bits that is missing.
    """
    if (target_bits is None) == (max_bytes is None):
        raise FormatError("give target_bits or max_bytes, one of the two")
    measured = measure_model(
        model, config, widths=widths, calibration=calibration, weight_of=weight_of, dtype=dtype, progress=progress
    )
    return (measured.together() if together else measured).choose(target_bits, max_bytes)


def sequences(tokens: Tensor) -> Tensor:
    """Token ids [t] of a text as sequences [s, 512] to calibrate on, or one shorter sequence; a rest is left out."""
    length = min(CALIBRATION_LENGTH, len(tokens))
    if length < 2:
        raise FormatError(f"the calibration text has {len(tokens)} tokens; give a longer one")
    return tokens[: len(tokens) // length * length].view(-1, length)


def choose_for_folder(
    folder: Path,
    config: QuantisationConfig,
    target_bits: float | None = None,
    max_bytes: int | None = None,
    widths: Sequence[int] | None = None,
    tokens: Tensor | None = None,
    device: torch.device | str | None = None,
    together: bool = False,
    progress: Progress | None = None,
) -> Choice:
    """`choose_widths` for a dense model folder.

    tokens: ids [t] of a text to calibrate on (see `sequences`); then the whole model is loaded in 16 bits. Without it
    one dense tensor is in memory at a time.
    """
    opened = open_source(folder)
    dtype = config.dtype or opened.dtype
    common = {
        "target_bits": target_bits,
        "max_bytes": max_bytes,
        "widths": widths,
        "dtype": dtype,
        "together": together,
    }
    if tokens is not None:
        model = load_dense(folder, device, opened.dtype)
        return choose_widths(model, config, calibration=sequences(tokens), progress=progress, **common)

    def weight_of(job: Job) -> Tensor:
        tensor = opened.files.get(opened.held[joined(job.name, "weight")])
        return tensor if device is None else tensor.to(device)

    return choose_widths(opened.model, config, weight_of=weight_of, progress=progress, **common)


def _beside(layers: Sequence[LayerOptions]) -> LayerOptions:
    """Layers of one input and the same formats as one of all their rows."""
    first = layers[0]
    sums = {name: tuple(map(sum, zip(*(getattr(layer, name) for layer in layers), strict=True))) for name in _SUMMED}
    names = tuple(name for layer in layers for name in layer.names)
    return LayerOptions(names, (sum(layer.shape[0] for layer in layers), first.shape[1]), first.formats, **sums)


def _allocate(layers: Sequence[LayerOptions], budget: int) -> Allocation | None:
    return allocate([layer.nbytes for layer in layers], [layer.errors for layer in layers], budget)


def _without_one_bit(layer: LayerOptions) -> LayerOptions:
    """The options of more than one bit, if there are several."""
    if len(layer.formats) == 1 or layer.formats[0] is None or layer.formats[0].bits > 1:
        return layer
    rest = {name: getattr(layer, name)[1:] for name in ("formats", "nbytes", "errors", "relative")}
    return replace(layer, **rest)


def measure_options(
    job: Job,
    config: QuantisationConfig,
    widths: Sequence[int] | None,
    dense: Tensor,
    calibration: Calibration | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> LayerOptions:
    """What the weight [n, k] of `job` costs, and what error it makes, at every width; None: all of its kind."""
    n, k = dense.shape
    formats: list[Format | None] = [job.recipe.format]
    if not any(re.search(pattern, job.name) for pattern in config.overrides):
        formats = _offered(job.recipe.format, widths)
    sizes, errors, relatives = [], [], []
    measured: tuple[float, float] | None = None
    for fmt in formats:
        if fmt is None:
            sizes.append(n * k * dtype.itemsize)
            errors.append(0.0)
            relatives.append(0.0)
            continue
        weight = quantise_weight(dense, replace(job.recipe, format=fmt), job.name, dtype)
        sizes.append(weight.nbytes)
        relative = 10 ** (-measure(job.name, dense, weight).sqnr_db / 10)
        relatives.append(relative)
        if calibration is None:
            errors.append(relative)
        elif measured is None or fmt.bits <= MEASURED_BITS:
            measured = _divergence(job, weight, calibration), relative
            errors.append(measured[0])
        else:
            errors.append(measured[0] * relative / measured[1] if measured[1] else 0.0)
    return LayerOptions(tuple(job.layers), (n, k), tuple(formats), tuple(sizes), tuple(errors), tuple(relatives))


def _offered(base: Format, widths: Sequence[int] | None) -> list[Format | None]:
    """`base` at the widths named, where 16 stands for dense; without names at all that its kind has."""
    found: list[Format | None] = []
    for bits in sorted(set(widths or WIDTHS)):
        try:
            found.append(None if bits == DENSE_BITS else replace(base, bits=bits))
        except FormatError:
            if widths:
                raise
    return found


def _divergence(job: Job, weight: QuantisedWeight, calibration: Calibration) -> float:
    """Mean KL, nats per token, from the model with the dense weight of `job` to the one with the low-bit one."""
    parameter = next(iter(job.layers.values())).weight
    dense = parameter.data
    try:
        parameter.data = reference.dequantise(weight, torch.float32).to(dense.device, dense.dtype)
        return calibration.divergence()
    finally:
        parameter.data = dense


def other_bytes(model: nn.Module, jobs: Sequence[Job], dtype: torch.dtype) -> int:
    """Bytes of everything that is stored beside the low-bit weights, tied tensors once, floating point in `dtype`."""
    seen = {id(layer.weight) for job in jobs for layer in job.layers.values()}
    total = 0
    for _, _, _, tensor in persistent(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.dtype.itemsize)
    return total


def parse_size(text: str) -> int:
    """Bytes of a text such as 8GB (10^9), 7.5GiB (2^30), 512MB or 123456. FormatError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise FormatError(f"{text!r} is not a size; write 8GB, 7.5GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])
