"""Looks at a gate's timed quantities: how the error is divided, what an interval says, what the shell hears.

A change is a difference of logarithms, head less base, positive where the head is worse; its mean over blocks
has a Student interval. The error `alpha` is divided twice, both by Bonferroni's inequality, so that nothing
is assumed of how quantities and looks hang together:

    over looks        by what O'Brien and Fleming's spending function gives out between two looks
                      (Lan and DeMets, Biometrika 1983): little early, most at the last look
    over quantities   equally

So one version against itself raises an alarm in any timed quantity at any look with a chance below `alpha`,
and mostly far below, since a change has to leave the margin, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from harness.errors import ExitCode
from harness.records.gate.record import Finding, Outcome
from harness.specs.gate import GateSpec, Quantity

Floats = NDArray[np.float64]
_FURTHEST = math.log(1e9)
RATES: tuple[Quantity, ...] = ("speedup", "tokens_per_s")  # of which less is worse


def spent(alpha: float, share: float) -> float:
    """Return how much of an error may be used up when a share of all blocks is there."""
    if share >= 1:
        return alpha
    return float(2 * stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(share))) if share > 0 else 0.0


def bounds(values: Floats, *, tail: float) -> tuple[Floats, Floats, Floats]:
    """Return the means over blocks with Student bounds that leave `tail` on either side.

    Shapes: `values` [.., n]; results [..].
    """
    num_blocks = values.shape[-1]
    mean = values.mean(axis=-1)
    error = values.std(axis=-1, ddof=1) / math.sqrt(num_blocks)
    half = float(stats.t.isf(tail, num_blocks - 1)) * error
    return mean, mean - half, mean + half


def log_margin(quantity: Quantity, margin: float) -> float:
    """Return a margin, a share of the base's value, as a logarithm of the same sign as a change."""
    return -math.log1p(-margin) if quantity in RATES else math.log1p(margin)


def as_share(quantity: Quantity, change: float) -> float:
    """Return the logarithm of a change as a share of the base's value, positive where the head is worse.

    A bound beyond a change by a factor of 10^9, which a few blocks may give at an early look, stays there.
    """
    held = max(-_FURTHEST, min(change, _FURTHEST))
    return -math.expm1(-held) if quantity in RATES else math.expm1(held)


def outcome_of(low: float, high: float, *, margin: float) -> Outcome:
    """Return what an interval of a change says."""
    if low > margin:
        return "worse"
    if high < -margin:
        return "better"
    return "equivalent" if -margin <= low and high <= margin else "inconclusive"


def half_width(spread: float, *, num_blocks: int, tail: float) -> float:
    """Return half the width of an interval over so many blocks of that standard deviation."""
    return float(stats.t.isf(tail, num_blocks - 1)) * spread / math.sqrt(num_blocks)


def smallest_seen(spread: float, *, margin: float, num_blocks: int, tail: float, power: float) -> float:
    """Return the least true change that an interval of so many blocks finds with a chance of `power`.

    All in logarithms.
    """
    error = spread / math.sqrt(num_blocks)
    chance = float(stats.t.isf(1 - power, num_blocks - 1)) * error
    return margin + half_width(spread, num_blocks=num_blocks, tail=tail) + chance


def last_tail(spec: GateSpec, *, num_quantities: int) -> float:
    """Return the error on either side that is left for one quantity at the last look."""
    before = spec.looks[-2] / spec.looks[-1] if len(spec.looks) > 1 else 0.0
    return (spec.alpha - spent(spec.alpha, before)) / num_quantities


def is_decided(finding: Finding) -> bool:
    """Return whether no further look changes what was found."""
    return finding.outcome != "inconclusive"


def kept(before: Mapping[str, Finding], now: Sequence[Finding]) -> dict[str, Finding]:
    """Return findings by name after a look: what an earlier look decided stays decided."""
    decided = {name: finding for name, finding in before.items() if is_decided(finding)}
    return {finding.name: decided.get(finding.name, finding) for finding in now}


def exit_code(findings: Sequence[Finding], spec: GateSpec) -> ExitCode:
    """Return what a gate says to a shell.

    Worse in anything is a regression. Without one, a withheld figure is invalid, and so is a gate that could
    not see what it has to.
    """
    if any(one.outcome == "worse" for one in findings):
        return ExitCode.GATE_REGRESSION
    if any(one.outcome == "withheld" or is_blind(one, spec) for one in findings):
        return ExitCode.INVALID_MEASUREMENT
    return ExitCode.OK


def is_blind(finding: Finding, spec: GateSpec) -> bool:
    """Return whether the slowdown of a step that the gate must see may be there, unseen.

    It is about steps alone: other quantities are noisier, and one that is left open says so itself.
    """
    is_open = finding.quantity == "step_s" and finding.outcome == "inconclusive"
    return is_open and (finding.high is None or finding.high >= spec.must_see)
