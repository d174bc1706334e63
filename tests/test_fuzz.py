"""Seeded random problems through every kernel. A failure prints one line that reproduces it.

FDK_FUZZ_CASES (default 600) and FDK_FUZZ_SEED (default 0) widen the search.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

import fdk
from fdk import kernels, testing
from fdk.formats import all_formats

CASES = int(os.environ.get("FDK_FUZZ_CASES", "600"))
SEED = int(os.environ.get("FDK_FUZZ_SEED", "0"))
BATCHES = 20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# It compiles for seconds at every format and shape; tests/kernels/test_compiled.py holds it to the same checks.
NAMES = [name for name in kernels.names() if name != "torch.compile"]


def draw(seed: int) -> dict:
    """The problem with this seed: sizes lean towards small, odd and boundary values."""
    rng = random.Random(seed)
    fmt = rng.choice(all_formats((rng.choice([16, 16, 32, 48, 64, 64, 112, 128, 256, None]),)))
    free = fmt.k_multiple == 1
    k = fmt.k_multiple * rng.choice([1, 2, 3, 15, 17, 31, 33, 100, 257, 512] if free else [1, 2, 3, 5, 7])
    return {
        "format": str(fmt),
        "n": rng.choice([1, 2, 15, 16, 17, 31, 33, 64, 100, 129, rng.randint(1, 300)]),
        "k": k,
        "m": rng.choice([1, 1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, rng.randint(1, 150)]),
        "dtype": rng.choice(["bfloat16", "float16", "float32"]),
        "tables": rng.choice([1, 1, 2, 4]),
        "float_zeros": rng.random() < 0.3,
        "bias": rng.random() < 0.4,
        "scale": rng.choice([1.0, 1.0, 1e-3, 30.0]),
        "threads": rng.choice([1, 2]),
    }


def run_case(seed: int, kernel_name: str, device: str) -> str | None:
    """None if the kernel passes or cannot serve the problem, else what went wrong with a reproduction."""
    case = draw(seed)
    dtype = getattr(torch, case["dtype"])
    fmt = fdk.parse(case["format"])
    weight = testing.random_weight(
        fmt, case["n"], case["k"], dtype, seed, device, case["tables"], case["float_zeros"] and fmt.has_zeros
    )
    kernel = kernels.kernel(kernel_name)
    problem = kernels.Problem(case["m"], weight.geometry, weight.device)
    if kernels.reason_against(kernel, problem):
        return None
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(case["m"], case["k"], generator=generator) * case["scale"]).to(dtype).to(device)
    bias = torch.randn(case["n"], generator=generator).to(dtype).to(device) if case["bias"] else None
    laid_out = weight.to_layout(kernel.layout)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(case["threads"])
        wrong = testing.check_product(kernel.linear, x, laid_out, bias, kernel.rounds_weights(problem))
        again = [testing.poisoned(case["m"], case["n"], dtype, device) for _ in range(2)]
        for out in again:
            kernel.linear(x, laid_out, bias, out)
    finally:
        torch.set_num_threads(threads)
    if wrong is None and torch.equal(*again):
        return None
    reason = wrong or "two runs differ"
    command = f"FDK_FUZZ_CASES=1 FDK_FUZZ_SEED={seed} python -m pytest tests/test_fuzz.py"
    return f"{command}  # {kernel_name}: {case}: {reason}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_problems(batch: int, name: str, device: str) -> None:
    failures = [text for seed in range(SEED + batch, SEED + CASES, BATCHES) if (text := run_case(seed, name, device))]
    assert not failures, "\n" + "\n".join(failures)
