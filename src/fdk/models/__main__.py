"""python -m fdk.models: decode with whole models, dense and quantised, and hold the time to the bytes they read."""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from fdk import device, load, quantise_
from fdk.bench import records, timing
from fdk.bench.command import rebind
from fdk.bench.report import significant
from fdk.bench.roofline import Memory
from fdk.cli.output import progress_bar, show, until_the_reader_leaves
from fdk.cli.widths import widths_of_folder
from fdk.errors import FdkError, UnsupportedError
from fdk.models import QuantisationConfig, quantise, read_overrides
from fdk.models.adopt import as_llama
from fdk.models.budget import COLUMNS as WIDTH_COLUMNS
from fdk.models.budget import Choice, choose_widths, parse_size, sequences
from fdk.models.checkpoint import quantisation_of
from fdk.models.configs import CUSTOM
from fdk.models.decode import Bytes, model_bytes, time_steps
from fdk.models.folder import load_dense, resolve
from fdk.models.llama import RELATIVES, Llama
from fdk.models.random import estimated_bytes, random_llama, random_tensor
from fdk.models.room import folder_room
from fdk.models.skeleton import CONFIG, architecture, read_config
from fdk.models.text import BUILT_IN, calibration_tokens
from fdk.nn.convert import Job

COLUMNS = ("format", "batch", "tokens/s", "ms/step (p20-p80)", "GB/s", "x floor", "x 16 bits", "GB")
MEMORY_SHARE = 0.8


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        print(f"fdk.models: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = _Parser(prog="python -m fdk.models", description=__doc__, allow_abbrev=False)
    default = "custom-llama-4B" if torch.cuda.is_available() else "custom-llama-tiny"
    p.add_argument("--model", default=default, help=f"{', '.join(CUSTOM)}, or a folder or cached id ({default})")
    p.add_argument("--batch-size", type=int, nargs="+", default=[1], help="sequences decoded together (1)")
    p.add_argument("--bits", type=int, nargs="+", default=[16, 4, 1], help="16 for dense, 1 to 8 (16 4 1)")
    p.add_argument(
        "--format", nargs="+", default=[], metavar="NAME", help="formats instead of --bits, such as int4_g128"
    )
    p.add_argument("--skip", default="^lm_head$", metavar="REGEX", help="layers that stay dense (^lm_head$)")
    p.add_argument("--block-size", default="64", help="weights that share a scale, or chan (64)")
    p.add_argument("--codebook", default="uniform", help="uniform, kmeans or int (uniform)")
    p.add_argument("--overrides", type=Path, metavar="FILE", help="lines 'layer.name: bits', or a format for the bits")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument(
        "--target-bits", type=float, metavar="B", help="widths by layer: B stored bits a weight on average"
    )
    budget.add_argument("--max-memory", metavar="SIZE", help="widths by layer: a model of this size, such as 8GB")
    p.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text to measure the layers' errors on, ids for a custom model, or builtin (errors of weights)",
    )
    p.add_argument("--ids", action="store_true", help="that file holds token ids, where there is no tokenizer")
    p.add_argument("--calibration-tokens", type=int, default=4096, help="of its beginning (4096)")
    p.add_argument("--kernel", default="auto", help="auto, a kernel's name, marlin or marlin-lut (auto)")
    p.add_argument(
        "--step",
        nargs="+",
        choices=("auto", "fused", "plain", "library"),
        default=["auto"],
        help="fused: one CUDA graph; plain: the model's own forward; auto: fused where it can; library: the forward "
        "of transformers, for folders; with several, x 16 bits is over the first (auto)",
    )
    p.add_argument("--reps", type=int, default=100, help="timed decoding steps (100)")
    p.add_argument("--prompt", type=int, default=16, metavar="TOKENS", help="length of the random prompt (16)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument("--seed", type=int, default=0, help="of weights and prompt (0)")
    p.add_argument("--output-dir", type=Path, default=Path("out"), help="folder for the records (out)")
    return p


class Sweep:
    """All formats and batch sizes of one model; one that fails leaves a line with the reason."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.environment = records.environment(self.device)
        self.max_bytes = None if args.max_memory is None else parse_size(args.max_memory)
        self.configs = self._configs()
        self.custom = CUSTOM.get(args.model)
        self.folder = None if self.custom else resolve(args.model)
        if self.folder and "quantization_config" in read_config(self.folder):
            self.configs = {"as stored": None}
        self.memory = Memory(self.device)
        self.ceilings = self.memory.ceilings()
        self.dense_time: dict[int, float] = {}
        self.rows: list[list[str]] = []
        self.failed = 0

    def _configs(self) -> dict[str, QuantisationConfig | None]:
        args = self.args
        found: dict[str, QuantisationConfig | None] = {}
        overrides = read_overrides(args.overrides) if args.overrides else {}
        common = {"kernel": args.kernel, "skip": args.skip, "overrides": overrides}
        for name in args.format:
            config = QuantisationConfig(format=name, **common)
            found[str(config.format)] = config
        for bits in [] if args.format else args.bits:
            if bits == 16:
                found["bf16"] = None
                continue
            config = QuantisationConfig(bits, args.block_size, codebook=args.codebook, **common)
            found[str(config.format)] = config
        if not self.by_layer:
            return found
        # The base's width plays no part, so one is enough.
        base = next((config for config in found.values() if config), None)
        base = base or QuantisationConfig(4, args.block_size, codebook=args.codebook, **common)
        budget = args.max_memory or f"{args.target_bits:g} bits"
        fmt = base.format
        name = str(fmt).replace(f"{fmt.kind.name}{fmt.bits}", fmt.kind.name, 1)
        return {**({"bf16": None} if "bf16" in found else {}), f"{name} in {budget}": base}

    @property
    def by_layer(self) -> bool:
        """Whether a budget chooses the width of each layer."""
        return self.args.target_bits is not None or self.max_bytes is not None

    def chosen(self, base: QuantisationConfig) -> QuantisationConfig:
        """`base` with the widths of least error that the budget allows; printed, and saved beside the records."""
        args = self.args
        budget = {"target_bits": args.target_bits, "max_bytes": self.max_bytes, "together": True}
        tokens = None
        if args.calibration:
            config = read_config(self.folder) if self.folder else {}
            count = args.calibration_tokens
            tokens = calibration_tokens(args.calibration, count, self.folder, config, args.ids)
        if self.custom:
            choice = self._widths_of_custom(base, tokens, budget)
        else:
            choice = widths_of_folder(self.folder, base, tokens, self.device, **budget)
        show(WIDTH_COLUMNS, choice.rows(), title=choice.summary)
        path = choice.save(args.output_dir / f"widths-{self.environment['id']}.txt")
        print(f"widths: {path}", flush=True)
        return choice.config

    def _widths_of_custom(self, base: QuantisationConfig, tokens: torch.Tensor | None, budget: dict) -> Choice:
        """By the errors of weights that are made one at a time, or of a whole model in 16 bits on tokens."""

        def weight_of(job: Job) -> torch.Tensor:
            shape = next(iter(job.layers.values())).weight.shape
            return random_tensor(f"{job.name}.weight", shape, self.args.seed, self.device, torch.bfloat16)

        with ExitStack() as stack:
            settings = {**budget, "progress": progress_bar(stack, "measuring")}
            if tokens is not None:
                return choose_widths(self.model(None), base, calibration=sequences(tokens), **settings)
            return choose_widths(Llama.skeleton(self.custom), base, weight_of=weight_of, **settings)

    def model(self, config: QuantisationConfig | None, step: str = "auto") -> nn.Module:
        """The model in one format, or an FdkError that says why not: a Llama, for "library" one of transformers."""
        if step == "library":
            return self.library_model(config)
        if self.custom:
            needed = estimated_bytes(self.custom, config)
            total, free = device.memory(self.device)
            room = int(MEMORY_SHARE * (total if self.device.type == "cuda" else free))
            if needed > room:
                raise FdkError(
                    f"needs {needed / 1e9:.1f} GB, but {MEMORY_SHARE:.0%} of the memory are {room / 1e9:.1f} GB; "
                    "use fewer bits, a smaller model or another device"
                )
            return random_llama(self.custom, config, self.device, seed=self.args.seed)
        stored = read_config(self.folder)
        if "quantization_config" in stored:
            quantisation_of(stored, self.folder)
        # A dense model that is to be quantised passes through the host's memory.
        folder_room(self.folder, stored, self.device if config is None else torch.device("cpu"))
        if architecture(stored, self.folder / CONFIG) not in RELATIVES:
            return self.library_model(config)
        if "quantization_config" in stored:
            model = load(self.folder, self.device)
        else:
            dense = load_dense(self.folder, dtype=torch.bfloat16)
            model = quantise(dense, config, self.device, torch.bfloat16).requires_grad_(False)
        if isinstance(model, Llama):
            return model
        llama = as_llama(model)
        llama.fdk_report = getattr(model, "fdk_report", None)
        return llama

    def library_model(self, config: QuantisationConfig | None) -> nn.Module:
        """The model of a folder as transformers builds it, quantised in place."""
        if self.custom:
            raise FdkError(f"--step library decodes with transformers, which has no {self.args.model}; name a folder")
        try:
            from fdk.integrations.transformers import load_causal
        except ImportError as error:
            raise FdkError(str(error)) from None
        model = load_causal(self.folder, self.device, torch.bfloat16).eval()
        if config is not None:
            model.fdk_report = quantise_(model, config)
        return model.requires_grad_(False)

    def run(self, writer: records.Writer) -> None:
        for name, config in self.configs.items():
            for step in self.args.step:
                gc.collect()
                try:
                    if self.by_layer and config is not None and step == self.args.step[0]:
                        config = self.chosen(config)
                    model = self.model(config, step)
                except Exception as error:
                    for batch in self.args.batch_size:
                        self.skip(writer, name, batch, step, error)
                    continue
                for batch in self.args.batch_size:
                    try:
                        self.time(writer, name, config, model, batch, step)
                    except Exception as error:
                        self.skip(writer, name, batch, step, error)
                del model

    def skip(self, writer: records.Writer, name: str, batch: int, step: str, error: Exception) -> None:
        """Say and record why there is no time."""
        expected = isinstance(error, FdkError | MemoryError | torch.OutOfMemoryError)
        self.failed += not expected
        if not expected and os.environ.get("FDK_DEBUG") == "1":
            traceback.print_exception(error)
        text = str(error).splitlines()[0] if str(error) else ""
        reason = text if isinstance(error, FdkError) else f"{type(error).__name__}: {text}"
        status = "skipped" if expected else "failed"
        print(f"{status}: {self.args.model} {name}, batch {batch}: {reason}", flush=True)
        writer.write({**self.base(name, batch), "step": step, "status": status, "reason": reason, **self.environment})

    def base(self, name: str, batch: int) -> records.Record:
        found = {"test": "decode", "model": self.args.model, "m": batch, "format": name, "codebook": self.args.codebook}
        if self.by_layer and name != "bf16":
            found["calibration"] = self.args.calibration and str(self.args.calibration)
        return found

    def bytes_of(self, model: nn.Module, batch: int) -> tuple[Bytes, int | None]:
        """What the model takes, and what a step reads; None where that is not known, as of a mixture's experts."""
        try:
            llama = model if isinstance(model, Llama) else as_llama(model)
        except UnsupportedError:
            return model_bytes(model), None
        size = model_bytes(llama)
        # Keys and values of the positions filled half way through are read too.
        cache = llama.new_cache(batch, self.args.prompt + self.args.reps // 2)
        return size, size.per_step + cache.keys.nbytes + cache.values.nbytes

    def time(self, writer: records.Writer, name: str, config, model: nn.Module, batch: int, step: str) -> None:
        """Decode, print and record."""
        args = self.args
        seconds = time_steps(model, batch, args.reps, args.prompt, args.seed, "plain" if step == "library" else step)
        times = timing.Times.of(seconds)
        size, read = self.bytes_of(model, batch)
        floor = None if read is None else read / self.ceilings.read
        reached = ("-", "-") if read is None else (significant(read / times.p50 / 1e9), significant(times.p50 / floor))
        if config is None and name == "bf16":
            self.dense_time.setdefault(batch, times.p50)
        dense = self.dense_time.get(batch)
        report = getattr(model, "fdk_report", None)
        writer.write(
            {
                **self.base(name, batch),
                "g": None if config is None else config.block_size,
                "bits": 16 if config is None else report.bits_per_weight if self.by_layer else config.bits,
                "kernel": args.kernel,
                "status": "ok",
                "reason": None,
                "reps": args.reps,
                "prompt": args.prompt,
                "step": step,
                "tokens_per_second": batch / times.p50,
                "avg_time": times.mean,
                "time_p20": times.p20,
                "time_p50": times.p50,
                "time_p80": times.p80,
                "bytes_rw": read,
                "model_bytes": size.total,
                "floor": floor,
                "x_floor": None if floor is None else times.p50 / floor,
                "x_bf16": None if dense is None else dense / times.p50,
                "read_bandwidth": self.ceilings.read,
                "threads": torch.get_num_threads(),
                "host_peak_bytes": device.peak_host_bytes(),
                "quantise_seconds": report.seconds if report else None,
                "share_quantised": report.share if report else None,
                **self.environment,
            }
        )
        low, middle, high = (significant(value * 1e3) for value in (times.p20, times.p50, times.p80))
        label = name if len(args.step) == 1 else f"{name} {step}"
        self.rows.append(
            [
                label, str(batch), significant(batch / times.p50), f"{middle} ({low}-{high})",
                *reached,
                "-" if dense is None else significant(dense / times.p50), significant(size.total / 1e9),
            ]
        )  # fmt: skip

    def table(self) -> None:
        """Print what was measured."""
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        bandwidth = f"read bandwidth {self.ceilings.read / 1e9:.1f} GB/s"
        title = f"{self.args.model} on {self.environment['device']}{threads}; {bandwidth}"
        show(COLUMNS, self.rows, title=title)


def _wrong(args: argparse.Namespace) -> str | None:
    """What is wrong with the command line, and what to do."""
    counts = {"--batch-size": args.batch_size, "--reps": [args.reps], "--prompt": [args.prompt]}
    for flag, values in {**counts, "--calibration-tokens": [args.calibration_tokens]}.items():
        if min(values) < 1:
            return f"{flag} {min(values)}: at least 1 is needed"
    if args.target_bits is not None and not 0 < args.target_bits < math.inf:
        return f"--target-bits {args.target_bits}: a positive number of bits a weight is needed"
    if args.calibration and args.target_bits is None and args.max_memory is None:
        return "--calibration needs a budget; add --target-bits or --max-memory"
    if args.calibration and str(args.calibration) != BUILT_IN and not args.calibration.is_file():
        return f"--calibration {args.calibration}: there is no such file; name a text, or {BUILT_IN}"
    if args.model.startswith("custom-") and args.model not in CUSTOM and not Path(args.model).exists():
        return f"--model {args.model}: there is no such model; choose from {', '.join(CUSTOM)}, or give a folder"
    if args.device == "cuda" and not torch.cuda.is_available():
        return f"--device cuda: {device.why_no_cuda()}; use --device cpu"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; 0, 1 if something failed that should not have, 2 for a wrong command line."""
    args = parser().parse_args(argv)
    if text := _wrong(args):
        print(f"fdk.models: {text}", file=sys.stderr)
        return 2
    if warning := rebind(argv, not torch.cuda.is_available() or args.device == "cpu"):
        print(f"fdk.models: {warning}", file=sys.stderr)
    try:
        sweep = Sweep(args)
        with (
            records.Writer(args.output_dir, f"models-{sweep.environment['id']}") as writer,
            warnings.catch_warnings(),
        ):
            warnings.showwarning = lambda message, *_, **__: print(f"fdk.models: {message}", file=sys.stderr)
            sweep.run(writer)
    except FdkError as error:
        print(f"fdk.models: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fdk.models: interrupted; the records so far are whole", file=sys.stderr)
        return 130
    if sweep.rows:
        sweep.table()
    print(f"records: {writer.path}")
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    sys.exit(until_the_reader_leaves(main))
