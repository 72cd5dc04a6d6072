"""Bootstrap intervals over prompts: both arms of a prompt drawn together, the statistic formed from totals.

A plain percentile interval is too narrow for few prompts, as a standard deviation with divisor n is. Moving
its tails from Phi(-z) to Phi(-sqrt(n / (n - 1)) * t) makes up for the divisor and for the normal quantile.
Rates at which a nominal 95 % interval of a speedup covered the truth (log-normal prompts, 2,000 records each;
`harness/tests/test_stats.py` measures the last column on 400):

    n     percentile   BCa     widened percentile (used)
    8     0.881        0.882   0.938
    16    0.911        0.906   0.939
    80    0.939        0.944   0.945
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, Field
from scipy import stats

from harness.bounds import Count, Share
from harness.files import Frozen
from harness.specs.suite import IntervalSpec

Floats = NDArray[np.float64]
FigureKind = Literal["measured", "composed", "predicted", "quoted", "hypothetical", "replayed", "computed"]


class Interval(Frozen):
    """An estimate with its bootstrap interval, in the estimate's unit."""

    estimate: float = Field(description="the figure, formed from totals")
    low: float = Field(description="lower bound; -inf where a single unit bounds nothing")
    high: float = Field(description="upper bound; inf where a single unit bounds nothing")
    level: Share = Field(description="nominal coverage, a share")
    num_prompts: Count = Field(description="units that were resampled: prompts, or batches of prompts")


def _known(interval: Interval) -> Interval:
    """Return an interval as a record may hold it: with an estimate, and bounds in order."""
    # bounds of data without spread may lie a rounding apart; nan compares as false
    ordered = interval.low <= interval.high or math.isclose(interval.low, interval.high, rel_tol=1e-9)
    if not ordered or math.isnan(interval.estimate):
        found = f"{interval.estimate:g} [{interval.low:g}, {interval.high:g}]"
        raise ValueError(f"found {found}, need an estimate with bounds in order")
    return interval


KnownInterval = Annotated[Interval, AfterValidator(_known)]


def bootstrap_ratio(
    numerator: ArrayLike, denominator: ArrayLike, *, spec: IntervalSpec, rng: np.random.Generator
) -> Interval:
    """Return the ratio of two totals over prompts, such as tokens over seconds.

    Shapes: [P] each, one entry a prompt.
    Raises: ValueError as `bootstrap_totals` does.
    """
    return bootstrap_totals(_ratio, numerator, denominator, spec=spec, rng=rng)


def bootstrap_ratio_of_ratios(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    base_numerator: ArrayLike,
    base_denominator: ArrayLike,
    spec: IntervalSpec,
    rng: np.random.Generator,
) -> Interval:
    """Return one arm's ratio of totals over another's on the same prompts, such as a speedup.

    Shapes: [P] each, entry p of all four from prompt p.
    Raises: ValueError as `bootstrap_totals` does.
    """
    columns = (numerator, denominator, base_numerator, base_denominator)
    return bootstrap_totals(lambda a, b, c, d: _ratio(a, b) / _ratio(c, d), *columns, spec=spec, rng=rng)


def bootstrap_totals(
    statistic: Callable[..., Floats], *columns: ArrayLike, spec: IntervalSpec, rng: np.random.Generator
) -> Interval:
    """Return a statistic of column totals with its interval.

    Prompts are resampled whole, all columns of a prompt together. `statistic` maps one array of totals a
    column to an array of the same shape. A single prompt bounds nothing: its interval is (-inf, inf).
    `spec.seed` is not read; the draws come from `rng`.
    Raises: ValueError if there is no prompt, the columns differ in length, or a value is not finite.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1 or not arrays[0].size:
        raise ValueError(
            f"found columns of shapes {[array.shape for array in arrays]}, need one entry a prompt in "
            "each, and a prompt"
        )
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("found a value that is not finite, need finite values for every prompt")
    num_prompts = len(arrays[0])
    estimate = float(statistic(*(array.sum() for array in arrays)))
    low, high = -math.inf, math.inf
    if num_prompts > 1:
        # One index column, so that every resample takes the same prompts in all columns.
        result = stats.bootstrap(
            (np.arange(num_prompts),),
            lambda index, axis: statistic(*(array[index].sum(axis=axis) for array in arrays)),
            n_resamples=spec.num_resamples,
            confidence_level=widened_level(spec.level, num_prompts=num_prompts),
            method="percentile",
            vectorized=True,
            rng=rng,
        ).confidence_interval
        low, high = float(result.low), float(result.high)
    return Interval(estimate=estimate, low=low, high=high, level=spec.level, num_prompts=num_prompts)


def bootstrap_groups(
    statistic: Callable[..., Floats], groups: Sequence[tuple[ArrayLike, ArrayLike]], *, spec: IntervalSpec
) -> Interval:
    """Return a statistic of the groups' rates with its interval; prompts are resampled within their groups.

    A group is (numerators, denominators), one entry a prompt, its rate the quotient of their sums.
    `statistic` maps one array of rates a group to an array of the same shape. The interval is widened as for
    the smallest group; a group of one prompt bounds nothing.
    Raises: ValueError for a group without prompts or of unlike columns.
    """
    arrays = [tuple(np.asarray(column, dtype=np.float64) for column in group) for group in groups]
    if any(top.shape != bottom.shape or top.ndim != 1 or not top.size for top, bottom in arrays):
        raise ValueError(
            "found a group without prompts or of columns of unlike shapes, need one entry a prompt"
        )

    def of_rates(*indices: NDArray[np.int64], axis: int = -1) -> Floats:
        rates = [
            top[index].sum(axis=axis) / bottom[index].sum(axis=axis)
            for (top, bottom), index in zip(arrays, indices, strict=True)
        ]
        return statistic(*rates)

    indices = [np.arange(len(top)) for top, _ in arrays]
    num_prompts, smallest = sum(map(len, indices)), min(map(len, indices))
    low, high = -math.inf, math.inf
    if smallest > 1:
        result = stats.bootstrap(
            indices,
            of_rates,
            n_resamples=spec.num_resamples,
            confidence_level=widened_level(spec.level, num_prompts=smallest),
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(spec.seed),
        ).confidence_interval
        low, high = float(result.low), float(result.high)
    return Interval(
        estimate=float(of_rates(*indices)), low=low, high=high, level=spec.level, num_prompts=num_prompts
    )


def long_share(times: Sequence[float], *, factor: float, width: int = 9) -> float:
    """Return the share of a sequence's time in steps of more than `factor` times the median around them.

    Shapes: one entry a step; the median is over the step and up to `width // 2` on each side. Fewer than
    three steps have no median that one of them does not make, and no long step.
    """
    if len(times) < 3:
        return 0.0
    steps, reach = np.asarray(times, dtype=np.float64), width // 2
    around = [np.median(steps[max(0, at - reach) : at + reach + 1]) for at in range(len(steps))]
    return float(steps[steps > factor * np.array(around)].sum() / steps.sum())


def spread_of(interval: Interval) -> tuple[float, float]:
    """Return an interval's standard error and half its width, as other samples of as many prompts have them.

    Both are infinite where a single prompt bounds nothing.
    """
    half = (interval.high - interval.low) / 2
    if not math.isfinite(half):
        return math.inf, math.inf
    level = widened_level(interval.level, num_prompts=interval.num_prompts)
    return half / float(stats.norm.ppf((1 + level) / 2)), half


def chance_above(interval: Interval, *, bound: float, truth: float) -> float:
    """Return how often such an interval lies wholly above a bound where the true value is `truth`.

    The estimate is taken as normal about the truth, and the interval as wide as this one.
    """
    error, half = spread_of(interval)
    if not math.isfinite(half):
        return 0.0
    return float(stats.norm.cdf((truth - bound - half) / error)) if error > 0 else float(truth > bound)


def chance_within(interval: Interval, *, margin: float, truth: float) -> float:
    """Return how often such an interval lies wholly within +-margin where the true difference is `truth`."""
    error, half = spread_of(interval)
    if not math.isfinite(half):
        return 0.0
    if error == 0:
        return float(-margin < truth < margin)
    room = (margin - half) / error
    return max(0.0, float(stats.norm.cdf(room - truth / error) - stats.norm.cdf(-room - truth / error)))


def least_detected(interval: Interval, *, bound: float, chance: float = 0.8) -> float:
    """Return the true value from which on such an interval lies above a bound that often."""
    error, half = spread_of(interval)
    return bound + half + error * float(stats.norm.ppf(chance)) if math.isfinite(half) else math.inf


def units_needed(interval: Interval, *, distance: float, chance: float = 0.8) -> float:
    """Return of how many units such an interval clears a bound `distance` from its estimate that often.

    Units are those that it was drawn over, prompts as a rule: with more of them it narrows by their root. The
    estimate is taken for the true value. Infinite where more of them would not decide.
    """
    error, half = spread_of(interval)
    if distance <= 0 or not math.isfinite(half):
        return math.inf
    return interval.num_prompts * ((half + error * float(stats.norm.ppf(chance))) / distance) ** 2


def widened_level(level: float, *, num_prompts: int) -> float:
    """Return the level at which a percentile interval of few prompts covers at about `level`.

    Departs: from the plain percentile interval; this is Hesterberg's expanded one ("What Teachers Should Know
    About the Bootstrap", 2015).
    """
    quantile = stats.t.ppf((1 + level) / 2, num_prompts - 1) * math.sqrt(num_prompts / (num_prompts - 1))
    return float(1 - 2 * stats.norm.sf(quantile))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return numerator / denominator


class Resamples:
    """The draws of `num_units` units with replacement, the same draws for every statistic.

    Units are prompts, or batches of prompts. Intervals are those of `bootstrap_totals`: percentiles, widened
    for few units. One unit bounds nothing.
    """

    def __init__(self, num_units: int, *, spec: IntervalSpec) -> None:
        self.num_units, self.level = num_units, spec.level
        rng = np.random.default_rng(spec.seed)
        shares = np.full(num_units, 1 / num_units)
        self._times_drawn = rng.multinomial(num_units, shares, size=spec.num_resamples).astype(np.float64)

    def totals(self, columns: Floats) -> Floats:
        """Return the totals of columns in every draw.

        Shapes: `columns` [units, C] or [units]; result [draws, C] or [draws].
        """
        return self._times_drawn @ columns

    def bounds(self, draws: Floats) -> tuple[Floats, Floats]:
        """Return the bounds that a statistic's values in the draws give.

        Shapes: `draws` [.., draws]; results [..].
        """
        if self.num_units == 1:
            return np.full(draws.shape[:-1], -math.inf), np.full(draws.shape[:-1], math.inf)
        tail = (1 - widened_level(self.level, num_prompts=self.num_units)) / 2
        low, high = np.quantile(draws, (tail, 1 - tail), axis=-1)
        return np.asarray(low), np.asarray(high)

    def interval(self, estimate: float, draws: Floats) -> Interval:
        """Return an estimate with the interval that a statistic's values in the draws give.

        Shapes: `draws` [draws].
        """
        low, high = self.bounds(draws)
        return Interval(
            estimate=estimate, low=float(low), high=float(high), level=self.level, num_prompts=self.num_units
        )
