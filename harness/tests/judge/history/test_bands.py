"""The band that a record promises: by hand, and by how often a second run lies in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from harness.judge.history.bands import Band, bounds_a_figure, holds_one, joint_factor, promised
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, Resamples

SPEC = IntervalSpec(num_resamples=1000)


def interval(estimate: float, low: float, high: float, *, num_prompts: int = 16) -> Interval:
    return Interval(estimate=estimate, low=low, high=high, level=0.95, num_prompts=num_prompts)


def test_one_figure_has_a_band_of_sqrt_2_intervals() -> None:
    """By hand: the interval reaches from 1 / 1.1 to 1.2 of the figure, each side by itself."""
    band = promised(interval(2.0, 2.0 / 1.1, 2.0 * 1.2), num_figures=1)
    assert band.low == pytest.approx(2.0 / 1.1 ** math.sqrt(2))
    assert band.high == pytest.approx(2.0 * 1.2 ** math.sqrt(2))
    assert band.holds(2.0) and band.holds(band.high) and not band.holds(band.high * 1.001)
    assert not band.holds(band.low * 0.999) and Band(0.0, 0.0).holds(0.0)


def test_many_figures_have_wider_bands_and_drift_is_added() -> None:
    """By hand: t of 15 degrees at 0.05 / 2 is 2.1314, at 0.05 / 20 is 3.2860 (tables of Student's t)."""
    assert joint_factor(0.95, num_prompts=16, num_figures=10) == pytest.approx(3.2860 / 2.1314, abs=1e-3)
    assert joint_factor(0.95, num_prompts=16, num_figures=1) == 1
    plain = promised(interval(1.0, 0.9, 1.1), num_figures=1)
    drifting = promised(interval(1.0, 0.9, 1.1), num_figures=1, drift=math.log(1.03))
    assert drifting.high == pytest.approx(1.03 * plain.high)
    assert drifting.low == pytest.approx(plain.low / 1.03)


@pytest.mark.parametrize(
    "bounds",
    [
        interval(1.0, -math.inf, math.inf, num_prompts=1),
        interval(1.0, 0.9, 1.1, num_prompts=1),
        interval(1.0, 0.0, 1.1),
        interval(1.0, 0.9, math.inf),
    ],
)
def test_a_sample_that_bounds_nothing_promises_nothing(bounds: Interval) -> None:
    assert promised(bounds, num_figures=3) == Band(0.0, math.inf) and not bounds_a_figure(bounds)
    assert bounds_a_figure(interval(1.0, 0.9, 1.1, num_prompts=2))


def test_two_prompts_promise_little_and_yet_something() -> None:
    """By hand: t of one degree at 0.05 / 2 is 12.706, at 0.05 / 4 it is 25.452 (tables of Student's t)."""
    band = promised(interval(1.0, 1 / 1.1, 1.1, num_prompts=2), num_figures=2)
    assert band.high == pytest.approx(1.1 ** (math.sqrt(2) * 25.452 / 12.706), rel=1e-4)


def test_the_same_prompts_hold_one_or_not() -> None:
    """By hand: 1.05 [1.02, 1.08] misses one; a drift of 3 % or ten figures at once excuse it."""
    ratio = interval(1.05, 1.02, 1.08)
    assert not holds_one(ratio, num_figures=1, drift=0.0)
    assert not holds_one(ratio, num_figures=1, drift=0.015)
    assert holds_one(ratio, num_figures=1, drift=0.03)
    assert holds_one(interval(1.05, 1.02, 1.08), num_figures=1000, drift=0.0)
    low = interval(0.95, 0.92, 0.98)
    assert not holds_one(low, num_figures=1, drift=0.0) and holds_one(low, num_figures=1, drift=0.03)
    assert holds_one(interval(1.0, 1.0, 1.0), num_figures=1, drift=0.0)
    assert holds_one(interval(1.05, -math.inf, math.inf), num_figures=1, drift=0.0)


@pytest.mark.parametrize("num_prompts", [8, 16])
def test_all_figures_of_a_second_run_lie_in_their_bands_together(num_prompts: int) -> None:
    """300 pairs of runs of six figures: at 5 % outside, more than 26 come in 1 of 500 such tests."""
    rng = np.random.default_rng(num_prompts)
    resamples, num_figures, outside, singly = Resamples(num_prompts, spec=SPEC), 6, 0, 0

    def figures() -> list[Interval]:
        table = np.exp(rng.normal(0, 0.2, (num_prompts, num_figures)))
        draws = resamples.totals(table) / num_prompts
        return [resamples.interval(float(table[:, one].mean()), draws[:, one]) for one in range(num_figures)]

    for _ in range(300):
        pairs = list(zip(figures(), figures(), strict=True))
        outside += any(not promised(a, num_figures=num_figures).holds(b.estimate) for a, b in pairs)
        singly += any(not promised(a, num_figures=1).holds(b.estimate) for a, b in pairs)
    assert outside <= int(stats.binom.isf(1 / 500, 300, 0.05)) == 27
    assert singly > 40, "bands that are not widened would put some figure outside in a quarter of the pairs"


def test_the_same_prompts_hold_one_together_with_the_bands() -> None:
    """300 pairs of runs of six figures on the same sixteen prompts, whose times alone are drawn anew: either
    rule may put a figure outside, and together they do so no more often than 5 %.
    """
    rng = np.random.default_rng(3)
    num_prompts, num_figures, outside, unwidened = 16, 6, 0, 0
    resamples = Resamples(num_prompts, spec=SPEC)
    for _ in range(300):
        prompts = np.exp(rng.normal(0, 0.2, (num_prompts, 1)))
        a, b = (prompts * np.exp(rng.normal(0, 0.03, (num_prompts, num_figures))) for _ in range(2))
        totals = resamples.totals(a), resamples.totals(b)
        found = [False, False]
        for one in range(num_figures):
            sums = float(a[:, one].sum()), float(b[:, one].sum())
            promise = promised(resamples.interval(sums[0], totals[0][:, one]), num_figures=num_figures)
            ratio = resamples.interval(sums[1] / sums[0], totals[1][:, one] / totals[0][:, one])
            found[0] |= not promise.holds(sums[1]) or not holds_one(ratio, num_figures=num_figures, drift=0.0)
            found[1] |= not holds_one(ratio, num_figures=1, drift=0.0)
        outside, unwidened = outside + found[0], unwidened + found[1]
    assert outside <= int(stats.binom.isf(1 / 500, 300, 0.05))
    assert unwidened > 40
