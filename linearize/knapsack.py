"""The multiple-choice knapsack, solved exactly: one option for every place, least loss under a cost and a second count.

Dynamic programming over places with merging by dominance: a partial choice is dropped when as many others as are
wanted are no worse in cost, count and loss alike, for whatever completes it completes them too. Costs and counts are
whole numbers, compared exactly; only losses are floating point. (Nemhauser and Ullmann, Management Science 15, 1969,
for the list of undominated states; Pisinger, EJOR 83, 1995, for classes of options.)
"""

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass


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


def _states(
    places: Sequence[Sequence[Option]], budget: int | None, most: int | None, best: int
) -> list[Choice]:
    rest_cost = _least_of_rest([[o.cost for o in options] for options in places])
    rest_count = _least_of_rest([[o.count for o in options] for options in places])
    states = [Choice((), 0, 0.0, 0)]
    for index, options in enumerate(places):
        made = [
            Choice(
                (*state.picks, pick),
                state.cost + option.cost,
                state.loss + option.loss,
                # Without a bound nobody asks for the count, and it must not keep states apart.
                state.count + option.count if most is not None else 0,
            )
            for state in states
            for pick, option in enumerate(options)
        ]
        made = [
            c
            for c in made
            if (budget is None or c.cost + rest_cost[index + 1] <= budget)
            and (most is None or c.count + rest_count[index + 1] <= most)
        ]
        states = _undominated(made, best)
    if most is None:
        states = [
            Choice(c.picks, c.cost, c.loss, sum(places[i][pick].count for i, pick in enumerate(c.picks)))
            for c in states
        ]
    return states


def _undominated(made: list[Choice], best: int) -> list[Choice]:
    """Those that fewer than ``best`` others dominate; of equal ones the first by its picks stay."""
    kept: list[Choice] = []
    losses: dict[int, list[float]] = {}  # count -> losses of what is kept, sorted: its costs are no higher
    for choice in sorted(made, key=lambda c: (c.cost, c.loss, c.count, c.picks)):
        better = sum(
            bisect_right(known, choice.loss) for count, known in losses.items() if count <= choice.count
        )
        if better < best:
            kept.append(choice)
            insort(losses.setdefault(choice.count, []), choice.loss)
    return kept


def _least_of_rest(values: list[list[int]]) -> list[int]:
    """[places + 1] the least that the places from each one on must cost."""
    found = [0]
    for options in reversed(values):
        found.append(found[-1] + min(options))
    return found[::-1]
