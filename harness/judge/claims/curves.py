"""Transfer forms about curves over the number of nodes.

Tokens/step come from replay; speed is composed of them and measured step times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from harness.judge.claims.evidence import (
    Evidence,
    Floats,
    ratio_of_rates,
    replay_counts,
    replays,
    search_split,
)
from harness.judge.claims.findings import Finding, NotTestable, above, combined, holds, shown
from harness.judge.judgement import VerdictKind
from harness.specs.forms.claims import LogGrowthForm, SpeedPeaksForm
from harness.stats import Interval, bootstrap_totals


def judge_log_growth(form: LogGrowthForm, evidence: Evidence) -> Finding:
    """Return whether tokens/step of the best trees rises with log n.

    Raises: NotTestable without a trace or where no tree of the largest size can be grown.
    """
    split = search_split(evidence)
    grown = split.grow(max(form.sizes), max_rank=form.max_rank)
    counts = [
        replay_counts(one) for one in replays(split.held_out, [grown.nested(size) for size in form.sizes])
    ]
    spec = evidence.record.suite.interval
    columns = [column for tokens, steps in counts for column in (tokens, steps)]

    def interval(statistic: Callable[[Sequence[Floats]], Floats]) -> Interval:
        return bootstrap_totals(
            lambda *totals: statistic(totals), *columns, spec=spec, rng=np.random.default_rng(spec.seed)
        )

    slope = interval(lambda totals: log_fit(totals, form.sizes)[1])
    slowing = interval(lambda totals: early_less_late_gain(totals, form.sizes))
    fit = interval(lambda totals: log_fit(totals, form.sizes)[2])
    rates = [float(tokens.sum() / steps.sum()) for tokens, steps in counts]
    ends = f"{rates[0]:.2f} tokens/step at {form.sizes[0]} nodes, {rates[-1]:.2f} at {form.sizes[-1]}"
    parts = [
        _part(above(slope, 0.0), f"slope {shown(slope)} a unit of ln n", name=f"tokens/step rise ({ends})"),
        _part(above(slowing, 0.0), "", name="ever more slowly"),
        _part(
            above(fit, form.min_r_squared),
            f"R^2 {shown(fit, digits=3)}",
            name=f"R^2 above {form.min_r_squared:g}",
        ),
    ]
    both = combined(parts)
    return replace(both, ours=f"{parts[0].ours}, {parts[2].ours}", reason=f"{both.reason} ({split.origin})")


def _part(kind: VerdictKind, ours: str, *, name: str) -> Finding:
    return Finding(kind=kind, ours=ours, reason=f"{name}: {holds(kind)}", figure_kind="replayed")


def early_less_late_gain(totals: Sequence[Floats], sizes: Sequence[int]) -> Floats:
    """Return the gain a node over the first half of the sizes less that over the second.

    It is above 0 for a curve that bends down.
    Shapes: as in `log_fit`.
    """
    rates = [np.asarray(top / bottom) for top, bottom in zip(totals[::2], totals[1::2], strict=True)]
    middle, last = len(sizes) // 2, len(sizes) - 1
    early = (rates[middle] - rates[0]) / (sizes[middle] - sizes[0])
    return np.asarray(early - (rates[last] - rates[middle]) / (sizes[last] - sizes[middle]))


def log_fit(totals: Sequence[Floats], sizes: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """Return intercept, slope and R^2 of rates against ln n, by least squares.

    Shapes: `totals` are numerator and denominator for each size in turn, arrays of one shape; so are the
    three results.
    """
    rates = np.stack(
        [np.asarray(top / bottom) for top, bottom in zip(totals[::2], totals[1::2], strict=True)], axis=-1
    )
    logs = np.log(np.asarray(sizes, dtype=np.float64))
    centred = logs - logs.mean()
    mean = rates.mean(axis=-1)
    slope = (rates - mean[..., None]) @ centred / (centred @ centred)  # exactly 0 for a flat curve
    residuals = rates - mean[..., None] - slope[..., None] * centred
    spread = ((rates - mean[..., None]) ** 2).sum(axis=-1)
    # A flat curve leaves the line nothing to explain, and 0 / 0 must not pass for a perfect fit.
    fit = 1 - (residuals**2).sum(axis=-1) / np.where(spread > 0, spread, np.inf)
    fit = np.where(spread > 0, fit, 0.0)
    return np.asarray(mean - slope * logs.mean()), np.asarray(slope), np.asarray(fit)


def judge_speed_peaks(form: SpeedPeaksForm, evidence: Evidence) -> Finding:
    """Return whether speed peaks and then falls while tokens/step still rises.

    Speed is composed of replayed tokens/step and measured step times.
    Raises: NotTestable without speed, a trace, or step times at three of the sizes.
    """
    evidence.require_speed()
    split = search_split(evidence)
    cost_s = step_seconds(evidence)
    sizes = [size for size in form.sizes if size in cost_s]
    if len(sizes) < 3:
        raise NotTestable(
            f"step times at {len(sizes)} of the sizes {list(form.sizes)}, three are needed to see a peak"
        )
    grown = split.grow(max(sizes), max_rank=form.max_rank)
    trees = [grown.nested(size) for size in sizes]
    predicted = [
        one.tokens_per_step / cost_s[size]
        for one, size in zip(replays(split.growth, trees), sizes, strict=True)
    ]
    best, last = int(np.argmax(predicted)), len(sizes) - 1
    if best == last:
        reason = (
            f"speed still rises at {sizes[last]} nodes, the largest timed: the device has "
            f"arithmetic to spare there ({split.origin})"
        )
        return Finding(
            kind=VerdictKind.INCONCLUSIVE,
            ours=f"no peak up to {sizes[last]} nodes",
            reason=reason,
            figure_kind="composed",
        )
    peak, end = (replay_counts(one) for one in replays(split.held_out, [trees[best], trees[last]]))
    spec = evidence.record.suite.interval
    falls = ratio_of_rates(
        (peak[0], peak[1] * cost_s[sizes[best]]), over=(end[0], end[1] * cost_s[sizes[last]]), spec=spec
    )
    rises = ratio_of_rates(end, over=peak, spec=spec)
    parts = []
    for name, interval in (
        (f"speed at {sizes[best]} over {sizes[last]} nodes", falls),
        (f"tokens/step at {sizes[last]} over {sizes[best]} nodes", rises),
    ):
        kind = above(interval, form.bound)
        reason = f"{name}: {holds(kind)}"
        parts.append(
            Finding(kind=kind, ours=f"{name} {shown(interval, 'x')}", reason=reason, figure_kind="composed")
        )
    return combined(parts)


def step_seconds(evidence: Evidence) -> dict[int, float]:
    """Return the median separately timed step by nodes, heads included where they were timed."""
    costs = evidence.record.step_costs
    if costs is None:
        raise NotTestable("the record has no separately timed steps")
    return {
        cost.num_nodes: median(cost.step_s or cost.backbone_s) for cost in costs.costs if cost.arm is None
    }
