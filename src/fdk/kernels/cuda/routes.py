"""Which CUDA path serves a product: a pure function of its shape, from predicted times.

decode   weights dequantised on the way into mma.sync, up to 64 rows of x per launch (decode.py)
prefill  the same into wgmma, any number of rows, compute capability 9.0 (prefill.py)
spread   of 16:32 sparse integers, codes spread to memory by their masks, then as prefill (spread.py)
dense    weights dequantised to memory, then cuBLAS (dense.py); rounds scaled weights

The constants are fits to graph replays with cold weights on an H200, 2026-11-21 (docs/findings.md): within 15 % at
4096^2 to 14336 x 4096. Another device scales them by its multiprocessors, as if its memory were as much slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fdk.kernels.cuda import decode_choice, decode_config, prefill_choice, prefill_config, spread

_SMS = 132

# Decode: microseconds around the loop, clocks at 1.83 GHz that one multiprocessor spends on a unit of 64 rows x 64
# columns, at one token by width and on top of that by tokens (one bit: see the second table), and bytes of x that it
# fetches in a microsecond.
_DECODE_START, _DECODE_CLOCKS_PER_US, _DECODE_X_BYTES_PER_US = 2.1, 1830, 58e3
_UNIT_CLOCKS = (64, 98, 109, 127, 194, 207, 229, 241)
_NESTED_CLOCKS, _PLANE_CLOCKS = 49, 25  # a unit of planes, and each of them
_SPARSE_CLOCKS = {decode_config.SPARSE_INT: 195, decode_config.SPARSE_TABLE: 300}
_NESTED_BYTES_CLOCKS, _PLANE_BYTES_CLOCKS, _SPARSE_BYTES_CLOCKS = 22, 24.5, 115  # of integer products
_EIGHT_BITS_BYTES_CLOCKS = 200
_TOKEN_CLOCKS = {1: 0, 2: 5, 4: 10, 8: 15, 16: 34, 32: 150, 64: 500}
_ONE_BIT_TOKEN_CLOCKS = {1: 0, 2: 20, 4: 30, 8: 30, 16: 55, 32: 190, 64: 510}
_THREE_BITS_CLOCKS_16 = 10
_ZEROS_CLOCKS_32 = 90
# Of planes by integer products: how much longer six and more take in blocks side by side, and of the multiprocessors,
# down to which fewer of them have as much more of the memory each.
_SIDE_BY_SIDE, _BUSY = 1.25, 0.65
_X_IN_PIECES = 0.6  # of the time of x, where it arrives as products go on
# Of a block, what clusters that share one save of its time; of up to three blocks.
_HALF_BLOCK, _HALF_OF_FEW = 0.2, 0.4
_SINGLE_LOOKUP_CLOCKS_16 = 15  # of 5 bits and more, whose look-ups hide products of more tokens

# Dense: bytes per microsecond that dequantising reads and writes, and cuBLAS reads; its operations per microsecond, and
# the starts of both kernels.
_DEQUANTISE_BYTES, _CUBLAS_BYTES, _CUBLAS_OPERATIONS, _DENSE_START = 3.35e6, 4.0e6, 700e6, 5.5

# Spreading codes: bytes per microsecond that are read and written, and its start. Decoding with fewer warps than these
# does not hide how masks become operands.
_SPREAD_BYTES, _SPREAD_START = 3.75e6, 2.0
_SPARSE_WARPS = 8


@dataclass(frozen=True)
class Route:
    """A way to serve a product.

    name    decode, prefill, spread or dense
    us      predicted time in microseconds
    rows    rows of x per launch: all of them, but for decode
    config  the configuration of decode or prefill at that many rows; of spread, that of the product
    """

    name: str
    us: float
    rows: int
    config: decode_config.Config | prefill_config.Config | None = None

    @property
    def rounds(self) -> bool:
        """Whether scaled weights are rounded to 16 bits before they are multiplied."""
        return self.name == "dense" or (self.name in ("prefill", "spread") and self.config.rounds)


def _unit_clocks(shape: decode_config.Shape, digits: bool) -> float:
    if digits and shape.sparse:
        return _SPARSE_BYTES_CLOCKS
    if digits and shape.nested:
        return _NESTED_BYTES_CLOCKS + _PLANE_BYTES_CLOCKS * shape.bits
    if shape.sparse:
        return _SPARSE_CLOCKS[shape.kind]
    if shape.nested:
        return _NESTED_CLOCKS + _PLANE_CLOCKS * shape.bits
    # Of other widths nothing hangs on what integer products save: no other path is near.
    return _EIGHT_BITS_BYTES_CLOCKS if digits and shape.bits == 8 else _UNIT_CLOCKS[shape.bits - 1]


def decode_us(
    shape: decode_config.Shape, m: int, rows: int, blocks: int, sms: int = _SMS, capability: tuple[int, int] = (9, 0)
) -> float:
    """Predicted time of m rows of x by the decode kernel, `rows` of them per launch: that of the busiest CTA."""
    tokens_clocks = _ONE_BIT_TOKEN_CLOCKS if shape.bits == 1 and not shape.nested else _TOKEN_CLOCKS
    config = decode_choice.choose_config(shape, rows, blocks, sms, capability)
    cta_units = -(-shape.units // config.cluster)
    more = tokens_clocks[config.tokens]
    if config.tokens == 16 and shape.bits > 4 and not shape.nested:
        more = _SINGLE_LOOKUP_CLOCKS_16
    if config.tokens == 16 and shape.bits == 3 and not shape.nested:
        more += _THREE_BITS_CLOCKS_16
    if config.tokens == 32 and shape.zeros:
        more += _ZEROS_CLOCKS_32
    saved = (_HALF_OF_FEW if config.blocks <= 3 else _HALF_BLOCK) * config.half_blocks
    clocks = (config.blocks - saved) * cta_units * (_unit_clocks(shape, config.digits) + more)
    if shape.nested and config.digits:
        clocks *= _SIDE_BY_SIDE if config.row_warps > 1 and shape.bits > 5 else 1.0
        clocks *= max(_BUSY, min(1.0, config.clusters(blocks) * config.cluster / sms))
    if shape.sparse:
        clocks *= max(1.0, _SPARSE_WARPS / config.warps)
    x_us = (rows - 1) * cta_units * 128 / _DECODE_X_BYTES_PER_US * (_X_IN_PIECES if config.interleaved else 1.0)
    total = m // rows * (_DECODE_START + clocks / _DECODE_CLOCKS_PER_US + x_us)
    if rest := m % rows:
        total += decode_us(shape, rest, rows_at_once(shape, rest, blocks, sms, capability), blocks, sms, capability)
    return total


def dense_us(shape: decode_config.Shape, m: int, sms: int = _SMS) -> float:
    """Predicted time of m rows of x by dequantised weights and cuBLAS."""
    weights = shape.n * shape.k
    moved = weights * (shape.bits / 8 + 2 / shape.group + 2) / _DEQUANTISE_BYTES
    product = max((2 * weights + 2 * m * (shape.n + shape.k)) / _CUBLAS_BYTES, 2 * m * weights / _CUBLAS_OPERATIONS)
    return (moved + product) * _SMS / sms + _DENSE_START


def spread_us(shape: decode_config.Shape, m: int, blocks: tuple[int, ...], sms: int = _SMS) -> float | None:
    """Predicted time of m rows of x by spread codes and prefill; None if it cannot serve them."""
    dense = spread.dense_shape(shape)
    product = None if dense is None else prefill_choice.predict_us(dense, m, blocks, sms)
    if product is None:
        return None
    moved = shape.n * shape.k * (shape.bits + dense.bits) / 8 / _SPREAD_BYTES
    return moved * _SMS / sms + _SPREAD_START + product


def rows_at_once(shape: decode_config.Shape, m: int, blocks: int, sms: int, capability: tuple[int, int]) -> int:
    """Rows of x per launch of the decode kernel: all m, or as many of 64, 32, ... as fit; 0 if not even one does.

    What launches of that many rows leave over must fit too, in launches of its own.
    """
    for rows in (min(m, 64), 32, 16, 8, 4, 2, 1):
        rest = m % rows
        fits = rows <= m and decode_choice.choose_config(shape, rows, blocks, sms, capability)
        if fits and (rest == 0 or rows_at_once(shape, rest, blocks, sms, capability)):
            return rows
    return 0


@lru_cache(maxsize=4096)
def routes(
    shape: decode_config.Shape, m: int, blocks: tuple[int, ...], sms: int, capability: tuple[int, int]
) -> tuple[Route, ...]:
    """Every route that can serve m rows of x, the fastest by prediction first; never empty.

    blocks: blocks of 64 rows of each table's range of rows.
    """
    found = [Route("dense", dense_us(shape, m, sms), m)]
    if rows := rows_at_once(shape, m, sum(blocks), sms, capability):
        config = decode_choice.choose_config(shape, rows, sum(blocks), sms, capability)
        found.append(Route("decode", decode_us(shape, m, rows, sum(blocks), sms, capability), rows, config))
    if capability == (9, 0) and (config := prefill_choice.choose(shape, m, blocks, sms)):
        us = prefill_choice.predict_us(shape, m, blocks, sms)
        if us is not None:
            found.append(Route("prefill", us, m, config))
    if capability == (9, 0) and (config := spread.choose(shape, m, blocks, sms)):
        found.append(Route("spread", spread_us(shape, m, blocks, sms), m, config))
    return tuple(sorted(found, key=lambda route: route.us))


def launched(
    shape: decode_config.Shape, m: int, blocks: tuple[int, ...], sms: int, capability: tuple[int, int]
) -> list[Route]:
    """The routes of a product of m rows of x: the fastest, and decoding for the rows that its launches leave over."""
    found = [routes(shape, m, blocks, sms, capability)[0]]
    while m % found[-1].rows:
        m %= found[-1].rows
        found.append(next(r for r in routes(shape, m, blocks, sms, capability) if r.name == "decode"))
    return found
