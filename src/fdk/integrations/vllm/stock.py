"""vLLM's own GPTQ, AWQ and compressed-tensors layers on fdk's products, through its registration of linear kernels.

Opt-in, because vLLM asks registered kernels last: FDK_VLLM_STOCK=1 registers this one, and VLLM_DISABLED_KERNELS names
those of vLLM that would be taken before it. Codes, scales and zeros become an `int` or `uint` weight, exactly.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fdk.formats import Format
from fdk.formats.registry import INT, UINT
from fdk.formats.spec import MIN_GROUP
from fdk.integrations.vllm import interfaces as vllm
from fdk.integrations.vllm.linear import hold, multiply
from fdk.packing.bits import row_bytes, unpack_codes
from fdk.packing.layouts import DTYPES
from fdk.weight import QuantisedWeight

MPLinearKernel = vllm.find("vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel", "MPLinearKernel")


def kind_of(weight_type) -> tuple[int, bool] | None:
    """(bits, whether zeros are stored) of a scalar type of vLLM's such as uint4b8 or uint4; None for other types."""
    bits = weight_type.size_bits
    if not weight_type.is_integer() or weight_type.is_signed() or bits not in INT.bits:
        return None
    return {0: (bits, True), 1 << (bits - 1): (bits, False)}.get(weight_type.bias)


class FdkLinearKernel(MPLinearKernel):
    """Weights of k codes a row, packed along k, with scales and perhaps zeros by group."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @classmethod
    def can_implement(cls, c) -> tuple[bool, str | None]:
        kind, k = kind_of(c.weight_type), c.partition_weight_shape[0]
        if kind is None or kind[1] != c.zero_points:
            return False, f"fdk has no format for {c.weight_type} with zero_points={c.zero_points}"
        if c.act_type not in DTYPES:
            return False, f"fdk multiplies bfloat16, float16 and float32, not {c.act_type}"
        if c.group_size != -1 and (c.group_size % MIN_GROUP or k % c.group_size):
            return False, f"a group of {c.group_size} is not a multiple of {MIN_GROUP} that divides k = {k}"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        bits, _ = kind_of(self.config.weight_type)
        k, n = self.config.partition_weight_shape
        packed, scales, zeros = self._get_weight_params(layer)
        stream = along_last(packed, "input_dim").view(torch.uint8)[:, : row_bytes(k, bits)]
        parts = {"codes": stream.contiguous(), "scales": along_last(scales, "input_dim", "output_dim")}
        group = None if self.config.group_size == -1 else self.config.group_size
        if self.config.zero_points:
            rows = along_last(zeros, "output_dim").view(torch.uint8)[:, : row_bytes(n, bits)]
            parts["zeros"] = unpack_codes(rows.contiguous(), bits, n).T.contiguous()
        fmt = Format(UINT if self.config.zero_points else INT, bits, group)
        weight = QuantisedWeight.from_parts(fmt, k, parts, name=getattr(layer, "prefix", "layer"))
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name, "weight_shape"):
            if name in layer._parameters:
                delattr(layer, name)
        layer.fdk_products = (hold(layer, weight, 0),)

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return multiply(layer, layer.fdk_products[0], x, bias)


def along_last(parameter: Tensor, dim: str, other: str = "") -> Tensor:
    """The data of a parameter of vLLM's, contiguous, with the dimension that it calls `dim` (or not `other`) last."""
    data, place = parameter.data, getattr(parameter, dim, None)
    if place is None and other:
        place = 1 - getattr(parameter, other)
    return (data.T if place == 0 else data).contiguous()


@cache
def register_kernel() -> None:
    """Once: offer the kernel to vLLM's choice of mixed-precision kernels, behind its own."""
    register = vllm.find("vllm.model_executor.kernels.linear", "register_linear_kernel")
    platforms = vllm.find("vllm.platforms", "PlatformEnum")
    for platform in (platforms.CUDA, platforms.CPU):
        register(FdkLinearKernel, platform, "mp")
