"""What sanitize.py runs under compute-sanitizer: a case for every kernel, each right on the emulated device."""

import re
from unittest import mock

import pytest

import sanitize
from conftest import WITHOUT_EMULATOR
from emulate import SCHEDULES, emulated
from fdk.kernels.cuda import jit

# The streaming kernel takes CUDA tensors only.
EMULATED = [case for case in sanitize.CUDA if case.entry != "fdk_stream"]


def test_every_kernel_has_a_case() -> None:
    entries = re.findall(r"extern \"C\" __global__ .*?(fdk_\w+)\(", "\n".join(jit.sources().values()))
    assert len(entries) >= 5 and set(entries) == {case.entry for case in sanitize.CUDA}
    lines = [sanitize.title(case) for case in sanitize.CUDA + sanitize.TRITON]
    assert len(set(lines)) == len(lines)


def test_cases_name_what_they_compile() -> None:
    files = [[file for file, _, _ in case.sources((9, 0))] for case in sanitize.CUDA]
    assert all(files) and {file for case in files for file in case} == {
        "decode.cuh", "prefill.cuh", "dequantise_weights.cuh", "attend.cuh", "stream.cuh"
    }  # fmt: skip
    assert not any(list(case.sources((9, 0))) for case in sanitize.TRITON)


def test_barriers_of_warps_can_be_shown() -> None:
    if reason := jit.unavailable():
        pytest.skip(reason)
    for case in (sanitize.PRODUCTS[0], next(c for c in sanitize.PRODUCTS if c.entry == "fdk_prefill")):
        source = next(case.sources((9, 0)))
        known = re.compile(r"bar\.warp\.sync\s+-1;")
        assert known.search(jit.ptx(*source))
        with mock.patch.object(jit, "_FLAGS", (*jit._FLAGS, sanitize.SHOW_SYNC)):
            shown = jit.ptx(*source)
        assert "bar.warp.sync" in shown and not known.search(shown)


def test_all_barriers_of_warps_are_those_that_can_be_shown() -> None:
    assert {name for name, text in jit.sources().items() if "__syncwarp" in text} == {"ptx.cuh"}


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_EMULATOR is not None, reason=WITHOUT_EMULATOR or "")
@pytest.mark.parametrize("i", range(len(EMULATED)))
def test_cases_on_an_emulated_device(i: int) -> None:
    case = EMULATED[i]
    with emulated(sms=8, schedule=SCHEDULES[i % len(SCHEDULES)]) as device:
        case.run("cpu")
    assert case.entry in {entry for entry, _ in device.executed}
