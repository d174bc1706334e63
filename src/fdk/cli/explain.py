"""fdk explain: the choice of kernel for a product that is described, not made."""

from __future__ import annotations

import argparse

from fdk.cli.flags import UsageError, device_of
from fdk.errors import FdkError

HELP = "which kernel serves a product, and why not another"


def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags of its command line."""
    p.add_argument("--format", required=True, help="such as lut4_g64 or int4_g128")
    p.add_argument("-m", type=int, default=1, help="rows of activations (1)")
    p.add_argument("-n", type=int, required=True, help="output features")
    p.add_argument("-k", type=int, required=True, help="input features")
    p.add_argument("--dtype", default="bf16", help="of activations and scales: bf16, fp16, fp32 (bf16)")
    p.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    p.add_argument("--kernel", default="auto", help="ask for one kernel by name (auto)")


def run(args: argparse.Namespace) -> int:
    """Run it. Returns the exit status."""
    from fdk import ops
    from fdk.formats import parse
    from fdk.kernels import Problem, kernel
    from fdk.models.config import check_dtype
    from fdk.packing.layouts import Geometry, canonical_shapes

    for flag, value, least in (("-m", args.m, 0), ("-n", args.n, 1), ("-k", args.k, 1)):
        if value < least:
            raise UsageError(f"{flag} {value}: sizes start at {least}")
    try:
        geometry = Geometry(parse(args.format), args.n, args.k, check_dtype(args.dtype), (args.n,))
        canonical_shapes(geometry)
        if args.kernel != "auto":
            kernel(args.kernel)
    except FdkError as error:
        raise UsageError(str(error)) from None
    print(ops.explain_problem(Problem(args.m, geometry, device_of(args.device)), args.kernel))
    return 0
