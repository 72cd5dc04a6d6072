"""The middle of a latency point's times, and the middles that other rounds of timing would have given.

A machine's speed drifts. Times within a round are moments apart and share one level; the next round has
another. So rounds are drawn, not single times, and the same rounds for all sizes, which were timed in turn:

    round            1       2       3                     a draw: rounds 1, 1, 3
    one node         35 35   44 43   37 38        ->       35 35   35 35   37 38
    64 nodes         138 ..  159 ..  135 ..       ->       138 ..  138 ..  135 ..

Rounds are few, so draws scatter too little. They are moved away from the record's own figure, as the tails of
an interval over few prompts are (`harness/stats.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from statistics import fmean, median
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from harness.records.latency import LatencyPoint

Floats = NDArray[np.float64]
Part = Literal["backbone_s", "heads_s", "step_s"]
Middles = Callable[[LatencyPoint, Part], Floats]
NUM_DRAWS = 400
_SEED = 0
_LEAST = 1e-3  # of a step's time: what a draw is taken for that subtraction made smaller


def middle(point: LatencyPoint, part: Part) -> Floats:
    """Return a part's seconds as a curve takes them.

    It is the mean over rounds of each round's median: a burst within a round does not move it, and a level
    that lasts for a round counts, as it does in a decoding. Of older points, which do not tell their rounds,
    it is the median of all times.
    Shapes: result [1].
    """
    rounds = point.by_round(part)
    if point.times_a_round:
        return np.array([fmean(map(median, rounds))])
    return np.array([median(time for one in rounds for time in one)])


def num_rounds(point: LatencyPoint) -> int:
    """Return in how many rounds a point was timed."""
    return len(point.by_round("backbone_s"))


def redrawn(point: LatencyPoint, part: Part) -> Floats:
    """Return a part's middles over draws of its rounds, with replacement; not yet widened.

    Parts and points of as many rounds are drawn together.
    Shapes: result [NUM_DRAWS].
    """
    rounds = point.by_round(part)
    picks = _picks(len(rounds))
    if point.times_a_round:
        middles = np.array([median(one) for one in rounds])
        return np.asarray(middles[picks].mean(axis=1))
    longest = max(map(len, rounds))
    padded = np.array([[*one, *[math.nan] * (longest - len(one))] for one in rounds])
    return np.asarray(np.nanmedian(padded[picks].reshape(NUM_DRAWS, -1), axis=1))


def widened(draws: Floats, *, about: Floats, rounds: int, level: float, num_units: int) -> Floats:
    """Return draws moved away from their figure, for the few rounds that they come from.

    An interval of `level` over `num_units` prompts moves its tails already, and so far the draws need not go.
    They move on the scale of logarithms, so that no time falls to 0.
    Shapes: `draws` [NUM_DRAWS, knots], as the result; `about` [knots].
    """
    times = _quantile(level, num=rounds)
    if num_units > 1:
        times /= _quantile(level, num=num_units)
    return np.asarray(about * (np.maximum(draws, _LEAST * about) / about) ** times)


def _quantile(level: float, *, num: int) -> float:
    """Return how many bootstrap errors of so many things a tail lies away (`stats.widened_level`)."""
    return float(stats.t.ppf((1 + level) / 2, num - 1)) * math.sqrt(num / (num - 1))


@cache
def _picks(rounds: int) -> NDArray[np.int64]:
    """Return which rounds each draw takes.

    Shapes: [NUM_DRAWS, rounds].
    """
    return np.random.default_rng([_SEED, rounds]).integers(rounds, size=(NUM_DRAWS, rounds))
