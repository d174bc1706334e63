"""The command: flags, compiling, the worker and what outlives it, records and tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fdk.bench import records, report
from fdk.bench.problems import DTYPES
from fdk.bench.variants import code
from fdk.bench.variants.code import Code
from fdk.bench.variants.configurations import (
    CHOSEN,
    KERNELS,
    SMS,
    Change,
    Problem,
    Variant,
    VariantError,
    is_hopper,
    parse_changes,
    shared_bytes,
    variants,
)
from fdk.bench.variants.named import SETS, Trial
from fdk.errors import FdkError
from fdk.kernels.cuda import jit

WORKER = (sys.executable, "-m", "fdk.bench.variants.worker")
STALLS = 90.0
"""Seconds without a word from the worker after which it is taken to hang: weights are drawn and packed in fewer."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise VariantError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = _Parser(prog="python -m fdk.bench.variants", description=__doc__, allow_abbrev=False)
    p.add_argument("--set", nargs="+", default=[], metavar="NAME", help=f"named sets: {', '.join(SETS)}")
    p.add_argument("--list", action="store_true", help="say what the named sets ask, and how long each takes")
    p.add_argument("--kernel", choices=tuple(KERNELS), default="decode", help="whose configurations (decode)")
    p.add_argument("--format", nargs="+", default=["lut4_g64"], metavar="NAME", help="formats (lut4_g64)")
    p.add_argument("--shapes", nargs="+", default=["8192x8192"], metavar="NxK", help="sizes (8192x8192)")
    p.add_argument("-m", type=int, nargs="+", default=[1], help="rows of activations (1)")
    p.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="of activations and scales (bf16)")
    p.add_argument(
        "--vary", nargs="+", action="append", default=[], metavar="FIELD=A,B",
        help="fields other than chosen, in all combinations; may be given more than once, for other combinations",
    )  # fmt: skip
    p.add_argument("--seconds", type=float, help="at most, for checking and timing all (120; twice what sets say)")
    p.add_argument("--rounds", type=int, default=100, help="rounds in which all variants are timed, at most (100)")
    p.add_argument("--chain", action="store_true", help="also time square layers one after the other")
    p.add_argument("--compile-only", action="store_true", help="no GPU: registers, stack and instructions")
    p.add_argument("--arch", default="sm_90a", help="architecture of --compile-only (sm_90a)")
    p.add_argument("--jobs", type=int, help="threads that compile (all cores)")
    p.add_argument("--output-dir", type=Path, default=Path("out"), help="folder for records (out)")
    return p


def trials(args: argparse.Namespace) -> list[Trial]:
    """What the command line asks for."""
    if unknown := [name for name in args.set if name not in SETS]:
        raise VariantError(f"--set {unknown[0]}: there is no such set; choose from {', '.join(SETS)}")
    if args.set and args.vary:
        raise VariantError("--set names its own changes, so --vary has no meaning beside it; leave one out")
    if args.set:
        return [trial for name in args.set for trial in SETS[name].trials]
    found = []
    for text in args.shapes:
        n, x, k = text.partition("x")
        if not (x and n.isdigit() and k.isdigit() and int(n) and int(k)):
            raise VariantError(f"--shapes {text!r} is not a size; write n x k without blanks: 14336x4096")
        found += [(int(n), int(k))]
    if wrong := [m for m in args.m if m < 1]:
        raise VariantError(f"-m {wrong[0]}: rows are positive integers")
    changes = tuple(change for texts in args.vary for change in parse_changes(texts, args.kernel))
    asked = tuple(
        Problem(args.kernel, name, n, k, m, args.dtype) for name in args.format for n, k in found for m in args.m
    )
    assert args.dtype in DTYPES
    return [Trial(asked, changes)]


@dataclasses.dataclass
class Task:
    """One problem with its variants, their code, and what came of them by name."""

    problem: Problem
    changes: tuple[Change, ...]
    variants: list[Variant]
    codes: list[Code]
    results: list[records.Record] = dataclasses.field(default_factory=list)

    def excluded(self) -> dict[str, str]:
        """Variants that are not to be run, with the reason."""
        found = {v.name: c.reason for v, c in zip(self.variants, self.codes, strict=True) if c.reason}
        return found | {str(r["variant"]): str(r["reason"]) for r in self.results if r["variant"] is not None}


def compiled(asked: Sequence[Trial], sms: int, arch: str, jobs: int | None) -> list[Task]:
    """Every problem of the trials once, with its variants compiled for `arch`."""
    changes: dict[Problem, tuple[Change, ...]] = {}
    for trial in asked:
        for problem in trial.problems:
            changes[problem] = changes.get(problem, ()) + trial.changes
    found = [(problem, wanted, variants(problem, wanted, sms, is_hopper(arch))) for problem, wanted in changes.items()]
    work = [(problem, variant) for problem, _, every in found for variant in every]
    codes = iter(code.compile_all(work, arch, jobs))
    return [Task(problem, wanted, every, [next(codes) for _ in every]) for problem, wanted, every in found]


def record(task: Task, common: dict[str, object], result: dict[str, object]) -> dict[str, object]:
    """A flat record of a variant, or of a reference."""
    found: dict[str, object] = dataclasses.asdict(task.problem) | result
    for variant, its in zip(task.variants, task.codes, strict=True):
        if result.get("variant") == variant.name:
            found |= {
                "registers": its.registers, "stack": its.stack, "shared": shared_or_none(task.problem, variant),
                "config": variant.fields(),
            }  # fmt: skip
    return found | common


def shared_or_none(problem: Problem, variant: Variant) -> int | None:
    try:
        return shared_bytes(problem, variant.config)
    except (ArithmeticError, ValueError, KeyError):
        return None


def lines_of(process: subprocess.Popen, stalls: float) -> Iterator[dict]:
    """What a worker says; ends with the process, or with its being killed after `stalls` seconds of silence."""
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            said.put(line)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = said.get(timeout=stalls)
        except queue.Empty:
            process.kill()
            process.wait()
            yield {"stalled": f"said nothing for {stalls:g} s and was killed"}
            return
        if line is None:
            process.wait()
            return
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            yield event


def supervise(
    tasks: Sequence[Task],
    command: Sequence[str],
    seconds: float,
    rounds: int,
    chain: bool,
    stalls: float = STALLS,
    done: Callable[[Task], None] = lambda task: None,
) -> None:
    """Have workers measure all tasks; whoever ends one is a failure, and a new worker goes on behind it.

    command: starts a worker, to which the path of its job is appended. done: told every task whose results are there.
    """
    started = time.monotonic()
    first = barren = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        while first < len(tasks) and barren < 2:
            job = {
                "problems": [{"problem": dataclasses.asdict(t.problem), "changes": list(t.changes)} for t in tasks],
                "excluded": {str(i): list(task.excluded()) for i, task in enumerate(tasks)},
                "first": first,
                "seconds": max(0.0, seconds - (time.monotonic() - started)),
                "rounds": rounds,
                "chain": chain,
            }
            path.write_text(json.dumps(job))
            worker = subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, text=True)
            running, ending = "", None
            barren += 1
            try:
                for event in lines_of(worker, stalls):
                    if "begin" in event:
                        running = event["begin"]
                    elif "results" in event or "failed" in event:
                        barren = 0
                        task = tasks[event["problem"]]
                        task.results += event.get("results") or failures(task, event["failed"])
                        done(task)
                        first, running = event["problem"] + 1, ""
                    else:
                        ending = event.get("broken") or event.get("stalled") or ending
            finally:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
            if first < len(tasks):
                why = ending or f"ended with status {worker.returncode}"
                reason = f"its process {why}" if ending is None or "said nothing" in why else why
                task = tasks[first]
                if running:
                    barren = 0
                    task.results.append({"who": "fdk", "variant": running, "status": "failed", "reason": reason})
                else:
                    task.results += failures(task, f"{reason}, outside of any one variant's check")
                    done(task)
                    first += 1
        for task in tasks[first:]:
            task.results += failures(task, "two processes in a row ended before they had measured anything")
            done(task)


def failures(task: Task, reason: str) -> list[dict[str, object]]:
    """Every variant without a result as failed."""
    known = task.excluded()
    return [
        {"who": "fdk", "variant": variant.name, "status": "failed", "reason": reason}
        for variant in task.variants
        if variant.name not in known
    ]


def rows(found: Sequence[dict[str, object]]) -> list[list[str]]:
    """Rows of the table of one problem: by time, then those without."""

    def number(entry: dict[str, object], field: str, factor: float = 1.0) -> str:
        value = entry.get(field)
        return "-" if value is None else report.significant(float(value) * factor)

    timed = sorted((e for e in found if "time_p50" in e), key=lambda e: float(e["time_p50"]))
    table = []
    for entry in timed:
        times = [number(entry, f"time_{p}", 1e6) for p in ("p50", "p20", "p80")]
        table.append([
            str(entry["variant"] or entry["who"]), f"{times[0]} ({times[1]}-{times[2]})",
            *(number(entry, field) for field in ("x_chosen", "x_floor", "x_cublas")),
            number(entry, "chain_time", 1e6), *(str(entry.get(field, "-")) for field in ("registers", "stack")),
        ])  # fmt: skip
    return table


COLUMNS = ("configuration", "us (p20-p80)", "x chosen", "x floor", "x cuBLAS", "chain us", "registers", "stack")
CODE_COLUMNS = ("configuration", "registers", "stack", "shared", "a unit", "a weight", "by opcode")


def code_rows(task: Task) -> list[list[str]]:
    """Rows of the table of --compile-only: instructions of the main loop a warp and unit, a thread and weight."""
    table = []
    for variant, its in zip(task.variants, task.codes, strict=True):
        if its.reason is not None:
            table.append([variant.name, *["-"] * 5, its.reason])
            continue
        counts = code.instructions(its.cubin)
        a_unit = a_weight = opcodes = "-"
        if counts:
            units = code.units_in_loop(task.problem, variant, counts)
            total = sum(counts.values()) / units
            a_unit, a_weight = f"{total:.0f}", f"{total * 32 / 4096:.2f}"
            opcodes = " ".join(f"{name} {count / units:.3g}" for name, count in list(counts.items())[:9])
        shared = shared_or_none(task.problem, variant)
        table.append([variant.name, str(its.registers), str(its.stack), str(shared), a_unit, a_weight, opcodes])
    return table


def listing() -> str:
    """The named sets in words."""
    return "\n".join(f"{name} (about {found.seconds} s): {found.question}" for name, found in SETS.items())


def run(args: argparse.Namespace) -> int:
    """Compile, then measure or describe the code; 1 if a chosen configuration failed."""
    asked = trials(args)
    if args.compile_only:
        tasks = compiled(asked, SMS, args.arch, args.jobs)
        for task in tasks:
            print(f"\n{task.problem}, {args.arch}; chosen: {task.variants[0].config}\n")
            print(report.markdown(code_rows(task), CODE_COLUMNS))
        if code.disassembler() is None:
            print("\ncuobjdump was not found, so instructions are not counted; install the CUDA toolkit or Triton")
        return int(any(its.reason for task in tasks for its in task.codes[:1]))
    import torch

    if not torch.cuda.is_available():
        raise VariantError("torch sees no CUDA device here; --compile-only needs none")
    device = torch.device("cuda", torch.cuda.current_device())
    facts = torch.cuda.get_device_properties(device)
    started = time.monotonic()
    tasks = compiled(asked, facts.multi_processor_count, jit.architecture((facts.major, facts.minor)), args.jobs)
    count = sum(len(task.variants) for task in tasks)
    seconds = args.seconds or 2.0 * sum(SETS[name].seconds for name in args.set) or 120.0
    print(
        f"{count} configurations of {len(tasks)} problems on {facts.name}: compiled in "
        f"{time.monotonic() - started:.0f} s, checked and timed in at most about {seconds:g} s"
    )
    common = records.environment(device)
    with records.Writer(args.output_dir, f"variants-{common['id']}") as writer:

        def done(task: Task) -> None:
            refused = [
                {"who": "fdk", "variant": v.name, "status": "skipped", "reason": c.reason}
                for v, c in zip(task.variants, task.codes, strict=True)
                if c.reason
            ]
            task.results = [record(task, common, result) for result in task.results + refused]
            for entry in task.results:
                writer.write(entry)
            print(f"\n{task.problem}\n\n{report.markdown(rows(task.results), COLUMNS)}")
            for entry in task.results:
                if entry["status"] != "ok":
                    print(f"{entry['status']}: {entry['variant']}: {entry['reason']}")
            sys.stdout.flush()

        supervise(tasks, WORKER, seconds, args.rounds, args.chain, done=done)
        print(f"\n{writer.count} records in {writer.path}, after {time.monotonic() - started:.0f} s")
    return int(any(e["status"] != "ok" for task in tasks for e in task.results if e["variant"] == CHOSEN))


def main(argv: list[str] | None = None) -> int:
    """Run; returns 0, 1 if a chosen configuration failed, 2 if the command line or a folder does not allow it."""
    try:
        args = parser().parse_args(argv)
        if args.list:
            print(listing())
            return 0
        return run(args)
    except (FdkError, OSError) as error:
        print(f"fdk bench variants: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("fdk bench variants: interrupted; the records so far are whole", file=sys.stderr)
        return 130
