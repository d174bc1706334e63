"""Layers whose norms, residual sums and gates are done by their products: five kernels of a decoding step, not eight.

A product that is added to the residual stores it, multiplies it by the weight of the next norm and leaves partial sums
of its squares; the product behind it divides its own sums by the root of their mean. What each kernel does is in
kernels/cuda/csrc/epilogue.cuh, what it rounds in docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdk import ops
from fdk.kernels import Problem
from fdk.kernels.cuda import KERNEL, decode, decode_config, jit, prebuild, product_of, target_of
from fdk.nn import Linear

# Microseconds that a norm or gate takes between two products of a chain on an H200 (docs/findings.md).
_BETWEEN_US = 1.3


class Products(NamedTuple):
    """Of the matrix products of a layer, query/key/value and gate/up merged: modules, descriptions, configurations."""

    qkv: Any
    o: Any
    gate_up: Any
    down: Any


class Normed(NamedTuple):
    """Input [b, k] of a product; with `squares` [b, parts], the sums of which it is still to be divided by."""

    values: Tensor
    squares: Tensor | None = None


@dataclass(frozen=True)
class Fused:
    """A linear layer as one product with an epilogue, for batches of `rows`."""

    layer: Linear
    plan: decode.Plan
    eps: float = 0.0

    @classmethod
    def of(cls, layer: Linear, config: decode_config.Config, eps: float) -> Fused:
        """`layer` with a configuration of `arranged`; eps: of the norm in front of it, if there is one."""
        return cls(layer, decode.Plan(layer.weight, config), eps if config.epilogue.squares else 0.0)

    def __call__(self, x: Normed) -> Tensor:
        """[b, n], or [b, n / 2] of a gated product."""
        epilogue = self.plan.config.epilogue
        out = x.values.new_empty(len(x.values), self.layer.out_features // (1 + epilogue.gated))
        norm = {"squares": x.squares, "eps": self.eps} if epilogue.squares else {}
        self.plan(x.values, self.layer.bias, out, **norm)
        return out

    def add_to(self, residual: Tensor, x: Tensor, gamma: Tensor) -> Normed:
        """Add the product of x [b, k] to residual [b, n]; what the norm with weight gamma [n] makes of that."""
        out = torch.empty_like(residual)
        squares = torch.empty(len(x), self.plan.squares, dtype=torch.float32, device=x.device)
        self.plan(x, self.layer.bias, out, residual=residual, gamma=gamma, squares_out=squares)
        return Normed(out, squares)


@dataclass(frozen=True)
class FusedLayer:
    """A layer's products; `qkv` behind a norm of its own, and `down` in front of one, have no epilogue."""

    qkv: Fused
    o: Fused
    gate_up: Fused
    down: Fused

    @property
    def adds(self) -> bool:
        """Whether `down` adds to the residual."""
        return self.down.plan.config.epilogue.residual


def reason_against(layer: nn.Module, rows: int) -> str | None:
    """Why a layer's product takes no epilogue; None if it may."""
    if type(layer) is not Linear:
        return f"it is a {type(layer).__name__}, not a quantised linear layer"
    weight = layer.weight
    if weight.dtype != torch.bfloat16:
        return f"it multiplies {weight.dtype}, in which a norm in two parts can overflow"
    if weight.device.type != "cuda":
        return f"it lies on {weight.device}"
    choice = ops.choose(Problem(rows, weight.geometry, weight.device), layer.kernel)
    return None if choice.kernel is KERNEL else f"it is served by {choice.kernel.name}"


def worth(times: Iterable[tuple[float, float]]) -> bool:
    """Whether products with epilogues, of (microseconds with one, at best without), save the kernels between them."""
    with_epilogues, without = zip(*times, strict=True)
    return sum(with_epilogues) <= sum(without) + 3 * _BETWEEN_US


def epilogues(
    wanted: Sequence[bool],
    squares: Callable[[int, str], int],
    tables: Callable[[int], int],
) -> list[Products | None]:
    """Those of every layer in a row, None for layers that are not wanted.

    squares: partial sums of squares that "o" or "down" of a layer leaves per token; tables: of its gate and up.
    """
    residual, plain = decode_config.Epilogue(residual=True), decode_config.Epilogue(chained=True)
    found, before = [], 0
    for i, (fused, leads) in enumerate(zip(wanted, [*wanted[1:], False], strict=True)):
        if not fused:
            found.append(None)
            before = 0
            continue
        qkv = decode_config.Epilogue(squares=before) if before else plain
        gate_up = decode_config.Epilogue(squares=squares(i, "o"), gated=True, tables=tables(i))
        found.append(Products(qkv, residual, gate_up, residual if leads else plain))
        before = squares(i, "down") if leads else 0
    return found


def pays(products: Products, target: prebuild.Target) -> bool:
    """Whether a layer, `prebuild.Product`s, is predicted to be faster with epilogues of the decode kernel."""
    named = zip(products._fields, products, strict=True)
    return worth(prebuild.chain_us(one, target, gated=name == "gate_up") for name, one in named)


def arranged(
    layers: Sequence[Products | None], tables: Callable[[int], int], target: prebuild.Target
) -> list[Products | None]:
    """Configurations, with epilogues, of the products of every layer in a row; None for layers that keep their kernels.

    layers: `prebuild.Product`s, None for those that can have no epilogues;  tables: different tables of gate and up.
    """
    residual = decode_config.Epilogue(residual=True)
    wanted = [layer is not None and pays(layer, target) for layer in layers]

    def squares(i: int, name: str) -> int:
        product = getattr(layers[i], name)
        return decode_config.squares_left(product.geometry.n, prebuild.chain_config(product, residual, target))

    def config(product: prebuild.Product, epilogue: decode_config.Epilogue) -> decode_config.Config:
        return prebuild.chain_config(product, epilogue, target)

    return [
        chosen and Products(*map(config, layer, chosen))
        for layer, chosen in zip(layers, epilogues(wanted, squares, tables), strict=True)
    ]


def sources(
    layers: Sequence[Products | None], configs: Sequence[Products | None], target: prebuild.Target
) -> list[jit.Source]:
    """What the products of `arranged` are compiled from."""
    return [
        prebuild.source_of(product, config, target)
        for layer, chosen in zip(layers, configs, strict=True)
        for product, config in zip(layer or (), chosen or (), strict=bool(chosen))
    ]


def fuse(layers: Sequence[Products], rows: int, eps: float) -> list[FusedLayer | None]:
    """The layers of a model for batches of `rows`; None for those that keep kernels of their own between products."""
    described = [
        None
        if any(reason_against(one, rows) for one in layer)
        else Products(*(product_of(one.weight, rows) for one in layer))
        for layer in layers
    ]
    if not any(described):
        return [None] * len(layers)
    target = target_of(next(layer for layer, known in zip(layers, described, strict=True) if known).o.weight.device)
    configs = arranged(described, lambda i: _tables(layers[i].gate_up), target)
    jit.compile_ahead(sources(described, configs, target))
    return [
        chosen and FusedLayer(*(Fused.of(one, config, eps) for one, config in zip(layer, chosen, strict=True)))
        for layer, chosen in zip(layers, configs, strict=True)
    ]


def _tables(layer: Linear) -> int:
    """Different tables of gate and up."""
    return tables_of(layer.weight.parts.get("table"))


def tables_of(table: Tensor | None) -> int:
    """Different tables of gate and up, [2, 2^bits] or one for both; 1 without."""
    same = table is None or table.dim() < 2 or len(table) == 1 or torch.equal(table[0], table[1])
    return 1 if same else 2
