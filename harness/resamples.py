"""Bootstrap draws made once and shared by thousands of points: an interval then costs one small matrix product."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from harness.config import IntervalSpec
from harness.intervals import widened_level
from harness.judgement import Interval

Floats = NDArray[np.float64]


class Resamples:
    """The draws of `num_units` units (prompts, or batches of prompts) with replacement; the same draws for every statistic.

    Intervals are those of `intervals.bootstrap_totals`: percentiles, widened for few units. One unit bounds nothing.
    """

    def __init__(self, num_units: int, *, spec: IntervalSpec) -> None:
        self.num_units, self.level = num_units, spec.level
        rng = np.random.default_rng(spec.seed)
        shares = np.full(num_units, 1 / num_units)
        self._times_drawn = rng.multinomial(num_units, shares, size=spec.num_resamples).astype(np.float64)

    def totals(self, columns: Floats) -> Floats:
        """Return the totals of columns in every draw. Shapes: `columns` [units, C] or [units]; result [draws, C] or [draws]."""
        return self._times_drawn @ columns

    def bounds(self, draws: Floats) -> tuple[Floats, Floats]:
        """Return the bounds that a statistic's values in the draws give. Shapes: `draws` [.., draws]; results [..]."""
        if self.num_units == 1:
            return np.full(draws.shape[:-1], -math.inf), np.full(draws.shape[:-1], math.inf)
        tail = (1 - widened_level(self.level, num_prompts=self.num_units)) / 2
        low, high = np.quantile(draws, (tail, 1 - tail), axis=-1)
        return np.asarray(low), np.asarray(high)

    def interval(self, estimate: float, draws: Floats) -> Interval:
        """Return an estimate with the interval that a statistic's values in the draws give. Shapes: `draws` [draws]."""
        low, high = self.bounds(draws)
        return Interval(estimate=estimate, low=float(low), high=float(high), level=self.level, num_prompts=self.num_units)
