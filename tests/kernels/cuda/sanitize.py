"""Small exact products of every kernel family in one process, for compute-sanitizer on a CUDA device (Hopper).

    PYTHONPATH=src compute-sanitizer --tool memcheck python tests/kernels/cuda/sanitize.py
    PYTHONPATH=src compute-sanitizer --tool racecheck python tests/kernels/cuda/sanitize.py

Each case asserts its results, and its line follows what the tool says about its launches. Names on the command line
choose cases by what their lines contain; the decoding steps, half a minute under racecheck, run only by their name
(`step`). Kernels are compiled with FDK_ALL_ARRIVE (csrc/ptx.cuh), without which racecheck does not follow an
arrival at a barrier for other lanes; --as-shipped compiles them as the library does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unittest import mock

import torch

import fdk
from fdk import reference, testing
from fdk.formats import parse
from fdk.kernels.cuda import attend, decode, dense, jit, prefill, spread, stream

ALL_ARRIVE = "-DFDK_ALL_ARRIVE=1"
Config = decode.Config | prefill.Config | None


@dataclass(frozen=True)
class Product:
    """Columns of a weight [n, k] as the product of `m` one-hot rows, by the kernel that `config` belongs to.

    None stands for the dense path, which dequantises, one of fresh codes for spreading them before it; sms:
    multiprocessors that tiles are shared out among.
    """

    format: str
    m: int
    config: Config
    n: int = 256
    k: int = 1024
    sms: int | None = None

    @property
    def spreads(self) -> bool:
        return isinstance(self.config, prefill.Config) and self.config.fresh

    @property
    def entry(self) -> str:
        """The kernel's name in machine code."""
        if self.spreads:
            return "fdk_spread"
        names = {decode.Config: "fdk_decode", prefill.Config: "fdk_prefill", type(None): "fdk_dequantise"}
        return names[type(self.config)]

    def shape(self) -> decode.Shape:
        weight = testing.random_weight(parse(self.format), 1, self.k)
        zeros = weight.parts.get("zeros")
        return replace(decode.shape_of(weight.geometry, None if zeros is None else zeros.dtype), n=self.n)

    def sources(self, capability: tuple[int, int]) -> Iterator[jit.Source]:
        """What the case's kernels are compiled from."""
        shape = self.shape()
        if self.spreads:
            yield spread.source(capability)
            yield prefill.source(spread.dense_shape(shape), self.config, capability)
        elif isinstance(self.config, decode.Config):
            yield decode.source(shape, self.config, capability)
        elif isinstance(self.config, prefill.Config):
            yield prefill.source(shape, self.config, capability)
        else:
            yield dense.source(dense.variant_of(shape), capability)

    def run(self, device: str) -> None:
        tables = 2 if self.format.startswith("lut") and "sp" not in self.format else 1
        weight = testing.random_weight(parse(self.format), self.n, self.k, tables=tables, device=device)
        columns = torch.arange(self.m) * 37 % self.k
        expected = reference.dequantise(weight)[:, columns].T
        weight = weight.to_layout("fragments")
        if self.config is None:
            assert torch.equal(dense.Plan(weight).dense()[:, columns].T, expected)
            return
        module = spread if self.spreads else decode if isinstance(self.config, decode.Config) else prefill
        plan = module.Plan(weight, self.config)
        if self.sms is not None:
            plan.sms = self.sms
        x = testing.one_hot_probe(self.k, columns, weight.dtype, device)
        found = [testing.poisoned(self.m, self.n, weight.dtype, device) for _ in range(2)]
        for out in found:  # the second launch begins while the first one runs
            plan(x, None, out)
        assert all(torch.equal(out, expected) for out in found)


@dataclass(frozen=True)
class Other:
    """A call that asserts its own results; compiled: what CUDA kernel it compiles, for a capability."""

    entry: str
    name: str
    call: Callable[[str], None]
    compiled: Callable[[tuple[int, int]], jit.Source] | None = None

    def sources(self, capability: tuple[int, int]) -> Iterator[jit.Source]:
        if self.compiled:
            yield self.compiled(capability)

    def run(self, device: str) -> None:
        self.call(device)


Case = Product | Other


def one(tokens: int, cluster: int, k_warps: int, **more) -> decode.Config:
    """One block of rows a cluster, unless `more` says otherwise."""
    return replace(decode.Config(tokens, cluster, k_warps, 1, 1, 1, 1, 1, 1), **more)


INTEGERS = one(1, 1, 4, digits=True, paired=True, uniform=True, late=True, stages=2)
TILE = prefill.Config(16, 1, 12, k_groups=2, rounds=True)

PRODUCTS = (
    Product("lut2_g64", 1, one(1, 1, 4, indices=True, uniform=True, alone=True, stage_units=4)),
    Product("lut1_g64", 1, one(1, 2, 2, indices=True, uniform=True, stages=2, stage_units=2)),
    *(Product(name, 1, INTEGERS) for name in ("lut1_g64", "int4_g64", "uint4_g64", "int8_g64", "nest8s4_g128")),
    Product("trunc8s2_g128", 1, INTEGERS),
    Product("lut1_g64", 1, replace(INTEGERS, late=False, hold=2000)),
    Product("int2_g64", 1, one(1, 2, 4, digits=True, row_warps=2, blocks=2, stages=2)),
    Product("int4_g64_sp16of32", 1, one(1, 2, 8, digits=True, paired=True, bulk=False, scales_once=True, stages=2)),
    Product("nest8s4_g128", 4, one(4, 2, 4, digits=True, paired=True, blocks=2, batch=2, stage_units=2)),
    Product("int8_g64", 8, one(8, 1, 4, digits=True, paired=True, row_warps=2, blocks=2, stages=2)),
    Product("lut4_g64_sp16of32", 8, one(8, 2, 4)),
    Product("lut4_g64", 1, one(1, 2, 4, row_warps=2, blocks=4, stages=3)),
    Product("lut4_g64", 1, one(1, 2, 4, row_warps=2, blocks=4, stages=3, ahead=2)),
    Product("lut4_g64", 1, one(1, 2, 4, blocks=3, batch=3, bulk=False, stages=2)),
    Product("lut4_g64", 8, one(8, 4, 4, uniform=True)),
    Product("uint4_g64", 8, one(8, 4, 4, x_sums=True)),
    Product("uint4_g64", 8, one(8, 1, 4, phases=2)),
    Product("lut3_g64", 8, one(8, 2, 4, row_warps=2, blocks=2, phases=2)),
    Product("lut1_g64", 16, one(16, 2, 2, row_warps=2, blocks=2, octets=True, uniform=True, x_chunks=2)),
    Product("lut4_g64", 16, one(16, 4, 4, wide=True, uniform=True)),
    Product("lut4_g64", 8, one(8, 2, 2, row_warps=2, blocks=2, half_blocks=True, uniform=True)),
    Product("lut4_g64", 8, one(8, 2, 2, row_warps=2, blocks=2, interleaved=True, x_chunks=2, x_ahead=1, uniform=True)),
    Product("lut1_g64", 16, one(16, 1, 2, octets=True, selected=1, interleaved=True, phases=4, x_buffers=3)),
    Product("int8_g128", 64, one(64, 4, 1, row_warps=2, blocks=2)),
    Product("lut4_g64", 64, replace(TILE, split=2, stages=6, wide=True)),
    Product("lut1_g64", 40, TILE),
    Product("nest8s4_g128", 40, replace(TILE, tokens=24)),
    Product("lut8_g64", 64, replace(TILE, stages=10)),
    Product("lut4_g64", 40, prefill.Config(32, 2, 4), sms=3),
    Product("int4_g64", 40, prefill.Config(32, 2, 4, turns=True), sms=3),
    Product(
        "lut4_g64", 300, prefill.Config(128, 2, 4, pair=2, rounds=True, wide=True, stream=True, unrolled=True), sms=6
    ),
    Product(
        "lut4_g64", 300, prefill.Config(128, 2, 4, rounds=True, wide=True, parts=2, stream=True, unrolled=True), sms=5
    ),
    Product("uint4_g32", 40, prefill.Config(48, 2, 4, k_groups=2, unrolled=True)),
    Product("lut2_g64", 300, prefill.Config(192, 2, 4, rounds=True, wide=True, unrolled=True), sms=2),
    Product("uint3_g32", 300, prefill.Config(256, 2, 4, rounds=True, unrolled=True), sms=2),
    Product("lut4_g64", 8, None),
    Product("int4_g64_sp16of32", 8, None),
    Product("int4_g64_sp16of32", 40, replace(TILE, fresh=True)),
)


def _attend(split: bool) -> Other:
    # Sixty positions a turn of a warp; a turn of every cluster and more.
    config = attend.Config(128, 3, True, 1, 4, 2, 2, norm=not split, splits=4 if split else 1)

    def call(device: str) -> None:
        from test_attend import check

        check(config, device, 300, (0, 64, 277), 2)

    return Other(
        "fdk_attend",
        f"4 warps, clusters of 2, {config.splits} of a head",
        call,
        lambda c: attend.source(config, c),
    )


def _stream() -> Other:
    config = stream.StreamConfig(4, 128, 2)

    def call(device: str) -> None:
        data = torch.tensor([1, 0, 0, 0], dtype=torch.int32, device=device).repeat(1 << 10)
        out = torch.zeros(96, dtype=torch.int16, device=device)
        stream.stream_floor(data, out, config)
        assert (out == (1 << 10) // config.ctas).all()

    return Other("fdk_stream", "16 KB", call, lambda c: stream.source(1 << 14, 96, config, c))


def _triton(name: str, m: int) -> Other:
    def call(device: str) -> None:
        weight = testing.random_weight(parse(name), 96, 512, device=device)
        columns = torch.arange(m) * 37 % 512
        x = testing.one_hot_probe(512, columns, weight.dtype, device)
        expected = reference.dequantise(weight)[:, columns].T
        assert torch.equal(fdk.linear(x, weight, kernel="triton"), expected)

    return Other("triton", f"{name} m={m}", call)


def _step(name: str, batch: int) -> Other:
    """Tokens of a small model: the Triton functions of a decoding step, attention, products with epilogues."""

    def call(device: str) -> None:
        from test_step import follows, small_config

        from fdk.models import QuantisationConfig
        from fdk.models.decode import PlainStep
        from fdk.models.random import random_llama
        from fdk.models.step import Step

        model = random_llama(small_config(num_hidden_layers=1), QuantisationConfig(format=name), device, seed=2)
        tokens = torch.randint(0, 512, (batch, 16), generator=torch.Generator().manual_seed(0)).to(device)
        follows(Step(model, batch, 24), PlainStep(model, batch, 24), tokens, 2)

    return Other("step", f"of {batch}, {name}", call)


CUDA: tuple[Case, ...] = (*PRODUCTS, _attend(False), _attend(True), _stream())
TRITON: tuple[Case, ...] = tuple(
    _triton(*case) for case in (("lut4_g64", 1), ("lut4_g64", 16), ("nest8s4_g128", 4), ("int4_g64_sp16of32", 4))
)
STEPS: tuple[Case, ...] = (_step("lut4_g64", 1), _step("lut4_g64", 16))


def title(case: Case) -> str:
    """The case's line: what its configuration has set."""
    if isinstance(case, Other):
        return f"{case.entry} {case.name}"
    line = [case.entry, case.format, f"{case.n}x{case.k}", f"m={case.m}"]
    for field in fields(case.config) if case.config else ():
        value = getattr(case.config, field.name)
        if value not in (field.default, 1) or value is True:
            line.append(field.name if value is True else f"{field.name}={value:d}")
    return " ".join(line)


def main() -> int:
    """How many cases failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as-shipped", action="store_true", help="compile kernels as the library does")
    parser.add_argument("names", nargs="*", help="run only cases whose lines contain one of these")
    args = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[2] / "models"))
    cases = CUDA + TRITON
    if args.names:
        cases = tuple(case for case in cases + STEPS if any(name in title(case) for name in args.names))
    failed = 0
    with mock.patch.object(jit, "_FLAGS", jit._FLAGS if args.as_shipped else (*jit._FLAGS, ALL_ARRIVE)):
        capability = torch.cuda.get_device_capability()
        begin = time.monotonic()
        count = jit.compile_ahead(source for case in cases for source in case.sources(capability))
        print(f"{count} kernels compiled in {time.monotonic() - begin:.1f} s", flush=True)
        for case in cases:
            begin, outcome = time.monotonic(), "as expected"
            try:
                case.run("cuda:0")
                torch.cuda.synchronize()
            except Exception as error:
                failed, outcome = failed + 1, f"FAILED: {type(error).__name__}: {error}"
            print(f"{title(case)}: {outcome}, {time.monotonic() - begin:.1f} s", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} cases as expected", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
