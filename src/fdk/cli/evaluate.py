"""fdk eval: how well a model predicts a text, alone and beside the model it was made from."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from fdk.cli.flags import UsageError, device_of
from fdk.cli.loading import load_model
from fdk.cli.output import progress_bar, show
from fdk.errors import FdkError

HELP = "perplexity, KL and agreement with the 16-bit model on a text file"


def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags of its command line."""
    p.add_argument("model", help="folder or cached id of a model, dense or quantised by fdk")
    p.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text to predict")
    p.add_argument("--reference", metavar="MODEL", help="the 16-bit model to compare with")
    p.add_argument("--ids", action="store_true", help="FILE holds token ids, where there is no tokenizer")
    p.add_argument("--length", type=int, default=512, help="tokens of a segment; context starts anew (512)")
    p.add_argument("--segments", type=int, help="at most so many, spread evenly over the text (all)")
    p.add_argument("--batch", type=int, default=8, help="segments at a time (8)")
    p.add_argument("--confidence", type=float, default=0.95, help="of the intervals (0.95)")
    p.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    p.add_argument("--output-dir", type=Path, help="also write a record into this folder")


def run(args: argparse.Namespace) -> int:
    """Run it. Returns the exit status."""
    from fdk.models.evaluate import score, segments
    from fdk.models.folder import resolve
    from fdk.models.skeleton import read_config
    from fdk.models.text import read_tokens

    for flag, value in (("--length", args.length), ("--batch", args.batch), ("--segments", args.segments)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value}: at least 1 is needed")
    if not 0 < args.confidence < 1:
        raise UsageError(f"--confidence {args.confidence}: a number between 0 and 1 is needed")
    device = device_of(args.device)
    folder = resolve(args.model)
    config = read_config(folder)
    # A quantised folder may lack the tokenizer that the original has.
    original = resolve(args.reference) if args.reference else None
    named = folder if original is None or (folder / "tokenizer.json").exists() else original
    tokens = read_tokens(args.text, named, config, args.ids)
    try:
        windows = segments(tokens, args.length, args.segments)
    except FdkError as error:
        raise FdkError(f"{args.text}: {error}") from None
    model = load_model(folder, config, device)
    reference = None if original is None else load_model(original, read_config(original), device)
    start = time.perf_counter()
    with ExitStack() as stack:
        advance = progress_bar(stack, "evaluating")
        progress = None if advance is None else lambda done, total: advance("segments", done, total)
        found = score(model, windows, reference, args.batch, progress)
    estimates = found.estimates(args.confidence)
    names = {
        "perplexity": "perplexity", "perplexity_ratio": "perplexity over the reference's",
        "kl": "mean KL to the reference, nats per token", "top1": "same most likely token as the reference",
    }  # fmt: skip
    rows = [(names[name], *(f"{x:.5g}" for x in (e.value, e.low, e.high))) for name, e in estimates.items()]
    show(("quantity", "value", f"{args.confidence:.0%} from", "to"), rows)
    seconds = time.perf_counter() - start
    print(f"{len(windows) * args.length:,} tokens in {len(windows)} segments of {args.length}; {seconds:.1f} s")
    if args.output_dir:
        from fdk.bench import records

        environment = records.environment(device)
        entry = {"test": "eval", "model": str(args.model), "reference": args.reference, "text": str(args.text)}
        entry |= {"length": args.length, "segments": len(windows), "confidence": args.confidence}
        for name, e in estimates.items():
            entry |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
        with records.Writer(args.output_dir, f"eval-{environment['id']}") as writer:
            writer.write({**entry, **environment})
        print(f"record: {writer.path}")
    return 0
