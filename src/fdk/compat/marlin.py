"""`marlin.Layer` and `marlin.mul`: Marlin's own names around its packed tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdk import ops
from fdk.errors import FormatError
from fdk.formats import Format
from fdk.formats.registry import INT
from fdk.importers.marlin import from_marlin, to_marlin
from fdk.packing.bits import pack_codes
from fdk.weight import QuantisedWeight


class Layer(nn.Module):
    """A linear layer without bias, float16, int4 with one scale per group of 128 (or 64) or per output (-1).

    Buffers B int32 [infeatures/16, 2*outfeatures] and s half [infeatures/groupsize, outfeatures], as Marlin's
    checkpoints name them; they are imported when the layer first runs, and again after they have been written.
    FormatError for sizes that Marlin does not take.
    """

    def __init__(self, infeatures: int, outfeatures: int, groupsize: int = -1) -> None:
        super().__init__()
        if groupsize not in (-1, 64, 128):
            raise FormatError(f"groupsize = {groupsize} is not one of Marlin's; use -1, 64 or 128")
        if infeatures % 128 or outfeatures % 256 or (groupsize > 0 and infeatures % groupsize):
            raise FormatError(
                f"[{outfeatures}, {infeatures}] does not fit Marlin: infeatures must be a multiple of 128 and "
                "of groupsize, outfeatures of 256"
            )
        self.k, self.n = infeatures, outfeatures
        self.groupsize = infeatures if groupsize == -1 else groupsize
        self.register_buffer("B", torch.zeros(infeatures // 16, 2 * outfeatures, dtype=torch.int32))
        self.register_buffer("s", torch.ones(infeatures // self.groupsize, outfeatures, dtype=torch.float16))
        self._imported: tuple[tuple, QuantisedWeight] | None = None

    def forward(self, A: Tensor) -> Tensor:
        return ops.linear(A, self.weight())

    def weight(self) -> QuantisedWeight:
        """The imported weight."""
        key = (self.B.data_ptr(), self.B._version, self.s.data_ptr(), self.s._version)
        if self._imported is None or self._imported[0] != key:
            self._imported = key, from_marlin(self.B, self.s)
        return self._imported[1]

    @torch.no_grad()
    def pack(self, linear: nn.Linear, scales: Tensor) -> None:
        """Fill the buffers from a layer whose weight [n, k] is already rounded to scales [n, groups] times integers."""
        weight = linear.weight.detach()
        if weight.shape != (self.n, self.k) or scales.shape != (self.n, self.k // self.groupsize):
            raise FormatError(
                f"weight {list(weight.shape)} and scales {list(scales.shape)} must be [{self.n}, {self.k}] "
                f"and [{self.n}, {self.k // self.groupsize}]"
            )
        scales = scales.to(weight.device, torch.float16)
        steps = weight.float().view(self.n, -1, self.groupsize) / scales.float().unsqueeze(2)
        codes = (steps.round() + 8).clamp(0, 15).to(torch.uint8).view(self.n, self.k)
        group = None if self.groupsize == self.k else self.groupsize
        parts = {"codes": pack_codes(codes, 4), "scales": scales.contiguous()}
        packed = to_marlin(QuantisedWeight.from_parts(Format(INT, 4, group), self.k, parts))
        self.B.copy_(packed["B"])
        self.s.copy_(packed["s"])


def mul(A: Tensor, B: Tensor, C: Tensor, s: Tensor, workspace: Tensor | None = None, *tuning: int) -> None:
    """C [..., n] = A [..., k] times the weight that (B, s) stores. The workspace and tuning numbers are not needed.

    The weight is imported at every call; `Layer` keeps it.
    """
    C.copy_(ops.linear(A, from_marlin(B, s)))
