"""The fdk command: info, explain, quantise, convert, eval, generate, warmup, bench, serve-bench, plot.

Exit status 0, 1 if it failed, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fdk.errors import FdkError

WIDTHS_FILE = "widths.txt"
OPTIONAL = ("safetensors", "numpy", "rich", "transformers", "huggingface_hub", "triton", "bitsandbytes", "matplotlib")


class UsageError(Exception):
    """The command line is wrong; the text says how to right it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The command line, without the flags of bench, serve-bench and plot, which read their own."""
    p = _Parser(prog="fdk", description="Low-bit weights: quantise models, see which kernel serves them, measure.")
    p.add_argument("--version", action="store_true", help="print the version")
    commands = p.add_subparsers(dest="command", metavar="command", parser_class=_Parser)

    info = commands.add_parser("info", help="this machine, or the layers of a model folder")
    info.add_argument("folder", nargs="?", help="folder or cached id of a model; without it: machine and kernels")
    info.set_defaults(run=run_info)

    explain = commands.add_parser("explain", help="which kernel serves a product, and why not another")
    explain.add_argument("--format", required=True, help="such as lut4_g64 or int4_g128")
    explain.add_argument("-m", type=int, default=1, help="rows of activations (1)")
    explain.add_argument("-n", type=int, required=True, help="output features")
    explain.add_argument("-k", type=int, required=True, help="input features")
    explain.add_argument("--dtype", default="bf16", help="of activations and scales: bf16, fp16, fp32 (bf16)")
    explain.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    explain.add_argument("--kernel", default="auto", help="ask for one kernel by name (auto)")
    explain.set_defaults(run=run_explain)

    quantise = commands.add_parser("quantise", help="quantise a Hugging Face model folder into a new folder")
    quantise.add_argument(
        "model", help="folder, or id of a model in the local Hugging Face cache; nothing is downloaded"
    )
    quantise.add_argument("--output", required=True, metavar="DIR", help="the new folder")
    quantise.add_argument("--bits", help="1 to 8 (4)")
    quantise.add_argument("--format", help="a format name such as int4_g128, in place of --bits and --block-size")
    quantise.add_argument("--block-size", help="weights that share a scale: a multiple of 16, or chan (64)")
    quantise.add_argument("--codebook", default="uniform", help="of lut formats: uniform, kmeans, int (uniform)")
    quantise.add_argument("--scale", default="auto", help="auto, absmax, absmean, search (auto)")
    quantise.add_argument("--skip", default="^lm_head$", metavar="REGEX", help="layers that stay dense (^lm_head$)")
    quantise.add_argument("--overrides", metavar="FILE", help="lines 'layer.name: bits', or a format name for the bits")
    quantise.add_argument("--target-bits", type=float, help="choose widths by layer: mean stored bits a weight")
    quantise.add_argument("--max-memory", metavar="SIZE", help="choose widths by layer: the model's size, such as 8GB")
    quantise.add_argument("--widths", type=int, nargs="+", help="bits on offer then, 16 for dense (1 to 8)")
    quantise.add_argument("--together", action="store_true", help="q, k, v alike, and gate, up: so they can merge")
    quantise.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text on which their errors are measured, or builtin"
    )
    quantise.add_argument("--ids", action="store_true", help="that file holds token ids, where there is no tokenizer")
    quantise.add_argument("--calibration-tokens", type=int, default=4096, help="of its beginning (4096)")
    quantise.add_argument("--dtype", help="of scales and dense tensors: bf16, fp16, fp32 (as the source, fp32 as bf16)")
    quantise.add_argument("--device", help="where to quantise: cpu or cuda (cpu)")
    quantise.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest file (5)")
    quantise.add_argument("--overwrite", action="store_true", help="replace an output folder that fdk has written")
    quantise.set_defaults(run=run_quantise)

    convert = commands.add_parser("convert", help="a folder that MatGPTQ packed, as a folder of fdk; the same codes")
    convert.add_argument("model", help="folder, or id of a model in the local Hugging Face cache")
    convert.add_argument("--output", required=True, metavar="DIR", help="the new folder")
    convert.add_argument(
        "--precision", metavar="BITS", help="width served, 2 to 8, or a file of lines 'layer.name: bits' (the folder's)"
    )
    convert.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest file (5)")
    convert.add_argument("--overwrite", action="store_true", help="replace an output folder that fdk has written")
    convert.set_defaults(run=run_convert)

    evaluate = commands.add_parser("eval", help="perplexity, KL and agreement with the 16-bit model on a text file")
    evaluate.add_argument("model", help="folder or cached id of a model, dense or quantised by fdk")
    evaluate.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text to predict")
    evaluate.add_argument("--reference", metavar="MODEL", help="the 16-bit model to compare with")
    evaluate.add_argument("--ids", action="store_true", help="FILE holds token ids, where there is no tokenizer")
    evaluate.add_argument("--length", type=int, default=512, help="tokens of a segment; context starts anew (512)")
    evaluate.add_argument("--segments", type=int, help="at most so many, spread evenly over the text (all)")
    evaluate.add_argument("--batch", type=int, default=8, help="segments at a time (8)")
    evaluate.add_argument("--confidence", type=float, default=0.95, help="of the intervals (0.95)")
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    evaluate.add_argument("--output-dir", type=Path, help="also write a record into this folder")
    evaluate.set_defaults(run=run_eval)

    generate = commands.add_parser("generate", help="continue a prompt with a model, dense or quantised")
    generate.add_argument("model", help="folder, or id of a model in the local Hugging Face cache")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text, read by the folder's tokenizer.json")
    prompt.add_argument("--ids", type=int, nargs="+", metavar="ID", help="token ids, where there is no tokenizer")
    generate.add_argument("--tokens", type=int, default=128, help="at most so many new tokens (128)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token (0)")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of that share (1)")
    generate.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    generate.add_argument("--device", help="cpu or cuda (cuda if there is one)")
    generate.add_argument("--step", choices=("auto", "fused", "plain"), default="auto", help="see python -m fdk.models")
    generate.set_defaults(run=run_generate)

    warmup = commands.add_parser("warmup", help="compile ahead the CUDA kernels of a model; needs no GPU with --arch")
    warmup.add_argument("--model", action="append", default=[], help="folder or cached id of a model quantised by fdk")
    warmup.add_argument("--format", nargs="+", default=[], metavar="NAME", help="formats of weights of the --shapes")
    warmup.add_argument("--shapes", nargs="+", default=[], metavar="NxK", help="sizes of those weights: 14336x4096")
    warmup.add_argument("--dtype", default="bf16", help="of their activations and scales: bf16, fp16 (bf16)")
    warmup.add_argument(
        "-m", nargs="+", default=["1"], metavar="ROWS", help="rows of activations, such as 1 8 16-512 (1)"
    )
    warmup.add_argument(
        "--batch-size", type=int, nargs="+", default=[1], help="of models: sequences decoded together (1)"
    )
    warmup.add_argument("--arch", help="sm_80, sm_89, sm_90a, sm_100a (that of the GPU here)")
    warmup.add_argument("--sms", type=int, help="multiprocessors of the GPU (its usual number: 132 on an H100 or H200)")
    warmup.set_defaults(run=run_warmup)

    commands.add_parser("bench", help="measure the kernels; the same as python -m fdk.bench", add_help=False)
    commands.add_parser("serve-bench", help="measure vLLM with formats beside each other", add_help=False)
    commands.add_parser("plot", help="draw figures from records; fdk plot --help", add_help=False)
    return p


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """A table: by rich on a terminal, aligned text elsewhere. The first `left` columns are text, the others numbers."""
    rows = [list(row) for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in (columns, *rows):
        cells = (
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_info(args: argparse.Namespace) -> int:
    """`fdk info` and `fdk info <folder>`."""
    return folder_info(args.folder) if args.folder else machine_info()


def machine_info() -> int:
    """Versions, CPU, CUDA and what each kernel can do here."""
    import torch

    import fdk
    from fdk import device, kernels
    from fdk.formats import parse
    from fdk.packing.layouts import Geometry

    facts: list[tuple[str, str]] = []
    facts.append(("fdk", f"{fdk.__version__}, Python {platform.python_version()}, torch {torch.__version__}"))
    found = {name: _version(name) for name in OPTIONAL}
    facts.append(("with", ", ".join(f"{name} {number}" for name, number in found.items() if number)))
    if missing := [name for name, number in found.items() if not number]:
        facts.append(("without", ", ".join(missing)))
    cpu = torch.device("cpu")
    total, free = device.memory(cpu)
    facts.append(
        (
            "CPU",
            f"{device.cpu_name()}, {device.cpu_count()} cores, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free",
        )
    )
    facts.append(
        ("", f"has {', '.join(device.cpu_instruction_sets()) or 'none of the instruction sets that fdk uses'}")
    )
    if "cpu" in kernels.names():
        facts += _cpu_library()
    reason = device.why_no_cuda()
    facts += [("CUDA", f"none: {reason}")] if reason else [("CUDA", line) for line in device.cuda_devices()]
    for name, text in facts:
        print(f"{name:12} {text}")
    geometry = Geometry(parse("lut4_g64"), 4096, 4096, torch.bfloat16, (4096,))
    rows = []
    for where in ("cpu", *(() if reason else ("cuda",))):
        problem = kernels.Problem(1, geometry, torch.device(where))
        rows += [(where, name, _reason(name, problem) or "yes") for name in kernels.names()]
    print()
    show(("device", "kernel", "serves lut4_g64, m = 1, 4096 x 4096, bf16"), rows, left=3)
    return 0


def _reason(name: str, problem) -> str | None:
    from fdk import kernels

    try:
        return kernels.reason_against(kernels.kernel(name), problem)
    except FdkError as error:
        return str(error)


def _cpu_library() -> list[tuple[str, str]]:
    from fdk.kernels.cpu import info

    try:
        facts = info()
    except FdkError as error:
        return [("CPU library", f"none: {error}")]
    if facts["reason"]:
        return [("CPU library", f"none, so the reference runs: {facts['reason']}")]
    lines = [
        ("CPU library", f"{facts['library']}"),
        (
            "",
            f"runs {facts['isa']} on {facts['threads']} threads; FDK_CPU_ISA chooses among {', '.join(facts['isas'])}",
        ),
    ]
    return lines + ([("", str(facts["note"]))] if facts.get("note") else [])


def folder_info(name: str) -> int:
    """Layers, formats, memory and kernels of a model folder."""
    import torch

    from fdk.models.folder import OtherNames, open_source, resolve
    from fdk.models.inventory import COLUMNS, inventory, size_text, stored_bytes
    from fdk.models.skeleton import architecture, read_config
    from fdk.models.tensors import TensorFiles

    folder = resolve(name)
    config = read_config(folder)
    if "quantization_config" not in config:
        files = TensorFiles(folder)
        try:
            count = sum(parameter.numel() for parameter in open_source(folder).model.parameters())
        except OtherNames:
            count = sum(torch.Size(files.spec(tensor)[1]).numel() for tensor in files)
        what = f"dense {architecture(config, folder)}, {count:,} parameters, {size_text(stored_bytes(files))}"
        print(f"{folder}: {what}, not quantised")
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = inventory(folder, device)
    show([column.format(device=device.type) for column in COLUMNS], found.rows, left=3)
    print("\n".join([*found.kernels, found.decoding, found.summary]))
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """`fdk explain`: the choice of kernel for a product that is described, not made."""
    from fdk import ops
    from fdk.formats import parse
    from fdk.kernels import Problem
    from fdk.models.config import check_dtype
    from fdk.packing.layouts import Geometry, canonical_shapes

    for flag, value, least in (("-m", args.m, 0), ("-n", args.n, 1), ("-k", args.k, 1)):
        if value < least:
            raise UsageError(f"{flag} {value}: sizes start at {least}")
    try:
        geometry = Geometry(parse(args.format), args.n, args.k, check_dtype(args.dtype), (args.n,))
        canonical_shapes(geometry)
    except FdkError as error:
        raise UsageError(str(error)) from None
    print(ops.explain_problem(Problem(args.m, geometry, _device(args.device)), args.kernel))
    return 0


def _device(name: str):
    import torch

    from fdk.device import why_no_cuda

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is unknown; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (reason := why_no_cuda()):
        raise UsageError(f"--device {name}: {reason}; use --device cpu")
    return device


def run_quantise(args: argparse.Namespace) -> int:
    """`fdk quantise`: a model folder to a quantised one, with progress and the error of every layer."""
    from fdk.models.config import QuantisationConfig, read_overrides
    from fdk.models.folder import OtherNames, quantise_folder
    from fdk.nn.report import COLUMNS

    if args.format and (args.bits or args.block_size):
        raise UsageError("--format stands for --bits and --block-size; give the one or the others")
    shard_bytes = _shard_bytes(args.shard_size)
    try:
        config = QuantisationConfig(
            bits=None if args.format else args.bits or 4,
            block_size=args.block_size or 64,
            format=args.format,
            codebook=args.codebook,
            scale=args.scale,
            skip=args.skip,
            overrides=read_overrides(args.overrides) if args.overrides else {},
            dtype=args.dtype,
        )
    except FdkError as error:
        raise UsageError(str(error)) from None
    device = _device(args.device) if args.device else None
    choice = _chosen_widths(args, config, device)
    if choice:
        config = choice.config
    # A terminated process cleans up as an interrupted one does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    start = time.perf_counter()
    settings = {"device": device, "overwrite": args.overwrite, "shard_bytes": shard_bytes}
    settings["texts"] = {WIDTHS_FILE: choice.text()} if choice else {}
    try:
        with ExitStack() as stack:
            report = quantise_folder(args.model, args.output, config, **settings, progress=_progress(stack))
    except OtherNames:
        from fdk.integrations.transformers import convert_folder

        report = convert_folder(args.model, args.output, config, **settings)
    show(COLUMNS, report.rows())
    if choice:
        print(f"{choice.summary}; widths in {Path(args.output) / WIDTHS_FILE}")
    for name, reason in report.kept.items():
        print(f"kept dense: {name}: {reason}")
    print(f"{report.summary}; {time.perf_counter() - start:.1f} s")
    print(f"{args.output} is ready: {_how_to_load(args.output)} in Python, or fdk info {args.output}")
    return 0


def _how_to_load(folder: str) -> str:
    """The call that reads a quantised folder: fdk's own, but for models that transformers converts while it reads."""
    from fdk.models.llama import RELATIVES
    from fdk.models.skeleton import architecture, read_config

    if architecture(read_config(Path(folder)), folder) in RELATIVES:
        return f"fdk.load({folder!r})"
    return f"import fdk and AutoModelForCausalLM.from_pretrained({folder!r})"


def _shard_bytes(size: float) -> int:
    """--shard-size in bytes."""
    if not 0 < size < math.inf:
        raise UsageError(f"--shard-size {size}: a positive number of GB is needed")
    return int(size * 1e9)


def run_convert(args: argparse.Namespace) -> int:
    """`fdk convert`: a MatGPTQ folder with its codes and scales as they are, in fdk's own form."""
    from fdk.importers.matgptq import load_packed
    from fdk.models import save
    from fdk.models.folder import copy_companions, resolve
    from fdk.nn import Linear

    shard_bytes = _shard_bytes(args.shard_size)
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


def _chosen_widths(args: argparse.Namespace, config, device):
    """The widths that a budget asks for, or None if none was given."""
    from fdk.models.budget import parse_size
    from fdk.models.folder import resolve
    from fdk.models.skeleton import read_config
    from fdk.models.text import calibration_tokens

    if args.target_bits is None and args.max_memory is None:
        if args.widths or args.calibration or args.together:
            raise UsageError("--widths, --calibration and --together need a budget; add --target-bits or --max-memory")
        return None
    if args.target_bits is not None and args.max_memory is not None:
        raise UsageError("--target-bits and --max-memory are two budgets; give one")
    if args.bits:
        raise UsageError("--bits has no meaning beside a budget, which chooses the widths; leave it out")
    if wrong := [bits for bits in args.widths or () if bits != 16 and not 1 <= bits <= 8]:
        raise UsageError(f"--widths {wrong[0]}: widths are 1 to 8 bits, and 16 for a layer that stays dense")
    try:
        size = None if args.max_memory is None else parse_size(args.max_memory)
    except FdkError as error:
        raise UsageError(f"--max-memory: {error}") from None
    folder = resolve(args.model)
    tokens = None
    if args.calibration:
        tokens = calibration_tokens(args.calibration, args.calibration_tokens, folder, read_config(folder), args.ids)
    budget = {"target_bits": args.target_bits, "max_bytes": size, "widths": args.widths, "together": args.together}
    return widths_of_folder(folder, config, tokens, device, **budget)


def widths_of_folder(folder, config, tokens, device, **budget):
    """`fdk.models.budget.choose_for_folder`, of any model that fdk or transformers reads, with a progress bar."""
    import torch

    from fdk.models.budget import choose_for_folder, choose_widths, sequences
    from fdk.models.folder import OtherNames

    with ExitStack() as stack:
        progress = progress_bar(stack, "measuring")
        try:
            return choose_for_folder(folder, config, tokens=tokens, device=device, progress=progress, **budget)
        except OtherNames:
            from fdk.integrations.transformers import load_causal

            model = load_causal(folder, device or torch.device("cpu"), config.dtype or torch.bfloat16)
            calibration = None if tokens is None else sequences(tokens)
            return choose_widths(model, config, calibration=calibration, progress=progress, **budget)


def run_generate(args: argparse.Namespace) -> int:
    """`fdk generate`: the continuation on standard output as it comes, its speed on standard error."""
    import torch

    from fdk.models.folder import resolve
    from fdk.models.generate import generate
    from fdk.models.skeleton import read_config
    from fdk.models.text import tokenizer

    if args.tokens < 1:
        raise UsageError(f"--tokens {args.tokens}: at least 1 is needed")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise UsageError(f"--temperature {args.temperature} --top-p {args.top_p}: at least 0, and above 0 up to 1")
    device = _device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = resolve(args.model)
    config = read_config(folder)
    reader = tokenizer(folder, config) if args.prompt is not None else None
    ids = reader.encode(args.prompt).ids if reader else args.ids
    model = _model(folder, config, device)
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


def _model(folder, config: dict, device):
    """The model of a folder for decoding: a Llama by fdk alone, others by transformers."""
    import torch

    from fdk.models.checkpoint import load, quantisation_of
    from fdk.models.folder import load_dense
    from fdk.models.llama import ARCHITECTURE
    from fdk.models.room import folder_room
    from fdk.models.skeleton import architecture

    quantised = "quantization_config" in config
    if quantised:
        quantisation_of(config, folder)
    folder_room(folder, config, device)
    if architecture(config, folder) == ARCHITECTURE:
        return load(folder, device) if quantised else load_dense(folder, device, torch.bfloat16)
    try:
        from fdk.integrations.transformers import load_causal
    except ImportError as error:
        raise FdkError(
            f"{folder} holds a {architecture(config, folder)}, which transformers decodes: {error}"
        ) from None
    return load_causal(folder, device, torch.bfloat16)


def _stops(folder, config: dict) -> list[int]:
    """The tokens that end a text; generation_config.json goes before config.json, as in transformers."""
    from fdk.models.tensors import read_json

    path = folder / "generation_config.json"
    stop = read_json(path).get("eos_token_id") if path.exists() else None
    stop = config.get("eos_token_id") if stop is None else stop
    return stop if isinstance(stop, list) else [] if stop is None else [stop]


def run_eval(args: argparse.Namespace) -> int:
    """`fdk eval`: how well a model predicts a text, alone and beside the model it was made from."""
    from fdk.models.evaluate import score, segments
    from fdk.models.folder import resolve
    from fdk.models.skeleton import read_config
    from fdk.models.text import read_tokens

    for flag, value in (("--length", args.length), ("--batch", args.batch), ("--segments", args.segments or 1)):
        if value < 1:
            raise UsageError(f"{flag} {value}: at least 1 is needed")
    if not 0 < args.confidence < 1:
        raise UsageError(f"--confidence {args.confidence}: a number between 0 and 1 is needed")
    device = _device(args.device)
    folder = resolve(args.model)
    config = read_config(folder)
    # A quantised folder may lack the tokenizer that the original has.
    original = resolve(args.reference) if args.reference else None
    named = folder if original is None or (folder / "tokenizer.json").exists() else original
    windows = segments(read_tokens(args.text, named, config, args.ids), args.length, args.segments)
    model = _model(folder, config, device)
    reference = None if original is None else _model(original, read_config(original), device)
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
    tokens = windows.shape[0] * args.length
    print(f"{tokens:,} tokens in {len(windows)} segments of {args.length}; {time.perf_counter() - start:.1f} s")
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
    found = []
    for text in args.shapes:
        n, x, k = text.partition("x")
        if not (x and n.isdigit() and k.isdigit() and int(n) and int(k)):
            raise UsageError(f"--shapes {text!r} is not a size; write n x k without blanks: 14336x4096")
        for name in args.format:
            try:
                dtype = check_dtype(args.dtype)
                geometry = Geometry(parse(name), int(n), int(k), dtype, (int(n),))
                geometry.format.groups(geometry.k)
            except FdkError as error:
                raise UsageError(str(error)) from None
            kinds = (torch.uint8, dtype) if geometry.format.has_zeros else (None,)
            found += [Product(geometry, zeros, m) for zeros in kinds for m in rows]
    return found


def run_warmup(args: argparse.Namespace) -> int:
    """`fdk warmup`: fill the cache of compiled CUDA kernels, here or for a GPU elsewhere."""
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
    if reason := jit.unavailable():
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


def progress_bar(stack: ExitStack, what: str):
    """A function of (text, done, total) that moves a bar on standard error if that is a terminal, else None."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
    task = bar.add_task(what)
    return lambda text, done, total: bar.update(task, completed=done, total=total, description=f"{what} {text}")


def _progress(stack: ExitStack):
    """A progress callback of quantisation with the mean SQNR so far, or None without a terminal."""
    advance = progress_bar(stack, "quantising")
    if advance is None:
        return None
    noise = [0, 0.0]

    def progress(layer, done: int, total: int) -> None:
        noise[0] += 1
        noise[1] += layer.error.sqnr_db
        advance(f"SQNR {noise[1] / noise[0]:.1f} dB  {layer.name}", done, total)

    return progress


def _run_module(name: str, what: str, argv: list[str]) -> int:
    if importlib.util.find_spec(name) is None:
        raise FdkError(f"this installation has no {what}; install the whole package again")
    module = importlib.import_module(name)
    return module.main(argv) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected error is one line with its remedy (FDK_DEBUG=1 adds the traceback)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("FDK_DEBUG") == "1"
    _interrupts.clear()
    try:
        if arguments[:1] == ["bench"]:
            return _run_module("fdk.bench", "benchmark", arguments[1:])
        if arguments[:1] == ["serve-bench"]:
            return _run_module("fdk.bench.serve", "benchmark of vLLM", arguments[1:])
        if arguments[:1] == ["plot"]:
            return _run_module("fdk.bench.plots", "plots", arguments[1:])
        p = parser()
        args = p.parse_args(arguments)
        if args.version:
            import fdk

            print(f"fdk {fdk.__version__}")
            return 0
        if args.command is None:
            p.print_help()
            return 0
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"fdk {args.command}: {message}", file=sys.stderr)
            status = args.run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _fail(arguments, str(error), 2, debug)
    except FdkError as error:
        return _fail(arguments, str(error), 1, debug)
    except BrokenPipeError:
        # The reader of our output has gone; the interpreter must not try to flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(arguments, f"{error.strerror or error}:{where}; nothing half-written was kept", 1, debug)
    except MemoryError:
        return _fail(arguments, "out of memory; free some, or use a smaller model", 1, debug)
    except KeyboardInterrupt:
        return _fail(arguments, "interrupted; nothing half-written was kept", 130, debug)
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        return _fail(arguments, f"{type(error).__name__}: {text} (a defect of fdk; FDK_DEBUG=1 shows where)", 1, debug)


_interrupts: list[int] = []


def _interrupt(number: int, frame: object) -> None:
    """Handler of signals that end a command. The number is kept: torch may make a ValueError of what is raised here."""
    _interrupts.append(number)
    raise KeyboardInterrupt


def _fail(arguments: list[str], text: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if _interrupts:
        text, status = "interrupted; nothing half-written was kept", 130
    names = {"info", "explain", "quantise", "convert", "eval", "generate", "warmup"}
    command = f"fdk {arguments[0]}" if arguments and arguments[0] in names else "fdk"
    print(f"{command}: {' '.join(text.split())}", file=sys.stderr)
    return status


__all__ = ["main", "parser"]

if __name__ == "__main__":
    sys.exit(main())
