"""The CPU kernels on all instruction sets, here and emulated: exactness, bounds, NaN, threads, shapes."""

from __future__ import annotations

import os
import random

import pytest
import torch

from fdk import reference, testing
from fdk.errors import UnsupportedError
from fdk.formats import Format, all_formats, parse
from fdk.kernels import Problem
from fdk.kernels.cpu import library
from fdk.kernels.cpu.launch import KERNEL
from fdk.weight import QuantisedWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUZZ_CASES = int(os.environ.get("FDK_FUZZ_CASES") or 0)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def multiply(isa, x: torch.Tensor, weight: QuantisedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = testing.poisoned(x.shape[0], weight.shape[0], x.dtype, "cpu")
    isa.linear(x, weight, bias, out)
    return out


def rounds(isa, weight: QuantisedWeight, m: int) -> bool:
    return not isa.emulated and KERNEL.rounds_weights(Problem(m, weight.geometry, torch.device("cpu")))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("fmt", all_formats((16, 48, 64, None)), ids=str)
def test_unit_activations_give_the_weight_rounded_once(isa, fmt: Format, dtype: torch.dtype) -> None:
    k = {1: 67, 16: 144, 48: 144}.get(fmt.k_multiple, 192)
    for float_zeros in (False, True) if fmt.has_zeros else (False,):
        weight = testing.random_weight(fmt, 40, k, dtype, seed=3, tables=3, float_zeros=float_zeros)
        dense = reference.dequantise(weight)
        weight = weight.to_layout(KERNEL.layout)
        assert torch.equal(isa.dequantise(weight), dense)
        unit = torch.eye(k, dtype=dtype)
        assert torch.equal(multiply(isa, unit, weight), dense.T)
        for m in (1, 2, 3, 5, 8):
            assert torch.equal(multiply(isa, unit[7 : 7 + m].contiguous(), weight), dense[:, 7 : 7 + m].T), m


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("bits", range(1, 9))
def test_one_row_of_many_blocks(isa, bits: int, dtype: torch.dtype) -> None:
    """Enough blocks, and k, for the paths that only pay on larger weights; several tables; an odd last block."""
    cases = (
        (f"lut{bits}_g64", 1, 1152),
        (f"lut{bits}_g64", 3, 1152),
        (f"uint{bits}_g128", 1, 1152),
        (f"lut{bits}_chan", 2, 1111),
    )
    for fmt, tables, k in cases:
        weight = testing.random_weight(parse(fmt), 797, k, dtype, seed=bits, tables=tables)
        dense = reference.dequantise(weight)
        weight = weight.to_layout(KERNEL.layout)
        x = torch.randn(1, k, generator=torch.Generator().manual_seed(bits)).to(dtype)
        wrong = testing.check_product(isa.linear, x, weight, None, False)
        assert wrong is None, f"{isa} {fmt}: {wrong}"
        for column in range(0, k, 37):
            unit = torch.zeros(1, k, dtype=dtype)
            unit[0, column] = 1
            assert torch.equal(multiply(isa, unit, weight)[0], dense[:, column]), f"{isa} {fmt}: column {column}"


@pytest.mark.parametrize("m", [9, 12, 13, 20, 23, 33, 45, 128, 129, 200, 385, 513, 520])
@pytest.mark.parametrize(
    "name", ["lut4_g64", "lut3_g16", "uint4_g32", "lut7_g64", "int8_chan", "lut8_g64", "lut5_g48", "uint1_g48"]
)
def test_every_cut_of_many_rows(isa, name: str, m: int) -> None:
    """Tiles of several widths, several chunks of rows, several stretches of k, ranges that end inside a batch."""
    if isa.name == "generic" and m > 385:
        m = 130  # the same cuts in less time
    k = 240 if name.endswith("g48") else 192 if m > 45 else 2112
    weight = testing.random_weight(parse(name), 150, k, tables=3, seed=m).to_layout(KERNEL.layout)
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).bfloat16()
    bias = torch.randn(150, generator=generator).bfloat16()
    wrong = testing.check_product(isa.linear, x, weight, bias, rounds(isa, weight, m))
    assert wrong is None, f"{isa}: {wrong}"


@pytest.mark.parametrize("name", ["lut4_g64", "uint8_g128", "lut3_g16"])
def test_many_rows_multiply_the_weight_rounded_once(isa, name: str) -> None:
    """Above 128 rows what is multiplied is what `dequantise` returns, within the bound of a product of that weight."""
    if isa.name != "avx512bf16":
        pytest.skip(f"{isa} never rounds weights")
    weight = testing.random_weight(parse(name), 64, 256, tables=2, seed=5).to_layout(KERNEL.layout)
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert not rounds(isa, weight, 128)
    assert rounds(isa, weight, 129)
    dense = x.double() @ reference.dequantise(weight).double().T
    assert torch.equal(multiply(isa, x[:129], weight), multiply(isa, x, weight)[:129])
    error = (multiply(isa, x, weight).double() - dense).abs()
    assert (error <= testing.dense_bound(x, reference.dequantise(weight).double(), dense, torch.bfloat16)).all()


def random_case(seed: int) -> tuple[QuantisedWeight, torch.Tensor, torch.Tensor | None, str]:
    rng = random.Random(seed)
    fmt = rng.choice(all_formats((rng.choice((None, 16, 32, 48, 64, 80, 128, 256)),)))
    m = rng.choice((1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 25, 97, 130, 260))
    # One row of many blocks has a path of its own.
    n = rng.randint(256, 900) if m == 1 and rng.random() < 0.5 else rng.randint(1, 90)
    k = fmt.k_multiple * rng.randint(1, 600 if fmt.k_multiple == 1 else 6)
    dtype = rng.choice(DTYPES)
    weight = testing.random_weight(fmt, n, k, dtype, seed, tables=rng.randint(1, 4), float_zeros=rng.random() < 0.5)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if rng.random() < 0.5 else None
    return weight.to_layout(KERNEL.layout), x, bias, f"random_case({seed}): {fmt} n={n} k={k} m={m} {dtype}"


@pytest.mark.emulated
def test_random_cases_stay_within_the_bound(isa) -> None:
    cases = FUZZ_CASES or (30 if isa.emulated else 400)
    for seed in range(cases):
        weight, x, bias, name = random_case(seed)
        wrong = testing.check_product(isa.linear, x, weight, bias, rounds(isa, weight, x.shape[0]))
        assert wrong is None, f"{isa} {name}: {wrong}"


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("fmt", ["lut4_g64", "lut1_g64", "lut8_chan", "int3_g48", "lut5_g16"])
def test_not_a_number_stays_in_its_row_and_infinity_is_not_lost(isa, fmt: str, dtype: torch.dtype) -> None:
    """k is padded inside the layout; 0 times infinity must not turn the padding into NaN."""
    k = 144 if fmt == "int3_g48" else 192 if fmt != "lut8_chan" else 77
    weight = testing.random_weight(parse(fmt), 150, k, dtype, seed=4)
    dense = reference.dequantise(weight).float()
    weight = weight.to_layout(KERNEL.layout)
    for m in (1, 3, 12):
        x = torch.zeros(m, k, dtype=dtype)
        x[0, k - 1] = float("inf")
        got = multiply(isa, x, weight)
        expected = (x.float()[0, k - 1] * dense[:, k - 1]).to(dtype)
        assert torch.equal(got[0], expected) or (dense[:, k - 1] == 0).any()
        assert (got[1:] == 0).all()
        x[0, k - 1] = float("nan")
        got = multiply(isa, x, weight)
        assert got[0].isnan().all()
        assert (got[1:] == 0).all()


def test_the_result_does_not_depend_on_threads(isa) -> None:
    before = torch.get_num_threads()
    try:
        for fmt in ("lut4_g64", "lut1_g64", "lut7_g64", "uint2_g32"):
            weight = testing.random_weight(parse(fmt), 1000, 1024, seed=1).to_layout(KERNEL.layout)
            for m in (1, 4, 20, 100):
                x = torch.randn(m, 1024, generator=torch.Generator().manual_seed(m)).bfloat16()
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(multiply(isa, x, weight))
                assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), (fmt, m)
    finally:
        torch.set_num_threads(before)


@pytest.mark.emulated
def test_subnormal_table_entries_are_not_flushed(isa) -> None:
    weight = testing.random_weight(parse("lut2_g64"), 32, 64)
    weight.parts["table"][0] = torch.tensor([0.0, 2.0**-130, -(2.0**-131), 1.0])
    weight.parts["scales"].fill_(2.0**20)
    dense = reference.dequantise(weight)
    assert torch.equal(multiply(isa, torch.eye(64).bfloat16(), weight.to_layout(KERNEL.layout)), dense.T)


def test_sparse_zeros_may_be_larger_than_codes(isa) -> None:
    """A zero is any byte; few bits of it are taken off where codes are looked up."""
    generator = torch.Generator().manual_seed(5)
    weight = testing.random_weight(parse("uint4_g64_sp16of32"), 70, 256, seed=5)
    zeros = weight.parts["zeros"]
    some = torch.rand(zeros.shape, generator=generator) < 0.2
    zeros[some] = torch.randint(0, 256, zeros.shape, generator=generator, dtype=torch.uint8)[some]
    zeros[:, 1] = 16
    dense = reference.dequantise(weight)
    weight = weight.to_layout(KERNEL.layout)
    assert torch.equal(isa.dequantise(weight), dense)
    for m in (1, 2, 5, 8, 9, 20):
        unit = torch.eye(256).bfloat16()[60 : 60 + m].contiguous()
        assert torch.equal(multiply(isa, unit, weight), dense[:, 60 : 60 + m].T), m
        x = torch.randn(m, 256, generator=generator).bfloat16()
        wrong = testing.check_product(isa.linear, x, weight, None, False)
        assert wrong is None, f"{isa} m={m}: {wrong}"


def test_probes_read_and_multiply(isa) -> None:
    if isa.emulated:
        pytest.skip("a probe under emulation says nothing")
    loaded = library.library()
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    loaded.read(memory.data_ptr(), memory.numel(), 1)
    assert all(loaded.multiply(dtype, 10, 1) > 0 for dtype in range(3))


def test_unknown_instruction_sets_are_refused() -> None:
    loaded = library.library()
    if loaded is None:
        pytest.skip(library.why_not())
    with pytest.raises(UnsupportedError, match="sse9.*generic, avx2"):
        loaded.use("sse9")
