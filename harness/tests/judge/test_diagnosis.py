"""The line that says why an arm is as fast as it is."""

from __future__ import annotations

import pytest

from harness.judge.diagnosis import diagnose
from harness.judge.judgement import Comparison
from harness.stats import Interval


def an_interval(estimate: float) -> Interval:
    return Interval(estimate=estimate, low=estimate, high=estimate, level=0.95, num_prompts=16)


@pytest.mark.parametrize(
    ("rate", "overhead", "step_cost", "baseline_share", "line"),
    [
        (
            1.9,
            3.1,
            1.2,
            0.8,
            "slower than vanilla: a step costs 3.10x and yields 1.90 tokens; needs > 3.10 (dear heads and "
            "bookkeeping)",
        ),
        (
            1.9,
            3.1,
            3.0,
            0.8,
            "slower than vanilla: a step costs 3.10x and yields 1.90 tokens; needs > 3.10 (dear "
            "verification)",
        ),
        (
            1.1,
            1.2,
            1.1,
            0.8,
            "slower than vanilla: a step costs 1.20x and yields 1.10 tokens; needs > 1.20 (low acceptance)",
        ),
        (1.2, 1.1, 1.1, 0.8, "low acceptance: a step costs 1.10x and yields 1.20 tokens"),
        (2.6, 1.9, 1.8, 0.8, "dear verification: a step costs 1.90x and yields 2.60 tokens"),
        (2.6, 1.1, 1.05, 0.2, "slow baseline: a step costs 1.10x and yields 2.60 tokens"),
        (2.6, 1.2, 1.1, 0.8, "balanced: a step costs 1.20x and yields 2.60 tokens"),
        (2.6, 1.2, None, None, "balanced: a step costs 1.20x and yields 2.60 tokens"),
    ],
)
def test_diagnosis(
    rate: float, overhead: float, step_cost: float | None, baseline_share: float | None, line: str
) -> None:
    comparison = Comparison(
        arm="medusa",
        baseline="vanilla",
        speedup=an_interval(rate / overhead),
        wall_speedup=an_interval(rate / overhead),
        overhead=an_interval(overhead),
        separate_overhead=None,
        identity_gap=0,
    )
    found = diagnose(
        acceleration_rate=rate,
        comparison=comparison,
        drafts=True,
        step_cost=step_cost,
        bandwidth_share=None,
        baseline_bandwidth_share=baseline_share,
    )
    assert found == line


@pytest.mark.parametrize(
    ("share", "words"), [(0.2, "slow baseline: reads its weights at 20%"), (0.8, "memory-bound baseline")]
)
def test_diagnosis_of_a_baseline(share: float, words: str) -> None:
    line = diagnose(
        acceleration_rate=1,
        comparison=None,
        drafts=False,
        step_cost=1,
        bandwidth_share=share,
        baseline_bandwidth_share=None,
    )
    assert line.startswith(words)
