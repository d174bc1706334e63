"""The weight of a line before any provider has it, and what a provider makes of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fdk import reference
from fdk.bench.problems import DTYPES, Line
from fdk.formats import Format, parse
from fdk.packing.bits import unpack_codes
from fdk.testing import random_weight
from fdk.weight import QuantisedWeight


class Unavailable(Exception):
    """This provider cannot run this line; the text is the reason."""


def drawn_on_device(
    format: Format, n: int, k: int, dtype: torch.dtype, seed: int, device: torch.device
) -> QuantisedWeight:
    """`fdk.testing.random_weight`, drawn on the device in a moment and with rows of unit norm.

    A product of normal activations is normal again, so the layers of a chain neither overflow nor vanish.
    """
    if format.storage != "plain":
        weight = random_weight(format, n, k, dtype, seed, device)
        norm = reference.dequantise(weight, torch.float32, slice(0, 64)).norm(dim=1).square().mean().sqrt()
        weight.parts["scales"].div_(norm)
        return weight
    generator = torch.Generator(device).manual_seed(seed)
    groups, entries = format.groups(k), 1 << format.bits
    width = format.code_bytes(1, k)
    # Uniformly random bytes are a stream of uniformly random codes; the bits behind the last code are zero.
    codes = torch.randint(0, 256, (n, width), generator=generator, device=device, dtype=torch.uint8)
    if padding := width * 8 - k * format.bits:
        codes[:, -1] &= 0xFF >> padding
    parts = {"codes": codes}
    values = torch.arange(entries, device=device).float() - format.offset
    if format.kind.table == "fixed":
        values = torch.tensor(format.kind.values, device=device)
    elif format.is_table:
        values = torch.randn(entries, generator=generator, device=device).sort().values
    power = values.square().mean()
    if format.is_table:
        parts["table"] = values.to(dtype).view(1, entries)
    if format.has_zeros:
        parts["zeros"] = torch.randint(0, entries, (n, groups), generator=generator, device=device, dtype=torch.uint8)
        power = torch.tensor((entries**2 - 1) / 6, device=device)
    signs = torch.randint(0, 2, (n, groups), generator=generator, device=device) * 2 - 1
    sizes = (torch.rand(n, groups, generator=generator, device=device) + 0.5) / (power.sqrt() * math.sqrt(k))
    parts["scales"] = (signs * sizes).to(dtype)
    return QuantisedWeight.from_parts(format, k, parts)


class Source:
    """The weight of a line before any provider has it: stored codes and scales, or a dense matrix; seeded."""

    def __init__(self, line: Line, n: int, k: int, device: torch.device, seed: int) -> None:
        self.n, self.k = n, k
        dtype = DTYPES[line.dtype]
        on_device = device.type == "cuda"
        self.dense: Tensor | None = None
        self.weight: QuantisedWeight | None = None
        if line.dense:
            if on_device:
                generator = torch.Generator(device).manual_seed(seed)
                self.dense = (torch.randn(n, k, generator=generator, device=device) / math.sqrt(k)).to(dtype)
            else:
                generator = torch.Generator().manual_seed(seed)
                self.dense = torch.randn(n, k, generator=generator).to(dtype).to(device)
            return
        draw = drawn_on_device if on_device else random_weight
        self.weight = draw(parse(line.format), n, k, dtype, seed, device)
        if line.family == "marlin_lut":
            parts = dict(self.weight.parts)
            parts["table"] = torch.arange(-8, 8, device=device).to(dtype).view(1, 16)
            self.weight = QuantisedWeight(self.weight.geometry, parts)

    def exact_rows(self, rows: slice) -> Tensor:
        """Rows of the weight in float64, without a rounding."""
        if self.dense is not None:
            return self.dense[rows].double()
        return reference.dequantise(self.weight, torch.float64, rows)

    def codes(self) -> Tensor:
        """uint8 [n, k]"""
        return unpack_codes(self.weight.parts["codes"], self.weight.format.bits, self.k)


class Prepared(ABC):
    """A provider's operands for one line: `copies` weights that share no memory."""

    rounds_weights = True
    """Whether scaled weights are rounded before they are multiplied, see `fdk.testing.error_bound`."""

    tolerance = 1.0
    """Multiple of the bound that its results may leave. More than 1 only for others' kernels, which may round partial
    sums or products to the activation's dtype; a wrong result is larger by orders of magnitude."""

    def __init__(self, weight_bytes: int) -> None:
        self.weight_bytes = weight_bytes
        self.weights: list = []

    @abstractmethod
    def another(self) -> object:
        """A new copy of the operands."""

    @abstractmethod
    def run(self, x: Tensor, index: int, out: Tensor) -> Tensor:
        """x [m, k] times the weight of copy `index`; returns the tensor that holds the result, out or a new one."""

    def tensors(self, index: int) -> list[Tensor]:
        """What a product reads of copy `index`, the largest tensor first."""
        weight = self.weights[index]
        if isinstance(weight, QuantisedWeight):
            weight = tuple(weight.parts.values())
        found = [weight] if isinstance(weight, Tensor) else list(weight)
        return sorted(found, key=lambda tensor: -tensor.numel() * tensor.element_size())

    def copy_to(self, copies: int) -> None:
        """Have `copies` copies; a first one exists."""
        self.weights = self.weights[:copies]
        while len(self.weights) < copies:
            self.weights.append(self.another())

    def rounds(self, m: int) -> bool:
        """`rounds_weights` for m rows of activations."""
        return self.rounds_weights

    def kernel(self, m: int) -> str | None:
        """Name of the kernel behind it, where it is known."""
        return None


def bytes_of(*parts: Tensor) -> int:
    """Bytes of tensors together."""
    return sum(part.numel() * part.element_size() for part in parts)
