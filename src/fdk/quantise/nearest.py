"""The nearest entry of a table: exact for every float32 input, and as fast for 256 entries as for 2."""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = (1 << 10, 1 << 12, 1 << 14, 1 << 16)


class Nearest:
    """code(x) = argmin over i of |x - table[i]|, the lowest index among ties, for finite float32 x.

    A cell is the truncation of an increasing float32 function of x. That function is monotone whatever its
    rounding, so a boundary between two entries that falls into another cell than x is decided by comparing
    cells, and only a boundary in the same cell needs one comparison with x itself. If no number of cells up
    to 65536 keeps boundaries apart, `torch.bucketize` takes over (the same answer, 20 times slower).

    table       [entries <= 256], any order, repeated values allowed; rounded to the dtype it is stored in.
    midpoints   "exact": compared as real numbers. "storage": (a + b) / 2 rounded to the table's dtype, which
                is what the source project compares with; a value equal to one goes to the lower neighbour.
    """

    def __init__(self, table: Tensor, device: torch.device | str | None = None, midpoints: str = "exact") -> None:
        device = table.device if device is None else device
        self.table = table.detach().to(device, torch.float32)
        ascending, entry = torch.sort(table.detach().to("cpu"), stable=True)
        if midpoints == "storage":
            bounds = ((ascending[1:] + ascending[:-1]) / 2).to(torch.float32)
        else:
            first = torch.ones_like(ascending, dtype=torch.bool)
            first[1:] = ascending[1:] != ascending[:-1]
            ascending, entry = ascending[first], entry[first]
            bounds = _last_of_lower_entry(ascending.double(), entry)
        self._bounds = bounds.to(device)
        in_order = torch.equal(entry, torch.arange(entry.numel()))
        self._entry = None if in_order else entry.to(device, torch.uint8)
        self._cells = self._cells_apart()

    def _cells_apart(self) -> int:
        """Build the look-up tables with the smallest number of cells that keeps boundaries apart; 0 if none does."""
        if not self._bounds.numel():
            return 0
        low, high = self._bounds[0].item(), self._bounds[-1].item()
        for cells in CELLS:
            self._low, self._rate = low, (cells - 2) / max(high - low, 1e-30)
            self._top = cells - 1
            cell = self._cell(self._bounds).long()
            count = torch.bincount(cell, minlength=cells)
            if count.max() <= 1:
                self._below = (count.cumsum(0) - count).to(torch.uint8)
                unbounded = torch.full((cells,), torch.inf, dtype=torch.float32, device=cell.device)
                self._bound = unbounded.scatter_(0, cell, self._bounds)
                return cells
        return 0

    def _cell(self, x: Tensor) -> Tensor:
        return x.sub(self._low).mul_(self._rate).clamp_(0, self._top).to(torch.int32)

    def codes(self, x: Tensor) -> Tensor:
        """uint8 codes of x (finite float32, any shape), on the same device."""
        flat = x.reshape(-1)
        if not self._bounds.numel():
            code = torch.zeros(flat.shape, dtype=torch.uint8, device=flat.device)
        elif self._cells:
            cell = self._cell(flat)
            code = self._below.index_select(0, cell)
            code += flat > self._bound.index_select(0, cell)
        else:
            code = torch.bucketize(flat, self._bounds, out_int32=True).to(torch.uint8)
        if self._entry is not None:
            code = self._entry.index_select(0, code.to(torch.int32))
        return code.reshape(x.shape)

    def values(self, codes: Tensor) -> Tensor:
        """float32 table entries of uint8 codes, same shape."""
        return self.table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def _last_of_lower_entry(ascending: Tensor, entry: Tensor) -> Tensor:
    """For each neighbouring pair the largest float32 x that still belongs to its lower entry."""
    middle = (ascending[1:] + ascending[:-1]) / 2
    bound = middle.to(torch.float32)
    # x on the midpoint is a tie, which the lower entry wins only if its index is lower too.
    too_high = (bound.double() > middle) | ((bound.double() == middle) & (entry[1:] < entry[:-1]))
    return torch.where(too_high, torch.nextafter(bound, torch.full_like(bound, -torch.inf)), bound)
