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


def test_so_many_prompts_decide_what_is_open_four_times_in_five() -> None:
    """Drawn: 40 prompts whose mean is 1.05 leave it open; as many as are needed show it to be above 1."""
    rng, truth = np.random.default_rng(4), 1.05
    half = 1.96 * SPREAD / math.sqrt(NUM_PROMPTS)
    few = Interval(estimate=truth, low=truth - half, high=truth + half, level=0.95, num_prompts=NUM_PROMPTS)
    asked = Asked(few, 1.0)
    assert asked.kind is VerdictKind.INCONCLUSIVE
    needed = math.ceil(asked.prompts_needed)
    assert 250 < needed < 320, "(1.96 + 0.84)^2 times the spread over the distance, squared, is 282"
    means = truth + SPREAD / math.sqrt(needed) * rng.standard_normal(4000)
    found = np.mean(means - 1.96 * SPREAD / math.sqrt(needed) > 1.0)
    assert abs(found - 0.8) < 0.04
    turned = Asked(few, 1.0, "below")
    assert turned.prompts_needed == asked.prompts_needed, "it would show the contrary as soon"


def test_a_difference_within_its_margin_needs_prompts_by_its_room() -> None:
    half = 0.06
    for estimate, room in ((0.0, 0.05), (-0.02, 0.03), (0.08, 0.03)):
        interval = Interval(
            estimate=estimate, low=estimate - half, high=estimate + half, level=0.9, num_prompts=40
        )
        one = Asked(interval, 0.05, "within")
        alone = Asked(interval, estimate - room)
        assert one.prompts_needed == pytest.approx(alone.prompts_needed)


def test_no_number_of_prompts_decides_a_bound_that_was_hit_or_a_claim_that_is_not_open() -> None:
    def finding(estimate: float, *, kind: VerdictKind = VerdictKind.INCONCLUSIVE) -> Finding:
        interval = Interval(estimate=estimate, low=0.9, high=1.2, level=0.95, num_prompts=16)
        decided = Interval(estimate=3.0, low=2.0, high=4.0, level=0.95, num_prompts=16)
        return Finding(kind, "", "", "measured", asked=(Asked(interval, 1.0), Asked(decided, 1.0)))

    needed = finding(1.05).prompts_needed
    assert needed == math.ceil(finding(1.05).asked[0].prompts_needed), "of the part that is open alone"
    assert finding(1.0).prompts_needed is None and finding(1.0001).prompts_needed is None
    assert finding(1.05, kind=VerdictKind.NOT_REPRODUCED).prompts_needed is None
    exact = Finding(VerdictKind.INCONCLUSIVE, "", "", "computed")
    assert exact.prompts_needed is None
    single = Interval(estimate=2.0, low=-math.inf, high=math.inf, level=0.95, num_prompts=1)
    assert Asked(single, 1.0).prompts_needed == math.inf
