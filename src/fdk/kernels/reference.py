"""The reference as a kernel: plain torch on any device, always the last resort."""

from __future__ import annotations

from torch import Tensor

from fdk import reference
from fdk.kernels import Problem
from fdk.weight import QuantisedWeight


class ReferenceKernel:
    """Dequantise a bounded chunk of rows to float32, multiply, round once."""

    name = "reference"
    layout = "canonical"

    def supports(self, problem: Problem) -> str | None:
        return None

    def rounds_weights(self, problem: Problem) -> bool:
        return False

    def linear(self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor) -> None:
        reference.linear(x, weight, bias, out)


KERNEL = ReferenceKernel()
