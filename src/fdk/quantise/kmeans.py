"""One table per tensor by 1-D k-means on block-scaled weights, from a weighted histogram.

Minimises sum of (w - scale * table[code])^2 = sum of scale^2 * (x - table[code])^2 with x = w / scale: k-means on
x with weights scale^2. All passes over the weights go into one histogram; the iteration then costs 2^bits binary
searches a step, whatever the size of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

# The cell of x keeps sign, exponent and MANTISSA bits of KNEE + |x|: 6e-5 wide at 0, 0.1 % of x far out, so that
# an outlier costs no resolution. 0 and +-1, where absmax scaling puts one weight of every block, are centres.
KNEE = 1 / 16
MANTISSA = 10
DROPPED = 23 - MANTISSA
# A scale is at least max |w| / k, so |x| stays below 2^24.
HALF = (24 + 4) << MANTISSA
LANES = 4
WEIGHT_BITS = 30
# Windows of the dynamic programme, in centres: first +-4 in halves, then +-1 in eighths.
REACH = 8
STRIDES = (0.5, 0.125)


def fit_table(blocks_and_scales: Iterable[tuple[Tensor, Tensor]], largest_scale: Tensor, bits: int) -> Tensor:
    """The k-means table of a tensor: float32 [2^bits] on the CPU, ascending; fewer distinct values repeat the last.

    blocks_and_scales   chunks of (weights [n, groups, group], scales as stored [n, groups]), finite, any device.
    largest_scale       the largest scale over all chunks, a tensor with one element.
    """
    histogram = None
    for blocks, scales in blocks_and_scales:
        histogram = _count(histogram, blocks, scales, largest_scale)
    mass = histogram.sum(0).cpu().numpy().astype(np.float64)
    filled = mass > 0
    return torch.from_numpy(weighted_kmeans(_cell_centres()[filled], mass[filled], 1 << bits)).float()


def _cell_centres() -> np.ndarray:
    """Values of x at the centres of the 2 * HALF + 1 cells, ascending, float64."""
    bits = (np.arange(HALF + 1, dtype=np.int32) << DROPPED) + np.float32(KNEE).view(np.int32)
    positive = bits.view(np.float32).astype(np.float64) - KNEE
    return np.concatenate([-positive[:0:-1], positive])


def _count(histogram: Tensor | None, blocks: Tensor, scales: Tensor, largest: Tensor) -> Tensor:
    """Add a chunk to the histogram int64 [LANES, cells]; integers make the sum independent of its order."""
    if histogram is None:
        histogram = torch.zeros(LANES, 2 * HALF + 1, dtype=torch.int64, device=blocks.device)
    relative = scales.double() / largest.double()
    mass = relative.square_().mul_(1 << WEIGHT_BITS).round_().long()
    x = blocks / scales.float()[..., None]
    # Adding half a cell to the bit pattern rounds to the nearest centre.
    first = int(np.float32(KNEE).view(np.int32)) - (1 << (DROPPED - 1))
    cell = x.abs().add_(KNEE).view(torch.int32).sub_(first).bitwise_right_shift_(DROPPED).clamp_(max=HALF)
    cell = torch.where(x < 0, -cell, cell).add_(HALF).long()
    lanes = LANES if cell.numel() % LANES == 0 else 1
    mass = mass[..., None].expand(blocks.shape).reshape(lanes, -1)
    # One lane for each share of the chunk, because scatter_add_ runs in parallel over rows only.
    histogram[:lanes].scatter_add_(1, cell.view(lanes, -1), mass)
    return histogram


def weighted_kmeans(points: np.ndarray, mass: np.ndarray, size: int) -> np.ndarray:
    """`size` ascending centres, float64, of ascending `points` with positive `mass`; fewer points repeat the last.

    Lloyd's iteration moves centres locally but needs very many steps to move a centre from one region to another,
    and stops early on an atom. So boundaries are first improved together by dynamic programming in windows of
    `REACH * stride` centres around the current ones, which also gives empty clusters something to do.
    """
    if len(points) <= size:
        return np.concatenate([points, np.full(size - len(points), points[-1])])
    sums = tuple(np.concatenate([[0.0], np.cumsum(mass * points**power)]) for power in range(3))
    edges = _lloyd(points, sums, _edges(points, _companding_start(points, mass, size)), steps=10)
    for stride in STRIDES:
        error = np.inf
        for _ in range(6):
            edges, next_error = _improve_together(sums, edges, stride)
            if not error - next_error > 1e-4 * next_error:
                break
            error = next_error
    edges = _lloyd(points, sums, edges, steps=100)
    centres = _centres(sums, np.unique(edges))
    return np.concatenate([centres, np.full(size - len(centres), centres[-1])])


def _companding_start(points: np.ndarray, mass: np.ndarray, size: int) -> np.ndarray:
    """Centres spaced by the cube root of the density, which is optimal for many centres (Panter and Dite, 1951)."""
    width = np.gradient(points)
    window = max(1, len(points) // 256)
    density = np.convolve(mass / width, np.full(window, 1 / window), mode="same")
    share = np.cumsum(np.cbrt(density) * width)
    return np.interp((np.arange(size) + 0.5) / size, share / share[-1], points)


def _edges(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Cluster j of ascending centres holds points[edges[j] : edges[j + 1]]; a point midway goes to the lower."""
    inner = np.searchsorted(points, (centres[1:] + centres[:-1]) / 2, side="right")
    return np.concatenate([[0], inner, [len(points)]])


def _centres(sums: tuple[np.ndarray, ...], edges: np.ndarray) -> np.ndarray:
    """Weighted means of non-empty clusters."""
    return np.diff(sums[1][edges]) / np.diff(sums[0][edges])


def _lloyd(points: np.ndarray, sums: tuple[np.ndarray, ...], edges: np.ndarray, steps: int) -> np.ndarray:
    """Lloyd's iteration until no boundary moves; empty clusters stay empty, at the upper end."""
    for _ in range(steps):
        kept = np.unique(edges)
        empty = np.full(len(edges) - len(kept), len(points))
        moved = np.concatenate([_edges(points, _centres(sums, kept)), empty])
        if np.array_equal(moved, edges):
            break
        edges = moved
    return edges


def _improve_together(sums: tuple[np.ndarray, ...], edges: np.ndarray, stride: float) -> tuple[np.ndarray, float]:
    """The best boundaries and their error, where edge j may go to the place of edge j + i * stride, |i| <= REACH."""
    size, options = len(edges) - 1, 2 * REACH + 1
    order = np.arange(size + 1)
    places = order[:, None] + stride * np.arange(-REACH, REACH + 1)
    option = np.rint(np.interp(places, order, edges)).astype(np.int64)
    option[0], option[-1] = 0, edges[-1]
    # cost[j][a, b]: error of cluster j from the a-th option of edge j to the b-th option of edge j + 1.
    mass, first, second = (s[option][1:, None, :] - s[option][:-1, :, None] for s in sums)
    empty = option[1:, None, :] == option[:-1, :, None]
    backwards = option[1:, None, :] < option[:-1, :, None]
    cost = second - np.square(first) / np.where(empty, 1.0, mass)
    cost[empty], cost[backwards] = 0.0, np.inf

    best = cost[0].min(0)
    came_from = np.zeros((size, options), dtype=np.int64)
    for j in range(1, size):
        total = best[:, None] + cost[j]
        came_from[j] = total.argmin(0)
        best = total[came_from[j], np.arange(options)]
    chosen = edges.copy()
    last = REACH
    for j in range(size - 1, 0, -1):
        last = came_from[j][last]
        chosen[j] = option[j][last]
    return chosen, float(best[REACH])
