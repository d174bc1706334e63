"""fdk warmup: fill the cache of compiled CUDA kernels, here or for a GPU elsewhere."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack

from fdk.cli.flags import UsageError
from fdk.cli.output import progress_bar
from fdk.errors import FdkError

HELP = "compile ahead the CUDA kernels of a model; needs no GPU with --arch"


def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags of its command line."""
    p.add_argument("--model", action="append", default=[], help="folder or cached id of a model quantised by fdk")
    p.add_argument("--format", nargs="+", default=[], metavar="NAME", help="formats of weights of the --shapes")
    p.add_argument("--shapes", nargs="+", default=[], metavar="NxK", help="sizes of those weights: 14336x4096")
    p.add_argument("--dtype", default="bf16", help="of their activations and scales: bf16, fp16 (bf16)")
    p.add_argument("-m", nargs="+", default=["1"], metavar="ROWS", help="rows of activations, such as 1 8 16-512 (1)")
    p.add_argument("--batch-size", type=int, nargs="+", default=[1], help="of models: sequences decoded together (1)")
    p.add_argument("--arch", help="sm_80, sm_89, sm_90a, sm_100a (that of the GPU here)")
    p.add_argument("--sms", type=int, help="multiprocessors of the GPU (its usual number: 132 on an H100 or H200)")


def run(args: argparse.Namespace) -> int:
    """Run it. Returns the exit status."""
    import torch

    from fdk.device import why_no_cuda
    from fdk.kernels.cuda import jit, prebuild
    from fdk.models.ahead import products, step_sources
    from fdk.models.folder import resolve

    rows = _rows(args.m)
    if args.sms is not None and args.sms < 1:
        raise UsageError(f"--sms {args.sms}: a GPU has at least one multiprocessor")
    wanted = _described(args, rows)
    if bad := [batch for batch in args.batch_size if batch < 1]:
        raise UsageError(f"--batch-size {bad[0]}: at least one sequence is decoded")
    folders = [resolve(name) for name in args.model]
    for folder in folders:
        wanted += products(folder, dict.fromkeys([*rows, *args.batch_size]))
    if not wanted:
        raise UsageError("nothing to compile; give --model FOLDER, or --format and --shapes")
    if args.arch is None:
        if reason := why_no_cuda():
            raise UsageError(f"there is no GPU to compile for ({reason}); name its architecture, as in --arch sm_90a")
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        target = prebuild.Target((facts.major, facts.minor), args.sms or facts.multi_processor_count)
    else:
        try:
            target = prebuild.Target.of(args.arch, args.sms)
        except FdkError as error:
            raise UsageError(f"--arch: {error}") from None
    if target.capability < (8, 0):
        raise UsageError(f"--arch {args.arch}: the CUDA kernels need compute capability 8.0; use sm_80 or newer")
    if reason := jit.unavailable(target.capability):
        raise FdkError(reason)
    sources = prebuild.sources(wanted, target)
    for folder in folders:
        sources += [source for batch in args.batch_size for source in step_sources(folder, batch, target)]
    sources = list({repr(source): source for source in sources}.values())
    if jit.missing(sources) and not jit.writable():
        raise FdkError(f"{jit.cache_dir()} cannot be written to; set FDK_CACHE_DIR to a folder that can")
    start = time.perf_counter()
    with ExitStack() as stack:
        advance = progress_bar(stack, "compiling")
        compiled = jit.compile_ahead(sources, (lambda done, of: advance("", done, of)) if advance else None)
    arch = jit.architecture(target.capability)
    print(
        f"{len(sources)} kernels for {arch} with {target.sms} multiprocessors: {compiled} compiled in "
        f"{time.perf_counter() - start:.1f} s, {len(sources) - compiled} were there; {jit.cache_dir()}"
    )
    return 0


def _rows(texts: Sequence[str]) -> list[int]:
    """Numbers of rows from texts like 8 and 16-512."""
    found: list[int] = []
    for text in texts:
        first, dash, last = text.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or not 1 <= int(first) <= int(last or first):
            raise UsageError(f"-m {text!r}: give a number of rows from 1 on, or a range such as 16-512")
        found += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(found))


def _described(args: argparse.Namespace, rows: Sequence[int]) -> list:
    """Products of `fdk warmup --format ... --shapes ...`, with zero points of a byte and of the weight's dtype."""
    import torch

    from fdk.formats import parse
    from fdk.kernels.cuda.prebuild import Product
    from fdk.models.config import check_dtype
    from fdk.packing.layouts import Geometry

    if bool(args.format) != bool(args.shapes):
        raise UsageError("--format and --shapes describe weights together; give both, or a --model")
    try:
        dtype = check_dtype(args.dtype)
    except FdkError as error:
        raise UsageError(f"--dtype: {error}") from None
    if dtype is torch.float32:
        raise UsageError(f"--dtype {args.dtype}: the CUDA kernels multiply bf16 and fp16")
    found = []
    for text in args.shapes:
        n, x, k = text.partition("x")
        if not (x and n.isdigit() and k.isdigit() and int(n) and int(k)):
            raise UsageError(f"--shapes {text!r} is not a size; write n x k without blanks: 14336x4096")
        for name in args.format:
            try:
                geometry = Geometry(parse(name), int(n), int(k), dtype, (int(n),))
                geometry.format.groups(geometry.k)
            except FdkError as error:
                raise UsageError(str(error)) from None
            kinds = (torch.uint8, dtype) if geometry.format.has_zeros else (None,)
            found += [Product(geometry, zeros, m) for zeros in kinds for m in rows]
    return found
