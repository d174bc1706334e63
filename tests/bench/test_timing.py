"""Percentiles, ratios, blocks and plans, with a clock that is told what to say."""

import pytest

from fdk.bench import timing


@pytest.mark.parametrize(
    "values, q, expected",
    [([5.0], 20, 5.0), ([1, 2, 3, 4, 5], 50, 3), ([5, 1, 4, 2, 3], 20, 1.8), ([1, 2], 80, 1.8), ([1, 2, 3, 4], 100, 4)],
)
def test_percentile_interpolates(values, q, expected):
    assert timing.percentile(values, q) == pytest.approx(expected)


def test_percentile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        timing.percentile([], 50)


def test_times():
    found = timing.Times.of([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (found.mean, found.p20, found.p50, found.p80) == pytest.approx((4.0, 1.8, 3.0, 5.2))


def test_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians():
    # The machine is slow in two rounds for both: 2 x in each round, though the medians alone would say 1.5.
    assert timing.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 4.0]) == pytest.approx(2.0)


def test_ratio_leaves_out_rounds_that_only_one_took_part_in():
    assert timing.ratio([2.0, 4.0], [1.0, 1.0, 100.0]) == pytest.approx(3.0)


class FakeClock:
    """A clock that calls move by hand, in nanoseconds."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


def test_a_block_divides_by_its_calls_and_goes_on_counting():
    clock, seen = FakeClock(), []

    def call(i):
        seen.append(i)
        clock.now += 1000 * (i + 1)

    block = timing.CpuBlock(call, inner=2, clock=clock)
    assert block() == pytest.approx(1.5e-6)
    assert block() == pytest.approx(3.5e-6)
    assert seen == [0, 1, 2, 3]


def test_rounds_interleave_and_start_with_another_block_each_time():
    order = []
    blocks = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    times = timing.rounds(blocks, {"a": 3, "b": 3, "c": 2})
    assert "".join(order) == "abc" + "bca" + "ab"
    assert times == {"a": [1.0, 6.0, 7.0], "b": [2.0, 4.0, 8.0], "c": [3.0, 5.0]}


def test_no_round_begins_when_it_is_late_but_a_few_are_always_taken():
    times = timing.rounds({"a": lambda: 1.0}, {"a": 50}, late=lambda: True)
    assert len(times["a"]) == timing.FEWEST_SLOW_ROUNDS


def test_drift_cancels_in_ratios():
    clock = FakeClock()
    slowness = iter([1, 1, 3, 3, 9, 9])

    def call(cost):
        def inner(i):
            clock.now += cost * next(slowness)

        return inner

    blocks = {"slow": timing.CpuBlock(call(200), 1, clock), "fast": timing.CpuBlock(call(100), 1, clock)}
    times = timing.rounds(blocks, {"slow": 3, "fast": 3})
    assert max(times["fast"]) == pytest.approx(9 * min(times["fast"]))
    assert timing.ratio(times["slow"], times["fast"]) == pytest.approx(2.0)


def test_plan_fills_blocks_and_keeps_the_budget():
    plan = timing.plan({"short": 150e-6, "long": 30e-3, "slow": 1.0}, budget=0.9)
    assert plan.inner == {"short": 100, "long": 1, "slow": 1}
    # A round of the fast ones takes 15 ms + 30 ms, so 20 of them fit.
    assert plan.outer == {"short": 20, "long": 20, "slow": timing.FEWEST_SLOW_ROUNDS}


def test_plan_has_a_least_number_of_rounds_and_takes_what_is_given():
    assert timing.plan({"a": 0.1}, budget=0.1).outer == {"a": timing.FEWEST_ROUNDS}
    assert timing.plan({"a": 1e-6}, budget=1e9).outer == {"a": timing.MOST_ROUNDS}
    plan = timing.plan({"a": 0.1, "b": 9.0}, 1.0, inner=3, outer=4)
    assert (plan.inner, plan.outer) == ({"a": 3, "b": 3}, {"a": 4, "b": 4})
