"""One run: build the operands of a shape, gate every product, time all of them in interleaved rounds, record."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fdk.bench import records, roofline, timing, warm, weights_floor
from fdk.bench.command import Settings, Shape, UsageError, cold_bytes, copies_for
from fdk.bench.gate import Gate
from fdk.bench.modes import MODES
from fdk.bench.operands import Prepared, Source, Unavailable
from fdk.bench.problems import BASELINE, DTYPES, Line, activation_bytes, lines, operations, weight_bytes
from fdk.bench.providers import is_ours, prepare
from fdk.bench.report import Report, slower_with_fewer_rows
from fdk.errors import FdkError
from fdk.formats import parse

ACTIVATIONS = 4
"""Sets of activations and outputs to rotate over: in a model they come from the kernel before and are in the cache."""

NOISY = 1.3

GPU_PEERS = frozenset({"torch-tinygemm", "bitsandbytes-nf4", "humming", "gemlite"})

READ_CALLS = 2
"""Calls of the large read in a CUDA graph; each lasts long enough."""

TUNES_FOR_LONG = frozenset({"gemlite"})
"""Peers that try dozens of kernels for every size at the first call."""


@dataclass
class Peers:
    """What a run has learned about others' kernels: the seconds that each has compiled for, and what is ruled out."""

    allowed: float
    spent: dict[str, float] = field(default_factory=dict)
    excluded: dict[tuple[Shape, Line], str] = field(default_factory=dict)

    def reason_against(self, shape: Shape, line: Line) -> str | None:
        if (shape, line) in self.excluded:
            return self.excluded[shape, line]
        if not is_ours(line.provider) and self.spent.get(line.provider, 0.0) > self.allowed:
            return f"it has compiled and tuned for more than the {self.allowed:g} s of --peer-seconds"
        return None

    @contextmanager
    def timing(self, line: Line):
        started = time.monotonic()
        try:
            yield
        finally:
            self.spent[line.provider] = self.spent.get(line.provider, 0.0) + time.monotonic() - started


def wanted_lines(settings: Settings, shape: Shape) -> list[Line]:
    """The lines of a shape that were asked for at some m, and the baseline."""
    wanted = [
        line
        for line in lines(settings.selection, shape.g)
        if any(settings.wants(line.test(m), line.provider) for m in settings.ms)
    ]
    if BASELINE not in wanted and not settings.profile:
        wanted.insert(0, BASELINE)
    return wanted


class DeviceError(Exception):
    """The device reported an error that ends the process's use of it; the text says where."""


class Bench:
    """All operands of one shape, shared by every m and number of threads."""

    def __init__(self, settings: Settings, shape: Shape, report: Report, peers: Peers | None = None) -> None:
        self.settings, self.shape, self.device = settings, shape, settings.device
        self.peers = peers or Peers(settings.peer_seconds)
        wanted = wanted_lines(settings, shape)
        self.lines = wanted
        self.prepared: dict[Line, Prepared] = {}
        self.unavailable: dict[Line, str] = {}
        self._sources: dict[tuple, Source] = {}
        self._gates: dict[tuple, Gate] = {}
        self._x: dict[str, Tensor] = {}
        for line in wanted:
            report.doing(f"preparing {line.format} for {line.provider}")
            self._prepare(line)

    def _prepare(self, line: Line) -> None:
        named = self.settings.providers or ()
        if self.settings.quick and line.provider in TUNES_FOR_LONG and line.provider not in named:
            self.unavailable[line] = "it tunes every size for long, so --quick needs it named with --providers"
            return
        if reason := self.peers.reason_against(self.shape, line):
            self.unavailable[line] = reason
            return
        try:
            with self.peers.timing(line):
                prepared = prepare(line, self.source(line))
            room = int(0.6 * available_bytes(self.device)) // (len(self.lines) - len(self.prepared))
            prepared.copy_to(copies_for(prepared.weight_bytes, self.settings.copies, self.device, room))
            self.prepared[line] = prepared
        except Unavailable as error:
            self.unavailable[line] = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            self.unavailable[line] = f"no memory for [{self.shape.n}, {self.shape.k}]; free some or use smaller sizes"
        except Exception as error:
            if is_ours(line.provider):
                raise
            self.unavailable[line] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"

    def source(self, line: Line) -> Source:
        key = (line.format, line.dtype, line.family == "marlin_lut")
        if key not in self._sources:
            self._sources[key] = Source(line, self.shape.n, self.shape.k, self.device, self.settings.seed)
        return self._sources[key]

    def x(self, dtype: str) -> Tensor:
        """Activations [largest m, k]; seeded."""
        if dtype not in self._x:
            generator = torch.Generator().manual_seed(self.settings.seed + 1)
            x = torch.randn(max(self.settings.ms), self.shape.k, generator=generator)
            self._x[dtype] = x.to(DTYPES[dtype]).to(self.device)
        return self._x[dtype]

    def check(self, line: Line, m: int) -> tuple[str, str | None]:
        """Status of the line for m rows, "ok", "failed" or "skipped", and the reason for the last two."""
        if line in self.unavailable:
            return "skipped", self.unavailable[line]
        if reason := self.peers.reason_against(self.shape, line):
            return "skipped", reason
        prepared, source = self.prepared[line], self.source(line)
        key = (line.format, line.dtype, line.family == "marlin_lut")
        if key not in self._gates:
            self._gates[key] = Gate(self.x(line.dtype), source.exact_rows, self.shape.n)
        try:
            for index in sorted({0, len(prepared.weights) - 1}):
                product = lambda x, out, index=index: prepared.run(x, index, out)  # noqa: E731
                with self.peers.timing(line):
                    wrong = self._gates[key].check(product, m, prepared.rounds(m), prepared.tolerance)
                if wrong:
                    return "failed", wrong
        except FdkError as error:
            return "skipped", str(error)
        except Exception as error:
            # Ours must not raise, and an error of the device says nothing about what a provider can do.
            broken = line.provider.startswith("fdk") or "CUDA error" in str(error)
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            return ("failed" if broken else "skipped"), text
        return "ok", None

    def relative_error(self, line: Line, m: int) -> float:
        """Of the product with the line's first copy, against the exact product with the same stored weight."""
        gate = self._gates[line.format, line.dtype, line.family == "marlin_lut"]
        return gate.relative_error(lambda x, out: self.prepared[line].run(x, 0, out), m)

    def call(self, line: Line, m: int) -> timing.Call:
        """The line's timed call for m rows."""
        prepared = self.prepared[line]
        x = self.x(line.dtype)[:m]
        xs = [x.clone() for _ in range(ACTIVATIONS)]
        outs = [torch.empty(m, self.shape.n, dtype=x.dtype, device=self.device) for _ in range(ACTIVATIONS)]
        run, copies = prepared.run, len(prepared.weights)
        return lambda i: run(xs[i % ACTIVATIONS], i % copies, outs[i % ACTIVATIONS])

    def chain(self, line: Line, m: int) -> timing.Call:
        """The line's call in a sequence of layers; of a square weight only."""
        prepared = self.prepared[line]
        return timing.chained(prepared.run, self.x(line.dtype)[:m].clone(), len(prepared.weights))


def available_bytes(device: torch.device) -> int:
    """Memory that can be had without harm to others."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def estimate(call: timing.Call, least: int = 3) -> float:
    """Seconds of a call on a CPU, roughly: the fastest of a few, one if it is slow."""
    fastest = float("inf")
    for i in range(least):
        start = time.perf_counter()
        call(i)
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > timing.SLOW_SECONDS:
            break
    return max(fastest, 1e-7)


@dataclass
class Calls:
    """What one point times, by name: lines by their number, "chain", "floor" and "plain" in front of it, and "read".

    inner: calls in a block on a GPU. floors: for every line, whose floor is its own and the factor to scale it by.
    facts: the fields of a record that say what read a line's floor, and which memory.
    """

    calls: dict[str, timing.Call] = field(default_factory=dict)
    inner: dict[str, int] = field(default_factory=dict)
    floors: dict[str, tuple[str, float]] = field(default_factory=dict)
    facts: dict[str, records.Record] = field(default_factory=dict)


def calls_of(bench: Bench, m: int, ok: dict[str, Line], memory: roofline.Memory, reader: str) -> Calls:
    """The calls of the lines that passed the gate for m rows, and of the floors beside them.

    reader: the name of torch's fastest reader, which reads a GPU's floor where the streaming kernel cannot.
    """
    settings, shape = bench.settings, bench.shape
    found = Calls()
    for name, line in ok.items():
        prepared = bench.prepared[line]
        found.calls[name] = bench.call(line, m)
        found.inner[name] = max(settings.inner or 1, len(prepared.weights))
        if settings.chain and shape.n == shape.k:
            found.calls[f"chain {name}"] = bench.chain(line, m)
            found.inner[f"chain {name}"] = found.inner[name]
        if memory.floor is None:
            copies = [prepared.tensors(index) for index in range(len(prepared.weights))]
            found.calls[f"floor {name}"] = weights_floor.stream(copies, prepared.weight_bytes)
            found.floors[name] = name, 1.0
            found.facts[name] = {"floor_memory": "weights", "floor_reader": weights_floor.READER}
    if memory.floor is not None:
        add_pool_floors(bench, m, ok, memory, reader, found)
    found.calls["read"] = memory.stream(roofline.READ_BYTES[bench.device.type])
    found.inner["read"] = READ_CALLS
    return found


def add_pool_floors(
    bench: Bench, m: int, ok: dict[str, Line], memory: roofline.Memory, reader: str, found: Calls
) -> None:
    """The floors of a GPU, one for all lines of a size: reads of a pool by the streaming kernel or by torch."""
    shape = bench.shape
    if memory.streams:
        # The floor reads what the format stores: activations lie in the cache, and a peer's padding is its own.
        sizes = {name: weight_bytes(line.format, shape.n, shape.k, line.dtype) for name, line in ok.items()}
    else:
        sizes = {name: moved_bytes(bench, line, m) for name, line in ok.items()}
    found.floors = roofline.share_floors(sizes)
    for name, (owner, _) in found.floors.items():
        size = sizes[owner]
        if memory.streams:
            found.facts[name] = {"floor_memory": "pool", "floor_reader": memory.floor.grid(size, shape.n)}
            found.calls[f"floor {owner}"], found.calls[f"plain {owner}"] = memory.floor.calls(size, shape.n)
            found.inner |= dict.fromkeys((f"floor {owner}", f"plain {owner}"), memory.floor.cold_calls(size))
        else:
            found.facts[name] = {"floor_memory": "pool", "floor_reader": reader}
            found.calls[f"floor {owner}"] = memory.stream(size)


def moved_bytes(bench: Bench, line: Line, m: int) -> int:
    """Bytes of weight, activations and output that a product of m rows reads and writes."""
    return bench.prepared[line].weight_bytes + activation_bytes(m, bench.shape.n, bench.shape.k, line.dtype)


def measure_point(
    bench: Bench, m: int, memory: roofline.Memory, ceilings: roofline.Ceilings, seconds: float, common: records.Record
) -> tuple[list[records.Record], str | None]:
    """Check and time every line for m rows: a record for each line that was asked for, and a warning of noise."""
    settings, shape, device = bench.settings, bench.shape, bench.device
    active = [line for line in bench.lines if line == BASELINE or settings.wants(line.test(m), line.provider)]
    verdicts = {line: bench.check(line, m) for line in active}
    ok = {str(index): line for index, line in enumerate(active) if verdicts[line][0] == "ok"}
    found = calls_of(bench, m, ok, memory, ceilings.reader)
    times, blocks, plan, broken = time_calls(found.calls, settings, seconds, device, found.inner)
    read, read_bytes = times["read"], roofline.READ_BYTES[device.type]
    baseline = next((name for name, line in ok.items() if line == BASELINE), None)
    results = []
    for index, line in enumerate(active):
        if not settings.wants(line.test(m), line.provider):
            continue
        name = str(index)
        status, reason = verdicts[line]
        entry = dict(
            common, test=line.test(m), m=m, k=shape.k, n=shape.n, bits=line.bits, format=line.format, dtype=line.dtype,
            g=None if line.dense else parse(line.format).group_size(shape.k), provider=line.provider, status=status,
            reason=reason, ops=operations(m, shape.k, shape.n), peak=ceilings.peak, reader=ceilings.reader,
            copy_bandwidth=ceilings.copy, read_bandwidth=read_bytes / timing.median(read),
        )  # fmt: skip
        if status == "ok" and name in broken:
            ours = is_ours(line.provider)
            entry |= {"status": "failed" if ours else "skipped", "reason": f"timing failed: {broken[name]}"}
        elif status == "ok":
            prepared, block, own = bench.prepared[line], blocks[name], times[name]
            spread, moved = timing.Times.of(own), moved_bytes(bench, line, m)
            owner, factor = found.floors[name]
            floor = [value * factor for value in times[f"floor {owner}"]]
            if reason := getattr(block, "why_not_graph", None):
                entry["reason"] = f"no CUDA graph: {reason}"
            entry |= {
                "kernel": prepared.kernel(m), "copies": len(prepared.weights), "launch": block.launch,
                "inner_reps": plan.inner[name], "reps": plan.inner[name] * len(own), "settle": settings.settle or None,
                "bytes_rw": moved,
                "relative_error": bench.relative_error(line, m),
                "avg_time": spread.mean, "time_p20": spread.p20, "time_p50": spread.p50, "time_p80": spread.p80,
                "floor": timing.median(floor), "x_floor": timing.ratio(own, floor),
                "read_fraction": moved / read_bytes * timing.ratio(read, own),
                **found.facts[name],
            }  # fmt: skip
            if f"plain {owner}" in times:
                entry["floor_plain"] = factor * timing.median(times[f"plain {owner}"])
            if f"chain {name}" in times:
                entry["chain_time"] = timing.median(times[f"chain {name}"])
                entry["x_chain"] = timing.ratio(times[f"chain {name}"], own)
            if baseline in times:
                gains = timing.ratios(times[baseline], own)
                entry["x_bf16"] = timing.median(gains)
                entry |= {f"x_bf16_p{q}": timing.percentile(gains, q) for q in (20, 80)}
        results.append(records.record(**entry))
    return results, noise(read)


def noise(read: list[float]) -> str | None:
    """A warning if the time to read one and the same number of bytes differed much from round to round."""
    spread = timing.percentile(read, 80) / timing.percentile(read, 20)
    if spread < NOISY:
        return None
    return (
        f"note: the read bandwidth changed by {spread:.2f} x (p80 over p20) while this was timed: "
        "other work is running, so trust ratios more than times, and run again"
    )


Block = timing.CpuBlock | timing.CudaBlock


def time_calls(
    calls: dict[str, timing.Call], settings: Settings, seconds: float, device: torch.device, inner: dict[str, int]
) -> tuple[dict[str, list[float]], dict[str, Block], timing.Plan, dict[str, str]]:
    """Seconds per call of every name, round by round; blocks and plan used; and whose block could not be built, why.

    inner: calls in a block on a GPU, settings.inner where a name is missing. On a CPU the plan chooses.
    """
    broken: dict[str, str] = {}
    blocks: dict[str, Block] = {}
    if device.type == "cuda":
        plan = timing.Plan(
            {name: inner.get(name, settings.inner) for name in calls}, dict.fromkeys(calls, settings.outer)
        )
        for name, call in calls.items():
            try:
                # Floors and reads are far from the power limit.
                settle = settings.settle if name.isdigit() else 0.0
                blocks[name] = timing.CudaBlock(call, plan.inner[name], settle)
            except Exception as error:
                if name.startswith(("floor", "read")):
                    raise
                broken[name] = (str(error) or type(error).__name__).splitlines()[0]
    else:
        plan = timing.plan(
            {name: estimate(call) for name, call in calls.items()}, seconds, settings.inner, settings.outer
        )
        blocks = {name: timing.CpuBlock(call, plan.inner[name]) for name, call in calls.items()}
    limit = time.monotonic() + 2 * seconds
    given = settings.outer is not None
    times = timing.rounds(blocks, plan.outer, lambda: not given and time.monotonic() > limit)
    return times, blocks, plan, broken


def profile(settings: Settings, report: Report) -> int:
    """Run the named benchmark's calls and nothing else, for a profiler around this process."""
    calls = (settings.inner or 100) * (1 if settings.device.type == "cuda" else settings.outer or 1)
    for shape in settings.shapes:
        bench = Bench(settings, shape, report)
        for line in bench.lines:
            for m in settings.ms:
                if not settings.wants(line.test(m), line.provider):
                    continue
                what = f"{line.test(m)} {line.format} {line.provider}, m={m} k={shape.k} n={shape.n}"
                if line in bench.unavailable:
                    report.note(f"not run: {what}: {bench.unavailable[line]}")
                    continue
                call = bench.call(line, m)
                for i in range(calls):
                    call(i)
                if settings.device.type == "cuda":
                    torch.cuda.synchronize()
                report.note(f"ran {calls} calls of {what}; nothing was checked, so no times are reported")
    return 0


def run(settings: Settings, warning: str | None = None) -> int:
    """Run everything; returns 1 if a product was wrong, else 0. Raises UsageError if records cannot be written."""
    report = Report(settings.output)
    if warning:
        report.note(f"warning: {warning}")
    try:
        with torch.inference_mode():
            return profile(settings, report) if settings.profile else _run(settings, report)
    except DeviceError as error:
        report.note(f"{error}; the records so far are whole", "bold red")
        return 1
    finally:
        report.close()


def _run(settings: Settings, report: Report) -> int:
    started = time.monotonic()
    environment = records.environment(settings.device)
    try:
        writer = records.Writer(settings.output_dir, str(environment["id"]))
    except FdkError as error:
        raise UsageError(str(error)) from None
    points = [(s, t, m) for s in settings.shapes for t in settings.threads for m in settings.ms]
    failed = 0
    everything: list[records.Record] = []
    with writer:
        report.note(f"{environment['device']}, {environment['isa']}; {environment['versions']}")
        if settings.shrunk:
            minutes = 2 if settings.budget > 60 else 1
            report.note(
                f"no GPU is used: the default sizes are to end within about {minutes} min, with as many repetitions "
                "as fit (--inner-reps, --outer-reps and --copies set them)"
            )
        report.start(len(points))
        peers = Peers(settings.peer_seconds)
        if settings.jobs:
            report.doing("compiling")
            started_compiling = time.monotonic()
            peers.excluded = warm.run(settings)
            report.note(
                f"{plural(settings.jobs, 'process', 'processes')} compiled for "
                f"{time.monotonic() - started_compiling:.0f} s before the timing"
            )
        report.doing("measuring ceilings")
        memory = roofline.Memory(settings.device)
        if memory.floor is not None and memory.floor.unavailable:
            report.note(f"note: the floor is read by torch, not by fdk's kernel: {memory.floor.unavailable}")
        ceilings = {}
        for threads in settings.threads:
            set_threads(threads)
            ceilings[threads] = found = memory.ceilings()
            where = "" if threads is None else f"{plural(threads, 'thread')}: "
            report.note(
                f"{where}read {found.read / 1e9:.1f} GB/s ({found.reader}), copy {found.copy / 1e9:.1f} GB/s, "
                f"bf16 matmul {found.peak / 1e12:.3g} TFLOP/s"
            )
        report.note("x floor: over a read of the same bytes, 1 is perfect; % of pool: of the read rate above")
        report.note("")
        left = len(points)
        for shape in settings.shapes:
            set_threads(max((t for t in settings.threads if t), default=None))
            bench = Bench(settings, shape, report, peers)
            note_warm(bench, report)
            if memory.streams:
                report.doing("choosing grids for the streaming floor")
                formats = {(line.format, line.dtype) for line in bench.prepared}
                sizes = [(weight_bytes(f, shape.n, shape.k, d), shape.n) for f, d in sorted(formats)]
                if reason := memory.floor.prepare(sizes):
                    report.note(f"note: from here on the floor is read by torch, not by fdk's kernel: {reason}")
            for threads in settings.threads:
                set_threads(threads)
                memory.use(ceilings[threads])
                for m in settings.ms:
                    ceilings[threads] = memory.refine(ceilings[threads])
                    title = f"m={m} k={shape.k} n={shape.n}" + (
                        "" if threads is None else f", {plural(threads, 'thread')}"
                    )
                    report.doing(title)
                    share = (settings.budget - (time.monotonic() - started)) / left
                    common = dict(environment, threads=threads)
                    try:
                        found, busy = measure_point(
                            bench, m, memory, ceilings[threads], min(5.0, max(0.7, 0.8 * share)), common
                        )
                    except RuntimeError as error:
                        if "CUDA error" not in str(error):
                            raise
                        # After an error of the device nothing more can be measured in this process.
                        raise DeviceError(f"stopped at {title}: {str(error).splitlines()[0]}") from error
                    for entry in found:
                        writer.write(entry)
                    everything += found
                    # A peer whose result is wrong is listed in red; the run fails for what is ours or torch's.
                    failed += sum(entry["status"] == "failed" and entry["provider"] not in GPU_PEERS for entry in found)
                    report.results(title, found, busy)
                    left -= 1
                    report.doing(title, advance=1)
            del bench
            gc.collect()
    if settings.mode and settings.output == "md":
        report.note(MODES[settings.mode].summary(everything))
    for slower in slower_with_fewer_rows(everything):
        report.note(f"fewer rows are slower: {slower}", "yellow")
    report.note(f"{writer.count} records in {writer.path}")
    if failed:
        report.note(f"{plural(failed, 'product')} failed the correctness check", "bold red")
    if settings.plot:
        plot(writer.path, settings, report)
    return 1 if failed else 0


def plot(path: Path, settings: Settings, report: Report) -> None:
    """Draw the run's records; a reason why that cannot be done is a note, since the records are safe."""
    from fdk.bench import plots

    try:
        paths = plots.draw([path], settings.output_dir)
        for drawn in paths + (MODES[settings.mode].draw(path, settings.output_dir) if settings.mode else []):
            report.note(f"drew {drawn}")
    except (plots.PlotError, records.RecordError, OSError) as error:
        report.note(f"no plots: {error}")


def note_warm(bench: Bench, report: Report) -> None:
    """Say which weights may stay in a cache because there is no room for enough copies, or few were asked for."""
    needed = 0.75 * cold_bytes(bench.device)
    warm = [line.format for line, p in bench.prepared.items() if p.weight_bytes * len(p.weights) < needed]
    if warm:
        names = ", ".join(dict.fromkeys(warm))
        report.note(f"note: the copies of {names} are less than {needed / 1e6:.0f} MB together and may stay in a cache")


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
