"""fdk generate: the continuation on standard output as it comes, its speed on standard error."""

from __future__ import annotations

import argparse
import math
import sys
import time

from fdk.cli.flags import UsageError, device_of
from fdk.cli.loading import load_model

HELP = "continue a prompt with a model, dense or quantised"


def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags of its command line."""
    p.add_argument("model", help="folder, or id of a model in the local Hugging Face cache")
    prompt = p.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text, read by the folder's tokenizer.json")
    prompt.add_argument("--ids", type=int, nargs="+", metavar="ID", help="token ids, where there is no tokenizer")
    p.add_argument("--tokens", type=int, default=128, help="at most so many new tokens (128)")
    p.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token (0)")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of that share (1)")
    p.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    p.add_argument("--device", help="cpu or cuda (cuda if there is one)")
    p.add_argument("--step", choices=("auto", "fused", "plain"), default="auto", help="see python -m fdk.models")


def run(args: argparse.Namespace) -> int:
    """Run it. Returns the exit status."""
    import torch

    from fdk.models.folder import resolve
    from fdk.models.generate import generate
    from fdk.models.skeleton import read_config
    from fdk.models.text import tokenizer

    if args.tokens < 1:
        raise UsageError(f"--tokens {args.tokens}: at least 1 is needed")
    if not 0 <= args.temperature < math.inf:
        raise UsageError(f"--temperature {args.temperature}: a number from 0 on is needed")
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p {args.top_p}: a share above 0 and up to 1 is needed")
    if not 0 <= args.seed < 1 << 64:
        raise UsageError(f"--seed {args.seed}: a number from 0 to 2^64 - 1 is needed")
    device = device_of(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = resolve(args.model)
    config = read_config(folder)
    reader = tokenizer(folder, config) if args.prompt is not None else None
    ids = reader.encode(args.prompt).ids if reader else args.ids
    model = load_model(folder, config, device)
    stop = _stops(folder, config)
    found: list[int] = []
    shown = ""
    start = first = time.perf_counter()
    for token in generate(model, ids, args.tokens, args.temperature, args.top_p, args.seed, stop, args.step):
        found.append(token)
        first = time.perf_counter() if len(found) == 1 else first
        text = reader.decode(found) if reader else " ".join(map(str, found))
        # A character may be spread over several tokens; until it is whole it decodes to a replacement character.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    end = time.perf_counter()
    speed = f", then {(len(found) - 1) / (end - first):.1f} tokens/s" if len(found) > 1 else ""
    print(f"{len(ids)} tokens read and 1 found in {first - start:.2f} s{speed}", file=sys.stderr)
    return 0


def _stops(folder, config: dict) -> list[int]:
    """The tokens that end a text; generation_config.json goes before config.json, as in transformers."""
    from fdk.models.tensors import read_json

    path = folder / "generation_config.json"
    stop = read_json(path).get("eos_token_id") if path.exists() else None
    stop = config.get("eos_token_id") if stop is None else stop
    return stop if isinstance(stop, list) else [] if stop is None else [stop]
