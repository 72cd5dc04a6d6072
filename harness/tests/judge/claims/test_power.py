"""What a sample can tell: chances of a verdict, against frequencies in samples drawn with a known truth."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from harness.judge.claims.findings import Asked, Finding, combined
from harness.judge.judgement import VerdictKind
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, bootstrap_ratio, chance_above, chance_within, least_detected

SPEC = IntervalSpec(level=0.95, num_resamples=400, seed=3)
NUM_PROMPTS, SPREAD = 40, 0.3


def sample(truth: float, rng: np.random.Generator, *, level: float = 0.95) -> Interval:
    """Draw prompts whose mean is the truth, and bound it as every test does."""
    values = truth + SPREAD * rng.standard_normal(NUM_PROMPTS)
    spec = SPEC.model_copy(update={"level": level})
    return bootstrap_ratio(values, np.ones(NUM_PROMPTS), spec=spec, rng=np.random.default_rng(7))


@pytest.mark.parametrize(
    ("side", "bound", "truth"),
    [
        ("above", 1.0, 1.15),
        ("above", 1.0, 1.0),
        ("above", 1.0, 1.05),
        ("below", 1.0, 0.9),
        ("within", 0.15, 0.0),
        ("within", 0.15, 0.15),
        ("within", 0.15, -0.08),
    ],
)
def test_the_chance_is_how_often_samples_say_so(
    side: Literal["above", "below", "within"], bound: float, truth: float
) -> None:
    rng, level = np.random.default_rng(0), 0.9 if side == "within" else 0.95
    drawn = [Asked(sample(truth, rng, level=level), bound, side) for _ in range(300)]
    frequency = np.mean([one.kind is VerdictKind.REPRODUCED for one in drawn])
    told = np.mean([one.chance(truth) for one in drawn])
    assert abs(frequency - told) < 0.07
    if truth == bound:
        assert frequency < 0.09 and told < 0.06


def test_the_least_effect_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(1)
    least = np.mean([least_detected(sample(1.0, rng), bound=1.0) for _ in range(20)])
    drawn = [Asked(sample(float(least), rng), 1.0) for _ in range(300)]
    assert abs(np.mean([one.kind is VerdictKind.REPRODUCED for one in drawn]) - 0.8) < 0.08
    below = Asked(drawn[0].interval, 2.0, "below")
    assert chance_above(drawn[0].interval, bound=1.0, truth=drawn[0].least) == pytest.approx(0.8)
    assert below.chance(below.least) == pytest.approx(0.8) and below.least < 2.0


def test_a_single_prompt_finds_nothing_and_one_without_spread_all() -> None:
    alone = Interval(estimate=2.0, low=-math.inf, high=math.inf, level=0.95, num_prompts=1)
    assert Asked(alone, 1.0).chance(100.0) == 0 and Asked(alone, 1.0).least == math.inf
    assert chance_above(alone, bound=1.0, truth=100.0) == chance_within(alone, margin=9.0, truth=0.0) == 0
    exact = Interval(estimate=2.0, low=2.0, high=2.0, level=0.95, num_prompts=9)
    assert Asked(exact, 1.0).chance(1.01) == 1 and Asked(exact, 1.0).chance(1.0) == 0
    flat = exact.model_copy(update={"level": 0.9})
    assert Asked(flat, 0.1, "within").chance(0.0) == 1 and Asked(flat, 0.1, "within").chance(0.1) == 0


def test_power_names_the_papers_size_where_it_is_stated_and_multiplies_chances() -> None:
    interval = sample(1.2, np.random.default_rng(2))
    part = Finding(VerdictKind.REPRODUCED, "", "", "measured", asked=(Asked(interval, 1.0),))
    both = combined([part, part])
    chance = Asked(interval, 1.0).chance(1.15)
    assert 0.2 < chance < 0.98
    assert part.power((1.15,)).startswith(f"{100 * chance:.0f} % at the paper's size; ")
    assert both.power((1.15, 1.15)).startswith(f"{100 * chance**2:.0f} % at the paper's size; ")
    assert part.power().startswith(f"80 % from {Asked(interval, 1.0).least:.3g}; ")
    assert part.power().endswith("% at the bound")
    assert 0 < Asked(interval, 1.0).chance(0.9) < 0.01 and 0.99 < Asked(interval, 1.0).chance(1.3) < 1
    assert part.power((0.9,)).startswith("< 1 %") and part.power((1.3,)).startswith("> 99 %")
    exact = Finding(VerdictKind.REPRODUCED, "", "", "computed")
    assert exact.power((2.0,)) == ""
