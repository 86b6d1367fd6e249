"""Wilson intervals and exact McNemar for right-or-wrong counts, the bootstrap for everything else."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Interval = tuple[float, float]

# Two-sided 95 % of the normal distribution, as every table of the project quotes it.
Z95 = 1.96
DRAWS = 10_000


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
    statistic: Callable[[Tensor], Tensor],
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
    samples = samples.double().cpu()
    count = samples.shape[0]
    if count == 0:
        raise ValueError("bootstrap: no samples; expected at least one row")
    if count == 1:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (draws, count), generator=generator)
    times = torch.zeros(draws, count, dtype=torch.double).scatter_add_(
        1, picks, torch.ones((), dtype=torch.double).expand_as(picks)
    )
    values = statistic(times @ samples)
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high


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
