"""The knapsack against brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.knapsack import Choice, Option, front, pareto, solve

OPTIONS = st.builds(
    Option, st.integers(0, 6), st.integers(0, 8).map(lambda n: n / 4), st.integers(0, 2)
)  # quarters add up exactly, and often tie
PLACES = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=4)


def every(places, budget, most):
    for picks in itertools.product(*(range(len(options)) for options in places)):
        chosen = [places[i][pick] for i, pick in enumerate(picks)]
        cost, count = sum(o.cost for o in chosen), sum(o.count for o in chosen)
        if (budget is None or cost <= budget) and (most is None or count <= most):
            yield Choice(picks, cost, sum(o.loss for o in chosen), count)


@settings(max_examples=150, deadline=None)
@given(PLACES, st.none() | st.integers(0, 20), st.none() | st.integers(0, 5), st.integers(1, 4))
def test_the_best_choices_are_those_of_brute_force(places, budget, most, best):
    allowed = list(every(places, budget, most))
    found = solve(places, budget, most=most, best=best)
    assert [c.loss for c in found] == sorted(c.loss for c in allowed)[:best]
    assert len({c.picks for c in found}) == len(found)
    assert all(c in allowed for c in found)


@settings(max_examples=100, deadline=None)
@given(PLACES, st.none() | st.integers(0, 20), st.none() | st.integers(0, 5))
def test_the_curve_has_the_least_loss_of_every_cost(places, budget, most):
    allowed = list(every(places, budget, most))
    curve = pareto(places, budget, most=most)
    assert all(c in allowed for c in curve)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(curve))
    for cost in {c.cost for c in allowed}:
        least = min(c.loss for c in allowed if c.cost <= cost)
        assert min(c.loss for c in curve if c.cost <= cost) == least


def test_large_bytes_are_exact_and_many_places_quick():
    places = [
        [Option(10**12 + 7 * n * (i + 1), 1.0 / (n + 1 + i), n % 2) for n in range(8)] for i in range(12)
    ]
    budget = 12 * 10**12 + 400
    (found,) = solve(places, budget, most=8)
    assert 0 <= budget - found.cost < 7 * 12
    assert found.count <= 8


def test_nothing_fits():
    assert solve([[Option(3, 0.0)], [Option(2, 1.0)]], 4) == []
    with pytest.raises(ValueError, match="empty"):
        solve([[]])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(PLACES, min_size=1, max_size=2),
    st.none() | st.integers(0, 20),
    st.none() | st.integers(0, 5),
    st.integers(1, 3),
)
def test_places_that_are_problems_themselves_are_solved_by_their_fronts(groups, budget, most, best):
    outer = [
        [Option(c.cost, c.loss, c.count) for c in front(places, counted=most is not None, best=best)]
        for places in groups
    ]
    found = solve(outer, budget, most=most, best=best)
    flat = solve([options for places in groups for options in places], budget, most=most, best=best)
    assert [c.loss for c in found] == [c.loss for c in flat]
