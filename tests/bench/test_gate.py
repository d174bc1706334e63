"""The gate: a wrong product is refused, a right one passes, and it agrees with fdk.testing.check_product."""

import pytest
import torch

from fdk import ops, testing
from fdk.bench import providers
from fdk.bench.gate import Gate
from fdk.bench.problems import Line
from fdk.formats import parse

N, K, M = 48, 128, 5


@pytest.fixture(scope="module")
def weight():
    return testing.random_weight(parse("lut4_g64"), N, K)


@pytest.fixture(scope="module")
def x():
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture
def gate(weight, x):
    return Gate(
        x, providers.Source(Line("fdk", "lut8", "lut4_g64", "bf16"), N, K, torch.device("cpu"), 0).exact_rows, N
    )


def right(weight):
    return lambda x, out: ops.run(x, weight, None, "reference", out)


@pytest.mark.parametrize("m", [1, 3, M])
def test_a_right_product_passes(gate, weight, m):
    assert gate.check(right(weight), m, rounds_weights=False) is None


def off_by_one_group(weight):
    def product(x, out):
        ops.run(x, weight, None, "reference", out)
        out[-1, 7] += 0.1 * out.float().std().bfloat16()
        return out

    return product


def unwritten_element(weight):
    def product(x, out):
        y = ops.run(x, weight, None, "reference")
        out[:, : N - 1] = y[:, : N - 1]
        return out

    return product


def wrong_shape(weight):
    return lambda x, out: out[:, : N - 1].zero_()


def nothing(weight):
    return lambda x, out: out


@pytest.mark.parametrize("wrong", [off_by_one_group, unwritten_element, wrong_shape, nothing])
def test_a_wrong_product_is_refused(gate, weight, wrong):
    assert gate.check(wrong(weight), M, rounds_weights=False) is not None


def test_the_gate_and_check_product_draw_the_same_line(gate, weight, x):
    y = testing.exact(x, weight)
    bound = testing.error_bound(x, weight, y, x.dtype)
    for factor, passes in ((0.0, True), (3.0, False)):
        product = lambda x, out, factor=factor: out.copy_(y + factor * bound)  # noqa: E731
        assert (gate.check(product, M, False) is None) is passes
        kernel = lambda x, w, b, out, factor=factor: out.copy_(y + factor * bound)  # noqa: E731
        assert (testing.check_product(kernel, x, weight, None, False) is None) is passes


def test_rows_are_taken_in_chunks(weight, x, monkeypatch):
    source = providers.Source(Line("fdk", "lut8", "lut4_g64", "bf16"), N, K, torch.device("cpu"), 0)
    gate = Gate(x, source.exact_rows, N)
    monkeypatch.setattr(gate, "_chunks", lambda: [slice(0, 17), slice(17, N)])
    assert gate.check(right(weight), M, False) is None
