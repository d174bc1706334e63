"""One product on the emulated GPU, by one route and configuration, under every schedule; held to its bound.

PYTHONPATH=src:tests/kernels/cuda python -m emulate lut4_g64 --n 128 --k 512 --m 8 --set cluster=2 --set k_warps=4
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import torch

from emulate import SCHEDULES, EmulationError, Schedule, emulated, unavailable
from fdk import testing
from fdk.formats import parse
from fdk.kernels.cuda import KERNEL, _routes


def setting(text: str) -> tuple[str, int | bool]:
    name, _, value = text.partition("=")
    return name, {"True": True, "False": False}.get(value) if value in ("True", "False") else int(value)


def main() -> int:
    parser = argparse.ArgumentParser(prog="emulate", description=__doc__)
    parser.add_argument("format", help="such as lut4_g64")
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--m", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tables", type=int, default=1, help="ranges of rows with a table of their own")
    parser.add_argument("--float-zeros", action="store_true")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--sms", type=int, default=4, help="multiprocessors of the emulated GPU")
    parser.add_argument("--capability", default="9.0")
    parser.add_argument(
        "--route", choices=["decode", "prefill", "spread", "dense"], help="default: what dispatch chooses"
    )
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="FIELD=VALUE", help="of the Config")
    parser.add_argument("--seeds", type=int, default=0, help="that many random schedules more")
    args = parser.parse_args()
    if reason := unavailable():
        print(reason, file=sys.stderr)
        return 1
    dtype = getattr(torch, args.dtype)
    capability = tuple(map(int, args.capability.split(".")))
    failed = 0
    for schedule in (*SCHEDULES, *(Schedule("random", "random", seed) for seed in range(2, args.seeds + 2))):
        with emulated(capability, args.sms, schedule) as device:
            weight = testing.random_weight(
                parse(args.format), args.n, args.k, dtype, tables=args.tables, float_zeros=args.float_zeros
            ).to_layout(KERNEL.layout)
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(args.m, args.k, generator=generator).to(dtype)
            bias = torch.randn(args.n, generator=generator).to(dtype) if args.bias else None
            zeros = weight.parts.get("zeros")
            found = _routes(weight.geometry, None if zeros is None else zeros.dtype, args.m, weight.device)
            route = next((route for route in found if args.route in (None, route.name)), None)
            if route is None:
                print(f"no route {args.route}; there are {', '.join(r.name for r in found)}", file=sys.stderr)
                return 1
            if args.set:
                route = replace(route, config=replace(route.config, **dict(args.set)))
            if schedule == SCHEDULES[0]:
                print(route.name, route.config or "")
            start = time.perf_counter()
            try:
                call = KERNEL._bind(weight, args.m, (route,))
                wrong = testing.check_product(lambda x, _, b, out, f=call: f(x, b, out), x, weight, bias, route.rounds)
            except EmulationError as error:
                wrong = error
            count = sum(executed for _, executed in device.executed)
            print(
                f"{schedule}: {wrong or 'within the bound'}; {count} instructions, {time.perf_counter() - start:.2f} s"
            )
            failed += wrong is not None
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
