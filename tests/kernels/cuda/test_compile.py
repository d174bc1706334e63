"""Every kernel variant compiles with NVRTC for every architecture, without spills; needs NVRTC, but no GPU."""

import re

import pytest

from fdk.kernels.cuda import decode, dense, jit, stream
from fdk.kernels.cuda.decode import Shape

ARCHITECTURES = ["sm_80", "sm_89", "sm_90a", "sm_100a"]
REASON = jit.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

# Shapes for 8 and for 16 warps, one with tails in n and k; every kind, groups inside, beside and beyond a unit.
SHAPES = [
    (4096, 4096, 64),
    (8192, 8192, 64),
    (100, 960, 48),
    (70, 1000, 1000),
    (192, 512, 16),
    (64, 512, 32),
    (128, 1024, 128),
]
KINDS = [
    (bits, kind, 0) for bits in range(1, 9) for kind in (decode.TABLE, decode.INT, decode.UINT_U8, decode.UINT_FLOAT)
]
NESTED = [(min(served + 1, 8), decode.ROUNDED, served) for served in range(2, 9)]
NESTED += [(served, decode.CUT, served) for served in range(2, 9)]
SPARSE = [(3, decode.SPARSE_INT, 0), (3, decode.SPARSE_TABLE, 0)]
VARIANTS = [
    (Shape(n, k, bits, group, (bits + kind) % 3 > 0, kind, served), m)
    for bits, kind, served in KINDS + NESTED + SPARSE
    for i, (n, k, group) in enumerate(SHAPES)
    for m in ((1, 8, 16) if i == 0 else (1, 2) if i == 1 else (1,) if (bits + kind + i) % 2 else (2,))
    if (bits, kind, served) not in SPARSE or group % 64 == 0
]


def resources(log: str) -> tuple[int, int]:
    """(registers, bytes spilled) that ptxas reported."""
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers and spilled, log
    return int(registers[1]), int(spilled[1]) + int(spilled[2])


def check(shape: Shape, m: int, arch: str, epilogue: decode.Epilogue = decode.PLAIN) -> None:
    hopper = arch not in ("sm_80", "sm_89")
    config = decode.choose_config(shape, m, -(-shape.n // 64), 132, hopper, epilogue)
    assert config is not None
    _, log = jit.build("decode.cuh", config.defines(shape, hopper), arch)
    registers, spilled = resources(log)
    assert spilled == 0, (arch, shape, config)
    assert registers * config.threads * config.min_ctas <= 65536, (arch, shape, config)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_token_of_every_width(arch: str, bits: int) -> None:
    for kind in (decode.TABLE, decode.INT):
        check(Shape(4096, 4096, bits, 64, True, kind), 1, arch)


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_epilogues(arch: str, bits: int, m: int) -> None:
    for n, k, epilogue in (
        (4096, 14336, decode.Epilogue(residual=True)),
        (6144, 4096, decode.Epilogue(squares=128)),
        (28672, 4096, decode.Epilogue(squares=128, gated=True, tables=2)),
    ):
        check(Shape(n, k, bits, 64, True, decode.TABLE), m, arch, epilogue)
    check(Shape(4096, 14336, 5, 64, True, decode.ROUNDED, 4), m, arch, decode.Epilogue(residual=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_token_of_nested_slices(arch: str) -> None:
    for bits, kind, served in NESTED:
        check(Shape(4096, 4096, bits, 64, served % 3 > 0, kind, served), 1, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", [decode.SPARSE_INT, decode.SPARSE_TABLE], ids=["int", "table"])
def test_sparse_codes(arch: str, kind: int) -> None:
    for m in (1, 8, 32):
        check(Shape(4096, 4096, 3, 64, m > 1, kind), m, arch)
    for bf16 in (True, False):
        check_dequantise(dense.Variant(3, 128, bf16, kind), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_variant(bits: int, arch: str) -> None:
    for shape, m in VARIANTS:
        if shape.bits == bits:
            check(shape, m, arch)


def check_dequantise(variant: dense.Variant, arch: str) -> None:
    _, log = jit.build("dequantise_weights.cuh", variant.defines(arch not in ("sm_80", "sm_89")), arch)
    registers, spilled = resources(log)
    assert spilled == 0 and registers <= 128, (arch, variant, registers, spilled)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dequantisation_of_every_width(arch: str, bits: int) -> None:
    check_dequantise(dense.Variant(bits, 64, bits % 2 == 0, decode.TABLE), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_dequantisation(bits: int, arch: str) -> None:
    for stored, kind, served in KINDS + NESTED + SPARSE:
        if stored == bits:
            for group in (0, 128) if kind >= decode.SPARSE_INT else (0, 16, 32, 48, 128):
                check_dequantise(dense.Variant(bits, group, (bits + kind) % 2 == 0, kind, served), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_streaming_floor(arch: str) -> None:
    for config in stream.CANDIDATES:
        defines = {
            "FDK_BYTES": 1 << 20,
            "FDK_N": 4096,
            "FDK_CTAS": config.ctas,
            "FDK_THREADS": config.threads,
            "FDK_UNROLL": config.unroll,
        }
        _, log = jit.build("stream.cuh", defines, arch)
        assert resources(log)[1] == 0


def test_errors_carry_the_compilers_log() -> None:
    with pytest.raises(RuntimeError, match="FDK_N"):
        jit.build("decode.cuh", {}, "sm_90a")
