"""Rates of groups of prompts: resampled within their groups, one rate a group."""

from __future__ import annotations

import numpy as np
import pytest

from harness.specs.suite import IntervalSpec
from harness.stats import Floats, bootstrap_groups

SPEC = IntervalSpec(level=0.95, num_resamples=500, seed=1)


def ratio(first: Floats, second: Floats) -> Floats:
    return first / second


def test_rates_are_quotients_of_sums() -> None:
    found = bootstrap_groups(ratio, [([1, 3], [1, 1]), ([1, 1, 4], [1, 2, 3])], spec=SPEC)
    assert found.estimate == pytest.approx(2.0 / 1.0) and found.num_prompts == 5
    assert found.low < found.estimate < found.high


def test_prompts_stay_in_their_groups() -> None:
    """Groups without spread within them leave the quotient none, however far apart they lie."""
    found = bootstrap_groups(ratio, [([10] * 5, [1] * 5), ([1] * 9, [1] * 9)], spec=SPEC)
    assert (found.low, found.estimate, found.high) == pytest.approx((10.0, 10.0, 10.0))


def test_the_smallest_group_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    many, few = (rng.uniform(1, 3, size=number) for number in (400, 4))

    def width(values: Floats) -> float:
        found = bootstrap_groups(ratio, [(values, np.ones_like(values)), ([1] * 50, [1] * 50)], spec=SPEC)
        return found.high - found.low

    assert width(few) > 5 * width(many)


def test_a_group_of_one_prompt_bounds_nothing_and_an_empty_one_is_refused() -> None:
    alone = bootstrap_groups(ratio, [([2], [1]), ([1, 1], [1, 1])], spec=SPEC)
    assert (alone.estimate, alone.low, alone.high) == (2.0, -np.inf, np.inf)
    for bad in (([], []), ([1, 2], [1]), (2.0, 1.0), ([[1, 2]], [[1, 1]])):
        with pytest.raises(ValueError, match="a group without prompts or of columns of unlike shapes"):
            bootstrap_groups(ratio, [bad, ([1], [1])], spec=SPEC)
