"""What only ARM has: which instruction sets each emulated processor offers, and the reasons against the others."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fdk.kernels.cpu import build


@pytest.mark.parametrize(
    ("processor", "isas"),
    [
        ("cortex-a53", ["generic", "neon"]),
        ("neoverse-n1", ["generic", "neon"]),
        ("a64fx", ["generic", "neon"]),
        ("max,sve=off", ["generic", "neon", "neonbf16"]),
        ("max,sve-max-vq=1", ["generic", "neon", "neonbf16", "sve"]),
        ("max,sve-max-vq=2", ["generic", "neon", "neonbf16", "sve"]),
        ("max,sve-max-vq=4", ["generic", "neon", "neonbf16", "sve"]),
    ],
)
def test_a_processor_offers_what_it_has(start_driver, processor: str, isas: list[str]) -> None:
    assert start_driver(processor, "generic") == " ".join(isas)


@pytest.mark.parametrize(
    ("processor", "wanted", "reason"),
    [
        ("cortex-a53", "neonbf16", "the processor has no bf16 instructions"),
        ("cortex-a53", "sve", "the processor has no SVE"),
        ("a64fx", "sve", "its SVE has no bf16 instructions"),
        (
            "max,sve-max-vq=3,sve384=on,sve-default-vector-length=48",
            "sve",
            "its SVE vectors are not of 128, 256 or 512 bits",
        ),
        ("max", "avx2", "it belongs to x86"),
    ],
)
def test_the_reason_against_an_instruction_set(start_driver, processor: str, wanted: str, reason: str) -> None:
    assert start_driver(processor, wanted) == f"missing: {reason}"


def test_the_program_is_small_and_needs_no_library(start_driver, driver_path) -> None:
    """The same flags as the benchmark's, which runs on Android without an NDK."""
    assert driver_path.stat().st_size < 3_000_000
    headers = subprocess.run(["readelf", "-l", driver_path], capture_output=True, text=True).stdout
    assert "Entry point" in headers and "INTERP" not in headers


@pytest.mark.parametrize(
    ("processor", "isas"), [("cortex-a53", "0 4"), ("max,sve=off", "0 4 5"), ("max,sve-max-vq=2", "0 4 5 6")]
)
def test_an_aarch64_python_loads_the_library(run_python, driver_path, processor: str, isas: str) -> None:
    library = driver_path.with_name(build.LIBRARY.name)
    said = run_python(processor, Path(__file__).parent / "load_library.py", library)
    assert said.split() == ["aarch64", *isas.split()]
