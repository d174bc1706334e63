"""python -m fdk.models.tiny: train a byte-level Llama and hold every format to the same model in 16 bits."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from fdk.bench import records
from fdk.cli.output import show, until_the_reader_leaves, unwritten
from fdk.errors import FdkError
from fdk.formats import parse
from fdk.models import QuantisationConfig, quantise, set_precision
from fdk.models.budget import measure_model
from fdk.models.evaluate import Estimate, score
from fdk.models.folder import load_dense
from fdk.models.llama import Llama
from fdk.models.tensors import new_folder
from fdk.models.tiny import COURSES, Course, corpus, held_out, train, write_dense
from fdk.nn import Linear
from fdk.nn.report import measure

PARTS = ("tables", "four", "nested", "weights", "calibrated")
"""lut formats of every width, other 4-bit formats dense and sparse, slices of 8-bit masters, and widths by layer:
by the errors of weights alone, or by KL on training text."""
COLUMNS = ("weights", "bits/weight", "mean KL (95 %)", "top-1 %", "perplexity / bf16 (95 %)", "mean SQNR dB")
BUDGET_WIDTHS = (2, 3, 4)
CALIBRATION_TOKENS = 8192
BATCH = 64


@dataclass(frozen=True)
class Variant:
    """One row: a low-bit model, what its weights are called, and what was special about them."""

    model: Llama
    format: str
    bits: int
    codebook: str
    note: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits that a product reads of each low-bit weight, scales included; tables are not counted."""
        layers = [layer.weight for layer in self.model.modules() if isinstance(layer, Linear)]
        read = sum(w.format.bytes_read(*w.shape, w.dtype.itemsize, zero_size=1) for w in layers)
        return 8 * read / sum(w.shape[0] * w.shape[1] for w in layers)

    def mean_sqnr_db(self, original: Llama) -> float:
        """Mean over the layers of the SQNR of the weights as they are served."""
        layers = [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, Linear)]
        ratios = [measure(name, original.get_submodule(name).weight, layer.weight).sqnr_db for name, layer in layers]
        return sum(ratios) / len(ratios)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m fdk.models.tiny", description=__doc__)
    p.add_argument("--size", choices=tuple(COURSES), default="tiny", help="0.66 or 25 million parameters (tiny)")
    p.add_argument("--steps", type=int, help="training steps (600; 800 for small)")
    p.add_argument("--folder", type=Path, help="load the trained model from there, or train and save it there")
    p.add_argument("--only-train", action="store_true", help="write --folder, and measure nothing")
    p.add_argument("--bits", type=int, nargs="+", default=[8, 7, 6, 5, 4, 3, 2, 1], help="widths (8 to 1)")
    p.add_argument("--block-size", type=int, default=64, help="weights that share a scale (64)")
    p.add_argument("--scale", default="auto", help="auto, absmax, absmean or search (auto)")
    p.add_argument("--sequences", type=int, default=512, help="held-out sequences (512)")
    p.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help=f"rows to make ({' '.join(PARTS)})")
    p.add_argument("--kernel", default="auto", help="which kernel multiplies (auto)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train and evaluate (cpu)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output-dir", type=Path, default=Path("out"), help="folder for the records (out)")
    return p


def trained(args: argparse.Namespace, course: Course) -> tuple[Llama, float | None]:
    """The model in float32 on the device, and the seconds that its training took, None if it was loaded."""
    if args.folder and args.folder.exists():
        return load_dense(args.folder, args.device), None
    start = time.perf_counter()
    shown = [start]

    def progress(step: int, loss: torch.Tensor) -> None:
        if time.perf_counter() - shown[0] > 10:
            shown[0] = time.perf_counter()
            print(f"step {step}: loss {loss.item():.3f}, {shown[0] - start:.0f} s", file=sys.stderr)

    # The folder is begun before the training, which would be lost where it cannot be made.
    with new_folder(args.folder) if args.folder else nullcontext() as work:
        model = train(args.steps, args.seed, course, args.device, progress)
        if work:
            write_dense(model, work)
    return model, time.perf_counter() - start


def variants(args: argparse.Namespace, course: Course, model: Llama, dense: Llama) -> Iterator[Variant]:
    """Every row, one model in memory at a time."""
    group = f"g{args.block_size}"

    def low(format: str, codebook: str = "uniform") -> Variant:
        config = QuantisationConfig(format=format, codebook=codebook, scale=args.scale, kernel=args.kernel)
        found = quantise(model, config, args.device)
        return Variant(found, format, config.bits, codebook)

    for bits in args.bits if "tables" in args.parts else ():
        yield low(f"lut{bits}_{group}")
        yield low(f"lut{bits}_{group}", "kmeans")
    if "four" in args.parts:
        yield low(f"nf4_{group}")
        yield low(f"int4_{group}")
        yield low(f"int4_{group}_sp16of32")
        yield low(f"lut4_{group}_sp16of32", "kmeans")
    for kind in ("nest8", "trunc8") if "nested" in args.parts else ():
        master = low(f"{kind}_{group}").model
        for bits in args.bits:
            if bits > 1:
                set_precision(master, bits)
                yield Variant(master, str(parse(f"{kind}_{group}").at(bits)), bits, "uniform")
    text, _ = corpus(course.broad)
    length = course.length
    calibration = text[: CALIBRATION_TOKENS // length * length].view(-1, length).long()
    base = QuantisationConfig(4, args.block_size, codebook="kmeans", scale=args.scale, kernel=args.kernel)
    for part, tokens, note in (
        ("weights", None, "budget, weights alone"),
        ("calibrated", calibration, "budget, calibrated"),
    ):
        if part not in args.parts:
            continue
        measured = measure_model(dense, base, calibration=tokens)
        for bits in BUDGET_WIDTHS:
            flat = sum(layer.nbytes[bits - 1] for layer in measured.layers) + measured.other_bytes
            chosen = measured.choose(max_bytes=flat)
            yield Variant(quantise(model, chosen.config, args.device), f"lut_{group}", bits, "kmeans", note)


def shown(estimate: Estimate, digits: int = 4) -> str:
    """value (low-high)"""
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}-{estimate.high:.{digits}f})"


def flat(estimates: dict[str, Estimate]) -> dict[str, float]:
    """Fields of a record: each value under its name, its limits with _low and _high."""
    found = {}
    for name, estimate in estimates.items():
        found |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return found


def main(argv: list[str] | None = None) -> int:
    """Train, quantise, evaluate; a table on the screen and records in the output folder."""
    args = parser().parse_args(argv)
    if args.only_train and (args.folder is None or args.folder.exists()):
        print("fdk.models.tiny: --only-train needs a --folder that does not exist yet", file=sys.stderr)
        return 2
    course = COURSES[args.size]
    try:
        return run(args, course)
    except FdkError as error:
        print(f"fdk.models.tiny: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fdk.models.tiny: {unwritten(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fdk.models.tiny: interrupted; nothing half-written was kept", file=sys.stderr)
        return 130


def run(args: argparse.Namespace, course: Course) -> int:
    """`main` for a command line that makes sense."""
    model, seconds = trained(args, course)
    if args.only_train:
        print(f"{args.folder} holds {course.config.parameters:,} parameters, trained for {seconds:.0f} s")
        return 0
    environment = records.environment(torch.device(args.device))
    windows = held_out(args.sequences, course)
    dense = quantise(model, None, args.device)
    original = score(dense, windows, batch=BATCH).estimates()
    base = {
        "test": "quality", "model": args.size, "parameters": course.config.parameters, "kernel": args.kernel,
        "steps": args.steps or (None if seconds is None else course.steps), "seed": args.seed,
        "training_seconds": seconds,
        "training_bytes": len(corpus(course.broad)[0]), "sequences": args.sequences, "length": course.length,
    }  # fmt: skip
    took = "loaded" if seconds is None else f"trained for {seconds:.0f} s"
    print(f"{course.config.parameters:,} parameters, {took}, {args.sequences} sequences of {course.length} bytes")
    rows = [("bf16", "16", "0", "100", f"perplexity {shown(original['perplexity'])}", "")]
    with records.Writer(args.output_dir, f"quality-{environment['id']}") as writer:
        writer.write({**base, "format": "bf16", "bits": 16, "bits_per_weight": 16.0, **flat(original), **environment})
        for variant in variants(args, course, model, dense):
            found = score(variant.model, windows, dense, BATCH).estimates()
            sqnr = variant.mean_sqnr_db(model)
            writer.write(
                {
                    **base, "format": variant.format, "bits": variant.bits, "codebook": variant.codebook,
                    "note": variant.note, "scale": args.scale, "bits_per_weight": variant.bits_per_weight,
                    **flat(found), "mean_sqnr_db": sqnr, **environment,
                }
            )  # fmt: skip
            name = " ".join(filter(None, (variant.format, variant.codebook, variant.note)))
            top = f"{100 * found['top1'].value:.2f}"
            ratio = shown(found["perplexity_ratio"])
            rows.append((name, f"{variant.bits_per_weight:.3f}", shown(found["kl"], 5), top, ratio, f"{sqnr:.1f}"))
    show(COLUMNS, rows)
    print(f"records: {writer.path}")
    return 0


if __name__ == "__main__":
    sys.exit(until_the_reader_leaves(main))
