"""Metrics and comparisons against the known right answers of a made-up record."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.judge.judgement import ArmMetrics, Comparison
from harness.judge.metrics import arm_metrics, comparisons, diagnose, replayed_tokens_per_step
from harness.judge.step_costs import bandwidth_share, separate_costs
from harness.judge.totals import paired_totals, prompt_totals
from harness.records.probes import StepCosts
from harness.records.run import RunRecord
from harness.records.trials import Failure, Generation
from harness.stats import Interval
from harness.tests.fake_record import (
    HEADS_BYTES,
    STEP_S,
    VANILLA_BANDWIDTH_SHARE,
    WEIGHT_BYTES,
    FakeParts,
    node_cost,
    write_fake_record,
)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """A record whose step times are exactly STEP_S."""
    return write_fake_record(tmp_path_factory.mktemp("exact"), jitter=0)


@pytest.fixture(scope="module")
def metrics(exact: RunRecord) -> dict[str, ArmMetrics]:
    return {row.arm: row for row in arm_metrics(exact)}


@pytest.fixture(scope="module")
def compared(exact: RunRecord) -> dict[str, Comparison]:
    return {row.arm: row for row in comparisons(exact)}


def test_counts_come_first(exact: RunRecord, metrics: dict[str, ArmMetrics]) -> None:
    generations = [row for row in exact.generations if row.trial.arm == "typical"]
    row = metrics["typical"]
    assert (row.num_generations, row.num_prompts, row.num_failures) == (16 * 2 * 2, 16, 0)
    assert (row.tokens, row.steps) == (
        sum(g.num_tokens for g in generations),
        sum(g.num_steps for g in generations),
    )
    assert row.acceleration_rate.estimate == pytest.approx((row.tokens - row.num_generations) / row.steps)
    assert row.acceleration_rate.num_prompts == 16


def test_vanilla_yields_one_token_a_step_exactly(metrics: dict[str, ArmMetrics]) -> None:
    rate = metrics["vanilla"].acceleration_rate
    assert (rate.low, rate.estimate, rate.high) == (1, 1, 1)
    assert metrics["vanilla"].step_cost == 1
    assert metrics["vanilla"].num_nodes == 1


def test_a_greedy_arm_yields_what_the_replay_of_its_tree_says(
    exact: RunRecord, metrics: dict[str, ArmMetrics]
) -> None:
    for arm in ("chain", "cartesian", "optimised_64"):
        assert metrics[arm].replayed_tokens_per_step == pytest.approx(metrics[arm].acceleration_rate.estimate)
        assert metrics[arm].calibrated_tokens_per_step == exact.trees[arm].predicted_tokens_per_step
    assert metrics["typical"].replayed_tokens_per_step is None
    assert replayed_tokens_per_step(exact, "vanilla") is None


def test_speed_figures_of_an_arm(metrics: dict[str, ArmMetrics]) -> None:
    row = metrics["optimised_64"]
    assert row.step_p50_s == row.step_p95_s == pytest.approx(STEP_S["optimised_64"])
    assert row.tokens_per_s is not None
    assert row.tokens_per_s.estimate == pytest.approx(row.acceleration_rate.estimate / STEP_S["optimised_64"])
    assert row.first_token_s == pytest.approx(3 * STEP_S["vanilla"])
    wall_s = row.steps * STEP_S["optimised_64"] + row.num_generations * 3 * STEP_S["vanilla"]
    assert row.wall_tokens_per_s == pytest.approx(row.tokens / wall_s)
    assert (row.peak_memory_bytes, row.cache_bytes) == (1_500_000_000, 20_000_000)


def test_speedup_overhead_and_identity(
    metrics: dict[str, ArmMetrics], compared: dict[str, Comparison]
) -> None:
    assert set(compared) == {"chain", "cartesian", "optimised_64", "hf_greedy", "typical", "rejection"}
    for arm, row in compared.items():
        overhead = STEP_S[arm] / STEP_S[row.baseline]
        assert row.overhead.estimate == pytest.approx(overhead)
        assert row.overhead.low == pytest.approx(overhead) == row.overhead.high
        assert row.speedup.estimate == pytest.approx(metrics[arm].acceleration_rate.estimate / overhead)
        assert row.speedup.low <= row.speedup.estimate <= row.speedup.high
        assert row.identity_gap < 1e-12
        assert 1 < row.wall_speedup.estimate < row.speedup.estimate or arm == "hf_greedy"


def test_speedup_pools_the_seeds_and_rounds_of_a_prompt(
    exact: RunRecord, compared: dict[str, Comparison]
) -> None:
    own, base = paired_totals(exact, "typical", baseline="vanilla_sampled", timed=True)
    assert [row.prompt_key for row in own] == [row.prompt_key for row in base]
    assert len(own) == compared["typical"].speedup.num_prompts == 16
    assert all(row.decode_tokens == 2 * 2 * 39 for row in own)


def test_only_shared_prompts_are_paired(tmp_path: Path) -> None:
    """A prompt that failed in one arm leaves the pair, so that an easy prompt cannot count on one side
    only.
    """

    def drop_first_prompt_of_chain(parts: FakeParts) -> None:
        first = parts.outcomes[0].trial.prompt_key
        parts.outcomes = [
            row for row in parts.outcomes if (row.trial.arm, row.trial.prompt_key) != ("chain", first)
        ]

    record = write_fake_record(tmp_path, spoil=drop_first_prompt_of_chain, jitter=0)
    rows = {row.arm: row for row in comparisons(record)}
    assert rows["chain"].speedup.num_prompts == 15
    assert rows["cartesian"].speedup.num_prompts == 16
    assert rows["chain"].identity_gap < 1e-12


def test_invalid_timings_leave_the_times_and_keep_the_counts(tmp_path: Path) -> None:
    def slow_and_marked(parts: FakeParts) -> None:
        parts.edit(
            lambda row: {"timing_valid": False, "step_times_s": (9.0,) * row.num_steps}, arm="chain", limit=3
        )

    record = write_fake_record(tmp_path, spoil=slow_and_marked, jitter=0)
    row = next(row for row in arm_metrics(record) if row.arm == "chain")
    assert row.num_generations == 32
    assert row.step_p95_s == pytest.approx(STEP_S["chain"])
    kept = {key: totals.steps for key, totals in prompt_totals(record, "chain", timed=False).items()}
    timed = {key: totals.steps for key, totals in prompt_totals(record, "chain", timed=True).items()}
    assert sum(kept.values()) > sum(timed.values())


def test_separately_timed_steps(
    exact: RunRecord, metrics: dict[str, ArmMetrics], compared: dict[str, Comparison]
) -> None:
    nodes = metrics["cartesian"].num_nodes
    assert metrics["cartesian"].step_cost == pytest.approx(node_cost(nodes))
    assert compared["cartesian"].separate_overhead == pytest.approx(STEP_S["cartesian"] / STEP_S["vanilla"])
    assert compared["typical"].separate_overhead == pytest.approx(
        STEP_S["typical"] / STEP_S["vanilla_sampled"]
    )
    assert separate_costs(exact, "hf_greedy").step_cost is None


def test_an_arm_without_a_row_takes_the_backbone_time_of_its_size_and_no_overhead(tmp_path: Path) -> None:
    def drop_arm_rows(parts: FakeParts) -> None:
        assert parts.step_costs is not None
        parts.step_costs = StepCosts(costs=tuple(row for row in parts.step_costs.costs if row.arm is None))

    record = write_fake_record(tmp_path, spoil=drop_arm_rows, num_prompts=2)
    costs = separate_costs(record, "optimised_64")
    assert costs.step_cost == pytest.approx(node_cost(64))
    assert costs.overhead is None
    assert separate_costs(record, "chain").step_cost is None  # 6 nodes were not timed


def test_share_of_the_read_bandwidth(exact: RunRecord, metrics: dict[str, ArmMetrics]) -> None:
    assert metrics["vanilla"].bandwidth_share == pytest.approx(VANILLA_BANDWIDTH_SHARE)
    more_bytes = (WEIGHT_BYTES + HEADS_BYTES) / WEIGHT_BYTES
    longer = STEP_S["chain"] / STEP_S["vanilla"]
    assert bandwidth_share(exact, "chain") == pytest.approx(VANILLA_BANDWIDTH_SHARE * more_bytes / longer)


def test_categories(metrics: dict[str, ArmMetrics], compared: dict[str, Comparison]) -> None:
    rows = metrics["chain"].categories
    assert len(rows) == 8
    assert all(row.num_prompts == 2 for row in rows)
    overhead = compared["chain"].overhead.estimate
    for row in rows:
        assert row.speedup == pytest.approx(row.acceleration_rate / overhead)
    assert all(row.speedup is None for row in metrics["vanilla"].categories)


def test_a_suite_without_speed_has_counts_and_no_times(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path, reports_speed=False, num_prompts=4)
    assert comparisons(record) == ()
    for row in arm_metrics(record):
        assert row.acceleration_rate.estimate >= 1
        speeds = (
            row.tokens_per_s,
            row.wall_tokens_per_s,
            row.first_token_s,
            row.step_p50_s,
            row.step_p95_s,
            row.step_cost,
        )
        assert (*speeds, row.bandwidth_share) == (None,) * 7
        assert all(category.speedup is None for category in row.categories)
        assert "no speed is reported" in row.diagnosis


def test_missing_probes_give_none(tmp_path: Path) -> None:
    omit = ["step_costs.json", "device_limits.json", "trace.npz"]
    rows = {row.arm: row for row in arm_metrics(write_fake_record(tmp_path, omit=omit, num_prompts=4))}
    row = rows["optimised_64"]
    assert row.step_cost is row.bandwidth_share is row.replayed_tokens_per_step is None
    assert row.tokens_per_s is not None


def test_an_arm_that_only_failed_has_no_figures_and_the_others_go_on(tmp_path: Path) -> None:
    def fail_chain(parts: FakeParts) -> None:
        for index, row in enumerate(parts.outcomes):
            if row.trial.arm == "chain":
                parts.outcomes[index] = Failure(
                    trial=row.trial, order=row.order, error_type="OutOfMemoryError", message="made up"
                )

    record = write_fake_record(tmp_path, spoil=fail_chain, num_prompts=4)
    rows = {row.arm: row for row in arm_metrics(record)}
    assert (rows["chain"].num_generations, rows["chain"].num_failures) == (0, 8)
    assert rows["chain"].acceleration_rate.estimate != rows["chain"].acceleration_rate.estimate  # nan
    assert rows["chain"].tokens_per_s is None
    assert "chain" not in {row.arm for row in comparisons(record)}
    assert rows["cartesian"].num_generations == 8


def test_a_failure_repeated_with_success_counts_once(tmp_path: Path) -> None:
    def fail_then_succeed(parts: FakeParts) -> None:
        first = parts.outcomes[0]
        assert isinstance(first, Generation)
        parts.outcomes.insert(0, Failure(trial=first.trial, order=0, error_type="OSError", message="made up"))

    record = write_fake_record(tmp_path, spoil=fail_then_succeed, num_prompts=2)
    assert sum(row.num_failures for row in arm_metrics(record)) == 0


def test_intervals_are_the_same_for_the_same_suite_and_differ_with_its_seed(tmp_path: Path) -> None:
    def reseed(parts: FakeParts) -> None:
        parts.suite_text = parts.suite_text.replace("[interval]\n", "[interval]\nseed = 7\n")

    first = comparisons(write_fake_record(tmp_path / "first", num_prompts=8))
    again = comparisons(write_fake_record(tmp_path / "again", num_prompts=8))
    other = comparisons(write_fake_record(tmp_path / "other", spoil=reseed, num_prompts=8))
    assert first == again
    assert (first[0].speedup.low, first[0].speedup.high) != (other[0].speedup.low, other[0].speedup.high)
    assert first[0].speedup.estimate == other[0].speedup.estimate


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
            "slower than vanilla: a step costs 3.10x and yields 1.90 tokens; needs > 3.10 (costly heads and "
            "bookkeeping)",
        ),
        (
            1.9,
            3.1,
            3.0,
            0.8,
            "slower than vanilla: a step costs 3.10x and yields 1.90 tokens; needs > 3.10 (costly "
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
        (2.6, 1.9, 1.8, 0.8, "costly verification: a step costs 1.90x and yields 2.60 tokens"),
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
        speedup_by_medians=rate / overhead,
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


def test_an_arm_that_drafts_nothing_is_not_blamed_for_low_acceptance(metrics: dict[str, ArmMetrics]) -> None:
    assert metrics["hf_greedy"].diagnosis == "another engine, no drafts: a step costs 1.40x"
