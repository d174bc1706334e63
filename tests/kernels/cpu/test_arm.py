"""What only ARM has: which instruction sets each emulated processor offers, and the reasons against the others."""

from __future__ import annotations

import pytest


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
