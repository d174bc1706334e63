"""vLLM's own throughput and latency commands for formats beside each other: `fdk serve-bench`.

The settings are those of MatGPTQ's benchmark: 128 prompts, 32 tokens in, 128 out; latency of batches of 1 to 16. Every
measurement is an engine of its own. Records go to `out/serve-<device>-<date>-<process>.jsonl`, a figure beside them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import torch

from fdk.bench import records
from fdk.bench.plots import COLOUR_OF_BITS, PlotError, pyplot
from fdk.bench.report import significant
from fdk.errors import FdkError
from fdk.formats import parse
from fdk.models.folder import resolve
from fdk.models.skeleton import read_config

DENSE = "16"
BATCHES = (1, 2, 4, 8, 16)
# What `vllm bench` runs; the command itself does not start from builds that are not called vllm.
LAUNCH = """
import sys
from importlib import import_module
from vllm.utils.argparse_utils import FlexibleArgumentParser
if __name__ == "__main__":
    benchmark, parser = import_module("vllm.benchmarks." + sys.argv[1]), FlexibleArgumentParser()
    benchmark.add_cli_args(parser)
    benchmark.main(parser.parse_args(sys.argv[2:]))
"""
TAIL = 400
"""Characters of a failed engine's last line that a record keeps."""


def parser() -> argparse.ArgumentParser:
    """The command line; what follows `--` goes to vLLM as it is."""
    p = argparse.ArgumentParser(
        prog="fdk serve-bench",
        description="vLLM's throughput and latency benchmarks for formats beside each other.",
        epilog="Arguments after -- go to vLLM, such as -- --tensor-parallel-size 2 --max-model-len 1024.",
    )
    p.add_argument(
        "models", nargs="+", help="folders or cached ids: dense ones in every format, quantised ones as they are"
    )
    p.add_argument(
        "--formats", nargs="+", default=[DENSE, "lut4_g64"], help="of dense models; 16: as it is (16 lut4_g64)"
    )
    p.add_argument("--prompts", type=int, default=128, help="requests of the throughput run (128)")
    p.add_argument("--input-len", type=int, default=32, help="tokens of a prompt (32)")
    p.add_argument("--output-len", type=int, default=128, help="tokens to generate (128)")
    p.add_argument("--batch-sizes", type=int, nargs="*", default=BATCHES, help="of the latency runs (1 2 4 8 16)")
    p.add_argument(
        "--iterations", type=int, default=10, help="timed runs of each batch size, after 3 untimed ones (10)"
    )
    p.add_argument("--timeout", type=float, default=3600, help="seconds after which an engine is given up (3600)")
    p.add_argument("--output-dir", type=Path, default=Path("out"), help="of records and figure (out)")
    return p


def variants(models: Sequence[str], formats: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """(model, format, arguments for vLLM) of everything to measure; FormatError for what does not exist."""
    found = []
    for model in models:
        stored = read_config(resolve(model)).get("quantization_config")
        if stored is not None:
            found.append((model, f"{stored.get('quant_method')} folder", []))
            continue
        for name in formats:
            if name == DENSE:
                found.append((model, DENSE, []))
            else:
                settings = json.dumps({"fdk": {"format": str(parse(name))}})
                found.append((model, name, ["--quantization", "fdk", "--additional-config", settings]))
    return found


def measure(arguments: Sequence[str], timeout: float) -> dict:
    """What one of vLLM's benchmarks wrote, or {"status": "failed", "reason": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launch = Path(folder) / "launch.py"
        launch.write_text(LAUNCH)
        command = [sys.executable, str(launch), *arguments, "--output-json", str(result)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"no result after {timeout:g} s"}
        if run.returncode or not result.exists():
            lines = [line for line in (run.stdout + run.stderr).splitlines() if "Error" in line] or ["no output"]
            return {"status": "failed", "reason": f"exit status {run.returncode}: {lines[-1].strip()[-TAIL:]}"}
        return {"status": "ok", **json.loads(result.read_text())}


def throughput(got: dict) -> records.Record:
    """The fields of a throughput record: seconds, requests, tokens and their rates."""
    if got["status"] != "ok":
        return got
    seconds = got["elapsed_time"]
    return {
        "status": "ok",
        "elapsed_time": seconds,
        "requests_per_second": got["num_requests"] / seconds,
        "tokens_per_second": got["total_num_tokens"] / seconds,
    }


def latency(got: dict) -> records.Record:
    """The fields of a latency record: seconds of a whole batch, mean and percentiles."""
    if got["status"] != "ok":
        return got
    return {
        "status": "ok",
        "avg_time": got["avg_latency"],
        **{f"time_p{q}": got["percentiles"][str(q)] for q in (10, 50, 90)},
    }


def run(args: argparse.Namespace, passed: Sequence[str]) -> list[records.Record]:
    """Measure everything, one engine after the other; each record is written and shown when it is there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = records.environment(device)
    chosen = variants(args.models, args.formats)
    lengths = ("input-len", str(args.input_len)), ("output-len", str(args.output_len))
    every: list[records.Record] = []
    with records.Writer(args.output_dir, f"serve-{facts['id']}") as writer:
        for model, name, extra in chosen:
            common = {"model": model, "format": name, "input_len": args.input_len, "output_len": args.output_len}
            common["arguments"] = " ".join(passed)
            jobs = [("throughput", args.prompts)] if args.prompts else []
            for test, count in [*jobs, *(("latency", batch) for batch in args.batch_sizes)]:
                # The random prompts of the throughput run have lengths of their own.
                prefix = "--random-" if test == "throughput" else "--"
                sizes = [word for flag, value in lengths for word in (prefix + flag, value)]
                command = [test, "--model", model, *sizes, *extra, *passed]
                if test == "throughput":
                    dataset = ["--dataset-name", "random", "--num-prompts", str(count)]
                    fields = throughput(measure([*command, *dataset], args.timeout))
                else:
                    batch = ["--batch-size", str(count), "--num-iters", str(args.iterations), "--num-iters-warmup", "3"]
                    fields = latency(measure([*command, *batch], args.timeout))
                entry = {"test": f"serve_{test}", **common, "m": count, **fields, **facts}
                writer.write(entry)
                every.append(entry)
                print(line(entry), flush=True)
    return every


def line(entry: records.Record) -> str:
    """One record in words."""
    what = f"{entry['format']:>16}  {entry['test'].removeprefix('serve_')} of {entry['m']}"
    if entry["status"] != "ok":
        return f"{what}: failed: {entry['reason']}"
    if entry["test"] == "serve_throughput":
        return f"{what}: {significant(entry['tokens_per_second'])} tokens/s"
    p10, p50, p90 = (significant(entry[f"time_p{q}"]) for q in (10, 50, 90))
    return f"{what}: {p50} s (p10 {p10}, p90 {p90})"


def draw(entries: Sequence[records.Record], path: Path) -> None:
    """Throughput by format, and latency over the batch size; PlotError if there is nothing to draw."""
    done = [entry for entry in entries if entry["status"] == "ok"]
    if not done:
        raise PlotError("no engine came to an end, so there is nothing to draw")
    plt = pyplot()
    panels = {"serve_throughput": _bars, "serve_latency": _lines}
    shown = [test for test in panels if any(entry["test"] == test for entry in done)]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.5), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(label(entry, done) for entry in done))
    colours = dict(zip(names, cycle(COLOUR_OF_BITS.values()), strict=False))
    for test, axis in zip(shown, axes[0], strict=True):
        panels[test](axis, [entry for entry in done if entry["test"] == test], colours, done)
    handles = [plt.Line2D([], [], color=colour, marker="o") for colour in colours.values()]
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    first = done[0]
    figure.suptitle(f"vLLM, {first['input_len']} tokens in, {first['output_len']} out\n{first['device']}", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def _bars(axis, entries: Sequence[records.Record], colours: dict[str, str], among: Sequence[records.Record]) -> None:
    """Throughput by format."""
    names = [label(entry, among) for entry in entries]
    bars = axis.barh(
        range(len(names)), [entry["tokens_per_second"] for entry in entries], color=[colours[name] for name in names]
    )
    axis.bar_label(bars, [significant(entry["tokens_per_second"]) for entry in entries], padding=3)
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.set_yticks([])
    axis.set_xlabel("tokens/s, prompts included")


def _lines(axis, entries: Sequence[records.Record], colours: dict[str, str], among: Sequence[records.Record]) -> None:
    """Latency over the batch size, from the 10th to the 90th percentile."""
    for name, colour in colours.items():
        points = sorted((entry for entry in entries if label(entry, among) == name), key=lambda entry: entry["m"])
        sizes = [entry["m"] for entry in points]
        axis.plot(sizes, [entry["time_p50"] for entry in points], marker="o", color=colour)
        low, high = ([entry[f"time_p{q}"] for entry in points] for q in (10, 90))
        axis.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes := sorted({entry["m"] for entry in entries}), sizes)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("batch size")
    axis.set_ylabel("seconds of a batch, p10 to p90")


def label(entry: records.Record, among: Sequence[records.Record]) -> str:
    """The format, with the model where there are several."""
    several = len({other["model"] for other in among}) > 1
    name = "16 bits" if entry["format"] == DENSE else entry["format"]
    return f"{Path(entry['model']).name} {name}" if several else name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; status 1 if any engine failed."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    args = parser().parse_args(given[:cut])
    if find_spec("vllm") is None:
        raise FdkError("it runs vLLM, which is not installed; pip install 'fused-dequantisation-kernels[vllm]'")
    entries = run(args, given[cut + 1 :])
    figure = args.output_dir / f"serve-{entries[0]['id']}.svg" if entries else None
    try:
        if figure:
            draw(entries, figure)
            print(f"figure in {figure}")
    except PlotError as error:
        print(f"no figure: {error}", file=sys.stderr)
    return int(any(entry["status"] != "ok" for entry in entries))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FdkError as error:
        sys.exit(f"fdk serve-bench: {error}")
