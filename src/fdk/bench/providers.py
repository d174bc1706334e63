"""Who can multiply: fdk, torch, bitsandbytes and the peers of peers.py, each with several copies of its operands.

Every provider starts from the same stored weight. What it computes with must equal that weight up to the rounding
that `fdk.testing`'s bound allows, so peers are given fdk's codes and scales, and quantise nothing themselves.
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import Tensor

from fdk import kernels, ops, reference
from fdk.bench.operands import Prepared, Source, Unavailable
from fdk.bench.peers import PEER_TOLERANCE, Gemlite, Humming, TorchTinygemm
from fdk.bench.problems import MARLIN_GROUPS, Line, weight_bytes
from fdk.errors import FdkError
from fdk.formats import parse
from fdk.weight import QuantisedWeight

INT4PACK_GROUPS = (32, 64, 128, 256)
BITSANDBYTES_GROUPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Fdk(Prepared):
    """The public path: dispatch, then the kernel that it chose, or the one named."""

    def __init__(self, line: Line, source: Source) -> None:
        fmt = parse(line.format)
        if line.family.startswith("marlin") and fmt.group not in MARLIN_GROUPS:
            raise Unavailable(f"the format has groups of {' or '.join(map(str, MARLIN_GROUPS))}, not {fmt.group}")
        super().__init__(weight_bytes(line.format, source.n, source.k, line.dtype))
        self.name = line.provider.partition(":")[2] or "auto"
        self.source = source.weight
        try:
            self.weights = [self.another()]
        except FdkError as error:
            raise Unavailable(str(error)) from None

    def _choice(self, m: int) -> kernels.Kernel:
        return kernels.choose(kernels.Problem(m, self.source.geometry, self.source.device), self.name).kernel

    def another(self) -> QuantisedWeight:
        geometry = self.source.geometry
        fresh = QuantisedWeight(geometry, {name: part.clone() for name, part in self.source.parts.items()})
        return ops.prepare(fresh, self.name)

    def run(self, x: Tensor, index: int, out: Tensor) -> Tensor:
        return ops.run(x, self.weights[index], None, self.name, out)

    def rounds(self, m: int) -> bool:
        geometry = self.source.geometry
        return self._choice(m).rounds_weights(kernels.Problem(m, geometry, self.source.device))

    def kernel(self, m: int) -> str:
        return self._choice(m).name


class Reference(Prepared):
    """Plain torch: the dense matmul of the source project's `*_ref`, or fdk's definition of correct."""

    rounds_weights = False

    def __init__(self, line: Line, source: Source) -> None:
        super().__init__(weight_bytes(line.format, source.n, source.k, line.dtype))
        self.weights = [source.dense if line.dense else source.weight]

    def another(self) -> Tensor | QuantisedWeight:
        first = self.weights[0]
        if isinstance(first, Tensor):
            return first.clone()
        return QuantisedWeight(first.geometry, {name: part.clone() for name, part in first.parts.items()})

    def run(self, x: Tensor, index: int, out: Tensor) -> Tensor:
        weight = self.weights[index]
        if isinstance(weight, Tensor):
            return torch.matmul(x, weight.T, out=out)
        return reference.linear(x, weight, None, out)


class TorchDense(Prepared):
    """torch.nn.functional.linear on a dense weight: oneDNN or MKL on a CPU, cuBLAS on a GPU."""

    rounds_weights = False

    def __init__(self, line: Line, source: Source) -> None:
        super().__init__(weight_bytes(line.format, source.n, source.k, line.dtype))
        self.weights = [source.dense]
        if source.dense.device.type == "cuda":
            # cuBLAS may split k and add up partial sums that were rounded to bf16.
            self.rounds_weights, self.tolerance = True, PEER_TOLERANCE

    def another(self) -> Tensor:
        return self.weights[0].clone()

    def run(self, x: Tensor, index: int, out: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weights[index])


class TorchInt4Pack(Prepared):
    """torch's own 4-bit weight-only product on a CPU, `_weight_int4pack_mm_for_cpu`."""

    def __init__(self, line: Line, source: Source) -> None:
        group, (n, k) = source.weight.format.group, (source.n, source.k)
        if source.weight.device.type != "cpu":
            raise Unavailable("it runs on CPUs only; on a GPU it is torch-tinygemm")
        if group not in INT4PACK_GROUPS:
            raise Unavailable(f"it has groups of {', '.join(map(str, INT4PACK_GROUPS))} only, not {group or 'k'}")
        if n % 16 or k % 2:
            raise Unavailable(f"[{n}, {k}] is not a multiple of the tiles that it needs")
        self.group = group
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(source.codes().int(), 1)
        scales = source.weight.parts["scales"].T
        scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], 2).contiguous()
        super().__init__(sum(part.numel() * part.element_size() for part in (packed, scales_and_zeros)))
        self.weights = [(packed, scales_and_zeros)]

    def another(self) -> tuple[Tensor, Tensor]:
        return tuple(part.clone() for part in self.weights[0])

    def run(self, x: Tensor, index: int, out: Tensor) -> Tensor:
        packed, scales_and_zeros = self.weights[index]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, self.group, scales_and_zeros)


class BitsAndBytesNF4(Prepared):
    """bitsandbytes' NF4 linear, in the packed arrangement that its module switches to for inference on a CPU."""

    def __init__(self, line: Line, source: Source) -> None:
        if source.weight.device.type == "cuda":
            self.tolerance = PEER_TOLERANCE
        if importlib.util.find_spec("bitsandbytes") is None:
            raise Unavailable("bitsandbytes is not installed; pip install 'fused-dequantisation-kernels[bench]'")
        # Its import reports at warning level that an optional companion is missing.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import bitsandbytes
        from bitsandbytes import functional

        weight, (n, k) = source.weight, (source.n, source.k)
        group = weight.format.group_size(k)
        if group not in BITSANDBYTES_GROUPS:
            raise Unavailable(f"it has blocks of {', '.join(map(str, BITSANDBYTES_GROUPS))} only, not {group}")
        codes = source.codes()
        packed = (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1)
        state = functional.QuantState(
            absmax=weight.parts["scales"].float().reshape(-1),
            shape=torch.Size((n, k)),
            dtype=weight.dtype,
            blocksize=group,
            code=weight.parts["table"][0].float(),
            quant_type="nf4",
        )
        if weight.device.type == "cpu" and line.dtype != "bf16":
            raise Unavailable(f"its CPU kernels compute in bf16, not {line.dtype}")
        if weight.device.type == "cpu" and functional.has_avx512bf16():
            if n % 32:
                raise Unavailable(f"its packed arrangement needs n to be a multiple of 32, not {n}")
            packed, state = functional._convert_weight_packed_for_cpu(packed, state)
        self.multiply, self.functional = bitsandbytes.matmul_4bit, functional
        super().__init__(packed.numel() + state.absmax.numel() * state.absmax.element_size())
        self.weights = [(packed, state)]

    def another(self) -> tuple[Tensor, object]:
        packed, first = self.weights[0]
        state = self.functional.QuantState(
            first.absmax.clone(), first.shape, first.code, first.blocksize, first.quant_type, first.dtype
        )
        if getattr(first, "packing_format_for_cpu", False):
            state.packing_format_for_cpu = True
        return packed.clone(), state

    def tensors(self, index: int) -> list[Tensor]:
        packed, state = self.weights[index]
        return [packed, state.absmax]

    def run(self, x: Tensor, index: int, out: Tensor) -> Tensor:
        packed, state = self.weights[index]
        return self.multiply(x, packed, quant_state=state)


PROVIDERS: dict[str, type[Prepared]] = {
    "fdk": Fdk,
    "torch-bf16": TorchDense,
    "torch-fp16": TorchDense,
    "torch-float32": TorchDense,
    "torch-int4pack": TorchInt4Pack,
    "torch-tinygemm": TorchTinygemm,
    "bitsandbytes-nf4": BitsAndBytesNF4,
    "humming": Humming,
    "gemlite": Gemlite,
    "reference": Reference,
}
"""By name; "fdk:NAME" is fdk with one kernel."""


def names() -> tuple[str, ...]:
    """Every provider that can be asked for."""
    return (*PROVIDERS, *(f"fdk:{name}" for name in kernels.names()))


def prepare(line: Line, source: Source) -> Prepared:
    """The line's provider with one copy of its operands; Unavailable with the reason if it cannot run."""
    try:
        return PROVIDERS[line.provider.partition(":")[0]](line, source)
    except Unavailable:
        raise
    except Exception as error:
        # A peer's own complaint about a shape or a missing symbol is a reason like any other.
        raise Unavailable(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        ) from error


def is_ours(provider: str) -> bool:
    """Whether a wrong result is a fault of this project."""
    return provider.partition(":")[0] in ("fdk", "reference")
