"""The band that a record promises: where a second run's figures lie, if nothing but chance differs.

Two runs of one commit on one machine are two samples of the same size, so their difference has sqrt(2) times
the error of one. Many figures are held to their bands at once: the bands are widened (Bonferroni, on
Student's t for so many prompts) so that at the intervals' level all of them hold together, and one figure
outside says something. What repeated runs of one commit have differed by is added: nothing within it is news.

Where both runs decoded the same prompts to the same texts, what differs from prompt to prompt is common to
both, and B over A is known much better than the band says. It then has to hold 1 as well, but only where the
drift between runs of one commit is known: without it, a small shift of the whole machine would count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from harness.stats import Interval


@dataclass(frozen=True)
class Band:
    """Bounds in the figure's own unit; 0 and inf where the sample bounds nothing."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Return whether a figure lies within; bounds that differ from it by rounding alone hold it."""
        return self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)


def joint_factor(level: float, *, num_prompts: int, num_figures: int) -> float:
    """Return how much wider an interval has to be so that `num_figures` such hold together at its level."""
    if num_prompts < 2:
        return math.inf
    share, freedom = 1 - level, num_prompts - 1
    single = float(stats.t.isf(share / 2, freedom))
    return float(stats.t.isf(share / 2 / max(1, num_figures), freedom)) / single


def bounds_a_figure(one: Interval) -> bool:
    """Return whether an interval bounds a figure above 0 on both sides; a single prompt's does not."""
    return one.low > 0 and one.high < math.inf and one.num_prompts > 1


def promised(a: Interval, *, num_figures: int, drift: float = 0.0) -> Band:
    """Return where the same figure of a second run lies, together with the other figures of the comparison.

    `drift` is the largest |log| of the ratio between runs of one commit. Sides are taken as logarithms, each
    by itself, so that a lopsided interval gives a lopsided band. A figure that is not above 0 has no band.
    """
    if not bounds_a_figure(a):
        return Band(0.0, math.inf)
    widen = math.sqrt(2) * joint_factor(a.level, num_prompts=a.num_prompts, num_figures=num_figures)
    down, up = math.log(a.estimate / a.low), math.log(a.high / a.estimate)
    return Band(a.estimate * math.exp(-widen * down - drift), a.estimate * math.exp(widen * up + drift))


def holds_one(ratio: Interval, *, num_figures: int, drift: float) -> bool:
    """Return whether B over A on the same prompts may be 1, widened for all figures and by the drift."""
    if not (math.isfinite(ratio.low) and math.isfinite(ratio.high)) or ratio.low <= 0:
        return True
    widen = joint_factor(ratio.level, num_prompts=ratio.num_prompts, num_figures=num_figures)
    low = math.log(ratio.estimate) - widen * math.log(ratio.estimate / ratio.low) - drift
    high = math.log(ratio.estimate) + widen * math.log(ratio.high / ratio.estimate) + drift
    return low <= 1e-9 and high >= -1e-9
