"""fdk quantise: a model folder to a quantised one, with progress and the error of every layer."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from fdk.cli import interrupts
from fdk.cli.flags import UsageError, device_of, shard_bytes_of
from fdk.cli.output import progress_bar, show
from fdk.cli.widths import chosen_widths
from fdk.errors import FdkError

HELP = "quantise a Hugging Face model folder into a new folder"
WIDTHS_FILE = "widths.txt"


def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags of its command line."""
    p.add_argument("model", help="folder, or id of a model in the local Hugging Face cache; nothing is downloaded")
    p.add_argument("--output", required=True, metavar="DIR", help="the new folder")
    p.add_argument("--bits", help="1 to 8 (4)")
    p.add_argument("--format", help="a format name such as int4_g128, in place of --bits and --block-size")
    p.add_argument("--block-size", help="weights that share a scale: a multiple of 16, or chan (64)")
    p.add_argument("--codebook", default="uniform", help="of lut formats: uniform, kmeans, int (uniform)")
    p.add_argument("--scale", default="auto", help="auto, absmax, absmean, search (auto)")
    p.add_argument("--skip", default="^lm_head$", metavar="REGEX", help="layers that stay dense (^lm_head$)")
    p.add_argument("--overrides", metavar="FILE", help="lines 'layer.name: bits', or a format name for the bits")
    p.add_argument("--target-bits", type=float, help="choose widths by layer: mean stored bits a weight")
    p.add_argument("--max-memory", metavar="SIZE", help="choose widths by layer: the model's size, such as 8GB")
    p.add_argument("--widths", type=int, nargs="+", help="bits on offer then, 16 for dense (1 to 8)")
    p.add_argument("--together", action="store_true", help="q, k, v alike, and gate, up: so they can merge")
    p.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text on which their errors are measured, or builtin"
    )
    p.add_argument("--ids", action="store_true", help="that file holds token ids, where there is no tokenizer")
    p.add_argument("--calibration-tokens", type=int, default=4096, help="of its beginning (4096)")
    p.add_argument("--dtype", help="of scales and dense tensors: bf16, fp16, fp32 (as the source, fp32 as bf16)")
    p.add_argument("--device", help="where to quantise: cpu or cuda (cpu)")
    p.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest file (5)")
    p.add_argument("--overwrite", action="store_true", help="replace an output folder that fdk has written")


def run(args: argparse.Namespace) -> int:
    """Run it. Returns the exit status."""
    from fdk.models.config import QuantisationConfig, read_overrides
    from fdk.models.folder import OtherNames, quantise_folder
    from fdk.nn.report import COLUMNS

    if args.format is not None and (args.bits or args.block_size):
        raise UsageError("--format stands for --bits and --block-size; give the one or the others")
    if args.bits is not None and not args.bits.isdecimal():
        raise UsageError(f"--bits {args.bits}: widths are 1 to 8; a format name is given by --format")
    shard_bytes = shard_bytes_of(args.shard_size)
    try:
        config = QuantisationConfig(
            bits=None if args.format is not None else args.bits or 4,
            block_size=64 if args.block_size is None else args.block_size,
            format=args.format,
            codebook=args.codebook,
            scale=args.scale,
            skip=args.skip,
            overrides=read_overrides(args.overrides) if args.overrides else {},
            dtype=args.dtype,
        )
    except FdkError as error:
        raise UsageError(str(error)) from None
    device = device_of(args.device) if args.device else None
    choice = chosen_widths(args, config, device)
    if choice:
        config = choice.config
    interrupts.install()
    start = time.perf_counter()
    settings = {"device": device, "overwrite": args.overwrite, "shard_bytes": shard_bytes}
    settings["texts"] = {WIDTHS_FILE: choice.text()} if choice else {}
    try:
        with ExitStack() as stack:
            report = quantise_folder(args.model, args.output, config, **settings, progress=_progress(stack))
    except OtherNames:
        from fdk.integrations.transformers import convert_folder

        report = convert_folder(args.model, args.output, config, **settings)
    show(COLUMNS, report.rows())
    if choice:
        print(f"{choice.summary}; widths in {Path(args.output) / WIDTHS_FILE}")
    for name, reason in report.kept.items():
        print(f"kept dense: {name}: {reason}")
    print(f"{report.summary}; {time.perf_counter() - start:.1f} s")
    print(f"{args.output} is ready: {_how_to_load(args.output)} in Python, or fdk info {args.output}")
    return 0


def _progress(stack: ExitStack):
    """A progress callback of quantisation with the mean SQNR so far, or None without a terminal."""
    advance = progress_bar(stack, "quantising")
    if advance is None:
        return None
    noise = [0, 0.0]

    def progress(layer, done: int, total: int) -> None:
        noise[0] += 1
        noise[1] += layer.error.sqnr_db
        advance(f"SQNR {noise[1] / noise[0]:.1f} dB  {layer.name}", done, total)

    return progress


def _how_to_load(folder: str) -> str:
    """The call that reads a quantised folder: fdk's own, but for models that transformers converts while it reads."""
    from fdk.models.llama import RELATIVES
    from fdk.models.skeleton import architecture, read_config

    if architecture(read_config(Path(folder)), folder) in RELATIVES:
        return f"fdk.load({folder!r})"
    return f"import fdk and AutoModelForCausalLM.from_pretrained({folder!r})"
