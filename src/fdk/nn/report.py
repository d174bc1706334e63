"""What quantising a model did: the error of every layer, what stayed dense and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from fdk import reference
from fdk.quantise import LayerError
from fdk.weight import QuantisedWeight

CHUNK_CPU = 1 << 20
CHUNK_ACCELERATOR = 1 << 24


@torch.no_grad()
def measure(name: str, dense: Tensor, weight: QuantisedWeight) -> LayerError:
    """The error of `weight` against the dense [n, k] it was made from, a few rows at a time."""
    n, k = weight.shape
    signal = torch.zeros((), dtype=torch.float64, device=weight.device)
    noise, largest = signal.clone(), signal.clone()
    chunk = CHUNK_CPU if weight.device.type == "cpu" else CHUNK_ACCELERATOR
    rows = max(1, chunk // max(1, k))
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        original = dense[part].to(weight.device, torch.float32)
        error = reference.dequantise(weight, torch.float32, part).sub_(original)
        signal += original.square().sum(dtype=torch.float64)
        if error.numel():
            largest = torch.maximum(largest, error.abs().amax().double())
        noise += error.square_().sum(dtype=torch.float64)
    ratio = 10 * torch.log10(signal / noise) if noise > 0 else torch.tensor(torch.inf)
    return LayerError(name, str(weight.format), (n, k), ratio.item(), largest.item(), weight.bits_per_weight)


@dataclass
class LayerReport:
    """One quantised layer: its error, the seconds it took, and the other names of a shared weight."""

    error: LayerError
    seconds: float
    shared_with: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.error.name

    def to_dict(self) -> dict:
        """Flat, for a JSON record."""
        return {**asdict(self.error), "seconds": self.seconds, "shared_with": list(self.shared_with)}


@dataclass
class Report:
    """All layers that were quantised, and the linear layers that were not, with the reason.

    parameters   numbers in the dense model, tied ones once; `quantised` of them are low-bit now.
    stacked      those in tensors of three dimensions, the experts of a mixture, which are no linear layers: they stay
                 dense.
    """

    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    quantised: int = 0
    stacked: int = 0

    @classmethod
    def of(cls, model: nn.Module, kept: dict[str, str]) -> Report:
        """The report on a model that is still dense, before its first layer is quantised."""
        report = cls(kept=kept)
        for parameter in model.parameters():
            report.parameters += parameter.numel()
            report.stacked += parameter.numel() if parameter.dim() == 3 else 0
        return report

    @property
    def share(self) -> float:
        """Share of the model's parameters that are low-bit, 0 to 1."""
        return self.quantised / self.parameters if self.parameters else 0.0

    @property
    def seconds(self) -> float:
        """Seconds spent in quantising layers."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the quantised weights, scales and tables included."""
        weights = [layer.error.shape[0] * layer.error.shape[1] for layer in self.layers]
        bits = sum(layer.error.bits_per_weight * count for layer, count in zip(self.layers, weights, strict=True))
        return bits / sum(weights) if sum(weights) else 0.0

    @property
    def summary(self) -> str:
        """One line."""
        worst = min(self.layers, key=lambda layer: layer.error.sqnr_db, default=None)
        text = f"{len(self.layers)} layers, {self.share:.1%} of {self.parameters:,} parameters quantised"
        if self.stacked:
            text += f", {self.stacked / self.parameters:.1%} dense in stacked experts"
        if worst is None:
            return text
        least = f"least SQNR {worst.error.sqnr_db:.1f} dB in {worst.name or 'the layer'}"
        return f"{text}, {self.bits_per_weight:.3f} bits a weight; {least}"

    def rows(self) -> Iterable[tuple[str, str, str, str, str, str]]:
        """Cells of the table: layer, shape, format, bits a weight, SQNR, seconds."""
        for layer in self.layers:
            error = layer.error
            name = " = ".join((error.name or "(the layer)", *layer.shared_with))
            shape = f"{error.shape[0]} x {error.shape[1]}"
            yield (
                name,
                shape,
                error.format,
                f"{error.bits_per_weight:.3f}",
                f"{error.sqnr_db:.1f}",
                f"{layer.seconds:.2f}",
            )

    def __str__(self) -> str:
        table = [COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        lines += [f"kept dense: {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join([*lines, self.summary])

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "kept": dict(self.kept),
            "parameters": self.parameters,
            "quantised": self.quantised,
            "stacked": self.stacked,
        }


COLUMNS = ("layer", "shape", "format", "bits", "SQNR dB", "s")
