"""Nearest against its definition: argmin |x - table[i]| in float64, the lowest index among ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdk.formats import parse
from fdk.quantise import Nearest, fixed_table, uniform_table

INFINITY = torch.tensor(torch.inf)


def brute_force(x, table):
    return (x.double()[:, None] - table.double()).abs().argmin(1).to(torch.uint8)


def adversarial(table):
    """Entries, midpoints, their float32 neighbours, and random values across the range and beyond.

    Only finite x whose differences to all entries are exact in float64, in which the definition is evaluated.
    """
    values = table.double()
    middles = ((values[:, None] + values) / 2).flatten()
    special = torch.cat([values, middles, torch.tensor([0.0, -0.0])]).float()
    spread = (values.max() - values.min()).item() + 1e-3
    random = values.min() - spread / 4 + torch.rand(4096, dtype=torch.float64) * spread * 1.5
    x = torch.cat([special, special.nextafter(INFINITY), special.nextafter(-INFINITY), random.float()])
    x = x[x.isfinite()]
    return x[exact_differences(x, table)]


def exact_differences(x, table):
    """True where the rounding error of x - entry in float64 (two-sum) is zero for all entries."""
    x, entry = x.double()[:, None], table.double()
    difference = x - entry
    shift = difference - x
    return ((x - (difference - shift)) - (entry + shift) == 0).all(1)


def tables():
    generator = torch.Generator().manual_seed(1)
    for bits in range(1, 9):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield f"uniform{bits}-{dtype}", uniform_table(bits, dtype)
        random = torch.randn(1 << bits, generator=generator)
        yield f"random{bits}", random.sort().values.bfloat16()
        yield f"unsorted{bits}", random.bfloat16()
    yield "nf4", fixed_table(parse("nf4_g64"), torch.bfloat16)
    yield "fp4", fixed_table(parse("fp4_g64"), torch.bfloat16)
    yield "one value", torch.full((16,), 0.5)
    yield "repeated values", torch.tensor([1.0, -1.0, 1.0, 0.0, -1.0, 0.0, 0.25, 0.25])
    yield "too close for cells", torch.cat([torch.linspace(1.0, 1.0 + 2e-6, 15), torch.tensor([1e6])])
    yield "huge", torch.tensor([-3e38, -1e38, 1e38, 3e38])


TABLES = dict(tables())


@pytest.mark.parametrize("name", TABLES)
def test_equals_brute_force(name):
    torch.manual_seed(0)
    table = TABLES[name]
    x = adversarial(table)
    assert len(x) > 1000
    codes = Nearest(table).codes(x)
    expected = brute_force(x, table)
    wrong = (codes != expected).nonzero()
    assert not len(wrong), f"x = {x[wrong[0, 0]].item()!r}: {codes[wrong[0, 0]]}, expected {expected[wrong[0, 0]]}"


def test_all_bfloat16_inputs_on_all_uniform_tables():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = every[every.abs() < 1e6]
    for bits in range(1, 9):
        table = uniform_table(bits, torch.bfloat16)
        for part in every[exact_differences(every, table)].split(8192):
            assert torch.equal(Nearest(table).codes(part), brute_force(part, table))


def test_ties_go_to_the_lower_index_whatever_the_order_of_values():
    x = torch.tensor([0.5])
    assert Nearest(torch.tensor([0.0, 1.0])).codes(x).item() == 0
    assert Nearest(torch.tensor([1.0, 0.0])).codes(x).item() == 0


def test_one_cell_falls_back_to_bucketize():
    assert Nearest(TABLES["too close for cells"])._cells == 0
    assert Nearest(uniform_table(8))._cells > 0


@settings(deadline=None, max_examples=150)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=32), st.integers(0, 1 << 30))
def test_any_table(values, seed):
    torch.manual_seed(seed)
    table = torch.tensor(values)
    x = adversarial(table)
    assert torch.equal(Nearest(table).codes(x), brute_force(x, table))


def test_values_are_table_entries():
    table = fixed_table(parse("fp4_g64"))
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    assert torch.equal(Nearest(table).values(codes), table.view(2, 8))
