"""The fit, against scipy's and against series with a slope that is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tests.soak.slopes import slope


def test_one_series_is_fitted_as_by_scipy() -> None:
    rng = np.random.default_rng(3)
    x = np.arange(20.0)
    y = 5 + 0.3 * x + rng.normal(size=20)
    ours, theirs = slope([(x.tolist(), y.tolist())]), stats.linregress(x, y)
    assert ours is not None and ours.points == 20
    half = stats.t.ppf(0.975, 18) * theirs.stderr
    assert [ours.value, ours.low, ours.high] == pytest.approx([theirs.slope, theirs.slope - half, theirs.slope + half])
    assert ours.level == pytest.approx(y[-5:].mean())


def test_processes_have_levels_of_their_own() -> None:
    """Each grows by 2 per unit from another level and at another time: pooled without levels the slope would fall."""
    groups = [([0.0, 1.0, 2.0], [50.0, 52.0, 54.0]), ([10.0, 11.0, 12.0], [10.0, 12.0, 14.0])]
    fit = slope(groups)
    assert fit is not None and (fit.value, fit.low, fit.high) == pytest.approx((2.0, 2.0, 2.0))
    dummies = np.array([[x, i == 0, i == 1] for i, (xs, _) in enumerate(groups) for x in xs], float)
    solved = np.linalg.lstsq(dummies, np.array([y for _, ys in groups for y in ys]), rcond=None)[0]
    assert fit.value == pytest.approx(solved[0])


def test_what_grows_with_something_else_is_told_apart() -> None:
    """As a regression on both, by least squares; with noise the interval is that of the two regressors."""
    rng = np.random.default_rng(5)
    x, z = np.arange(30.0), np.minimum(np.arange(30.0) // 3, 7.0)
    y = 2 + 0.5 * x + 3 * z + 0.1 * rng.normal(size=30)
    fit = slope([(x.tolist(), y.tolist())], beside=z.tolist())
    design = np.stack([np.ones(30), x, z], axis=1)
    solved, residual = np.linalg.lstsq(design, y)[:2]
    error = np.sqrt(residual[0] / 27 * np.linalg.inv(design.T @ design)[1, 1])
    assert fit is not None and fit.value == pytest.approx(solved[1])
    assert fit.half == pytest.approx(stats.t.ppf(0.975, 27) * error)


def test_means_widen_the_interval_of_samples_that_are_alike() -> None:
    """A walk that goes nowhere has samples that follow each other: fitted singly, they seem to show a slope."""
    rng, found = np.random.default_rng(0), {1: 0, 25: 0}
    for _ in range(200):
        noise = rng.normal(size=400)
        y = np.zeros(400)
        for i in range(1, 400):
            y[i] = 0.9 * y[i - 1] + noise[i]
        for block in found:
            fit = slope([(list(range(400)), y.tolist())], block)
            assert fit is not None
            found[block] += not fit.low <= 0 <= fit.high
    assert found[1] > 80 and found[25] < 30  # of 200, 5 % would be 10


def test_too_little_or_too_short_is_said() -> None:
    assert slope([]) is None and slope([([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])]) is None
    assert slope([([1.0] * 9, [2.0] * 9)]) is None  # no step was done
    flat = slope([(list(range(9)), [7.0] * 9)])
    assert flat is not None and (flat.value, flat.half, flat.level) == (0.0, 0.0, 7.0)
