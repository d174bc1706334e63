"""The Triton kernel on the CPU, in Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fdk import kernels, testing
from fdk.formats import parse

CASES = Path(__file__).with_name("interpreted_cases.py")


@pytest.mark.slow
def test_contract_in_the_interpreter(pass_in_the_interpreter) -> None:
    pass_in_the_interpreter(CASES)


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = testing.random_weight(parse("lut4_g64"), 40, 192)
    reason = kernels.kernel("triton").supports(kernels.Problem(1, weight.geometry, torch.device("cpu")))
    assert reason and ("interpreter" in reason or "not installed" in reason)
