"""fdk convert: a MatGPTQ folder with its codes and scales as they are, in fdk's own form."""

from __future__ import annotations

import argparse

from fdk.cli.flags import shard_bytes_of

HELP = "a folder that MatGPTQ packed, as a folder of fdk; the same codes"


def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags of its command line."""
    p.add_argument("model", help="folder, or id of a model in the local Hugging Face cache")
    p.add_argument("--output", required=True, metavar="DIR", help="the new folder")
    p.add_argument(
        "--precision", metavar="BITS", help="width served, 2 to 8, or a file of lines 'layer.name: bits' (the folder's)"
    )
    p.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest file (5)")
    p.add_argument("--overwrite", action="store_true", help="replace an output folder that fdk has written")


def run(args: argparse.Namespace) -> int:
    """Run it. Returns the exit status."""
    from fdk.importers.matgptq import load_packed
    from fdk.models import save
    from fdk.models.folder import copy_companions, resolve
    from fdk.nn import Linear

    shard_bytes = shard_bytes_of(args.shard_size)
    folder = resolve(args.model)
    precision = int(args.precision) if args.precision and args.precision.isdecimal() else args.precision
    model = load_packed(folder, precision=precision)
    target = save(model, args.output, overwrite=args.overwrite, shard_bytes=shard_bytes)
    copy_companions(folder, target)
    served = sorted({str(module.weight.format) for module in model.modules() if isinstance(module, Linear)})
    print(
        f"{args.output} is ready, served as {', '.join(served)}: fdk.load({args.output!r}), or fdk info {args.output}"
    )
    return 0
