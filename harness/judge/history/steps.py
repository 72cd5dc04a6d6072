"""Steps in a series of figures: where its level changes, and how much it takes to call noise a step.

The search is PELT with the cost l2 (ruptures): it cuts the series where the squared distances to the means of
its parts, plus a penalty a cut, are least. Figures are taken as logarithms, so that equal shares weigh alike,
and divided by the series' own noise, which its neighbours' differences tell: a step moves one of them, noise
all of them. The penalty is what makes a cut in pure noise a rare event (`penalty_of`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError

FALSE_ALARM = 0.01
"""How often a series of pure noise may show any step: a page with a hundred series shows about one."""

LEAST_RECORDS = 5  # fewer have at most three differences, of which the median no longer leaves out a step
MOST_RECORDS = 60  # the newest are searched; no table of penalties is needed for longer histories
# Of a figure that is usually the same to the last digit (peak memory) the noise is taken to be no less than
# this share of it, so that no step of a tenth of it is told.
LEAST_NOISE = 1e-3
_NORMAL_MEDIAN = 0.6745 * math.sqrt(2)  # the median of |a - b| for two standard normal figures
_TAILS = 4
_NUM_DRAWS, _SEED, _MOST_CUTS, _CHUNK = 4000, 20240119, 3, 250


@dataclass(frozen=True)
class Step:
    """A change of level: `index` is the first figure of the new one, `ratio` the new level over the old."""

    index: int
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Return the new level over the old one."""
        return self.after / self.before if self.before else math.inf


def noisy_steps(values: Sequence[float]) -> tuple[Step, ...]:
    """Return the steps of a series of positive figures, each measured with noise; none in too few of them.

    Levels are geometric means.
    Raises: UserError without ruptures.
    """
    if len(values) < LEAST_RECORDS:
        return ()
    first = max(0, len(values) - MOST_RECORDS)
    logs = np.log(np.asarray(values[first:], dtype=np.float64))
    cuts = _cuts(logs / noise_of(logs))
    bounds = list(itertools.pairwise([0, *cuts, len(logs)]))
    levels = [math.exp(float(logs[start:stop].mean())) for start, stop in bounds]
    return tuple(
        Step(first + cut, before, after) for cut, before, after in zip(cuts, levels, levels[1:], strict=False)
    )


def exact_steps(values: Sequence[float]) -> tuple[Step, ...]:
    """Return the steps of a series of figures that have no noise: every change, but for rounding."""
    cuts = [
        index
        for index, (before, after) in enumerate(itertools.pairwise(values), start=1)
        if not math.isclose(before, after, rel_tol=1e-9)
    ]
    levels = [values[start] for start in [0, *cuts][: len(values)]]
    return tuple(
        Step(cut, before, after) for cut, before, after in zip(cuts, levels, levels[1:], strict=False)
    )


def noise_of(logs: NDArray[np.float64]) -> float:
    """Return the standard deviation of a series about its levels, from the median step between neighbours."""
    return max(LEAST_NOISE, float(median(np.abs(np.diff(logs)))) / _NORMAL_MEDIAN)


@cache
def penalty_of(num_values: int) -> float:
    """Return what a cut must gain, in squares of the noise, so that noise alone gains it in 1 of 100 series.

    It is a quantile of the most that any cut gains in noise, found by drawing such series. Their scale is
    estimated from each of them, as it is from a series of figures; so the penalty is large where few figures
    say little of their noise. The draws have heavier tails than normal ones (Student's t with 4 degrees of
    freedom), since some run is always disturbed; normal noise then shows a step less often. A gain over up to
    three cuts is shared by them, as a penalty is.
    """
    rng = np.random.default_rng(_SEED)
    gains = np.concatenate(
        [_most_gained(rng.standard_t(_TAILS, size=(_CHUNK, num_values))) for _ in range(_NUM_DRAWS // _CHUNK)]
    )
    return float(np.quantile(gains, 1 - FALSE_ALARM))


def _most_gained(series: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the most that a cut of each series gains, in squares of its noise.

    Shapes: `series` [draws, n]; result [draws].
    """
    num_draws, length = series.shape
    noise = np.median(np.abs(np.diff(series)), axis=1) / _NORMAL_MEDIAN
    sums = np.concatenate([np.zeros((num_draws, 1)), np.cumsum(series, axis=1)], axis=1)
    # A part from i to j adds sum(x_i..x_j)^2 / (j - i) to what the parts' means explain of the squares.
    explained = np.full((length + 1, num_draws), -np.inf)
    explained[1:] = np.array([sums[:, stop] ** 2 / stop for stop in range(1, length + 1)])
    whole, most = explained[length].copy(), np.zeros(num_draws)
    for num_cuts in range(1, _MOST_CUTS + 1):
        better = np.full_like(explained, -np.inf)
        for stop in range(num_cuts + 1, length + 1):
            starts = np.arange(num_cuts, stop)
            parts = (sums[:, stop] - sums[:, starts].T) ** 2 / (stop - starts)[:, None]
            better[stop] = (explained[starts] + parts).max(axis=0)
        explained = better
        most = np.maximum(most, (explained[length] - whole) / num_cuts)
    return most / noise**2


def _cuts(signal: NDArray[np.float64]) -> list[int]:
    """Return the indices at which new levels begin."""
    try:
        import ruptures
    except ImportError as error:
        raise UserError(
            found="no ruptures",
            need="ruptures, which finds the steps of a series",
            where="this environment",
            do="pip install 'medusa-repro[history]'",
        ) from error
    search = ruptures.Pelt(model="l2", min_size=1, jump=1).fit(signal.reshape(-1, 1))
    ends: list[int] = search.predict(pen=penalty_of(len(signal)))
    return ends[:-1]
