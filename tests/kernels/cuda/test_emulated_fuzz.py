"""Random products on the emulated GPU: every route, in a random order. A failure's test id is its seed.

FDK_EMULATED_FUZZ_CASES (default 8) and FDK_EMULATED_FUZZ_SEED (default 0) widen the search.
"""

import os
import random

import pytest
import torch

from emulate import Schedule, emulated, unavailable
from fdk import testing
from fdk.formats import all_formats
from fdk.kernels import Problem, reason_against
from fdk.kernels.cuda import KERNEL, _routes

REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

CASES = int(os.environ.get("FDK_EMULATED_FUZZ_CASES", "8"))
SEED = int(os.environ.get("FDK_EMULATED_FUZZ_SEED", "0"))
ROWS = (1, 1, 2, 3, 4, 7, 8, 13, 16, 20, 32, 40, 64, 100, 130, 200, 260)


@pytest.mark.parametrize("seed", range(SEED, SEED + CASES))
def test_random_products(seed: int) -> None:
    draw = random.Random(seed)
    fmt = draw.choice(all_formats((draw.choice([16, 32, 48, 64, 128, None]),)))
    n, m, multiple = draw.choice([1, 8, 40, 64, 100, 129, 192, 256, 320, 448, 640]), draw.choice(ROWS), fmt.k_multiple
    k = -(-draw.choice([64 * draw.randint(1, 24), 8 * draw.randint(2, 150)]) // multiple) * multiple
    dtype = draw.choice([torch.bfloat16, torch.float16])
    orders, copies = ("forward", "backward", "random"), ("at once", "late", "random")
    schedule = Schedule(draw.choice(orders), draw.choice(copies), seed)
    tables, float_zeros = min(n, draw.choice([1, 1, 2, 3, 5])), fmt.has_zeros and draw.random() < 0.3
    with emulated(draw.choice([(9, 0), (9, 0), (9, 0), (8, 0)]), draw.choice([2, 4, 8, 16, 132]), schedule):
        weight = testing.random_weight(fmt, n, k, dtype, seed, tables=tables, float_zeros=float_zeros)
        if reason := reason_against(KERNEL, Problem(m, weight.geometry, weight.device)):
            pytest.skip(reason)
        weight = weight.to_layout(KERNEL.layout)
        generator = torch.Generator().manual_seed(seed)
        x, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((m, k), (n,)))
        zeros = weight.parts.get("zeros")
        for route in _routes(weight.geometry, None if zeros is None else zeros.dtype, m, weight.device):
            call = KERNEL._bind(weight, m, (route,))
            run = lambda x, _, bias, out, call=call: call(x, bias, out)  # noqa: E731
            added = bias if seed % 3 == 0 else None
            assert testing.check_product(run, x, weight, added, route.rounds) is None, (fmt, n, k, m, schedule, route)
