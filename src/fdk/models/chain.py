"""Layers whose norms, residual sums and gates are done by their products: five kernels of a decoding step, not eight.

A product that is added to the residual stores it, multiplies it by the weight of the next norm and leaves partial sums
of its squares; the product behind it divides its own sums by the root of their mean. What each kernel does is in
kernels/cuda/csrc/epilogue.cuh, what it rounds in docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fdk import ops
from fdk.kernels import Problem
from fdk.kernels.cuda import KERNEL, decode, decode_config, prefill
from fdk.nn import Linear

# Microseconds that a norm or gate takes between two products of a chain on an H200 (docs/findings.md).
_BETWEEN_US = 1.3
# Whether layers that the prefill kernel serves leave their norms to it too.
_TILES = False
# Whether, in a chain, the prefill kernel multiplies gate and up where it is the faster one, and the gate is a kernel.
_TILED_GATES = False


class Products(NamedTuple):
    """The matrix products of a layer, query/key/value and gate/up merged."""

    qkv: nn.Module
    o: nn.Module
    gate_up: nn.Module
    down: nn.Module


class Normed(NamedTuple):
    """Input [b, k] of a product; with `squares` [b, parts], the sums of which it is still to be divided by."""

    values: Tensor
    squares: Tensor | None = None


@dataclass(frozen=True)
class Fused:
    """A linear layer as one product with an epilogue, for batches of `rows`."""

    layer: Linear
    plan: decode.Plan | prefill.Plan
    eps: float = 0.0

    @classmethod
    def of(
        cls, layer: Linear, rows: int, epilogue: decode_config.Epilogue, eps: float = 0.0, tiles: bool = False
    ) -> Fused:
        """`layer` with `epilogue`, for a layer that `pays` accepts, or with `tiles` `in_tiles`."""
        return cls(layer, (KERNEL.tiled if tiles else KERNEL.chained)(layer.weight, rows, epilogue), eps)

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


class Epilogues(NamedTuple):
    """What becomes of the sums of a layer's products."""

    qkv: decode_config.Epilogue
    o: decode_config.Epilogue
    gate_up: decode_config.Epilogue
    down: decode_config.Epilogue


def epilogues(
    wanted: Sequence[bool],
    squares: Callable[[int, str], int],
    tables: Callable[[int], int],
    gated: bool = True,
) -> list[Epilogues | None]:
    """Those of every layer in a row, None for layers that are not wanted.

    squares: partial sums of squares that "o" or "down" of a layer leaves per token; tables: of its gate and up; gated:
    whether the product of those two is gated.
    """
    residual, plain = decode_config.Epilogue(residual=True), decode_config.Epilogue(chained=True)
    found, before = [], 0
    for i, (fused, leads) in enumerate(zip(wanted, [*wanted[1:], False], strict=True)):
        if not fused:
            found.append(None)
            before = 0
            continue
        qkv = decode_config.Epilogue(squares=before) if before else plain
        gate_up = decode_config.Epilogue(squares=squares(i, "o"), gated=gated, tables=tables(i) if gated else 1)
        found.append(Epilogues(qkv, residual, gate_up, residual if leads else plain))
        before = squares(i, "down") if leads else 0
    return found


def pays(products: Products, rows: int) -> bool:
    """Whether a layer can have epilogues, and is predicted to be faster with them; only the decode kernel has any."""
    if any(reason_against(layer, rows) for layer in products):
        return False
    times = [KERNEL.chain_us(layer.weight, rows, gated=layer is products.gate_up) for layer in products]
    return worth(times)


def in_tiles(products: Products, rows: int) -> bool:
    """Whether the prefill kernel serves a layer, so that its products take norms, though not the gate."""
    if any(reason_against(layer, rows) for layer in products):
        return False
    norm, residual = decode_config.Epilogue(squares=1), decode_config.Epilogue(residual=True)
    both = zip(products, (norm, residual, norm, residual), strict=True)
    return all(KERNEL.tiled_config(layer.weight, rows, epilogue) for layer, epilogue in both)


def fuse(layers: Sequence[Products], rows: int, eps: float) -> list[FusedLayer | None]:
    """The layers of a model for batches of `rows`; None for those that keep kernels of their own between products."""
    residual = decode_config.Epilogue(residual=True)
    wanted = [pays(products, rows) for products in layers]
    tiles = _TILES and not any(wanted)
    if tiles:
        wanted = [in_tiles(products, rows) for products in layers]

    def squares(i: int, name: str) -> int:
        weight = getattr(layers[i], name).weight
        if tiles:
            return weight.shape[0] // 64
        return decode_config.squares_left(weight.shape[0], KERNEL.chain_config(weight, rows, residual))

    plan = epilogues(wanted, squares, lambda i: _tables(layers[i].gate_up), gated=not tiles)
    if not tiles:
        KERNEL.compile_chained(
            (layer.weight, rows, epilogue)
            for products, chosen in zip(layers, plan, strict=True)
            for layer, epilogue in zip(products, chosen or (), strict=bool(chosen))
        )

    def fused(layer: Linear, epilogue: decode_config.Epilogue) -> Fused:
        without = decode_config.Epilogue(squares=epilogue.squares)
        if _TILED_GATES and epilogue.gated and KERNEL.tiled_config(layer.weight, rows, without):
            return Fused.of(layer, rows, without, eps, tiles=True)
        return Fused.of(layer, rows, epilogue, eps if epilogue.squares else 0.0, tiles)

    found: list[FusedLayer | None] = []
    for products, chosen in zip(layers, plan, strict=True):
        made = [fused(layer, one) for layer, one in zip(products, chosen or (), strict=bool(chosen))]
        found.append(FusedLayer(*made) if made else None)
    return found


def _tables(layer: Linear) -> int:
    """Different tables of gate and up."""
    return tables_of(layer.weight.parts.get("table"))


def tables_of(table: Tensor | None) -> int:
    """Different tables of gate and up, [2, 2^bits] or one for both; 1 without."""
    same = table is None or table.dim() < 2 or len(table) == 1 or torch.equal(table[0], table[1])
    return 1 if same else 2
