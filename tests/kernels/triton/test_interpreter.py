"""The Triton kernel on the CPU, in Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fdk import kernels, testing
from fdk.formats import parse

CASES = Path(__file__).with_name("interpreted_cases.py")


@pytest.mark.slow
def test_contract_in_the_interpreter() -> None:
    if find_spec("triton") is None:
        pytest.skip("the triton package is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout, run.stdout + run.stderr


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = testing.random_weight(parse("lut4_g64"), 40, 192)
    reason = kernels.kernel("triton").supports(kernels.Problem(1, weight.geometry, torch.device("cpu")))
    assert reason and ("interpreter" in reason or "not installed" in reason)
