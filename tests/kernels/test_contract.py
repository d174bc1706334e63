"""One suite over every kernel in the table, every format and every layout: registering one puts it under this."""

from __future__ import annotations

import pytest
import torch

from fdk import kernels, reference, testing
from fdk.formats import all_formats, parse
from fdk.packing import layout, layouts
from fdk.weight import QuantisedWeight, concat

GROUPS = (16, 48, 64, None)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# It compiles for seconds at every format and shape; tests/kernels/test_compiled.py holds it to the same checks.
NAMES = [name for name in kernels.names() if name != "torch.compile"]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def supported(name: str, weight: QuantisedWeight, m: int) -> tuple[kernels.Kernel, kernels.Problem]:
    """The kernel and the problem, or a skip with the kernel's own reason."""
    kernel = kernels.kernel(name)
    problem = kernels.Problem(m, weight.geometry, weight.device)
    if reason := kernels.reason_against(kernel, problem):
        pytest.skip(f"{name}: {reason}")
    return kernel, problem


def inputs(m: int, k: int, dtype: torch.dtype, device: str, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", all_formats(GROUPS), ids=str)
@pytest.mark.parametrize("layout_name", [entry.name for entry in layouts()])
def test_layout_has_an_exact_inverse(layout_name: str, fmt, device: str) -> None:
    if device not in layout(layout_name).devices:
        pytest.skip(f"{layout_name} lies on {' or '.join(layout(layout_name).devices)}")
    for n, k in ((1, 192), (37, 192), (64, 384), (0, 192), (200, 1152)):
        for dtype in DTYPES:
            weight = testing.random_weight(fmt, n, k, dtype, seed=n, device=device, tables=min(3, max(1, n)))
            if reason := layout(layout_name).supports(weight.geometry):
                pytest.skip(reason)
            again = weight.to_layout(layout_name).canonical()
            assert again.parts.keys() == weight.parts.keys()
            for name, part in weight.parts.items():
                assert torch.equal(again.parts[name], part), (name, n, k, dtype)


@pytest.mark.parametrize("fmt", all_formats((None,)), ids=str)
@pytest.mark.parametrize("layout_name", [entry.name for entry in layouts()])
def test_layout_holds_odd_k(layout_name: str, fmt) -> None:
    for n, k in ((1, 1), (5, 7), (33, 101), (16, 0)):
        k *= fmt.k_multiple
        weight = testing.random_weight(fmt, n, k, seed=k)
        if reason := layout(layout_name).supports(weight.geometry):
            pytest.skip(reason)
        again = weight.to_layout(layout_name).canonical()
        for name, part in weight.parts.items():
            assert torch.equal(again.parts[name], part), (name, n, k)


@pytest.mark.parametrize("layout_name", [entry.name for entry in layouts()])
@pytest.mark.parametrize("fmt", all_formats((64,)), ids=str)
def test_layout_packs_on_the_meta_device(layout_name: str, fmt) -> None:
    real = testing.random_weight(fmt, 40, 128)
    if reason := layout(layout_name).supports(real.geometry):
        pytest.skip(reason)
    meta = QuantisedWeight(real.geometry, {name: part.to("meta") for name, part in real.parts.items()})
    packed, expected = meta.to_layout(layout_name), real.to_layout(layout_name)
    assert {k: (v.shape, v.dtype) for k, v in packed.parts.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.parts.items()
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("fmt", all_formats(GROUPS), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_hot_probe_is_exact(name: str, fmt, dtype: torch.dtype, device: str) -> None:
    n, k = 40, 192
    weight = testing.random_weight(fmt, n, k, dtype, seed=3, device=device, tables=3)
    dense = reference.dequantise(weight)
    for m in (1, 5, 16, 192):
        kernel, _ = supported(name, weight, m)
        columns = torch.arange(k) if m == k else torch.randperm(k, generator=torch.Generator().manual_seed(m))[:m]
        x = testing.one_hot_probe(k, columns, dtype, device)
        out = testing.poisoned(m, n, dtype, device)
        kernel.linear(x, weight.to_layout(kernel.layout), None, out)
        assert torch.equal(out, dense[:, columns.to(device)].T), f"{name} {fmt} {dtype} m={m}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("fmt", all_formats((16, 64, None)), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dense_product_is_within_the_bound_and_repeatable(name: str, fmt, dtype: torch.dtype, device: str) -> None:
    shapes = ((1, 33, 320, False), (3, 64, 320, True), (8, 17, 320, True), (70, 48, 128, False), (140, 48, 128, True))
    for m, n, k, with_bias in shapes:
        k = -(-k // fmt.k_multiple) * fmt.k_multiple
        weight = testing.random_weight(fmt, n, k, dtype, seed=m, device=device, tables=2)
        kernel, problem = supported(name, weight, m)
        x = inputs(m, k, dtype, device)
        bias = inputs(1, n, dtype, device, seed=2)[0] if with_bias else None
        laid_out = weight.to_layout(kernel.layout)
        wrong = testing.check_product(kernel.linear, x, laid_out, bias, kernel.rounds_weights(problem))
        assert wrong is None, f"{name} {fmt} {dtype} m={m} n={n} k={k}: {wrong}"
        first, second = (testing.poisoned(m, n, dtype, device) for _ in range(2))
        kernel.linear(x, laid_out, bias, first)
        kernel.linear(x, laid_out, bias, second)
        assert torch.equal(first, second), f"{name} {fmt} {dtype} m={m}: two runs differ"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["scale", "code", "row"])
def test_the_bound_catches_small_faults(name: str, fault: str) -> None:
    """The check can fail: a 10 % error in one scale, one wrong code, one zeroed row must leave the bound."""
    weight = testing.random_weight(parse("lut4_g64"), 48, 256, seed=9)
    kernel, problem = supported(name, weight, 4)
    parts = {key: part.clone() for key, part in weight.parts.items()}
    if fault == "scale":
        parts["scales"][5, 1] *= 1.1
    elif fault == "code":
        parts["codes"][5, 7] ^= 0x0F
    else:
        parts["scales"][5] = 0
    broken = QuantisedWeight(weight.geometry, parts).to_layout(kernel.layout)
    x = inputs(4, 256, torch.bfloat16, "cpu")

    def faulty(x, _, bias, out):
        kernel.linear(x, broken, bias, out)

    assert testing.check_product(faulty, x, weight, None, kernel.rounds_weights(problem)) is not None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_integers_multiply_exactly(name: str, device: str) -> None:
    """Integer weights, scales of one and small integer activations leave no room for rounding."""
    generator = torch.Generator().manual_seed(0)
    for bits in (1, 2, 3, 4, 8):
        fmt = parse(f"int{bits}_g64")
        weight = testing.random_weight(fmt, 50, 256, torch.float32, seed=bits, device=device)
        weight.parts["scales"].fill_(1)
        weight = weight.to(dtype=torch.float32)
        for m in (1, 2, 8, 20):
            kernel, _ = supported(name, weight, m)
            x = torch.randint(-4, 5, (m, 256), generator=generator).float().to(device)
            out = testing.poisoned(m, 50, torch.float32, device)
            kernel.linear(x, weight.to_layout(kernel.layout), None, out)
            assert torch.equal(out.double(), testing.exact(x, weight)), (bits, m)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=short)
@pytest.mark.parametrize("float_zeros", (False, True), ids=("integer zeros", "fractional zeros"))
def test_zero_points_multiply_exactly(name: str, float_zeros: bool, dtype: torch.dtype, device: str) -> None:
    """Zeros that are multiples of a half leave no room for rounding sums either: batches to 20, groups from 16.

    A weight may need a bit more than its dtype has (8 bits less a half); kernels that say so round it once.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (20, 192), generator=generator).to(dtype).to(device)
    for fmt in all_formats((16, 32, 64, None)):
        if not fmt.has_zeros or fmt.bits not in (2, 3, 4, 8):
            continue
        weight = testing.random_weight(fmt, 33, 192, dtype, seed=fmt.bits, device=device, float_zeros=float_zeros)
        parts = {**weight.parts, "scales": torch.ones_like(weight.parts["scales"])}
        if float_zeros:
            parts["zeros"] = (2 * parts["zeros"]).round() / 2
        weight = QuantisedWeight.from_parts(fmt, 192, parts)
        kernel, _ = supported(name, weight, 1)
        laid_out = weight.to_layout(kernel.layout)
        rounded = x.double() @ reference.dequantise(weight).double().T
        expected = {False: testing.exact(x, weight).to(dtype), True: rounded.to(dtype)}
        for m in range(1, 21):
            rounds = kernel.rounds_weights(kernels.Problem(m, weight.geometry, weight.device))
            out = testing.poisoned(m, 33, dtype, device)
            kernel.linear(x[:m], laid_out, None, out)
            assert torch.equal(out, expected[rounds][:m]), (fmt, m)


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_use_the_table_of_their_rows(name: str) -> None:
    weights = [testing.random_weight(parse("lut3_g32"), n, 96, seed=n) for n in (24, 7, 33)]
    merged = concat(weights)
    kernel, _ = supported(name, merged, 3)
    x = inputs(3, 96, torch.bfloat16, "cpu")
    out = testing.poisoned(3, 64, torch.bfloat16, "cpu")
    kernel.linear(x, merged.to_layout(kernel.layout), None, out)
    alone = []
    for weight in weights:
        alone.append(testing.poisoned(3, weight.shape[0], torch.bfloat16, "cpu"))
        kernel.linear(x, weight.to_layout(kernel.layout), None, alone[-1])
    assert torch.equal(out, torch.cat(alone, 1))
