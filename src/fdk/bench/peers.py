"""Others' GPU kernels: torch's tinygemm, humming-kernels and gemlite, each fed with fdk's codes and scales.

They compute (code - 2^(bits-1)) * scale, fdk's `int` formats. None of them reads a table.
"""

from __future__ import annotations

import copy
import importlib.util
import json

import torch
from torch import Tensor

from fdk.bench.operands import Prepared, Source, Unavailable, bytes_of
from fdk.bench.problems import Line

PEER_TOLERANCE = 4.0
TINYGEMM_GROUPS = (32, 64, 128, 256)
GEMLITE_BITS = (1, 2, 4, 8)


def _needs_cuda(source: Source) -> None:
    if source.weight.device.type != "cuda":
        raise Unavailable("it runs on CUDA devices only")


def _needs_package(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed; pip install {package}")


class TorchTinygemm(Prepared):
    """torch.ops.aten._weight_int4pack_mm: (code - 8) * scale + zero; the zeros are there, and zero."""

    INNER_K_TILES = 8
    tolerance = PEER_TOLERANCE

    def __init__(self, line: Line, source: Source) -> None:
        _needs_cuda(source)
        group, (n, k) = source.weight.format.group, (source.n, source.k)
        if group not in TINYGEMM_GROUPS:
            raise Unavailable(f"it has groups of {', '.join(map(str, TINYGEMM_GROUPS))} only, not {group or 'k'}")
        if line.dtype != "bf16":
            raise Unavailable(f"it multiplies bf16 activations only, not {line.dtype}")
        if n % 8 or k % (16 * self.INNER_K_TILES):
            raise Unavailable(f"[{n}, {k}] is not a multiple of the tiles that it needs, 8 by 128")
        codes = source.codes()
        nibbles = codes[:, ::2] << 4 | codes[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(nibbles.contiguous(), self.INNER_K_TILES)
        scales = source.weight.parts["scales"].T
        scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], 2).contiguous()
        super().__init__(bytes_of(packed, scales_and_zeros))
        self.group = group
        self.weights = [(packed, scales_and_zeros)]

    def another(self) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in self.weights[0])

    def run(self, x: Tensor, index: int, out: Tensor) -> Tensor:
        packed, scales_and_zeros = self.weights[index]
        return torch.ops.aten._weight_int4pack_mm(x, packed, self.group, scales_and_zeros)


class Humming(Prepared):
    """humming-kernels' symmetric integers of 1 to 8 bits, with the configuration that its heuristics choose for m."""

    tolerance = PEER_TOLERANCE

    def __init__(self, line: Line, source: Source) -> None:
        _needs_cuda(source)
        _needs_package("humming", "humming-kernels")
        from humming.forward import humming_forward
        from humming.layer import HummingLayer
        from humming.tune import get_heuristics_config

        weight, (n, k) = source.weight, (source.n, source.k)
        bits = weight.format.bits
        if n % 64 or k % 32:
            raise Unavailable(f"[{n}, {k}] is not a multiple of its tiles, 64 by 32")
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={"dtype": f"int{bits}", "group_size": weight.format.group or 0},
            torch_dtype=weight.dtype,
        )
        # It packs codes into the same bit stream as fdk, and they are offset by 2^(bits-1) as fdk's are.
        stream = weight.parts["codes"].clone().view(torch.int32)
        layer.weight = torch.nn.Parameter(stream, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(weight.parts["scales"].clone(), requires_grad=False)
        layer.transform()
        config = layer.humming_config
        self.forward, self.config, self.device = humming_forward, config, weight.device
        self.heuristics = get_heuristics_config
        parts = {
            name: value.detach().clone()
            for name in ("weight", "weight_scale", "zero_point", "weight_scale_2", "locks")
            if (value := getattr(layer, name, None)) is not None
        }
        super().__init__(bytes_of(parts["weight"], parts["weight_scale"]))
        self.tuning: dict[int, str | None] = {}
        self.weights = [parts]

    def another(self) -> dict[str, Tensor]:
        return {name: part.clone() for name, part in self.weights[0].items()}

    def _tuning(self, m: int) -> str | None:
        """What the library itself would choose for m rows; naming it compiles that kernel and not those for other m."""
        if m not in self.tuning:
            choices = self.heuristics(layer_config=self.config, device=self.device)
            try:
                self.tuning[m] = next(json.dumps(c) for low, high, c in choices if low < m <= (high or m))
            except (TypeError, ValueError, StopIteration):
                self.tuning[m] = None
        return self.tuning[m]

    def run(self, x: Tensor, index: int, out: Tensor) -> Tensor:
        tuning = self._tuning(x.shape[0])
        return self.forward(self.config, inputs=x, outputs=out, tuning_config=tuning, **self.weights[index])


class Gemlite(Prepared):
    """gemlite's Triton kernels on unsigned codes with a shift; it tunes every size at the first call."""

    tolerance = PEER_TOLERANCE

    def __init__(self, line: Line, source: Source) -> None:
        _needs_cuda(source)
        _needs_package("gemlite", "gemlite")
        weight, (n, k) = source.weight, (source.n, source.k)
        fmt = weight.format
        if fmt.bits not in GEMLITE_BITS:
            raise Unavailable(f"it has widths of {', '.join(map(str, GEMLITE_BITS))} bits only, not {fmt.bits}")
        if k % 32:
            raise Unavailable(f"k = {k} is not a multiple of 32")
        from gemlite import DType, GemLiteLinear

        dtype = {"bf16": DType.BF16, "fp16": DType.FP16}.get(line.dtype)
        if dtype is None:
            raise Unavailable(f"it multiplies bf16 and fp16 activations only, not {line.dtype}")
        layer = GemLiteLinear(fmt.bits, fmt.group_size(k), k, n, input_dtype=dtype, output_dtype=dtype)
        layer.pack(source.codes(), weight.parts["scales"].clone(), fmt.offset, None)
        super().__init__(bytes_of(layer.W_q, layer.scales))
        self.weights = [layer]

    def another(self) -> torch.nn.Module:
        return copy.deepcopy(self.weights[0])

    def run(self, x: Tensor, index: int, out: Tensor) -> Tensor:
        return self.weights[index].forward(x)
