"""Problems, and the configurations to try on each: what dispatch chooses, and changes to fields of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fdk.bench.problems import DTYPES
from fdk.errors import FdkError
from fdk.formats import parse
from fdk.kernels.cuda import (
    decode,
    decode_choice,
    decode_config,
    jit,
    prefill,
    prefill_choice,
    prefill_config,
    spread,
)
from fdk.packing.fragments import block_counts
from fdk.packing.layouts import Geometry

KERNELS = {"decode": decode, "prefill": prefill, "spread": spread}
SOURCES = {"decode": "decode.cuh", "prefill": "prefill.cuh", "spread": "prefill.cuh"}
SMS = 132
"""Multiprocessors that configurations are chosen for where no GPU says otherwise: those of an H100 and H200."""

CONFIGS = {"decode": decode_config.Config, "prefill": prefill_config.Config, "spread": prefill_config.Config}
Config = decode_config.Config | prefill_config.Config
Change = Mapping[str, int | bool]
"""Fields of a configuration by name."""


class VariantError(FdkError):
    """A problem or a configuration that makes no sense; the text says what to do instead."""


@dataclass(frozen=True)
class Problem:
    """m rows of x by a weight of one table [n, k], served by `kernel` ("decode", "prefill" or "spread")."""

    kernel: str
    format: str
    n: int
    k: int
    m: int
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{self.kernel} {self.format} {self.n}x{self.k} m={self.m}" + f" {self.dtype}" * (self.dtype != "bf16")

    @property
    def geometry(self) -> Geometry:
        return Geometry(parse(self.format), self.n, self.k, DTYPES[self.dtype], (self.n,))

    @property
    def stored(self) -> decode_config.Shape:
        """The shape of the weight; zero points, if any, are bytes."""
        return decode_config.shape_of(self.geometry, torch.uint8 if self.geometry.format.has_zeros else None)

    @property
    def shape(self) -> decode_config.Shape:
        """What is fixed at compile time: of the codes that are multiplied, which may be spread ones."""
        return (spread.dense_shape(self.stored) or self.stored) if self.kernel == "spread" else self.stored


@dataclass(frozen=True)
class Variant:
    """A configuration of a problem, and what it is called: the fields that differ from the chosen one."""

    name: str
    config: Config

    def fields(self) -> dict[str, object]:
        """Every field of the configuration by name, fit for a record."""
        return dataclasses.asdict(self.config)


CHOSEN = "chosen"


def is_hopper(arch: str) -> bool:
    """Whether the kernels are compiled as for Hopper, which compute capabilities from 9.0 on can run."""
    return jit.capability(arch) >= (9, 0)


def chosen(problem: Problem, sms: int = SMS, hopper: bool = True) -> Config:
    """What the kernel's own choice is; VariantError if it cannot serve the problem."""
    blocks = tuple(block_counts(problem.geometry))
    if problem.kernel == "decode":
        config = (
            decode_choice.choose_config(problem.shape, problem.m, sum(blocks), sms, (9, 0) if hopper else (8, 0))
            if problem.m <= decode_config.MAX_TOKENS
            else None
        )
    else:
        choice = spread if problem.kernel == "spread" else prefill_choice
        config = choice.choose(problem.stored, problem.m, blocks, sms) if hopper else None
    if config is None:
        raise VariantError(f"{problem}: the {problem.kernel} kernel does not serve it; try another kernel, m or format")
    return config


def field_types(kernel: str) -> dict[str, type]:
    """Fields of the kernel's configuration that can be varied, with their types."""
    names = {"int": int, "bool": bool}
    fields = dataclasses.fields(CONFIGS[kernel])
    return {field.name: names[field.type] for field in fields if field.type in names}


def parse_changes(texts: Sequence[str], kernel: str) -> list[Change]:
    """All combinations of texts like "stages=2,4": [{"stages": 2}, {"stages": 4}]."""
    types = field_types(kernel)
    lists = []
    for text in texts:
        name, equals, values = text.partition("=")
        if name not in types:
            raise VariantError(f"{text!r} names no field of the {kernel} kernel's configuration: {', '.join(types)}")
        if not equals or not all(value.isdigit() for value in values.split(",")):
            raise VariantError(f"{text!r}: write {name}= and whole numbers with commas between; 0 and 1 for no and yes")
        lists.append([(name, types[name](int(value))) for value in values.split(",")])
    return [dict(pairs) for pairs in itertools.product(*lists)]


def changed(problem: Problem, base: Config, change: Change, sms: int = SMS) -> Config:
    """`base` with other fields; with another cluster of the decode kernel, the blocks that it needs, unless named."""
    if unknown := change.keys() - field_types(problem.kernel).keys():
        raise VariantError(f"{', '.join(sorted(unknown))}: no fields of the {problem.kernel} kernel's configuration")
    config = dataclasses.replace(base, **change)
    if problem.kernel == "decode" and "cluster" in change and "blocks" not in change:
        if config.cluster not in (1, 2, 4, 8):
            raise VariantError(f"cluster={config.cluster}: clusters have 1, 2, 4 or 8 CTAs")
        at_once = decode_config.clusters_at_once(sms, config.cluster)
        config = dataclasses.replace(config, blocks=max(1, -(-sum(block_counts(problem.geometry)) // at_once)))
    return config


def variants(problem: Problem, changes: Sequence[Change], sms: int = SMS, hopper: bool = True) -> list[Variant]:
    """The chosen configuration and its changes, each once; named by the fields in which they differ from it."""
    base = chosen(problem, sms, hopper)
    found = {base: CHOSEN}
    for change in changes:
        config = changed(problem, base, change, sms)
        different = [
            f"{field.name}={int(getattr(config, field.name))}"
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(base, field.name)
        ]
        found.setdefault(config, " ".join(different))
    return [Variant(name, config) for config, name in found.items()]


def shared_bytes(problem: Problem, config: Config, hopper: bool = True) -> int:
    """Shared memory that a CTA needs."""
    return config.shared_bytes(problem.shape, *([hopper] if problem.kernel == "decode" else []))


def unfit(problem: Problem, config: Config, hopper: bool = True) -> str | None:
    """Why a configuration cannot run, as far as that is known without compiling it, or None."""
    if problem.kernel == "decode" and config.tokens < problem.m:
        return f"is compiled for {config.tokens} tokens, the problem has {problem.m}"
    try:
        needed = shared_bytes(problem, config, hopper)
    except (ArithmeticError, ValueError, KeyError) as error:
        return f"its shared memory cannot be laid out ({type(error).__name__}: {error})"
    if needed > decode_config.MAX_SHARED:
        return f"needs {needed} bytes of shared memory, a CTA has {decode_config.MAX_SHARED}"
    if config.threads > 1024:
        return f"has {config.threads} threads, a CTA has at most 1024"
    return None


def defines(problem: Problem, config: Config, hopper: bool = True) -> dict[str, int]:
    """Macros that it is compiled with."""
    return config.defines(problem.shape, *([hopper] if problem.kernel == "decode" else []))
