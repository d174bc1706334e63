"""The command: flags, the loop over shapes, threads and m, and what is passed over."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fdk.bench.modes import MODES
from fdk.bench.problems import DTYPES, Selection, lines
from fdk.bench.providers import names as provider_names
from fdk.errors import FdkError, FormatError
from fdk.formats import parse

BOUND = "OMP_PROC_BIND"
MOST_COPIES = 2048
"""Without a limit a small weight would have a million copies, most of them overhead."""
COLD_BYTES_ON_A_GPU = 400_000_000
QUICK_SHAPES = ("4096x4096", "8192x8192", "14336x4096", "4096x14336", "28672x8192")
QUICK_FORMATS = ("lut8_g64", "lut4_g64", "lut3_g64", "lut2_g64", "lut1_g64", "int4_g64", "nf4_g64")
QUICK_CALLS, QUICK_ROUNDS = 20, 30
PEER_SECONDS = {True: 40.0, False: 600.0}
"""Seconds that all compiling and tuning of one peer may take in a run, by --quick."""
_FAMILIES = ("mv", "mv_lut8", "mv_int", "mm", "mm_lut8", "mm_int")
TESTS = (*_FAMILIES, *(f"{family}_ref" for family in _FAMILIES), "marlin", "marlin_lut")


class UsageError(Exception):
    """The command line asks for something impossible; the text says what to do instead."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """The command line. Flags and defaults of the source project come first, ours after."""
    p = _Parser(prog="python -m fdk.bench", description=__doc__, allow_abbrev=False)
    p.add_argument("-m", type=int, nargs="+", help="rows of activations (1 4 16 64 256)")
    p.add_argument("-k", type=int, nargs="+", help="input features (4096)")
    p.add_argument("-n", nargs="+", default=["k"], help="output features: integers, or k for square")
    p.add_argument("--shapes", nargs="+", metavar="NxK", help="sizes instead of -k and -n: 14336x4096 8192x8192")
    p.add_argument("-g", nargs="+", help="weights that share a scale: multiples of 16, or chan for the whole row (64)")
    p.add_argument("-b", "--bits", type=int, nargs="+", help="16: dense weight, 1 to 8: table weight (16 4 1)")
    p.add_argument("--copies", type=int, help="independent weights to rotate over (100; on a CPU over 300 MB)")
    p.add_argument("--inner-reps", type=int, help="calls in a timed block (100; chosen by duration on a CPU)")
    p.add_argument("--outer-reps", type=int, help="timed blocks (100; as many as fit the time on a CPU)")
    p.add_argument("--profile", default="", metavar="TEST", help="run one benchmark for a profiler, unchecked")
    p.add_argument("--include", default="", metavar="REGEX", help="benchmarks to run")
    p.add_argument("--exclude", default=None, metavar="REGEX", help="benchmarks to leave out (_ref)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument("--providers", nargs="+", metavar="NAME", help=f"who may multiply: {', '.join(provider_names())}")
    p.add_argument("--format", nargs="+", default=[], metavar="NAME", help="formats instead of -b and -g: int4_g128")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="activations and scales (bf16)")
    p.add_argument("--threads", nargs="+", metavar="T", help="numbers of CPU threads, or all (all 1)")
    p.add_argument("--output", choices=("md", "jsonl", "csv"), default="md", help="what is printed (md)")
    p.add_argument("--output-dir", type=Path, default=Path("out"), help="folder for records and plots (out)")
    p.add_argument("--plot", action="store_true", help="draw plots of this run's records into the output folder")
    p.add_argument("--mode", choices=tuple(MODES), help="the kernel benchmark of another project, with its own table")
    p.add_argument("--quick", action="store_true", help="fewer sizes and rounds: about a minute")
    p.add_argument("--chain", action="store_true", help="also time layers that multiply the output of the last one")
    p.add_argument("--settle", type=float, metavar="SECONDS", help="run a product that long before each time (GPU; 0)")
    p.add_argument("--jobs", type=int, help="processes that compile before the timing on a GPU (its cores; 0: none)")
    p.add_argument("--peer-seconds", type=float, help="compiling time allowed to each peer (600; 40 with --quick)")
    p.add_argument("--seed", type=int, default=42, help="of weights and activations (42)")
    return p


@dataclass(frozen=True)
class Shape:
    """One weight's size; g is None for one scale per row."""

    k: int
    n: int
    g: int | None


@dataclass(frozen=True)
class Settings:
    """A valid command line."""

    device: torch.device
    shapes: tuple[Shape, ...]
    ms: tuple[int, ...]
    threads: tuple[int | None, ...]
    selection: Selection
    providers: frozenset[str] | None
    profile: str
    include: re.Pattern
    exclude: re.Pattern | None
    copies: int | None
    inner: int | None
    outer: int | None
    budget: float
    """Seconds that a run on a CPU aims at; a point gets a share, but not less than a second."""
    shrunk: bool
    output: str
    output_dir: Path
    plot: bool
    seed: int
    quick: bool = False
    chain: bool = False
    settle: float = 0.0
    jobs: int = 0
    peer_seconds: float = math.inf
    mode: str | None = None
    arguments: tuple[str, ...] = ()
    """The command line that this came from."""

    def wants(self, test: str, provider: str) -> bool:
        """Whether a line with this test name and provider was asked for."""
        if self.providers is not None and provider not in self.providers:
            return False
        if self.profile:
            return test == self.profile and (
                self.providers is not None or provider.startswith(("fdk", "reference", "torch-bf16"))
            )
        return bool(self.include.search(test)) and not (self.exclude and self.exclude.search(test))


def _positive(values: list[int], flag: str) -> tuple[int, ...]:
    if wrong := [value for value in values if value < 1]:
        raise UsageError(f"{flag} {wrong[0]}: sizes are positive integers")
    return tuple(dict.fromkeys(values))


def _integer(text: str, flag: str, other: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{flag} {text!r} is neither an integer nor {other!r}") from None


def _regex(text: str, flag: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"{flag} {text!r} is not a regular expression: {error}; escape special characters") from None


def _shapes(args: argparse.Namespace, ks: tuple[int, ...]) -> tuple[Shape, ...]:
    groups: list[int | None] = [None if g == "chan" else _integer(g, "-g", "chan") for g in args.g or ["64"]]
    if args.format:
        groups = groups[:1]
    found = []
    for k in ks:
        ns = _positive([k if n == "k" else _integer(n, "-n", "k") for n in args.n], "-n")
        found += [Shape(k, n, g) for n in ns for g in groups]
    return tuple(dict.fromkeys(found))


def _named_shapes(texts: list[str], args: argparse.Namespace) -> tuple[Shape, ...]:
    """Shapes from texts like 14336x4096, which is n x k."""
    found = []
    for text in texts:
        n, x, k = text.partition("x")
        if not (x and n.isdigit() and k.isdigit() and int(n) and int(k)):
            raise UsageError(f"--shapes {text!r} is not a size; write n x k without blanks: 14336x4096")
        args.n = [n]
        found += _shapes(args, (int(k),))
    return tuple(dict.fromkeys(found))


def _check_formats(selection: Selection, shapes: tuple[Shape, ...]) -> None:
    """UsageError unless every format exists and divides every k."""
    for shape in shapes:
        try:
            for line in lines(selection, shape.g):
                if not line.dense:
                    parse(line.format).groups(shape.k)
        except FormatError as error:
            raise UsageError(str(error)) from None


def _threads(texts: list[str] | None, quick: bool) -> tuple[int, ...]:
    most = torch.get_num_threads()
    wanted = texts or (["all"] if quick else ["all", "1"])
    found = _positive([most if text == "all" else _integer(text, "--threads", "all") for text in wanted], "--threads")
    if too_many := [t for t in found if t > most]:
        raise UsageError(f"--threads {too_many[0]}: torch has {most} threads here; ask for that or fewer")
    return found


def _jobs(wanted: int | None, on_cpu: bool) -> int:
    if wanted is not None and wanted < 0:
        raise UsageError(f"--jobs {wanted}: give 0 or a number of processes")
    if on_cpu:
        return 0
    return min(14, max(1, (os.cpu_count() or 1) - 2)) if wanted is None else wanted


def _peer_seconds(args: argparse.Namespace, on_cpu: bool) -> float:
    if args.peer_seconds is not None:
        if not args.peer_seconds >= 0:
            raise UsageError(f"--peer-seconds {args.peer_seconds}: give 0 or more")
        return args.peer_seconds
    return math.inf if on_cpu else PEER_SECONDS[args.quick]


def _settle(seconds: float | None, on_cpu: bool) -> float:
    if seconds is None:
        return 0.0
    if on_cpu or not 0 <= seconds <= 10:
        raise UsageError(
            f"--settle {seconds:g}: on a GPU 0 to 10 seconds; 0.2 brings a clock under a power limit to rest"
        )
    return seconds


def settings(argv: list[str] | None) -> Settings:
    """The command line as Settings; UsageError if it makes no sense on this machine."""
    args = parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; leave the flag out, or use --device cpu")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cpu = device.type == "cpu"
    shrunk = on_cpu and (args.inner_reps is None or args.outer_reps is None)
    if args.mode:
        MODES[args.mode].fill(args, on_cpu)
    quick_gpu = args.quick and not on_cpu
    if quick_gpu and not args.format and args.bits is None and args.g is None:
        args.format, args.bits = list(QUICK_FORMATS), [16]
    if quick_gpu and not args.shapes and args.k is None and args.n == ["k"]:
        args.shapes = list(QUICK_SHAPES)
    bits = tuple(dict.fromkeys(args.bits or ([16, 8, 4, 3, 2, 1] if args.quick else [16, 4, 1])))
    if wrong := [b for b in bits if b != 16 and not 1 <= b <= 8]:
        raise UsageError(f"-b {wrong[0]}: widths are 1 to 8 bits, and 16 for a dense weight")
    few = [1, 8, 64] if on_cpu else [1, 8, 16, 32, 64]
    ms = _positive(args.m or (few if args.quick else [1, 4, 16, 64, 256]), "-m")
    known = provider_names()
    if unknown := [name for name in args.providers or [] if name not in known]:
        raise UsageError(f"--providers {unknown[0]}: unknown provider; choose from {', '.join(known)}")
    providers = frozenset(args.providers) if args.providers else None
    ours = tuple(name for name in args.providers or [] if name.partition(":")[0] == "fdk") or ("fdk",)
    try:
        formats = tuple(str(parse(name)) for name in args.format)
    except FormatError as error:
        raise UsageError(f"--format: {error}") from None
    selection = Selection(bits, formats, args.dtype, ours, cuda=not on_cpu)
    if args.shapes and (args.k or args.n != ["k"]):
        raise UsageError("--shapes names n and k, so -k and -n have no meaning beside it; leave them out")
    shapes = _named_shapes(args.shapes, args) if args.shapes else _shapes(args, _positive(args.k or [4096], "-k"))
    _check_formats(selection, shapes)
    for flag, value in (
        ("--copies", args.copies),
        ("--inner-reps", args.inner_reps),
        ("--outer-reps", args.outer_reps),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value}: at least 1 is needed")
    if args.profile and args.profile not in TESTS:
        raise UsageError(f"--profile {args.profile}: unknown benchmark; choose from {', '.join(TESTS)}")
    exclude = "_ref" if args.exclude is None else args.exclude
    found = Settings(
        device=device,
        shapes=shapes,
        ms=ms,
        threads=_threads(args.threads, args.quick or bool(args.profile)) if on_cpu else (None,),
        selection=selection,
        providers=providers,
        profile=args.profile,
        include=_regex(args.include, "--include"),
        exclude=_regex(exclude, "--exclude") if exclude else None,
        copies=args.copies,
        inner=args.inner_reps if on_cpu else args.inner_reps or (QUICK_CALLS if args.quick else 100),
        outer=args.outer_reps if on_cpu else args.outer_reps or (QUICK_ROUNDS if args.quick else 100),
        budget=40.0 if args.quick else 95.0,
        shrunk=shrunk,
        output=args.output,
        output_dir=args.output_dir,
        plot=args.plot,
        seed=args.seed,
        quick=args.quick,
        chain=args.chain,
        settle=_settle(args.settle, on_cpu),
        jobs=_jobs(args.jobs, on_cpu),
        peer_seconds=_peer_seconds(args, on_cpu),
        mode=args.mode,
        arguments=tuple(sys.argv[1:] if argv is None else argv),
    )
    tests = {(line.test(m), line.provider) for shape in shapes for line in lines(selection, shape.g) for m in ms}
    if not any(found.wants(*pair) for pair in tests):
        there = ", ".join(sorted({test for test, _ in tests}))
        raise UsageError(
            f"nothing to run: these sizes have {there}; change --include, --exclude, --profile, --providers or -m"
        )
    return found


def rebind(argv: list[str] | None, on_cpu: bool) -> str | None:
    """Start this command again with OMP_PROC_BIND=true, which counts only before torch loads.

    Without it both threads sometimes share one core, and every time doubles or worse. Returns a warning if the
    process cannot be replaced, because it is not this command's own.
    """
    if not on_cpu or os.environ.get(BOUND):
        return None
    own = getattr(sys.modules.get("__main__"), "__spec__", None)
    script = Path(sys.argv[0]).name if sys.argv else ""
    is_command = (own is not None and own.name.startswith("fdk.")) or script == "fdk"
    if not is_command or (argv is not None and sys.orig_argv[len(sys.orig_argv) - len(argv) :] != list(argv)):
        return f"{BOUND} is not set, so two threads may share a core; set it to true before Python starts"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, BOUND: "true"})


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns 0, 1 if a product was wrong, 2 if the command line or a folder does not allow it."""
    from fdk.bench.run import run

    try:
        chosen = settings(argv)
        warning = rebind(argv, chosen.device.type == "cpu")
        return run(chosen, warning)
    except (UsageError, FdkError) as error:
        print(f"fdk bench: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("fdk bench: interrupted; the records so far are whole", file=sys.stderr)
        return 130


def cold_bytes(device: torch.device) -> int:
    """Bytes that copies of a weight must have together so that none stays in a cache: 4 times the largest."""
    if device.type == "cuda":
        return max(COLD_BYTES_ON_A_GPU, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return 320_000_000


def copies_for(weight_bytes: int, wanted: int | None, device: torch.device, room: int) -> int:
    """Copies of a weight: those wanted, else enough to be cold, up to MOST_COPIES; never more than `room` bytes."""
    if wanted is None:
        wanted = min(MOST_COPIES, max(2, math.ceil(cold_bytes(device) / weight_bytes)))
    return max(1, min(wanted, room // max(1, weight_bytes)))
