"""Costs on the host: what a module's call adds to the kernel, and how fast weights are quantised.

`python -m fdk.bench.host` prints both and appends records to `out/bench-host-<device>-<date>-<process>.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import fdk
from fdk.bench import records, timing
from fdk.bench.command import rebind
from fdk.bench.report import significant
from fdk.errors import FdkError
from fdk.quantise import quantise

CALLS, ROUNDS = 2000, 41
SMALL = 64
"""Rows and columns of the weight whose kernel takes as little time as a kernel can."""

QUANTISED = (
    ("lut4_g64", "uniform"), ("lut8_g64", "uniform"), ("lut2_g64", "uniform"), ("lut1_g64", "uniform"),
    ("int4_g64", "uniform"), ("uint4_g64", "uniform"), ("nf4_g64", "uniform"), ("fp4_g64", "uniform"),
    ("lut2_g64", "kmeans"), ("lut4_g64", "kmeans"), ("lut8_g64", "kmeans"),
)  # fmt: skip


def overhead(through: str = "module", device: str = "cpu") -> records.Record:
    """Seconds of a call of a layer with a 4-bit weight [64, 64] and one row of bf16, and beside it, in rounds that
    take turns, of its kernel alone: what the layer adds is the median of the differences.

    through: "module" (fdk.nn.Linear) or "vllm" (the linear method of the plugin, which needs vLLM).
    device:  "cpu", where the kernel is a C function, or "cuda", where it is the call that launches it: only the host's
             time counts there, since the device is done with a launch before the host makes the next.
    """
    config = fdk.models.QuantisationConfig(bits=4, block_size=SMALL)
    dense = torch.nn.Linear(SMALL, SMALL, bias=False)
    module = fdk.models.quantise(dense, config, device=device, dtype=torch.bfloat16)
    x = torch.randn(1, SMALL, device=device).bfloat16()
    call = partial(vllm_method(module.weight), x) if through == "vllm" else partial(module, x)
    expected = call()
    out = torch.empty_like(expected)
    kernel, arguments = kernel_alone(module.weight, x, out)
    if kernel is None:
        return {"test": "overhead", "status": "skipped", "reason": arguments}
    kernel(*arguments)
    if not torch.equal(out, expected):
        raise RuntimeError("the kernel called alone and the layer disagree")
    blocks = {
        "module": timing.CpuBlock(lambda _: call(), CALLS),
        "kernel": timing.CpuBlock(lambda _: kernel(*arguments), CALLS),
    }
    times = timing.rounds(blocks, dict.fromkeys(blocks, ROUNDS))
    added = [a - b for a, b in zip(times["module"], times["kernel"], strict=True)]
    entry = {
        "test": "overhead",
        "status": "ok",
        "through": through,
        "format": str(config.format),
        "n": SMALL,
        "k": SMALL,
        "m": 1,
    }
    entry |= {f"added_p{q}": timing.percentile(added, q) for q in (20, 50, 80)}
    return entry | {f"{name}_p50": timing.median(values) for name, values in times.items()}


def kernel_alone(weight: fdk.QuantisedWeight, x: Tensor, out: Tensor) -> tuple[Callable | None, tuple | str]:
    """(a function, its arguments) that multiply x [1, k] into out [1, n] and do nothing else, or (None, why not)."""
    if x.is_cuda:
        kernel = weight.choices[(1, "auto")]
        return kernel.linear, (x, weight, None, out)
    from fdk.kernels.cpu.launch import handle_of
    from fdk.kernels.cpu.library import library, why_not

    loaded = library()
    if loaded is None:
        return None, why_not()
    address = handle_of(weight).address
    return loaded.linear, (address, x.data_ptr(), None, out.data_ptr(), 1, torch.get_num_threads())


def vllm_method(weight: fdk.QuantisedWeight) -> Callable[[Tensor], Tensor]:
    """What vLLM's linear layers call: apply of the plugin's method, on a layer that holds this weight."""
    from fdk.integrations.vllm.linear import FdkLinearMethod, hold

    layer, method = torch.nn.Module(), FdkLinearMethod(None, ["layer"])
    layer.fdk_products, layer.fdk_missing_rows = (hold(layer, weight, 0),), 0
    return partial(method.apply, layer)


def quantisation(weight: Tensor, format: str, codebook: str, rounds: int) -> records.Record:
    """Seconds of a whole quantise call: checks, scales, table, codes, packing."""
    n, k = weight.shape
    block = timing.CpuBlock(lambda _: quantise(weight, format, codebook=codebook))
    block()
    found = timing.Times.of([block() for _ in range(rounds)])
    entry = {"test": "quantise", "status": "ok", "format": format, "codebook": codebook, "n": n, "k": k}
    times = {"time_p20": found.p20, "time_p50": found.p50, "time_p80": found.p80}
    return entry | times | {"weights_per_second": n * k / found.p50}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, record; returns 0, or 2 if the folder cannot be written."""
    p = argparse.ArgumentParser(prog="python -m fdk.bench.host", description=__doc__)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the layers (cpu); cuda: calls alone")
    p.add_argument("-n", type=int, default=4096, help="output features of the quantised weight (4096)")
    p.add_argument("-k", type=int, default=4096, help="input features (4096)")
    p.add_argument("--rounds", type=int, default=7, help="quantisations of each format (7); 0 leaves them out")
    p.add_argument("--output-dir", type=Path, default=Path("out"), help="folder for the records (out)")
    args = p.parse_args(argv)
    if warning := rebind(argv, on_cpu=args.device == "cpu"):
        print(f"warning: {warning}", file=sys.stderr)
    environment = records.environment(torch.device(args.device)) | {"threads": torch.get_num_threads()}
    try:
        writer = records.Writer(args.output_dir, f"host-{environment['id']}")
    except FdkError as error:
        print(f"fdk.bench.host: {error}", file=sys.stderr)
        return 2
    with writer, torch.inference_mode():
        print(f"{environment['device']}, {environment['isa']}, {environment['threads']} threads")
        for through, name in (("module", "a module"), ("vllm", "vLLM's linear method")):
            if through == "vllm" and find_spec("vllm") is None:
                continue
            entry = overhead(through, args.device)
            writer.write({**entry, **environment})
            if entry["status"] == "ok":
                added, low, high = (significant(entry[f"added_p{q}"] * 1e6) for q in (50, 20, 80))
                kernel = significant(entry["kernel_p50"] * 1e6)
                print(f"a call of {name} adds {added} us ({low}-{high}) to the {kernel} us of [{SMALL}, {SMALL}]")
            else:
                print(f"no overhead: {entry['reason']}")
        weight = torch.randn(args.n, args.k, generator=torch.Generator().manual_seed(0)).bfloat16()
        for format, codebook in QUANTISED if args.rounds and args.device == "cpu" else ():
            entry = quantisation(weight, format, codebook, args.rounds)
            writer.write({**entry, **environment})
            rate, low, high = (significant(weight.numel() / entry[f"time_p{q}"] / 1e6) for q in (50, 80, 20))
            print(f"quantise {format} {codebook}: {rate} M weights/s ({low}-{high})", flush=True)
        print(f"{writer.count} records in {writer.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
