"""The multiple-choice knapsack, solved exactly: one option for every place, least loss under a cost and a second count.

Dynamic programming over places with merging by dominance: a partial choice is dropped when as many others as are
wanted are no worse in cost, count and loss alike, for whatever completes it completes them too. Costs and counts are
whole numbers, compared exactly; only losses are floating point. (Nemhauser and Ullmann, Management Science 15, 1969,
for the list of undominated states; Pisinger, EJOR 83, 1995, for classes of options.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

AT_ONCE = 1 << 20
"""Partial choices that are compared at one time; bounds memory."""


@dataclass(frozen=True)
class Option:
    """What a place may get."""

    cost: int
    loss: float
    count: int = 0
    """Added up like the cost, and bounded by ``most``; such as prompts that are lost."""


@dataclass(frozen=True)
class Choice:
    """An option's number for every place, and their sums."""

    picks: tuple[int, ...]
    cost: int
    loss: float
    count: int


def solve(
    places: Sequence[Sequence[Option]], budget: int | None = None, *, most: int | None = None, best: int = 1
) -> list[Choice]:
    """The ``best`` choices of least loss, the least first, whose cost is at most ``budget`` and count at most ``most``.

    Fewer where there are fewer; none where nothing fits. Equal losses: the smaller cost first.
    """
    found = _states(places, budget, most, best)
    found.sort(key=lambda c: (c.loss, c.cost, c.count, c.picks))
    return found[:best]


def pareto(
    places: Sequence[Sequence[Option]], budget: int | None = None, *, most: int | None = None
) -> list[Choice]:
    """The curve: every choice that no cheaper one equals in loss, by rising cost and falling loss."""
    curve: list[Choice] = []
    for choice in sorted(_states(places, budget, most, 1), key=lambda c: (c.cost, c.loss, c.count)):
        if not curve or choice.loss < curve[-1].loss:
            curve.append(choice)
    return curve


def front(places: Sequence[Sequence[Option]], *, counted: bool, best: int = 1) -> list[Choice]:
    """Every choice that may be part of one of the ``best`` of a larger problem: those that fewer than ``best`` others
    equal or better in cost, loss and, where it is ``counted``, count."""
    most = sum(max(o.count for o in options) for options in places) if counted else None
    return _states(places, None, most, best)


class _States(NamedTuple):
    """Partial choices; how each goes back to the one that it extends."""

    cost: np.ndarray
    loss: np.ndarray
    count: np.ndarray
    parent: np.ndarray
    pick: np.ndarray

    def of(self, index: np.ndarray) -> "_States":
        return _States(*(x[index] for x in self))


def _states(
    places: Sequence[Sequence[Option]], budget: int | None, most: int | None, best: int
) -> list[Choice]:
    rest_cost = _least_of_rest([[o.cost for o in options] for options in places])
    rest_count = _least_of_rest([[o.count for o in options] for options in places])
    none = np.zeros(1, dtype=np.int64)
    states, trail = _States(none, np.zeros(1), none, none, none), []
    for index, options in enumerate(places):
        step = max(1, AT_ONCE // max(1, len(states.cost)))
        made = states.of(none[:0])
        for start in range(0, len(options), step):
            new = _extended(states, options[start : start + step], start, counted=most is not None)
            fits = np.ones(len(new.cost), dtype=bool)
            if budget is not None:
                fits &= new.cost + rest_cost[index + 1] <= budget
            if most is not None:
                fits &= new.count + rest_count[index + 1] <= most
            pool = _States(*(np.concatenate(pair) for pair in zip(made, new.of(fits), strict=True)))
            made = pool.of(_undominated(pool, best))
        states = made
        trail.append((states.parent, states.pick))
    at, picks = np.arange(len(states.cost)), []
    for parent, pick in reversed(trail):
        picks.append(pick[at])
        at = parent[at]
    rows = np.array(picks[::-1], dtype=np.int64).reshape(len(places), -1).T.tolist()
    return [
        Choice(tuple(row), int(cost), float(loss), sum(places[i][pick].count for i, pick in enumerate(row)))
        for row, cost, loss in zip(rows, states.cost, states.loss, strict=True)
    ]


def _extended(states: _States, options: Sequence[Option], first: int, *, counted: bool) -> _States:
    """Every state with every option; ``first`` is the number of the first one."""
    old, new = np.repeat(np.arange(len(states.cost)), len(options)), len(states.cost)
    cost, loss, count = (
        np.tile(np.array([getattr(o, name) for o in options], dtype=kind), new)
        for name, kind in (("cost", np.int64), ("loss", float), ("count", np.int64))
    )
    # Without a bound nobody asks for the count, and it must not keep states apart.
    return _States(
        states.cost[old] + cost,
        states.loss[old] + loss,
        states.count[old] + count if counted else 0 * count,
        old,
        np.tile(np.arange(first, first + len(options)), new),
    )


def _undominated(made: _States, best: int) -> np.ndarray:
    """Indices of those that fewer than ``best`` others dominate, by cost; of equal ones the first stay."""
    order = np.lexsort((made.count, made.loss, made.cost))
    loss, count = made.loss[order], made.count[order]
    kept = np.zeros(len(order), dtype=bool)
    for level in np.unique(count):
        # All that come before are no dearer: the ``best``-th least loss among those that lose no more of the count.
        among = np.flatnonzero(count <= level)
        kept[among] |= (count[among] == level) & (loss[among] < _running(loss[among], best))
    return order[kept]


def _running(values: np.ndarray, rank: int) -> np.ndarray:
    """The ``rank``-th least of the values before each one; infinite where there are fewer."""
    least = values
    for _ in range(rank):
        # A value takes the place of the least so far, or goes on to the next rank; so does whoever is displaced.
        before = np.concatenate(([np.inf], np.minimum.accumulate(values)[:-1]))
        least, values = before, np.maximum(values, before)
    return least


def _least_of_rest(values: list[list[int]]) -> list[int]:
    """[places + 1] the least that the places from each one on must cost."""
    found = [0]
    for options in reversed(values):
        found.append(found[-1] + min(options))
    return found[::-1]
