"""Dequantised weights and products by way of them; how a weight is cut into parts, anywhere."""

from itertools import pairwise

import pytest
import torch

import fdk
from fdk import reference, testing
from fdk.formats import parse
from fdk.kernels.cuda import KERNEL, _routes, _warn_of_scratch, dense

SHAPES = [(200, 1152, 3), (64, 64, 1), (130, 4112, 2), (1, 240, 1), (777, 704, 4)]


def weight_of(where: str, name: str, n: int, k: int, **more):
    return testing.random_weight(parse(name), n, k, device=where, **more).to_layout("fragments")


@pytest.mark.parametrize("total", [1, 5, 64, 1000])
@pytest.mark.parametrize("most", [0, 1, 7, 64, 5000])
def test_parts_are_adjacent_and_small(total: int, most: int) -> None:
    parts = list(dense.parts_of((total - total // 2, total // 2), most))
    assert parts[0][0] == 0 and parts[-1][1] == total
    assert all(first[1] == second[0] for first, second in pairwise(parts))
    assert all(0 < end - start <= max(1, most) for start, end in parts)


@pytest.mark.parametrize("group", ["g16", "g32", "g48", "g64", "g128", "chan"])
@pytest.mark.parametrize("kind", ["lut", "int", "uint", "uint float"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_value_is_the_references(where: str, bits: int, kind: str, group: str) -> None:
    size = 1 if group == "chan" else int(group[1:])
    for dtype in (torch.bfloat16, torch.float16) if where != "cpu" or size == 48 else (torch.bfloat16,):
        for n, k, tables in SHAPES:
            if k % size == 0:
                name = f"{kind.split()[0]}{bits}_{group}"
                weight = weight_of(where, name, n, k, dtype=dtype, tables=tables, seed=n, float_zeros="float" in kind)
                assert torch.equal(dense.Plan(weight).dense(), reference.dequantise(weight)), (n, k, dtype)


@pytest.mark.gpu
def test_dequantise_and_the_gradient_take_this_path(monkeypatch) -> None:
    weight = testing.random_weight(parse("lut3_g64"), 300, 256, device="cuda:0")
    expected = reference.dequantise(weight)
    x = torch.randn(5, 256, device="cuda:0").bfloat16().requires_grad_()
    out = fdk.linear(x, weight)
    monkeypatch.setattr(reference, "dequantise", None)
    assert weight.layout == "fragments" and torch.equal(fdk.dequantise(weight), expected)
    grad = torch.randn(out.shape, device="cuda:0").bfloat16()
    out.backward(grad)
    exact = grad.double() @ expected.double()
    bound = testing.dense_bound(grad, expected.double().T, exact, grad.dtype, True)
    assert testing.violation(x.grad, exact, bound) is None


@pytest.mark.parametrize("scratch", [dense.SCRATCH_BYTES, 200 * 1024, 1])
def test_products_and_gradients_by_parts(where: str, scratch: int) -> None:
    for name, n, k in (("lut4_g64", 777, 704), ("uint3_g16", 330, 4112), ("int8_chan", 65, 129)):
        weight = weight_of(where, name, n, k, tables=3)
        plan = dense.Plan(weight)
        for m in (1, 3, 200):
            generator = torch.Generator().manual_seed(m)
            x, bias = (torch.randn(*size, generator=generator).bfloat16().to(where) for size in ((m, k), (n,)))
            for b in (None, bias):
                out = testing.poisoned(m, n, x.dtype, where)
                plan(x, b, out, scratch)
                exact = testing.exact(x, weight, b)
                bound = testing.error_bound(x, weight, exact, x.dtype, True)
                assert testing.violation(out, exact, bound) is None, (name, m)
            grad = torch.randn(m, n, generator=generator).bfloat16().to(where)
            values = reference.dequantise(weight, torch.float64)
            exact = grad.double() @ values
            bound = testing.dense_bound(grad, values.T, exact, grad.dtype, True)
            assert testing.violation(plan.grad(grad, scratch), exact, bound) is None, (name, m)


def test_without_memory_for_scratch_it_decodes_and_warns_once(where: str, monkeypatch) -> None:
    weight = weight_of(where, "lut4_g64", 512, 1024)
    x = torch.randn(130, 1024, generator=torch.Generator().manual_seed(130)).bfloat16().to(where)
    possible = _routes(weight.geometry, None, 130, weight.device)
    dense_first = tuple(sorted(possible, key=lambda route: (route.name != "dense", route.name != "decode")))
    call = KERNEL._bind(weight, 130, dense_first)

    def exhausted(*_):
        raise torch.cuda.OutOfMemoryError("none left")

    monkeypatch.setattr(KERNEL.dense_plan(weight), "dequantise", exhausted)
    _warn_of_scratch.cache_clear()
    out = testing.poisoned(130, 512, torch.bfloat16, where)
    with pytest.warns(RuntimeWarning, match="no memory is left") as warned:
        for _ in range(2):
            call(x, None, out)
    assert len(warned) == 1
    exact = testing.exact(x, weight)
    assert testing.violation(out, exact, testing.error_bound(x, weight, exact, x.dtype)) is None
