"""Intervals and what is made of them: answers worked out by hand, and laws that hold for any data."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.judge.claims.findings import (
    Finding,
    NotTestable,
    above,
    below,
    combined,
    equivalence,
    holds,
    percent,
    shown,
    varied,
    worst,
)
from harness.judge.judgement import VerdictKind
from harness.specs.forms.claims import LogGrowthForm, LossGrowsForm
from harness.specs.suite import IntervalSpec
from harness.stats import (
    Interval,
    Resamples,
    bootstrap_ratio,
    bootstrap_ratio_of_ratios,
    bootstrap_totals,
    widened_level,
)

SPEC = IntervalSpec(num_resamples=200)
YES, NO, OPEN = VerdictKind.REPRODUCED, VerdictKind.NOT_REPRODUCED, VerdictKind.INCONCLUSIVE
Amounts = st.floats(min_value=0.01, max_value=100)
Bounds = st.floats(min_value=-50, max_value=50)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def interval(low: float, high: float, *, level: float = 0.95) -> Interval:
    return Interval(estimate=(low + high) / 2, low=low, high=high, level=level, num_prompts=16)


@settings(max_examples=20, deadline=None)
@given(top=Amounts, bottom=Amounts, num=st.integers(2, 12))
def test_constant_data_have_an_interval_of_no_width(top: float, bottom: float, num: int) -> None:
    found = bootstrap_ratio([top] * num, [bottom] * num, spec=SPEC, rng=rng())
    assert (found.low, found.estimate, found.high) == pytest.approx((top / bottom,) * 3)
    assert (found.level, found.num_prompts) == (SPEC.level, num)


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.tuples(Amounts, Amounts), min_size=2, max_size=12))
def test_a_ratio_is_that_of_totals_and_its_interval_holds_no_more_than_the_data(
    values: list[tuple[float, float]],
) -> None:
    top, bottom = zip(*values, strict=True)
    found = bootstrap_ratio(top, bottom, spec=SPEC, rng=rng())
    ratios = [a / b for a, b in values]
    assert found.estimate == pytest.approx(sum(top) / sum(bottom))
    assert min(ratios) * (1 - 1e-9) <= found.low <= found.high <= max(ratios) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.tuples(Amounts, Amounts), min_size=2, max_size=8), factor=Amounts)
def test_an_arm_over_itself_is_1_and_a_factor_comes_through(
    values: list[tuple[float, float]], factor: float
) -> None:
    top, bottom = (np.array(one) for one in zip(*values, strict=True))
    found = bootstrap_ratio_of_ratios(
        factor * top, bottom, base_numerator=top, base_denominator=bottom, spec=SPEC, rng=rng()
    )
    assert (found.low, found.estimate, found.high) == pytest.approx((factor,) * 3)


def test_columns_of_two_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry a prompt"):
        bootstrap_ratio(np.ones((2, 2)), np.ones((2, 2)), spec=SPEC, rng=rng())


def test_the_widened_level_is_hesterbergs() -> None:
    for num in (2, 5, 16, 80):
        quantile = stats.t(num - 1).ppf(0.975) * math.sqrt(num / (num - 1))
        assert widened_level(0.95, num_prompts=num) == pytest.approx(2 * stats.norm.cdf(quantile) - 1)


def test_the_interval_is_the_percentiles_of_the_resampled_totals() -> None:
    """Both kinds of resampling, against numpy's quantiles of draws made here."""
    tokens = np.arange(1.0, 11.0) ** 2
    spec = IntervalSpec(num_resamples=4000)
    tail = (1 - widened_level(spec.level, num_prompts=10)) / 2
    index = np.random.default_rng(9).integers(10, size=(100_000, 10))
    low, high = np.quantile(tokens[index].sum(axis=1), (tail, 1 - tail))
    plain = bootstrap_totals(lambda total: total, tokens, spec=spec, rng=rng())
    resamples = Resamples(10, spec=spec)
    again = resamples.interval(float(tokens.sum()), resamples.totals(tokens))
    for found in (plain, again):
        assert found.estimate == tokens.sum() == 385
        assert (found.low, found.high) == pytest.approx((low, high), rel=0.03)
        assert (found.level, found.num_prompts) == (0.95, 10)


def test_bounds_of_many_statistics_are_those_of_each() -> None:
    resamples = Resamples(6, spec=SPEC)
    draws = np.stack([resamples.totals(np.arange(6.0) + shift) for shift in range(3)])
    low, high = resamples.bounds(draws)
    for row, *both in zip(draws, low, high, strict=True):
        assert tuple(both) == tuple(float(bound) for bound in resamples.bounds(row))
    assert (low < high).all() and low.shape == high.shape == (3,)
    nested = resamples.bounds(draws.reshape(3, 1, -1))
    assert nested[0].shape == nested[1].shape == (3, 1) and (nested[0][:, 0] == low).all()


def test_one_unit_bounds_nothing_whatever_the_shape() -> None:
    resamples = Resamples(1, spec=SPEC)
    for shape in ((), (3,), (3, 2)):
        low, high = resamples.bounds(np.ones((*shape, 200)))
        assert low.shape == high.shape == shape
        assert (low == -math.inf).all() and (high == math.inf).all()
    alone = resamples.interval(2.0, resamples.totals(np.array([2.0])))
    assert (alone.low, alone.estimate, alone.high) == (-math.inf, 2.0, math.inf)


@settings(deadline=None)
@given(low=Bounds, width=st.floats(0, 20), bound=Bounds)
def test_above_and_below_say_what_the_whole_interval_says(low: float, width: float, bound: float) -> None:
    high = low + width
    assert (above(interval(low, high), bound) is YES) == (low > bound)
    assert (above(interval(low, high), bound) is NO) == (high <= bound)
    assert (below(interval(low, high), bound) is YES) == (high < bound)
    assert (below(interval(low, high), bound) is NO) == (low >= bound)


@pytest.mark.parametrize(
    ("test", "low", "high", "kind"),
    [
        (above, 1.0, 2.0, OPEN),  # "above" is not "at least"
        (above, 0.0, 1.0, NO),
        (above, 1.0, 1.0, NO),
        (below, 0.0, 1.0, OPEN),
        (below, 1.0, 2.0, NO),
        (below, 1.0, 1.0, NO),
    ],
)
def test_a_bound_itself_is_not_passed(
    test: Callable[[Interval, float], VerdictKind], low: float, high: float, kind: VerdictKind
) -> None:
    assert test(interval(low, high), 1.0) is kind


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (-0.1, 0.05, OPEN),  # touches the margin, which is not within it
        (-0.05, 0.1, OPEN),
        (-0.0999, 0.0999, YES),
        (0.1, 0.2, OPEN),  # touches it from outside
        (-0.2, -0.1, OPEN),
        (0.1001, 0.2, NO),
        (-0.2, -0.1001, NO),
        (0.1, 0.1, OPEN),
        (-0.3, 0.3, OPEN),
        (-0.05, 0.3, OPEN),
        (-0.3, 0.05, OPEN),
    ],
)
def test_equivalence_at_exactly_the_margin_is_open(low: float, high: float, kind: VerdictKind) -> None:
    assert equivalence(interval(low, high, level=0.9), 0.1) is kind


@pytest.mark.parametrize(("margin", "level"), [(0.0, 0.9), (-0.1, 0.9), (0.1, 0.95), (0.1, 0.5), (-1, 0.5)])
def test_equivalence_needs_a_margin_and_a_90_percent_interval(margin: float, level: float) -> None:
    with pytest.raises(ValueError, match="positive margin and a 90 % interval"):
        equivalence(interval(-0.01, 0.01, level=level), margin)


def test_the_worst_part_decides_and_an_untested_one_leaves_the_claim_untested() -> None:
    ordered = [VerdictKind.NOT_TESTED, VerdictKind.NOT_DECIDABLE, NO, OPEN, YES]
    for index, kind in enumerate(ordered):
        assert worst(ordered[index:][::-1]) is kind


def test_parts_become_one_finding_with_all_that_they_say() -> None:
    parts = [Finding(YES, "a 1", "first", "measured"), Finding(OPEN, "b 2", "second", "replayed")]
    assert combined(parts) == Finding(OPEN, "a 1; b 2", "first; second", "replayed")
    assert combined(parts[:1]) == parts[0]
    assert [holds(kind) for kind in (YES, NO, OPEN, VerdictKind.NOT_TESTED)] == [
        "holds",
        "fails",
        "open",
        "untested",
    ]


def test_intervals_as_text() -> None:
    assert shown(interval(1.0, 2.0), "x") == "1.50x [1.00, 2.00]"
    assert shown(interval(1.0, 2.0), digits=3) == "1.500 [1.000, 2.000]"
    assert percent(interval(-0.003, 0.028)) == "+1.2 % [-0.3, 2.8]"


def growth(**changes: object) -> LogGrowthForm:
    return LogGrowthForm.model_validate(
        {
            "test": "log_growth",
            "sizes": (1, 2, 4, 8),
            "max_rank": 4,
            "min_r_squared": 0.9,
            "reason": "made up for a test",
            **changes,
        }
    )


def test_a_form_is_judged_with_other_settings_and_says_what_turns() -> None:
    def test(form: LogGrowthForm) -> Finding:
        if form.max_rank == 2:
            raise NotTestable("too few")
        return Finding(YES if form.max_rank > 3 else NO, "o", "why", "measured")

    assert varied(growth(), test) == Finding(YES, "o", "why", "measured")
    found = varied(growth(vary={"max_rank": (3, 5, 2)}), test)
    assert found.reason == (
        "why; it turns: fails with max_rank 3; the same with max_rank 5; not tested with max_rank 2"
    )
    assert found.kind is YES and found.turns == ("fails with max_rank 3",)
    turning = varied(growth(vary={"max_rank": (3,)}), test)
    assert turning.reason == "why; it turns: fails with max_rank 3"
    same = varied(growth(vary={"min_r_squared": (0.25,)}), test)
    assert (same.reason, same.turns) == ("why; the same with min_r_squared 0.25", ())
    plain = LossGrowsForm(test="loss_grows", bound=0.0, reason="made up for a test")
    assert varied(plain, lambda form: Finding(OPEN, "", f"{form.bound}", None)).reason == "0.0"
