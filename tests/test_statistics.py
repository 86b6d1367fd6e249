"""Intervals against reference values."""

import math

import pytest
import torch

from linearize.evaluate.statistics import bootstrap, mcnemar, wilson


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
