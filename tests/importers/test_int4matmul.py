"""int4matmul's packed tensors against its golden vectors, its exponent modes, and its function."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fdk
from fdk import reference, testing
from fdk.compat import quant_matmul
from fdk.importers.int4matmul import from_int4matmul, to_int4matmul
from fdk.packing import unpack_codes

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "int4matmul.safetensors")
CASES = ("int2", "int3", "int4", "int4_16_32")


def case(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in GOLDEN.items() if key.startswith(f"{name}.")}


def imported(name: str, **options):
    golden = case(name)
    bits = int(name[3])
    return from_int4matmul(
        bits, golden["qweight"], golden["scales"], golden["zeros"], golden.get("sparse_mask"), **options
    )


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_source(name: str) -> None:
    golden, weight = case(name), imported(name)
    suffix = "_sp16of32" if "sparse_mask" in golden else ""
    assert str(weight.format) == f"uint{name[3]}_g64{suffix}" and weight.parts["zeros"].dtype == torch.uint8
    assert torch.equal(reference.dequantise(weight, torch.float32), golden["dequantised"])


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_source(name: str) -> None:
    golden, weight = case(name), imported(name)
    assert torch.equal(testing.exact(golden["x"], weight), golden["y_fp64"])
    outs = torch.full((1, 4, 192), float("nan")).half()
    arguments = golden["scales"], golden["zeros"], 64, golden.get("sparse_mask")
    returned = quant_matmul(int(name[3]), outs, golden["qweight"], golden["x"][None], *arguments)
    assert returned is outs
    bound = testing.error_bound(golden["x"], weight, golden["y_fp64"], torch.float16)
    assert testing.violation(outs[0], golden["y_fp64"], bound) is None


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_come_back(name: str) -> None:
    golden, packed = case(name), to_int4matmul(imported(name))
    names = {"qweight": "qweight", "scales": "scales", "zeros": "zeros", "mask": "sparse_mask"}
    assert set(packed) == {ours for ours, theirs in names.items() if theirs in golden}
    assert all(torch.equal(packed[ours], golden[names[ours]]) for ours in packed)


def test_fractional_zeros_stay_fractional() -> None:
    golden = case("int4")
    zeros = golden["zeros"] + 0.5
    weight = from_int4matmul(4, golden["qweight"], golden["scales"], zeros)
    assert weight.parts["zeros"].dtype == torch.float16
    shift = 0.5 * golden["scales"].T.float().repeat_interleave(64, 1)
    got = reference.dequantise(weight, torch.float64)
    assert torch.equal(got, golden["dequantised"].double() - shift.double())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("mode", ["exponent", "dynamic"])
def test_exponent_modes_are_exact_tables(bits: int, mode: str) -> None:
    golden = case(f"int{bits}")
    codes = unpack_codes(imported(f"int{bits}").parts["codes"], bits, 256).int()
    scales, zeros = golden["scales"].clone(), golden["zeros"].clone()
    if mode == "dynamic":
        scales[::2] *= -1
    negative = scales < 0 if mode == "dynamic" else torch.ones_like(scales, dtype=torch.bool)
    zeros[negative] = 0
    weight = from_int4matmul(bits, golden["qweight"], scales, zeros, mode=mode)
    e, sign = codes % (1 << (bits - 1)), 1 - 2 * (codes >> (bits - 1))
    step = scales.abs().T.double().repeat_interleave(64, 1)
    by_power = sign * 2.0 ** e.double() * step
    linear = (codes - zeros.T.double().repeat_interleave(64, 1)) * step
    expected = torch.where(negative.T.repeat_interleave(64, 1), by_power, linear)
    assert torch.equal(reference.dequantise(weight, torch.float64), expected)
    assert weight.format.kind.name == "lut" and weight.format.bits == (
        bits if mode == "exponent" else weight.format.bits
    )
    x = golden["x"]
    bound = testing.error_bound(x, weight, x.double() @ expected.T, x.dtype)
    assert testing.violation(fdk.linear(x, weight), x.double() @ expected.T, bound) is None


def test_sparse_exponents_have_four_bits() -> None:
    golden = case("int4_16_32")
    arguments = golden["qweight"], golden["scales"], torch.zeros_like(golden["zeros"]), golden["sparse_mask"]
    assert str(from_int4matmul(4, *arguments, mode="exponent").format) == "lut4_g64_sp16of32"
    with pytest.raises(fdk.UnsupportedError, match="does not import the dynamic mode with a mask"):
        from_int4matmul(4, *arguments, mode="dynamic")


def test_the_function_notices_new_contents() -> None:
    golden = case("int4")
    matrix, scales, x = golden["qweight"].clone(), golden["scales"].clone(), golden["x"][None]

    def product():
        outs = torch.empty(1, 4, 192).half()
        return quant_matmul(4, outs, matrix, x, scales, golden["zeros"], 64)

    first = product()
    assert torch.equal(product(), first)
    scales *= 2
    assert torch.equal(product(), 2 * first)
    matrix.zero_()
    assert not torch.equal(product(), 2 * first)


def test_what_does_not_fit_is_refused_by_name() -> None:
    golden = case("int4")
    qweight, scales, zeros = golden["qweight"], golden["scales"], golden["zeros"]
    for arguments, message in (
        ((5, qweight, scales, zeros), "proj: int4matmul has 2, 3 and 4 bits, not 5"),
        ((4, qweight.long(), scales, zeros), "proj: qweight must be int32"),
        ((4, qweight[:31], scales, zeros), "proj: qweight has 31 rows"),
        ((4, qweight, scales[:, :5], zeros), r"proj: scales must be \[K/group, 192\] with K = 256"),
        ((4, qweight, scales, zeros[:2]), "proj: zeros must be"),
        ((4, qweight, scales, zeros, torch.zeros(3, 192, dtype=torch.int32)), r"proj: mask must be int32 \[16, 192\]"),
        ((3, case("int3")["qweight"], scales, zeros, qweight), "16:32 sparsity at 4 bits only, not 3"),
        ((4, qweight, scales, zeros, None, "log"), "proj: unknown mode 'log'"),
    ):
        with pytest.raises(fdk.FormatError, match=message):
            from_int4matmul(*arguments, name="proj")
    with pytest.raises(fdk.UnsupportedError, match=r"proj: zeros\[\d, \d\] = .* is added to powers of two"):
        from_int4matmul(4, qweight, scales, zeros, mode="exponent", name="proj")
    with pytest.raises(fdk.UnsupportedError, match="dynamic mode with fractional zeros has no table"):
        from_int4matmul(4, qweight, scales.abs(), zeros + 0.5, mode="dynamic", name="proj")
    sparse = case("int4_16_32")
    broken = sparse["sparse_mask"].clone()
    broken[1, 7] ^= 1
    with pytest.raises(fdk.FormatError, match=r"keeps 1[57] of the 32 weights of row 7, columns 32 to 63"):
        from_int4matmul(4, sparse["qweight"], sparse["scales"], sparse["zeros"], broken)
    with pytest.raises(fdk.FormatError, match="has no form in int4matmul"):
        to_int4matmul(testing.random_weight(fdk.parse("int4_g64"), 32, 64, torch.float16))
    outs = torch.empty(1, 4, 192).half()
    with pytest.raises(fdk.FormatError, match="group_size = 128, but scales .* have groups of 64"):
        quant_matmul(4, outs, qweight, golden["x"][None], scales, zeros, 128)
    with pytest.raises(fdk.FormatError, match=r"outs is \[1, 4, 192\], but x \[2, 256\] gives \[2, 192\]"):
        quant_matmul(4, outs, qweight, golden["x"][:2], scales, zeros, 64)
