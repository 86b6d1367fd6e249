"""Intervals and paired tests: Wilson, bootstrap over blocks, exact McNemar, Holm, non-inferiority, retention."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Interval = tuple[float, float]
Statistic = Callable[[Tensor], Tensor]

# Two-sided 95 % of the normal distribution, as every table of the project quotes it.
Z95 = 1.96
DRAWS = 10_000
MARGIN = -0.02
"""The loss, in shares of right answers, up to which a student still counts as having kept a task: two points."""


def wilson(correct: int, samples: int, z: float = Z95) -> Interval:
    """Interval of a success rate (Wilson 1927): sensible at 0 and 1, where the normal one has no width.

    No samples say nothing: (0, 1).
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"wilson: {correct} correct of {samples} samples; expected 0 <= correct <= samples")
    if samples == 0:
        return 0.0, 1.0
    rate, spread = correct / samples, z * z / samples
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / samples + spread / (4 * samples)) / (1 + spread)
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == samples else centre + half
    return low, high


def bootstrap(
    samples: Tensor,
    statistic: Statistic,
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of column totals, drawing rows of `samples` [N, C] with replacement.

    `statistic` takes the totals of every draw at once, [draws, C] -> [draws]. Quantities that belong to one
    sample stand in one row and are drawn together: a difference of two columns is the *paired* bootstrap.
    One row says nothing of its spread: (nan, nan).
    """
    return bootstrap_all(samples, {"": statistic}, draws=draws, level=level, seed=seed)[""]


def bootstrap_all(
    samples: Tensor,
    statistics: Mapping[str, Statistic],
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """The intervals of several statistics of the same rows, from the same draws."""
    samples = samples.double().cpu()
    count = samples.shape[0]
    if count == 0:
        raise ValueError("bootstrap: no samples; expected at least one row")
    if count == 1:
        return dict.fromkeys(statistics, (math.nan, math.nan))
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (draws, count), generator=generator)
    times = torch.zeros(draws, count, dtype=torch.double).scatter_add_(
        1, picks, torch.ones((), dtype=torch.double).expand_as(picks)
    )
    totals = times @ samples
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.double)
    found = {}
    for name, statistic in statistics.items():
        low, high = torch.quantile(statistic(totals), ends).tolist()
        found[name] = low, high
    return found


def by_block(samples: Tensor, blocks: Sequence[int]) -> Tensor:
    """Rows [N, C] added up to one row per block, in order of first appearance: the block bootstrap draws these.

    Rows of one document are alike, and drawing them one by one would make an interval too narrow. Blocks differ in
    size, so a mean must carry its own count as a column.
    """
    if len(blocks) != samples.shape[0]:
        raise ValueError(
            f"by_block: {len(blocks)} block names for {samples.shape[0]} rows; give one for each row"
        )
    place = {block: index for index, block in enumerate(dict.fromkeys(blocks))}
    index = torch.tensor([place[block] for block in blocks], dtype=torch.long)
    return torch.zeros(len(place), samples.shape[1], dtype=torch.double).index_add_(
        0, index, samples.double().cpu()
    )


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p that two models differ, from the prompts that only the one or only the other answered."""
    tail = sum(math.comb(wins + losses, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated between neighbours."""
    if not values:
        raise ValueError("quartiles: no values; expected at least one")
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)
    low, middle, high = torch.quantile(torch.tensor(values, dtype=torch.double), points).tolist()
    return low, middle, high


def holm(values: Sequence[float]) -> list[float]:
    """p-values of one claim's tests, adjusted for their number (Holm 1979), in the order given.

    An adjusted value below 0.05 may be called significant beside all the others.
    """
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"holm: {value} is no p-value; expected 0 to 1")
    adjusted = [0.0] * len(values)
    reached = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        reached = max(reached, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = reached
    return adjusted


@dataclass(frozen=True)
class Paired:
    """Two models on the same samples: how often the first scored higher, the same, lower; the mean difference.

    `p` is the exact sign test of wins against losses, which is McNemar's for right-or-wrong scores. `low` and `high`
    bound the mean difference (95 %).
    """

    wins: int
    ties: int
    losses: int
    p: float
    difference: float
    low: float
    high: float

    @property
    def samples(self) -> int:
        return self.wins + self.ties + self.losses

    def non_inferior(self, margin: float = MARGIN) -> bool:
        """Whether the first is shown to be at most `-margin` worse. A large `p` alone shows no such thing."""
        return self.low > margin


def paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Paired:
    """Scores of two models on the same samples, in the same order, set against each other.

    The interval of the difference is Newcombe's where every score is 0 or 1, and the paired bootstrap's elsewhere.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired: {len(first)} and {len(second)} scores; expected as many of each, and some")
    wins, losses = (
        sum(a > b for a, b in zip(x, y, strict=True)) for x, y in ((first, second), (second, first))
    )
    ties = len(first) - wins - losses
    mean = math.fsum(a - b for a, b in zip(first, second, strict=True)) / len(first)
    if {*first, *second} <= {0, 1}:
        both = sum(a == b == 1 for a, b in zip(first, second, strict=True))
        low, high = newcombe(both, wins, losses, ties - both)
    else:
        rows = torch.tensor([first, second], dtype=torch.double).T
        low, high = bootstrap(rows, lambda totals: (totals[:, 0] - totals[:, 1]) / len(first), seed=seed)
    return Paired(wins, ties, losses, mcnemar(wins, losses), mean, low, high)


def newcombe(both: int, first: int, second: int, neither: int, z: float = Z95) -> Interval:
    """Interval of the difference of two paired success rates (Newcombe 1998, Stat. Med. 17:2635, method 10).

    The counts are samples that both models, only the first, only the second, neither answered. It has a width where
    the two agree on everything, and where the bootstrap has none.
    """
    samples = both + first + second + neither
    a, b = (both + first) / samples, (both + second) / samples
    (low_a, high_a), (low_b, high_b) = wilson(both + first, samples, z), wilson(both + second, samples, z)
    phi = _correlation(both, first, second, neither)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return a - b - reach(a - low_a, high_b - b), a - b + reach(high_a - a, b - low_b)


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """Newcombe's phi, with its continuity correction; 0 where a margin is empty."""
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if margins == 0:
        return 0.0
    product, samples = both * neither - first * second, both + first + second + neither
    corrected = max(product - samples / 2, 0.0) if product > 0 else product
    return corrected / math.sqrt(margins)


@dataclass(frozen=True)
class Retention:
    """What share of the teacher's score the student has: as it is, and of what lies above chance."""

    raw: float | None
    """None where the teacher scores nothing."""
    corrected: float | None
    """(student - chance) / (teacher - chance); None without a known chance, or where the teacher is not above it."""


def retention(student: float, teacher: float, chance: float | None, teacher_low: float) -> Retention:
    """`teacher_low` is the lower bound of the teacher's own interval.

    At or below chance it leaves nothing that could have been kept, and the corrected ratio would divide noise by noise.
    """
    raw = student / teacher if teacher > 0 else None
    if chance is None or not teacher_low > chance:
        return Retention(raw, None)
    return Retention(raw, (student - chance) / (teacher - chance))
