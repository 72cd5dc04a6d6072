"""Steps in a series: a planted one is found where it is, and noise shows one as rarely as promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from harness.judge.history.steps import (
    FALSE_ALARM,
    LEAST_RECORDS,
    MOST_RECORDS,
    Step,
    _most_gained,
    exact_steps,
    noise_of,
    noisy_steps,
    penalty_of,
)


def noise(rng: np.random.Generator, length: int, *, share: float, tails: float = 4) -> list[float]:
    """A series around 50 whose noise is a share of it, as heavy in its tails as Student's t."""
    return list(50 * np.exp(share * rng.standard_t(tails, size=length)))


def test_a_planted_step_is_found_at_its_place_with_its_size() -> None:
    """By hand: 10.0 and 10.1 in turns, from the sixth on a fifth more; geometric means of five each."""
    values = [10.0, 10.1, 10.0, 10.1, 10.0, 12.0, 12.12, 12.0, 12.12, 12.0]
    (step,) = noisy_steps(values)
    before = (10.0**3 * 10.1**2) ** (1 / 5)
    assert step.index == 5
    assert step.before == pytest.approx(before) and step.after == pytest.approx(1.2 * before)
    assert step.ratio == pytest.approx(1.2)


def test_two_planted_steps_are_found() -> None:
    level = [1.0] * 8 + [1.3] * 8 + [0.9] * 8
    values = [one * (1 + 0.004 * (-1) ** index) for index, one in enumerate(level)]
    assert [step.index for step in noisy_steps(values)] == [8, 16]


def test_a_last_record_alone_can_be_a_step() -> None:
    values = [50.0, 50.2, 49.9, 50.1, 50.0, 49.8, 50.1, 50.0, 49.9, 40.0]
    assert [step.index for step in noisy_steps(values)] == [9]


@pytest.mark.parametrize("length", [LEAST_RECORDS, 8, 20])
@pytest.mark.parametrize("tails", [4, 1000])
def test_noise_shows_a_step_as_rarely_as_the_penalty_says(length: int, tails: float) -> None:
    """400 series each: were the rate 1 in 100, more than 11 alarms would come in 1 of 500 such tests."""
    rng = np.random.default_rng(length)
    alarms = sum(bool(noisy_steps(noise(rng, length, share=0.02, tails=tails))) for _ in range(400))
    most = int(stats.binom.isf(1 / 500, 400, FALSE_ALARM))
    assert alarms <= most == 11


def test_a_lower_penalty_would_cry_wolf(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with BIC's penalty, twice the logarithm of the length, four in ten alarm."""
    monkeypatch.setattr("harness.judge.history.steps.penalty_of", lambda length: 2 * math.log(length))
    rng = np.random.default_rng(20)
    assert sum(bool(noisy_steps(noise(rng, 20, share=0.02))) for _ in range(400)) > 140


def test_a_step_of_ten_times_the_noise_is_found_among_twelve_records() -> None:
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(200):
        values = np.array(noise(rng, 12, share=0.01, tails=1000))
        values[6:] *= math.exp(0.1)
        found += [step.index for step in noisy_steps(list(values))] == [6]
    assert found >= 190


def test_the_penalty_is_the_same_whenever_it_is_asked_for() -> None:
    first = penalty_of(9)
    penalty_of.cache_clear()
    assert penalty_of(9) == first


def test_too_few_records_are_not_searched() -> None:
    assert noisy_steps([1.0, 1.0, 2.0, 2.0]) == ()
    assert noisy_steps([]) == ()
    assert [step.index for step in noisy_steps([1.0, 1.0, 1.0, 2.0, 2.0])] == [3]


def test_the_newest_records_alone_are_searched() -> None:
    old = [1.0] * 10
    assert noisy_steps([*old, *[2.0] * MOST_RECORDS]) == ()
    assert [step.index for step in noisy_steps([*old, *[2.0] * (MOST_RECORDS - 10)])] == [10]


def test_noise_is_read_from_neighbours_and_is_never_nothing() -> None:
    """By hand: |differences| 0.02, 0.04, 1, 0.04, 0.02, whose median is 0.04."""
    logs = np.array([0.0, 0.02, 0.06, 1.06, 1.10, 1.12])
    assert noise_of(logs) == pytest.approx(0.04 / (0.6745 * math.sqrt(2)))
    assert noise_of(np.zeros(6)) == 1e-3
    assert noisy_steps([100.0, 100.0, 100.0, 100.02, 100.02, 100.02]) == ()


def test_exact_figures_step_at_every_change() -> None:
    assert exact_steps([1.5, 1.5, 1.6, 1.6, 1.6, 1.5]) == (Step(2, 1.5, 1.6), Step(5, 1.6, 1.5))
    assert exact_steps([1.5, 1.5 * (1 + 1e-12)]) == () == exact_steps([2.0]) == exact_steps([])
    assert exact_steps([0.0, 2.0]) == (Step(1, 0.0, 2.0),)
    assert Step(1, 0.0, 2.0).ratio == math.inf


def test_penalties_are_those_that_were_looked_at() -> None:
    """Of `python -c "from harness.judge.history.steps import *; print(penalty_of(10))"` and so on."""
    found = [penalty_of(length) for length in (5, 10, 20)]
    assert found == pytest.approx([45.5, 55.4, 43.2], rel=0.01)


@pytest.mark.parametrize(("share", "is_found"), [(1.02, True), (0.98, False)])
def test_a_step_is_found_where_its_gain_is_above_the_penalty(share: float, is_found: bool) -> None:
    """By hand: logarithms 0 and d in turns, so that the median difference is d; five of ten are shifted by s.

    The gain of that cut is 5 * 5 / 10 * m^2 over the squared noise, where means lie m apart, here s + d / 5.
    """
    noise_sd = 0.01 / (0.6745 * math.sqrt(2))
    shift = math.sqrt(share * penalty_of(10) / 2.5) * noise_sd - 0.01 / 5
    logs = np.array([0.0, 0.01] * 5) + np.array([0.0] * 5 + [shift] * 5)
    assert noise_of(logs) == pytest.approx(noise_sd)
    assert [step.index for step in noisy_steps(list(np.exp(logs)))] == ([5] if is_found else [])


def test_three_cuts_may_gain_more_than_fewer() -> None:
    """By hand: levels 0, 5, 0, 5 over 2, 6, 6, 2 values. Three cuts explain all 100 squares, 33.3 a cut; two
    explain 62.5 at most and one 25. The values swing by 0.1 to either side, so that their noise is known.
    """
    swing = 0.1 * np.resize([1.0, -1.0], 16)
    series = np.repeat([0.0, 5.0, 0.0, 5.0], [2, 6, 6, 2]) + swing
    noise = 0.2 / (0.6745 * np.sqrt(2))
    (gained,) = _most_gained(series[None])
    assert gained * noise**2 == pytest.approx(100 / 3, rel=0.02)
