"""Figures of arms against sums over the raw generations, formed here in another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from harness.judge.metrics import arm_metrics, compare, comparisons, original_baseline
from harness.judge.totals import (
    PromptTotals,
    column,
    has_steps,
    paired_totals,
    prompt_totals,
    ratio_of_sums,
    timed_generations,
)
from harness.records.run import RunRecord
from harness.records.trials import Generation
from harness.stats import Interval, bootstrap_ratio_of_ratios
from harness.tests.fake_record import STEP_S, FakeParts, write_fake_record


def uneven(parts: FakeParts) -> None:
    """Make lengths, step times and prefills differ from trial to trial, and one timing invalid."""
    number = iter(range(100_000))

    def change(one: Generation) -> dict[str, Any]:
        index = next(number)
        cut = 1 + index % 5 if one.trial.arm in ("typical", "vanilla_sampled") else 0
        steps = one.step_tokens[: len(one.step_tokens) - cut]
        return {
            "step_tokens": steps,
            "token_ids": one.token_ids[: 1 + sum(steps)],
            "step_times_s": tuple(0.01 + 0.001 * ((7 * index + step) % 23) for step in range(len(steps))),
            "prefill_s": 0.02 + 0.005 * (index % 11),
            "peak_memory_bytes": 1000 + index if index % 3 else None,
            "cache_bytes": 5000 - index,
            "timing_valid": index % 7 != 3,
        }

    parts.edit(change)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return write_fake_record(tmp_path_factory.mktemp("uneven"), rounds=2, num_prompts=8, spoil=uneven)


def of(record: RunRecord, arm: str, *, timed: bool) -> list[Generation]:
    return [one for one in record.generations if one.trial.arm == arm and (one.timing_valid or not timed)]


def rate(
    rows: Sequence[Generation], top: Callable[[Generation], float], per: Callable[[Generation], float]
) -> float:
    return math.fsum(map(top, rows)) / math.fsum(map(per, rows))


def decoded(one: Generation) -> float:
    return len(one.token_ids) - 1


def decode_s(one: Generation) -> float:
    return math.fsum(one.step_times_s)


def wall_s(one: Generation) -> float:
    return one.prefill_s + math.fsum(one.step_times_s)


def num_steps(one: Generation) -> float:
    return len(one.step_times_s)


def num_tokens(one: Generation) -> float:
    return len(one.token_ids)


@pytest.mark.parametrize("arm", ["typical", "chain", "hf_greedy", "vanilla_sampled"])
def test_figures_are_ratios_of_sums_over_generations(record: RunRecord, arm: str) -> None:
    """The 95th percentile was once taken at 0.90, and every step of the made-up record took as long."""
    row = next(one for one in arm_metrics(record) if one.arm == arm)
    every, timed = of(record, arm, timed=False), of(record, arm, timed=True)
    assert len(every) > len(timed) > 0
    assert (row.tokens, row.steps) == (sum(map(num_tokens, every)), sum(map(num_steps, every)))
    assert row.acceleration_rate.estimate == pytest.approx(rate(every, decoded, num_steps))
    assert row.tokens_per_s is not None
    assert row.tokens_per_s.estimate == pytest.approx(rate(timed, decoded, decode_s))
    assert row.wall_tokens_per_s == pytest.approx(rate(timed, num_tokens, wall_s))
    times = sorted(time for one in timed for time in one.step_times_s)
    prefills = sorted(one.prefill_s for one in timed)
    assert row.step_p50_s == pytest.approx(np.percentile(times, 50, method="linear"))
    assert row.step_p95_s == pytest.approx(np.percentile(times, 95, method="linear"))
    assert row.step_p95_s != pytest.approx(np.percentile(times, 90, method="linear"))
    assert row.first_token_s == pytest.approx(np.percentile(prefills, 50))
    assert row.peak_memory_bytes == max(one.peak_memory_bytes or 0 for one in every)
    assert row.cache_bytes == max(one.cache_bytes or 0 for one in every)


@pytest.mark.parametrize("arm", ["typical", "chain", "hf_greedy"])
def test_speedups_are_ratios_of_rates_each_on_its_clock(record: RunRecord, arm: str) -> None:
    """The wall speedup counts every kept token: the clock runs while the prefill makes the first."""
    row = next(one for one in comparisons(record) if one.arm == arm)
    own, base = (of(record, name, timed=True) for name in (arm, row.baseline))
    speedup = rate(own, decoded, decode_s) / rate(base, decoded, decode_s)
    overhead = rate(own, decode_s, num_steps) / rate(base, decode_s, num_steps)
    assert row.speedup.estimate == pytest.approx(speedup)
    assert row.wall_speedup.estimate == pytest.approx(
        rate(own, num_tokens, wall_s) / rate(base, num_tokens, wall_s)
    )
    assert row.overhead.estimate == pytest.approx(overhead)
    assert row.identity_gap < 1e-12


def test_the_wall_speedup_of_other_tokens_is_another(record: RunRecord) -> None:
    row = next(one for one in comparisons(record) if one.arm == "typical")
    own, base = (of(record, name, timed=True) for name in ("typical", "vanilla_sampled"))
    without_first = rate(own, decoded, wall_s) / rate(base, decoded, wall_s)
    assert abs(row.wall_speedup.estimate / without_first - 1) > 1e-6


def test_the_gap_of_the_identity_is_relative(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an overhead told twice as large, the identity misses half of the speedup."""

    def doubled(*args: Any, **options: Any) -> Interval:
        found = bootstrap_ratio_of_ratios(*args, **options)
        is_overhead = args[0].max() < 20  # seconds, where the others begin with tokens
        return found.model_copy(update={"estimate": found.estimate * (2 if is_overhead else 1)})

    monkeypatch.setattr("harness.judge.metrics.bootstrap_ratio_of_ratios", doubled)
    found = compare(record, "chain", baseline="vanilla")
    assert found is not None and found.identity_gap == pytest.approx(0.5)


def test_the_identity_holds_over_a_baseline_that_drafts(record: RunRecord) -> None:
    """Over vanilla, whose rate is 1, it would hold with the baseline's rate left out."""
    for arm, baseline in (("chain", "cartesian"), ("cartesian", "chain")):
        found = compare(record, arm, baseline=baseline)
        assert found is not None and found.identity_gap < 1e-12
        own, base = (of(record, name, timed=True) for name in (arm, baseline))
        assert rate(base, decoded, num_steps) > 1.1
        assert found.speedup.estimate == pytest.approx(
            rate(own, decoded, decode_s) / rate(base, decoded, decode_s)
        )


def test_separate_overheads_belong_to_the_arms_own_baseline(record: RunRecord) -> None:
    own, other = (compare(record, "chain", baseline=name) for name in ("vanilla", "vanilla_sampled"))
    assert own is not None and other is not None
    assert own.separate_overhead == pytest.approx(STEP_S["chain"] / STEP_S["vanilla"])
    assert other.separate_overhead is None


@pytest.mark.parametrize("arm", ["typical", "chain"])
def test_categories_are_ratios_of_sums_too(record: RunRecord, arm: str) -> None:
    row = next(one for one in arm_metrics(record) if one.arm == arm)
    baseline = {"typical": "vanilla_sampled", "chain": "vanilla"}[arm]
    assert len(row.categories) == 8
    for category in row.categories:
        every, own, base = (
            [one for one in of(record, name, timed=timed) if one.category == category.category]
            for name, timed in ((arm, False), (arm, True), (baseline, True))
        )
        assert category.num_prompts == len({one.trial.prompt_key for one in every}) == 1
        assert category.acceleration_rate == pytest.approx(rate(every, decoded, num_steps))
        assert category.speedup == pytest.approx(rate(own, decoded, decode_s) / rate(base, decoded, decode_s))
    vanilla = next(one for one in arm_metrics(record) if one.arm == "vanilla")
    assert [one.speedup for one in vanilla.categories] == [None] * 8


def test_totals_of_an_arm_are_those_of_its_generations_alone(record: RunRecord) -> None:
    for arm in ("hf_greedy", "chain"):
        for timed in (False, True):
            rows = of(record, arm, timed=timed)
            totals = prompt_totals(record, arm, timed=timed)
            assert list(totals) == sorted({one.trial.prompt_key for one in rows})
            for key, total in totals.items():
                mine = [one for one in rows if one.trial.prompt_key == key]
                assert (total.prompt_key, total.category) == (key, mine[0].category)
                assert total.kept_tokens == sum(map(num_tokens, mine))
                assert total.decode_tokens == sum(map(decoded, mine))
                assert total.steps == sum(map(num_steps, mine))
                assert total.decode_s == pytest.approx(math.fsum(map(decode_s, mine)))
                assert total.wall_s == pytest.approx(math.fsum(map(wall_s, mine)))
        assert timed_generations(record, arm) == of(record, arm, timed=True)
    own, base = paired_totals(record, "chain", baseline="vanilla", timed=True)
    assert [one.prompt_key for one in own] == [one.prompt_key for one in base]


def test_sums_over_nothing_have_no_ratio() -> None:
    assert ratio_of_sums([3, 4], [2.0]) == 3.5
    assert ratio_of_sums([3.0], [0.0]) is ratio_of_sums([], []) is None
    none = PromptTotals("p", None, kept_tokens=1, decode_tokens=0, steps=0, decode_s=0.0, wall_s=1.0)
    one = PromptTotals("q", None, kept_tokens=3, decode_tokens=2, steps=1, decode_s=0.5, wall_s=1.5)
    assert [has_steps(totals) for totals in ([], [none], [none, one])] == [False, False, True]
    assert column([none, one], "decode_tokens").tolist() == [0.0, 2.0]


def test_a_tuned_arm_is_held_against_the_original_of_its_own_temperature(record: RunRecord) -> None:
    """A greedy arm against sampled vanilla would be told a speedup of another task."""
    suite = record.suite
    for name, baseline in (
        ("chain", "vanilla"),
        ("typical", "vanilla_sampled"),
        ("rejection", "vanilla_sampled"),
    ):
        found = original_baseline(record, suite.arm(name))
        assert found is not None and found.name == baseline
    rule = suite.arm("typical").acceptance
    assert rule is not None
    warm = suite.arm("typical").model_copy(
        update={"acceptance": rule.model_copy(update={"temperature": 0.3})}
    )
    assert warm.sampling_temperature == 0.3 and original_baseline(record, warm) is None


def test_only_vanilla_on_the_original_backbone_is_a_second_baseline(record: RunRecord) -> None:
    suite = record.suite
    tuned = [
        arm.model_copy(update={"backbone": "tuned"}) if arm.name == "vanilla" else arm for arm in suite.arms
    ]
    other = SimpleNamespace(suite=suite.model_copy(update={"arms": tuple(tuned)}))
    assert original_baseline(cast(RunRecord, other), suite.arm("chain")) is None
