"""The best of several options for each item within a budget: the multiple-choice knapsack problem, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

MOST_STATES = 1 << 16


@dataclass(frozen=True)
class Allocation:
    """One option for each item: `chosen` indices, their total `error` and `cost`.

    bound  no choice within the budget has less error than this.
    exact  whether `error` is the least possible; otherwise it is at most error - bound too large.
    """

    chosen: tuple[int, ...]
    error: float
    cost: int
    bound: float
    exact: bool


def allocate(
    costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int, most_states: int = MOST_STATES
) -> Allocation | None:
    """The options, one for each item, of least total error whose costs sum to `budget` at most; None if none fits.

    A dynamic programme over the items keeps, of all choices so far, those that no other one beats in both cost and
    error, and that may still end below the greedy solution: what remains is bounded from below by the linear
    relaxation, whose solution is the steepest steps along the items' lower convex hulls. That is exact. Should more
    than `most_states` remain, they are thinned out evenly by cost, and the result is held to the relaxation's bound.
    """
    costs = [np.asarray(c, dtype=np.int64) for c in costs]
    errors = [np.asarray(e, dtype=np.float64) for e in errors]
    cheapest = np.array([c.min() for c in costs], dtype=np.int64)
    if cheapest.sum() > budget:
        return None
    relaxed = _Relaxation(costs, errors)
    least = relaxed.bound(0, np.array([budget]))[0]
    best = _greedy(costs, errors, budget)
    # Sums of the same errors in another order differ by rounding; a state is dropped only well above the best.
    limit = best.error + 1e-9 * abs(best.error)
    rest = np.concatenate([np.cumsum(cheapest[::-1])[::-1][1:], [0]])
    cost, error = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    exact = True
    for item in range(len(costs)):
        options = len(costs[item])
        next_cost = (cost[:, None] + costs[item]).ravel()
        next_error = (error[:, None] + errors[item]).ravel()
        open_ = np.flatnonzero(next_cost + rest[item] <= budget)
        hope = next_error[open_] + relaxed.bound(item + 1, budget - next_cost[open_])
        open_ = open_[hope <= limit]
        open_ = open_[np.lexsort((next_error[open_], next_cost[open_]))]
        lowest = np.minimum.accumulate(next_error[open_])
        open_ = open_[np.concatenate([[True], next_error[open_][1:] < lowest[:-1]])[: len(open_)]]
        if len(open_) > most_states:
            open_ = open_[np.linspace(0, len(open_) - 1, most_states).round().astype(np.int64)]
            exact = False
        if not len(open_):
            # Thinning has lost every state that could reach the greedy solution.
            return replace(best, bound=least, exact=False)
        cost, error = next_cost[open_], next_error[open_]
        steps.append((open_ // options, open_ % options))
    state = int(error.argmin())
    chosen = []
    for parent, option in reversed(steps):
        chosen.append(int(option[state]))
        state = int(parent[state])
    chosen.reverse()
    found = _total(costs, errors, chosen)
    if best.error < found.error:
        found = best
    return replace(found, bound=found.error if exact else min(least, found.error), exact=exact)


def _total(costs: list[np.ndarray], errors: list[np.ndarray], chosen: Sequence[int]) -> Allocation:
    error = float(sum(e[i] for e, i in zip(errors, chosen, strict=True)))
    return Allocation(tuple(chosen), error, int(sum(c[i] for c, i in zip(costs, chosen, strict=True))), error, False)


def _hull(cost: np.ndarray, error: np.ndarray) -> list[int]:
    """Options on the lower convex hull of (cost, error), from the cheapest to the one of least error."""
    order = np.lexsort((error, cost))
    kept: list[int] = []
    for i in order:
        if kept and error[i] >= error[kept[-1]]:
            continue
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (error[b] - error[a]) * (cost[i] - cost[a]) < (error[i] - error[a]) * (cost[b] - cost[a]):
                break
            kept.pop()
        kept.append(int(i))
    return kept


class _Relaxation:
    """Least total error of the items from `first` on if options may be mixed: a convex function of the cost."""

    def __init__(self, costs: list[np.ndarray], errors: list[np.ndarray]) -> None:
        self._curves: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(1), np.zeros(1))]
        runs, rises = np.empty(0), np.empty(0)
        start_cost, start_error = 0.0, 0.0
        for cost, error in zip(reversed(costs), reversed(errors), strict=True):
            hull = _hull(cost, error)
            start_cost, start_error = start_cost + cost[hull[0]], start_error + error[hull[0]]
            runs = np.concatenate([runs, np.diff(cost[hull])])
            rises = np.concatenate([rises, np.diff(error[hull])])
            order = np.argsort(rises / runs, kind="stable")
            runs, rises = runs[order], rises[order]
            xs = start_cost + np.concatenate([[0.0], np.cumsum(runs)])
            self._curves.append((xs, start_error + np.concatenate([[0.0], np.cumsum(rises)])))
        self._curves.reverse()

    def bound(self, first: int, budgets: np.ndarray) -> np.ndarray:
        """Lower bounds of the total error within each of `budgets`, which the cheapest options fit."""
        return np.interp(budgets, *self._curves[first])


def _greedy(costs: list[np.ndarray], errors: list[np.ndarray], budget: int) -> Allocation:
    """From the cheapest options up the steepest steps of the hulls, as long as they fit."""
    hulls = [_hull(c, e) for c, e in zip(costs, errors, strict=True)]
    steps = []
    for item, hull in enumerate(hulls):
        for place, (a, b) in enumerate(pairwise(hull)):
            slope = (errors[item][b] - errors[item][a]) / (costs[item][b] - costs[item][a])
            steps.append((slope, item, place))
    spent = sum(int(costs[item][hull[0]]) for item, hull in enumerate(hulls))
    at = [0] * len(hulls)
    for _, item, place in sorted(steps):
        hull = hulls[item]
        extra = int(costs[item][hull[place + 1]] - costs[item][hull[place]])
        if at[item] == place and spent + extra <= budget:
            at[item], spent = place + 1, spent + extra
    return _total(costs, errors, [hull[i] for hull, i in zip(hulls, at, strict=True)])
