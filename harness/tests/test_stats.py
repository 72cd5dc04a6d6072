"""Intervals: exact cases, seeds, pairing, and the rate at which they cover the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from harness.judge.claims.findings import above, below, equivalence
from harness.judge.judgement import VerdictKind
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, bootstrap_ratio, bootstrap_ratio_of_ratios, widened_level

SPEC = IntervalSpec(num_resamples=500)
Columns = tuple[NDArray[np.float64], ...]


def heterogeneous_prompts(shape: tuple[int, ...], *, rng: np.random.Generator) -> Columns:
    """Tokens, seconds of a Medusa arm and seconds of vanilla: prompts differ in length, ease, and the
    machine's mood.
    """
    tokens = rng.integers(30, 96, size=shape).astype(np.float64)
    steps = tokens / np.exp(rng.normal(0.7, 0.35, size=shape))
    mood = np.exp(rng.normal(0, 0.10, size=shape))
    medusa_s = 0.03 * steps * mood * np.exp(rng.normal(0, 0.12, size=shape))
    vanilla_s = 0.02 * tokens * mood * np.exp(rng.normal(0, 0.03, size=shape))
    return tokens, medusa_s, vanilla_s


def speedup(columns: Columns, *, spec: IntervalSpec, seed: int) -> Interval:
    tokens, medusa_s, vanilla_s = columns
    rng = np.random.default_rng(seed)
    return bootstrap_ratio_of_ratios(
        tokens, medusa_s, base_numerator=tokens, base_denominator=vanilla_s, spec=spec, rng=rng
    )


@pytest.mark.parametrize("num_prompts", [8, 16, 80])
def test_a_nominal_95_percent_interval_covers_the_truth_nine_times_in_ten(num_prompts: int) -> None:
    """Measured on 400 records each: 0.925 at n = 8, 0.930 at 16, 0.943 at 80. An unwidened interval covers
    0.88 at n = 8 and fails.
    """
    _, medusa_s, vanilla_s = heterogeneous_prompts((2_000_000,), rng=np.random.default_rng(1))
    truth = vanilla_s.sum() / medusa_s.sum()
    rng = np.random.default_rng(num_prompts)
    intervals = [
        speedup(heterogeneous_prompts((num_prompts,), rng=rng), spec=SPEC, seed=record)
        for record in range(400)
    ]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    print(f"n = {num_prompts}: covers {covered:.4f}")
    assert 0.90 <= covered <= 0.98


def test_widening_shrinks_with_prompts_and_never_narrows() -> None:
    levels = [widened_level(0.95, num_prompts=num_prompts) for num_prompts in (4, 8, 16, 80, 100_000)]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == pytest.approx(0.95, abs=1e-4)


def test_same_seed_same_interval_other_seed_another() -> None:
    columns = heterogeneous_prompts((16,), rng=np.random.default_rng(3))
    first, again, other = (speedup(columns, spec=SPEC, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert first.estimate == other.estimate


def test_the_estimate_is_the_ratio_of_totals_not_the_mean_of_ratios() -> None:
    interval = bootstrap_ratio([10.0, 90.0], [10.0, 30.0], spec=SPEC, rng=np.random.default_rng(0))
    assert interval.estimate == 2.5
    assert (interval.low, interval.high) == (1.0, 3.0)
    assert (interval.level, interval.num_prompts) == (0.95, 2)


def test_both_arms_of_a_prompt_are_drawn_together() -> None:
    """Arms that differ by one constant factor on wildly different prompts have an exact speedup; drawn apart
    it would spread.
    """
    vanilla_s = np.exp(np.random.default_rng(2).normal(0, 2, size=12))
    tokens = np.ones(12)
    interval = bootstrap_ratio_of_ratios(
        tokens,
        vanilla_s / 3,
        base_numerator=tokens,
        base_denominator=vanilla_s,
        spec=SPEC,
        rng=np.random.default_rng(0),
    )
    assert interval.low == pytest.approx(3) == interval.high


def test_one_prompt_bounds_nothing() -> None:
    interval = bootstrap_ratio([4.0], [2.0], spec=SPEC, rng=np.random.default_rng(0))
    assert (interval.low, interval.estimate, interval.high) == (-math.inf, 2, math.inf)
    assert above(interval, 1) is below(interval, 1) is VerdictKind.INCONCLUSIVE


@pytest.mark.parametrize(
    ("numerator", "denominator"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, math.nan], [1.0, 2.0])]
)
def test_unusable_columns_are_refused(numerator: list[float], denominator: list[float]) -> None:
    with pytest.raises(ValueError, match="need"):
        bootstrap_ratio(numerator, denominator, spec=SPEC, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (-0.05, 0.08, VerdictKind.REPRODUCED),
        (0.11, 0.2, VerdictKind.NOT_REPRODUCED),
        (-0.2, -0.11, VerdictKind.NOT_REPRODUCED),
        (0.05, 0.2, VerdictKind.INCONCLUSIVE),
        (-0.2, 0.2, VerdictKind.INCONCLUSIVE),
    ],
)
def test_equivalence_within_a_margin(low: float, high: float, kind: VerdictKind) -> None:
    interval = Interval(estimate=(low + high) / 2, low=low, high=high, level=0.9, num_prompts=16)
    assert equivalence(interval, 0.1) is kind


def test_equivalence_refuses_another_level_and_no_margin() -> None:
    interval = Interval(estimate=0, low=-0.01, high=0.01, level=0.95, num_prompts=16)
    with pytest.raises(ValueError, match="90 %"):
        equivalence(interval, 0.1)
    with pytest.raises(ValueError, match="positive margin"):
        equivalence(interval.model_copy(update={"level": 0.9}), 0)


@pytest.mark.parametrize(
    ("test", "bound", "kind"),
    [
        (above, 0.5, VerdictKind.REPRODUCED),
        (above, 1.5, VerdictKind.INCONCLUSIVE),
        (above, 2.5, VerdictKind.NOT_REPRODUCED),
        (below, 0.5, VerdictKind.NOT_REPRODUCED),
        (below, 1.5, VerdictKind.INCONCLUSIVE),
        (below, 2.5, VerdictKind.REPRODUCED),
    ],
)
def test_a_bound_is_judged_by_the_whole_interval(
    test: Callable[[Interval, float], VerdictKind], bound: float, kind: VerdictKind
) -> None:
    assert test(Interval(estimate=1.5, low=1, high=2, level=0.95, num_prompts=16), bound) is kind
