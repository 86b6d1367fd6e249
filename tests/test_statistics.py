"""Intervals against reference values."""

import math

import pytest
import torch

from linearize.evaluate.statistics import (
    bootstrap,
    bootstrap_all,
    by_block,
    holm,
    mcnemar,
    newcombe,
    paired,
    retention,
    wilson,
)


@pytest.mark.parametrize(("samples", "low"), [(50, 0.929), (100, 0.963), (500, 0.992)])
def test_wilson_of_all_correct(samples, low):
    assert wilson(samples, samples) == (pytest.approx(low, abs=5e-4), 1.0)
    assert wilson(0, samples) == (0.0, pytest.approx(1 - low, abs=5e-4))


@pytest.mark.parametrize(("correct", "samples"), [(46, 50), (88, 100)])
def test_wilson_gate_of_080(correct, samples):
    assert wilson(correct, samples)[0] >= 0.80 > wilson(correct - 1, samples)[0]


def test_wilson_solves_its_own_equation():
    low, high = wilson(7, 40)
    for bound in (low, high):
        assert abs(7 / 40 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 40), abs=1e-12)


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match="5 correct of 4"):
        wilson(5, 4)


def test_bootstrap_of_a_mean_matches_the_normal_interval():
    samples = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    low, high = bootstrap(samples, lambda totals: totals[:, 0] / 400)
    half = 1.96 * samples.std(correction=0).item() / 20
    mean = samples.mean().item()
    assert (low, high) == (
        pytest.approx(mean - half, abs=0.1 * half),
        pytest.approx(mean + half, abs=0.1 * half),
    )


def test_bootstrap_is_a_function_of_its_seed():
    samples = torch.arange(20.0)[:, None]
    first, again, other = (bootstrap(samples, lambda t: t[:, 0], seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_pairing_removes_what_samples_share():
    shared = 100 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    pairs = torch.stack([shared + 1, shared], 1)
    low, high = bootstrap(pairs, lambda totals: (totals[:, 0] - totals[:, 1]) / 50)
    assert (low, high) == (pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4))


@pytest.mark.parametrize(("wins", "losses", "p"), [(6, 0, 0.03125), (0, 5, 0.0625), (0, 0, 1), (3, 3, 1)])
def test_mcnemar_is_exact(wins, losses, p):
    assert mcnemar(wins, losses) == p


def test_one_sample_has_no_interval():
    assert all(map(math.isnan, bootstrap(torch.ones(1, 1), lambda t: t[:, 0])))


def test_misuse_is_named():
    with pytest.raises(ValueError, match="no samples"):
        bootstrap(torch.zeros(0, 1), lambda t: t[:, 0])


@pytest.mark.parametrize(("correct", "samples"), [(0, 1), (1, 7), (7, 40), (199, 200), (50, 50)])
def test_wilson_is_scipys(correct, samples):
    from scipy.stats import binomtest, norm

    level = 2 * norm.cdf(1.96) - 1
    theirs = binomtest(correct, samples).proportion_ci(level, method="wilson")
    assert wilson(correct, samples) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(6, 0), (3, 11), (40, 25), (1, 1)])
def test_mcnemar_is_scipys_sign_test(wins, losses):
    from scipy.stats import binomtest

    assert mcnemar(wins, losses) == pytest.approx(binomtest(wins, wins + losses).pvalue, abs=1e-12)


def test_bootstrap_is_scipys_within_its_noise():
    from scipy.stats import bootstrap as theirs

    samples = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.double) ** 3
    ours = bootstrap(samples[:, None], lambda totals: totals[:, 0] / 60)
    found = theirs((samples.numpy(),), lambda x, axis: x.mean(axis=axis), method="percentile", rng=0)
    assert ours == pytest.approx(tuple(found.confidence_interval), abs=4e-3)


def test_several_statistics_share_their_draws():
    samples = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    both = bootstrap_all(samples, {"a": lambda t: t[:, 0], "b": lambda t: t[:, 1] / t[:, 0]}, seed=5)
    assert both["a"] == bootstrap(samples, lambda t: t[:, 0], seed=5)
    assert both["b"] == bootstrap(samples, lambda t: t[:, 1] / t[:, 0], seed=5)


def test_blocks_are_drawn_whole():
    values = torch.randn(12, 1, generator=torch.Generator().manual_seed(0)).repeat_interleave(10, 0)
    rows = torch.cat([values, torch.ones_like(values)], 1)

    def mean(totals):
        return totals[:, 0] / totals[:, 1]

    blocked = by_block(rows, [i // 10 for i in range(120)])
    assert torch.equal(blocked[:, 1], torch.full((12,), 10.0, dtype=torch.double))
    # Twelve documents of ten equal rows are twelve samples, not a hundred and twenty.
    assert bootstrap(blocked, mean) == pytest.approx(bootstrap(rows[::10], mean), abs=1e-6)
    narrow, wide = bootstrap(rows, mean), bootstrap(blocked, mean)
    assert wide[1] - wide[0] > 2.5 * (narrow[1] - narrow[0])
    with pytest.raises(ValueError, match="3 block names for 120 rows"):
        by_block(rows, [0, 1, 2])


@pytest.mark.parametrize("values", [[0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.9], [0.5], [], [0.0, 1.0]])
def test_holm_rejects_what_the_stepwise_rule_rejects(values):
    adjusted = holm(values)
    for level in (0.01, 0.02, 0.05, 0.1, 0.5, 0.999):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
            if values[index] > level / (len(values) - rank):
                break
            rejected.add(index)
        assert {i for i, value in enumerate(adjusted) if value <= level + 1e-12} == rejected


def test_holm_of_a_known_family():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with pytest.raises(ValueError, match="no p-value"):
        holm([math.nan])


def test_pairs_are_counted():
    found = paired([1, 1, 0, 1, 0], [1, 0, 1, 0, 0])
    assert (found.wins, found.ties, found.losses, found.samples) == (2, 2, 1, 5)
    assert found.difference == pytest.approx(0.2)
    assert found.p == 1
    assert found.low < 0 < found.high
    shares = paired([0.5, 1.0, 0.75], [0.25, 1.0, 1.0])
    assert (shares.wins, shares.ties, shares.losses) == (1, 1, 1)
    assert shares.low < shares.difference == 0 < shares.high
    with pytest.raises(ValueError, match="2 and 1 scores"):
        paired([1, 0], [1])


def test_the_paired_interval_covers_the_truth_in_nineteen_of_twenty():
    """Exactly, over every table that 24 pairs can make."""
    from scipy.stats import multinomial

    n = 24
    tables = [
        (a, b, c, n - a - b - c) for a in range(n + 1) for b in range(n + 1 - a) for c in range(n + 1 - a - b)
    ]
    ends = torch.tensor([newcombe(*table) for table in tables])
    for shares in [
        (0.5, 0.2, 0.1, 0.2),
        (0.7, 0.05, 0.15, 0.1),
        (0.9, 0.03, 0.03, 0.04),
        (0.25, 0.25, 0.25, 0.25),
    ]:
        weight = torch.tensor(multinomial(n, shares).pmf(tables))
        truth = shares[1] - shares[2]
        inside = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
        assert weight[inside].sum() > 0.93


def test_equal_scores_of_few_samples_are_not_shown_to_be_kept():
    few, many = (paired([1.0] * n, [1.0] * n) for n in (50, 400))
    assert few.difference == many.difference == 0
    assert not few.non_inferior()
    assert many.non_inferior()
    assert few.non_inferior(margin=-0.10)
    worse = paired([1.0] * 380 + [0.0] * 20, [1.0] * 400)
    assert not worse.non_inferior()


@pytest.mark.parametrize(
    ("student", "teacher", "chance", "raw", "corrected"),
    [(52.8, 66.6, 25, 0.793, 0.668), (43.4, 65.3, 25, 0.665, 0.457), (0.5, 0.8, None, 0.625, None)],
)
def test_retention_is_raw_and_above_chance(student, teacher, chance, raw, corrected):
    found = retention(student, teacher, chance, teacher_low=teacher * 0.95)
    assert found.raw == pytest.approx(raw, abs=1e-3)
    assert found.corrected == (None if corrected is None else pytest.approx(corrected, abs=1e-3))


def test_retention_is_silent_where_the_teacher_knows_nothing():
    assert retention(0.3, 0.27, 0.25, teacher_low=wilson(27, 100)[0]).corrected is None
    assert retention(0.0, 0.0, 0.0, teacher_low=0.0).raw is None
