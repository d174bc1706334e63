"""Every kernel variant compiles with NVRTC for every architecture: no spills, within registers and shared memory."""

import pytest

from fdk.kernels.cuda import decode_choice, decode_config, dense, jit, stream
from fdk.kernels.cuda.decode_config import Shape

ARCHITECTURES = ["sm_80", "sm_89", "sm_90a", "sm_100a"]

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
    (bits, kind, 0)
    for bits in range(1, 9)
    for kind in (decode_config.TABLE, decode_config.INT, decode_config.UINT_U8, decode_config.UINT_FLOAT)
]
NESTED = [(min(served + 1, 8), decode_config.ROUNDED, served) for served in range(2, 9)]
NESTED += [(served, decode_config.CUT, served) for served in range(2, 9)]
SPARSE = [(3, decode_config.SPARSE_INT, 0), (3, decode_config.SPARSE_TABLE, 0)]
VARIANTS = [
    (Shape(n, k, bits, group, (bits + kind) % 3 > 0, kind, served), m)
    for bits, kind, served in KINDS + NESTED + SPARSE
    for i, (n, k, group) in enumerate(SHAPES)
    for m in ((1, 8, 16, 32) if i == 0 else (1, 2) if i == 1 else (1,) if (bits + kind + i) % 2 else (2,))
    if (bits, kind, served) not in SPARSE or group % 64 == 0
]


def decode_sources(problems, arch: str) -> list[tuple[decode_config.Config, tuple]]:
    """Configuration and what NVRTC gets, of each (shape, m) or (shape, m, epilogue)."""
    capability, found = jit.capability(arch), []
    for shape, m, *epilogue in problems:
        config = decode_choice.choose_config(shape, m, -(-shape.n // 64), 132, capability, *epilogue)
        assert config is not None
        found.append((config, ("decode.cuh", config.defines(shape, capability >= (9, 0)), arch)))
    return found


def check(compiled, problems, arch: str) -> None:
    found = decode_sources(problems, arch)
    for (config, source), result in zip(found, compiled(source for _, source in found), strict=True):
        assert result.spilled == 0, source
        assert result.registers * config.threads * config.min_ctas <= 65536, source


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_token_of_every_width(compiled, arch: str) -> None:
    shapes = [
        Shape(4096, 4096, bits, 64, True, kind)
        for bits in range(1, 9)
        for kind in (decode_config.TABLE, decode_config.INT)
    ]
    check(compiled, [(shape, 1) for shape in shapes], arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_epilogues(compiled, arch: str) -> None:
    problems = []
    for m in (1, 16):
        for bits in (1, 4):
            for n, k, epilogue in (
                (4096, 14336, decode_config.Epilogue(residual=True)),
                (6144, 4096, decode_config.Epilogue(squares=128)),
                (28672, 4096, decode_config.Epilogue(squares=128, gated=True, tables=2)),
            ):
                problems.append((Shape(n, k, bits, 64, True, decode_config.TABLE), m, epilogue))
        nested = Shape(4096, 14336, 5, 64, True, decode_config.ROUNDED, 4)
        problems.append((nested, m, decode_config.Epilogue(residual=True)))
    check(compiled, problems, arch)


def test_registers_keep_apart_what_shared_memory_does_not(compiled) -> None:
    """Of one bit, or a table of 4 bits, and one token in a chain a multiprocessor takes one CTA of each launch."""
    problems = []
    for k, wide in ((3072, 11264), (3584, 18944), (4096, 11008), (4096, 12288), (6144, 21504), (8192, 28672)):
        gate_up, residual = decode_config.Epilogue(squares=k // 32, gated=True), decode_config.Epilogue(residual=True)
        for bits in (1, 4):
            problems += [(Shape(2 * wide, k, bits, 64, True, decode_config.TABLE), 1, gate_up)]
            problems += [(Shape(k, wide, bits, 64, True, decode_config.TABLE), 1, residual)]
    found = [(config, source) for config, source in decode_sources(problems, "sm_90a") if not config.alone]
    assert {source[1]["FDK_BITS"] for _, source in found} == {1, 4}
    for (config, source), result in zip(found, compiled(source for _, source in found), strict=True):
        # Registers are given out eight a thread.
        assert result.spilled == 0 and 2 * config.threads * -(-result.registers // 8) * 8 > 65536, source


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_token_of_nested_slices(compiled, arch: str) -> None:
    shapes = [Shape(4096, 4096, bits, 64, served % 3 > 0, kind, served) for bits, kind, served in NESTED]
    check(compiled, [(shape, 1) for shape in shapes], arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sparse_codes(compiled, arch: str) -> None:
    problems = [(Shape(4096, 4096, 3, 64, m > 1, kind), m) for _, kind, _ in SPARSE for m in (1, 8, 32)]
    check(compiled, problems, arch)
    check_dequantise(
        compiled, [dense.Variant(3, 128, bf16, kind) for _, kind, _ in SPARSE for bf16 in (True, False)], arch
    )


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_large_weights(compiled, arch: str) -> None:
    """Where 8 to 20 warps, integer products, indices, zeros, wide tables, half blocks or `ahead` are chosen by size."""
    kinds = [(2, decode_config.INT, 1), (8, decode_config.INT, 1), (1, decode_config.TABLE, 1)]
    kinds += [(bits, decode_config.UINT_U8, m) for bits, m in ((2, 1), (4, 1), (8, 1), (2, 2), (4, 4), (4, 8))]
    kinds += [(bits, decode_config.TABLE, 8) for bits in (1, 2, 3, 4, 8)]
    kinds += [(bits, decode_config.TABLE, m) for bits, m in ((1, 2), (2, 1), (8, 16))]
    kinds += [(bits, decode_config.TABLE, 1) for bits in (3, 4, 8)]
    kinds += [(bits, decode_config.INT, 1) for bits in range(3, 8)] + [(3, decode_config.SPARSE_INT, 1)]
    kinds += [(bits, decode_config.UINT_U8, 1) for bits in (3, 7)]
    sizes = [(8192, 8192), (14336, 4096), (4096, 14336), (28672, 8192), (20480, 5120)]
    problems = [(Shape(n, k, bits, 64, True, kind), m) for bits, kind, m in kinds for n, k in sizes]
    problems += [
        (Shape(16384, 16384, bits, group, group == 64, kind), 1)
        for kind in (decode_config.INT, decode_config.UINT_U8)
        for bits in range(2, 9)
        for group in (64, 128)
    ]
    problems += [(Shape(8192, 8192, bits, 128, True, decode_config.INT), 1) for bits in (3, 5, 6, 7)]
    slices = [(bits, decode_config.ROUNDED, served) for bits, served in ((3, 2), (5, 4), (8, 8))]
    slices += [(bits, decode_config.CUT, bits) for bits in (2, 7)]
    problems += [(Shape(n, k, bits, 128, True, kind, served), 1) for bits, kind, served in slices for n, k in sizes]
    check(compiled, problems, arch)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_several_tokens_of_slices(compiled, arch: str) -> None:
    """By integer products of two and four tokens, and in two stages of sixteen, as they are chosen by size."""
    sizes = [(4096, 2), (4096, 4), (8192, 2), (8192, 4), (8192, 16), (12288, 4), (16384, 2), (16384, 4)]
    problems = [
        (Shape(n, n, bits, 128, bits % 2 > 0, kind, served), m) for bits, kind, served in NESTED for n, m in sizes
    ]
    problems += [(Shape(28672, 8192, bits, 128, True, kind, served), 4) for bits, kind, served in NESTED]
    problems += [(Shape(n, n, 8, 64, True, decode_config.INT), 4) for n in (4096, 8192)]
    problems += [(Shape(8192, 8192, bits, 64, True, decode_config.INT), 2) for bits in range(2, 9)]
    problems += [(Shape(8192, 8192, bits, 128, False, decode_config.INT), m) for bits in range(5, 8) for m in (2, 4)]
    check(compiled, problems, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_variant(compiled, bits: int, arch: str) -> None:
    check(compiled, [(shape, m) for shape, m in VARIANTS if shape.bits == bits], arch)


def check_dequantise(compiled, variants: list[dense.Variant], arch: str) -> None:
    hopper = jit.capability(arch) >= (9, 0)
    sources = [("dequantise_weights.cuh", variant.defines(hopper), arch) for variant in variants]
    for source, result in zip(sources, compiled(sources), strict=True):
        # Two CTAs of 256 threads on a multiprocessor.
        assert result.spilled == 0 and result.registers <= 128, source


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dequantisation_of_every_width(compiled, arch: str) -> None:
    check_dequantise(
        compiled, [dense.Variant(bits, 128, bits % 2 == 0, decode_config.TABLE) for bits in range(1, 9)], arch
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_dequantisation(compiled, bits: int, arch: str) -> None:
    variants = []
    for stored, kind, served in KINDS + NESTED + SPARSE:
        groups = (0, 128) if kind >= decode_config.SPARSE_INT else (0, 16, 32, 48, 128)
        # Registers of gathered planes differ between the two dtypes.
        dtypes = (True, False) if (stored, kind, served) in NESTED else ((bits + kind) % 2 == 0,)
        if stored == bits:
            variants += [dense.Variant(bits, group, bf16, kind, served) for group in groups for bf16 in dtypes]
    check_dequantise(compiled, variants, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_streaming_floor(compiled, arch: str) -> None:
    sources = []
    for config in stream.CANDIDATES:
        defines = {
            "FDK_BYTES": 1 << 20,
            "FDK_N": 4096,
            "FDK_CTAS": config.ctas,
            "FDK_THREADS": config.threads,
            "FDK_UNROLL": config.unroll,
        }
        sources.append(("stream.cuh", defines, arch))
    assert all(result.spilled == 0 for result in compiled(sources))


def test_errors_carry_the_compilers_log(compiled) -> None:
    with pytest.raises(RuntimeError, match="FDK_N"):
        jit.build("decode.cuh", {}, "sm_90a")
