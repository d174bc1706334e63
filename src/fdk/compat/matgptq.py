"""`MatGPTQLinear`: the layer of MatGPTQ's kernels, whose width can also change after it was built."""

from __future__ import annotations

from torch import Tensor

from fdk.importers.matgptq import from_matgptq
from fdk.nn import Linear


class MatGPTQLinear(Linear):
    """y = x @ W.T + bias with W [n, k] of master codes, served at `bitwidth` bits.

    qweight uint8 [n, k]; scales [n, groups], and for group_size -1 also [n] or [1, n]; x in the scales' dtype.
    `set_precision(bits)` serves another width of the same buffer; the source needs a buffer for each.
    """

    def __init__(
        self, qweight: Tensor, scales: Tensor, bitwidth: int, group_size: int = 128, bias: Tensor | None = None
    ) -> None:
        weight = from_matgptq(qweight, scales, bits=bitwidth, group_size=group_size, name="qweight")
        super().__init__(weight, bias)
