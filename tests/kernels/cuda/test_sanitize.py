"""What sanitize.py runs under compute-sanitizer: a case for every kernel, each right on the emulated device."""

import re
from functools import cache

import pytest

import sanitize
from conftest import WITHOUT_EMULATOR
from emulate import SCHEDULES, device, emulated
from fdk.kernels.cuda import jit

# The streaming kernel takes CUDA tensors only.
EMULATED = [case for case in sanitize.CUDA if case.entry != "fdk_stream"]


def test_every_kernel_has_a_case() -> None:
    entries = re.findall(r"extern \"C\" __global__ .*?(fdk_\w+)\(", "\n".join(jit.sources().values()))
    assert len(entries) >= 5 and set(entries) == {case.entry for case in sanitize.CUDA}
    lines = [sanitize.title(case) for case in sanitize.CUDA + sanitize.TRITON + sanitize.STEPS]
    assert len(set(lines)) == len(lines)


def test_cases_name_what_they_compile() -> None:
    files = [[file for file, _, _ in case.sources((9, 0))] for case in sanitize.CUDA]
    assert all(files) and {file for case in files for file in case} == {
        "decode.cuh", "prefill.cuh", "dequantise_weights.cuh", "spread.cuh", "attend.cuh", "stream.cuh"
    }  # fmt: skip
    assert not any(list(case.sources((9, 0))) for case in sanitize.TRITON + sanitize.STEPS)


@pytest.mark.skipif(WITHOUT_EMULATOR is not None, reason=WITHOUT_EMULATOR or "")
@pytest.mark.parametrize("chosen", ["k_groups=2 rounds", "split=2", "pair=2"])
def test_all_lanes_may_arrive(chosen: str, monkeypatch) -> None:
    monkeypatch.setattr(jit, "_FLAGS", (*jit._FLAGS, sanitize.ALL_ARRIVE))
    monkeypatch.setattr(device, "_kernel", cache(device._kernel.__wrapped__))
    case = next(case for case in sanitize.PRODUCTS if case.entry == "fdk_prefill" and chosen in sanitize.title(case))
    with emulated(sms=8):
        case.run("cpu")


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_EMULATOR is not None, reason=WITHOUT_EMULATOR or "")
@pytest.mark.parametrize("i", range(len(EMULATED)))
def test_cases_on_an_emulated_device(i: int) -> None:
    case = EMULATED[i]
    with emulated(sms=8, schedule=SCHEDULES[i % len(SCHEDULES)]) as gpu:
        case.run("cpu")
    assert case.entry in {entry for entry, _ in gpu.executed}
