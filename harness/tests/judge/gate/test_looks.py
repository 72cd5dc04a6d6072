"""How a gate's error is divided, what an interval says, and what the shell hears."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.errors import ExitCode
from harness.judge.gate.looks import (
    as_share,
    bounds,
    exit_code,
    half_width,
    kept,
    last_tail,
    log_margin,
    outcome_of,
    smallest_seen,
    spent,
)
from harness.records.gate.record import Finding, Outcome
from harness.specs.gate import Quantity
from harness.tests.fake_gate import spec_of


def finding(outcome: Outcome, *, quantity: Quantity = "step_s", high: float | None = 0.01) -> Finding:
    return Finding(
        quantity=quantity,
        arm="tree",
        base=1.0,
        head=1.0,
        change=0.0,
        low=None if high is None else -0.01,
        high=high,
        margin=0.025,
        outcome=outcome,
    )


def test_all_of_the_error_is_spent_at_the_end_little_before() -> None:
    """O'Brien and Fleming at alpha 0.05: 2 - 2 Phi(1.95996 sqrt 2) is 0.0056 at half of the blocks."""
    assert spent(0.05, 0) == 0 and spent(0.05, 1) == 0.05 and spent(0.05, 1.2) == 0.05
    assert spent(0.05, 0.5) == pytest.approx(0.00557, abs=5e-5)
    shares = [spent(0.01, share) for share in (0.1, 0.3, 0.6, 0.9, 1)]
    assert shares == sorted(shares) and shares[0] < 1e-12
    spec = spec_of((8, 16, 24), alpha=0.01)
    assert last_tail(spec, num_quantities=5) == pytest.approx((0.01 - spent(0.01, 16 / 24)) / 5)
    assert last_tail(spec_of((8,), alpha=0.01), num_quantities=1) == 0.01


def test_bounds_leave_the_tail_on_either_side_and_cover_at_their_rate() -> None:
    """20,000 samples of 8 normal blocks: 1 % lie beyond each bound, give or take 4 standard errors."""
    values = np.random.default_rng(1).normal(0.3, 2, (20_000, 8))
    mean, low, high = bounds(values, tail=0.01)
    assert mean == pytest.approx(values.mean(1)) and np.allclose(high - mean, mean - low)
    for missed in (low > 0.3, high < 0.3):
        assert missed.mean() == pytest.approx(0.01, abs=4 * math.sqrt(0.01 * 0.99 / 20_000))


def test_heavy_tails_of_blocks_miss_no_more_often() -> None:
    values = np.random.default_rng(2).standard_t(2, (20_000, 8))
    _, low, high = bounds(values, tail=0.01)
    assert (low > 0).mean() < 0.01 and (high < 0).mean() < 0.01


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.021, 0.2, "worse"),
        (0.02, 0.2, "inconclusive"),
        (-0.02, 0.02, "equivalent"),
        (-0.021, 0.02, "inconclusive"),
        (-0.02, 0.021, "inconclusive"),
        (-0.1, -0.021, "better"),
        (-0.1, -0.02, "inconclusive"),
    ],
)
def test_what_an_interval_says(low: float, high: float, outcome: str) -> None:
    assert outcome_of(low, high, margin=0.02) == outcome


@pytest.mark.parametrize("quantity", ["step_s", "overhead", "step_cost", "speedup", "tokens_per_s"])
def test_a_margin_and_a_change_are_the_same_share(quantity: Quantity) -> None:
    """5 % more seconds and 5 % fewer tokens a second are not one logarithm, and each is its own margin."""
    assert as_share(quantity, log_margin(quantity, 0.05)) == pytest.approx(0.05)
    lost = quantity in ("speedup", "tokens_per_s")
    for far in (1e4, -1e4, math.inf, -math.inf):
        assert math.isfinite(as_share(quantity, far))
    assert as_share(quantity, math.log(2)) == pytest.approx(0.5 if lost else 1.0)


def test_the_smallest_change_seen_is_seen_at_that_rate() -> None:
    """4,000 samples of 24 blocks: found in 95 %, with 3 standard errors and what t leaves of the normal."""
    spread, tail = 0.02, 1e-3
    seen = smallest_seen(spread, margin=0.02, num_blocks=24, tail=tail, power=0.95)
    values = np.random.default_rng(4).normal(seen, spread, (4000, 24))
    _, low, _ = bounds(values, tail=tail)
    assert (low > 0.02).mean() == pytest.approx(0.95, abs=0.02)
    assert half_width(spread, num_blocks=24, tail=tail) < seen - 0.02


def test_what_a_look_decided_stays_decided() -> None:
    first, then = finding("worse"), finding("equivalent")
    assert kept({first.name: first}, [then]) == {first.name: first}
    open_ = finding("inconclusive")
    assert kept({open_.name: open_}, [then]) == {open_.name: then}
    assert kept({}, [then]) == {then.name: then}


def test_exit_codes_say_worse_first_then_what_could_not_be_seen() -> None:
    spec = spec_of(must_see=0.05)
    fine, worse, gone = finding("equivalent"), finding("worse"), finding("withheld", high=None)
    assert exit_code([fine, finding("better")], spec) == ExitCode.OK
    assert exit_code([gone, worse, fine], spec) == ExitCode.GATE_REGRESSION
    assert exit_code([gone, fine], spec) == ExitCode.INVALID_MEASUREMENT
    assert exit_code([fine, finding("inconclusive", high=0.049)], spec) == ExitCode.OK
    assert exit_code([fine, finding("inconclusive", high=0.05)], spec) == ExitCode.INVALID_MEASUREMENT
    assert exit_code([fine, finding("equivalent", high=0.05)], spec) == ExitCode.OK
    noisy = finding("inconclusive", quantity="step_cost", high=0.3)
    assert exit_code([fine, noisy], spec) == ExitCode.OK
