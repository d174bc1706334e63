"""The gate: no time is reported for a product whose result was not checked in the same process.

It applies `fdk.testing`'s bound. The exact product depends on the weight alone, so it is computed once for the
largest m and serves every provider, every smaller m and every number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdk import testing


class Gate:
    """The exact product of x [M, k] and a weight, and its bound; `check` holds the first m rows to them."""

    def __init__(self, x: Tensor, rows: Callable[[slice], Tensor], n: int) -> None:
        """rows: the weight's rows of a slice as float64 [.., k]; asked for in chunks, so that n * k can be large."""
        self.x = x
        self.n = n
        self._rows = rows
        self._expected: Tensor | None = None
        self._bounds: dict[bool, Tensor] = {}

    def _chunks(self) -> list[slice]:
        step = max(1, (1 << 24) // max(1, self.x.shape[1]))
        return [slice(start, min(start + step, self.n)) for start in range(0, self.n, step)]

    def _prepare(self, rounds_weights: bool) -> tuple[Tensor, Tensor]:
        if self._expected is None or rounds_weights not in self._bounds:
            expected, bounds = [], []
            wide = self.x.double()
            for chunk in self._chunks():
                dense = self._rows(chunk)
                y = wide @ dense.T
                expected.append(y)
                bounds.append(testing.dense_bound(self.x, dense, y, self.x.dtype, rounds_weights))
            self._expected = torch.cat(expected, 1)
            self._bounds[rounds_weights] = torch.cat(bounds, 1)
        return self._expected, self._bounds[rounds_weights]

    def check(
        self, product: Callable[[Tensor, Tensor], Tensor], m: int, rounds_weights: bool, tolerance: float = 1.0
    ) -> str | None:
        """None if product(x [m, k], out [m, n] full of NaN) is right in every element, else what is wrong.

        product returns the tensor that holds its result: out, or one of its own. tolerance: multiple of the bound.
        """
        expected, bound = self._prepare(rounds_weights)
        x = self.x[:m].contiguous()
        y = product(x, testing.poisoned(m, self.n, x.dtype, x.device))
        if y.shape != (m, self.n):
            return f"the product has shape {list(y.shape)}, not {[m, self.n]}"
        found = testing.violation(y, expected[:m], bound[:m] * tolerance)
        return None if found is None else str(found)

    def relative_error(self, product: Callable[[Tensor, Tensor], Tensor], m: int) -> float:
        """||y - exact|| / ||exact|| over all m n elements, 2-norms; after a successful `check`."""
        expected = self._expected[:m]
        x = self.x[:m].contiguous()
        y = product(x, testing.poisoned(m, self.n, x.dtype, x.device))
        return ((y.double() - expected).norm() / expected.norm()).item()
