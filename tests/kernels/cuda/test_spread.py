"""16:32 sparse integers by way of dense codes: the codes themselves, products, and waiting for them."""

import pytest
import torch

from conftest import WITHOUT_EMULATOR
from emulate import SCHEDULES, EmulationError, device, emulated
from fdk import reference, testing
from fdk.formats import parse
from fdk.kernels.cuda import KERNEL, _routes, decode_config, jit, prefill, prefill_choice, spread
from fdk.packing.bits import pack_codes, unpack_codes
from fdk.packing.fragments import block_counts
from fdk.packing.sparse import spread_kept, unpack_mask
from fdk.weight import QuantisedWeight

DENSE = {"int4_g64_sp16of32": "int4_g64", "int4_g128_sp16of32": "int4_g128", "int4_chan_sp16of32": "int4_chan"}
CASES = [("int4_g64_sp16of32", 200, 320), ("int4_g128_sp16of32", 130, 1152), ("int4_chan_sp16of32", 65, 96)]


def plan_of(weight: QuantisedWeight, m: int, sms: int = 4) -> spread.Plan:
    shape = decode_config.shape_of(weight.geometry, None)
    config = spread.choose(shape, m, block_counts(weight.geometry), sms)
    return spread.Plan(weight, config)


def with_codes_of_all(weight: QuantisedWeight) -> QuantisedWeight:
    """The dense weight of the same values."""
    k = weight.shape[1]
    keep = unpack_mask(weight.parts["mask"], k)
    codes = spread_kept(unpack_codes(weight.parts["codes"], 4, k // 2), keep).masked_fill(~keep, 8)
    parts = {"codes": pack_codes(codes, 4), "scales": weight.parts["scales"]}
    return QuantisedWeight.from_parts(parse(DENSE[str(weight.format)]), k, parts)


@pytest.mark.parametrize("name,n,k", CASES)
def test_codes_are_those_of_the_dense_weight(where: str, name: str, n: int, k: int) -> None:
    weight = testing.random_weight(parse(name), n, k, device=where, seed=n)
    dense = with_codes_of_all(weight)
    assert torch.equal(reference.dequantise(dense), reference.dequantise(weight))
    packed = dense.to_layout("fragments")
    packed.parts["codes"] = plan_of(weight.to_layout("fragments"), 300).spread().view_as(packed.parts["codes"])
    assert torch.equal(packed.to_layout("canonical").parts["codes"], dense.parts["codes"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("m", [9, 40, 300])
@pytest.mark.parametrize("name,n,k", CASES)
def test_products(where: str, name: str, n: int, k: int, m: int, dtype: torch.dtype) -> None:
    weight = testing.random_weight(parse(name), n, k, dtype, device=where, seed=m).to_layout("fragments")
    plan = plan_of(weight, m)
    generator = torch.Generator().manual_seed(m)
    x, bias = (torch.randn(*size, generator=generator).to(dtype).to(where) for size in ((m, k), (n,)))
    run = lambda x, _, bias, out: plan(x, bias, out)  # noqa: E731
    assert testing.check_product(run, x, weight, bias, plan.product.config.rounds) is None
    columns = torch.randperm(k, generator=generator)[:m]
    out = testing.poisoned(len(columns), n, dtype, where)
    plan(testing.one_hot_probe(k, columns, dtype, where), None, out)
    assert torch.equal(out, reference.dequantise(weight)[:, columns].T)


@pytest.mark.parametrize("m", [40, 300])
def test_without_memory_for_codes_dense_weights_take_over(where: str, m: int, monkeypatch) -> None:
    weight = testing.random_weight(parse("int4_g64_sp16of32"), 130, 256, device=where).to_layout("fragments")
    possible = _routes(weight.geometry, None, m, weight.device)
    assert {route.name for route in possible} == {"decode", "spread", "dense"}
    order = sorted(possible, key=lambda route: ("spread", "dense", "decode").index(route.name))
    call = KERNEL._bind(weight, m, tuple(order))

    def exhausted() -> None:
        raise torch.cuda.OutOfMemoryError("none left")

    monkeypatch.setattr(call.call, "spread", exhausted)
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(m)).bfloat16().to(where)
    run = lambda x, _, bias, out: call(x, bias, out)  # noqa: E731
    assert testing.check_product(run, x, weight, None, True) is None


def test_only_where_a_code_stands_for_a_dropped_weight() -> None:
    for kind, served in (
        (decode_config.SPARSE_INT, True),
        (decode_config.SPARSE_TABLE, False),
        (decode_config.INT, False),
    ):
        shape = decode_config.Shape(8192, 8192, 3, 64, True, kind)
        config = spread.choose(shape, 2048, (128,), 132)
        assert (config is not None) == served and (config is None or config.fresh)


def test_the_codes_of_a_plan_that_has_its_own_are_never_fresh() -> None:
    shape = decode_config.Shape(8192, 8192, 4, 64, True, decode_config.INT)
    assert not any(prefill_choice.choose(shape, m, (128,), 132).fresh for m in (16, 64, 256, 2048, 8192))


@pytest.mark.skipif(WITHOUT_EMULATOR is not None, reason=WITHOUT_EMULATOR or "")
def test_codes_that_are_not_waited_for_are_noticed(monkeypatch) -> None:
    texts = jit.sources()
    file = "prefill_producer.cuh"
    monkeypatch.setitem(texts, file, texts[file].replace("run_units<FRESH>(", "run_units<false>("))

    def fails(schedule) -> bool:
        with emulated(schedule=schedule):
            weight = testing.random_weight(parse("int4_g64_sp16of32"), 130, 256).to_layout("fragments")
            try:
                plan_of(weight, 40)(torch.zeros(40, 256).bfloat16(), None, torch.empty(40, 130).bfloat16())
            except EmulationError:
                return True
        return False

    monkeypatch.setattr(device, "_kernel", device._kernel.__wrapped__)
    assert any(map(fails, SCHEDULES))


def test_it_compiles_without_spills(compiled) -> None:
    (result,) = compiled([spread.source((9, 0))])
    # Three CTAs of 256 threads on a multiprocessor.
    assert result.spilled == 0 and result.registers <= 80
    shapes = [
        decode_config.Shape(n, k, 3, 64, True, decode_config.SPARSE_INT) for n, k in ((8192, 8192), (20480, 5120))
    ]
    sources = [
        prefill.source(spread.dense_shape(shape), spread.choose(shape, m, (shape.n // 64,), 132), (9, 0))
        for shape in shapes
        for m in (16, 64, 256, 2048)
    ]
    assert all(found.spilled == 0 for found in compiled(sources))
