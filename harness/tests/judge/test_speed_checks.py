"""Each check that guards a speed passes on a sound record and fails on one whose clock was wrong.

The defects were planted in whole records once, and every check that there was passed: vanilla's times
doubled, heads left out of the clock, a pause in the Medusa arms, a rejection arm with typical's texts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from harness.judge.checks import run_checks
from harness.judge.judgement import CheckOutcome, CheckStatus
from harness.judge.step_costs import paired, priced
from harness.records.probes import StepCosts
from harness.records.run import RunRecord
from harness.records.trials import Generation
from harness.tests.fake_record import (
    BACKBONE_ONE_NODE_S,
    PROCESSOR_SHARE,
    FakeParts,
    node_cost,
    write_fake_record,
)

NUM_PROMPTS = 8
OWN_PART_S = 0.0016  # what heads and our own code add to the backbone's step of any tree
NAMES = (
    "steps_as_timed_apart",
    "steps_as_priced",
    "heads_are_timed",
    "profile_adds_up",
    "vanilla_is_least",
    "vanilla_against_generate",
    "processor_busy",
)
DRAFTING = ("chain", "cartesian", "optimised_64", "typical", "rejection")
GREEDY_DRAFTING = DRAFTING[:3]
Spoiler = Callable[[FakeParts], object]


def priced_record(folder: Path, *, spoil: Spoiler | None = None, num_prompts: int = NUM_PROMPTS) -> RunRecord:
    """Write a fake record whose step costs price whole steps too, and return it."""

    def price(parts: FakeParts) -> None:
        assert parts.step_costs is not None
        rows = (
            row.model_copy(update={"step_s": tuple(time + OWN_PART_S for time in row.backbone_s)})
            if row.arm is None and row.num_nodes > 1
            else row
            for row in parts.step_costs.costs
        )
        parts.step_costs = StepCosts(costs=tuple(rows))
        if spoil is not None:
            spoil(parts)

    return write_fake_record(folder, spoil=price, num_prompts=num_prompts)


def outcomes(record: RunRecord) -> dict[str, CheckOutcome]:
    return {outcome.name: outcome for outcome in run_checks(record)}


def failed(record: RunRecord) -> set[str]:
    return {name for name, outcome in outcomes(record).items() if outcome.status is CheckStatus.FAILED}


def scale_steps(parts: FakeParts, arms: Collection[str], factor: float) -> None:
    """Multiply every decoding step of some arms, processor time with it."""

    def scaled(row: Generation) -> dict[str, object]:
        times = tuple(factor * time for time in row.step_times_s)
        return {"step_times_s": times, "processor_s": PROCESSOR_SHARE * (row.prefill_s + sum(times))}

    for arm in arms:
        parts.edit(scaled, arm=arm)


def scale_apart(parts: FakeParts, arms: Collection[str | None], factor: float, *, sizes: int = 1000) -> None:
    """Multiply the separately timed steps of some arms, backbone and all."""
    assert parts.step_costs is not None
    parts.step_costs = StepCosts(
        costs=tuple(
            row.model_copy(
                update={
                    "backbone_s": tuple(factor * time for time in row.backbone_s),
                    "step_s": tuple(factor * time for time in row.step_s),
                }
            )
            if row.arm in arms and row.num_nodes <= sizes
            else row
            for row in parts.step_costs.costs
        )
    )


def change_profile(
    parts: FakeParts, arms: Collection[str], *, step: float = 1.0, heads: float = 1.0, backbone: float = 1.0
) -> None:
    assert parts.profile is not None
    rows = (
        row.model_copy(
            update={
                "step_s": step * row.step_s,
                "heads_s": heads * row.heads_s,
                "backbone_s": backbone * row.backbone_s,
            }
        )
        if row.arm in arms
        else row
        for row in parts.profile.rows
    )
    parts.profile = parts.profile.model_copy(update={"rows": tuple(rows)})


VANILLA = ("vanilla", "vanilla_sampled")


def double_decoding(parts: FakeParts) -> None:
    scale_steps(parts, VANILLA, 2.0)


def double_decoding_and_apart(parts: FakeParts) -> None:
    double_decoding(parts)
    scale_apart(parts, VANILLA, 2.0)


def double_vanilla_everywhere(parts: FakeParts) -> None:
    """In step costs too, so that nothing but other arms knows better."""
    double_decoding_and_apart(parts)
    scale_apart(parts, (None,), 2.0, sizes=1)
    change_profile(parts, ("vanilla",), step=2.0, backbone=2.03)


def halve_medusa(parts: FakeParts) -> None:
    scale_steps(parts, DRAFTING, 0.5)


def leave_heads_out(parts: FakeParts) -> None:
    """Leave the heads out of every clock, so that a step is its backbone and a little."""
    assert parts.step_costs is not None
    parts.step_costs = StepCosts(
        costs=tuple(
            row.model_copy(update={"step_s": tuple(time + 0.2 * OWN_PART_S for time in row.backbone_s)})
            if row.arm in DRAFTING
            else row
            for row in parts.step_costs.costs
        )
    )
    scale_steps(parts, DRAFTING, 0.95)


def leave_heads_out_of_the_profile(parts: FakeParts) -> None:
    change_profile(parts, GREEDY_DRAFTING, step=0.96)


def take_no_time_for_heads(parts: FakeParts) -> None:
    change_profile(parts, ("chain",), heads=0.0, backbone=1.04)


def pause_in_medusa(parts: FakeParts) -> None:
    """A pause of 3 % in every Medusa step, decoded, timed apart and profiled; the processor rests."""

    def paused(row: Generation) -> dict[str, object]:
        return {"step_times_s": tuple(1.03 * time for time in row.step_times_s)}

    for arm in DRAFTING:
        parts.edit(paused, arm=arm)
    scale_apart(parts, DRAFTING, 1.03)


def pause_outside_of_parts(parts: FakeParts) -> None:
    """The same pause where the processor spins while it waits: no part of the step explains it."""
    assert parts.step_costs is not None
    scale_steps(parts, DRAFTING, 1.025)
    rows = (
        row.model_copy(update={"step_s": tuple(1.025 * time for time in row.step_s)})
        if row.arm in DRAFTING
        else row
        for row in parts.step_costs.costs
    )
    parts.step_costs = StepCosts(costs=tuple(rows))
    change_profile(parts, GREEDY_DRAFTING, step=1.025)


def wait_in_every_arm(parts: FakeParts) -> None:
    parts.edit(lambda row: {"processor_s": 0.6 * row.wall_s})


def typical_texts(parts: FakeParts) -> None:
    texts = {
        (row.trial.prompt_key, row.trial.seed): row
        for row in parts.outcomes
        if isinstance(row, Generation) and row.trial.arm == "typical"
    }

    def copied(row: Generation) -> dict[str, object]:
        other = texts[row.trial.prompt_key, row.trial.seed]
        times = (row.step_times_s[0],) * other.num_steps
        return {
            "token_ids": other.token_ids,
            "step_tokens": other.step_tokens,
            "step_times_s": times,
            "processor_s": PROCESSOR_SHARE * (row.prefill_s + sum(times)),
        }

    parts.edit(copied, arm="rejection")


# Of each planted defect, the checks that fail for it and no others.
PLANTED: tuple[tuple[Spoiler, set[str]], ...] = (
    (
        double_decoding,
        {"steps_as_timed_apart", "steps_as_priced", "vanilla_is_least", "vanilla_against_generate"},
    ),
    (double_decoding_and_apart, {"steps_as_priced", "vanilla_is_least", "vanilla_against_generate"}),
    (double_vanilla_everywhere, {"vanilla_is_least", "vanilla_against_generate"}),
    (halve_medusa, {"steps_as_timed_apart", "steps_as_priced", "vanilla_is_least"}),
    (leave_heads_out, {"heads_are_timed"}),
    (leave_heads_out_of_the_profile, {"profile_adds_up"}),
    (take_no_time_for_heads, {"profile_adds_up"}),
    (pause_in_medusa, {"processor_busy"}),
    (pause_outside_of_parts, {"profile_adds_up"}),
    (wait_in_every_arm, {"processor_busy"}),
)


@pytest.mark.parametrize(("spoil", "expected"), PLANTED, ids=[spoil.__name__ for spoil, _ in PLANTED])
def test_a_planted_defect_fails_its_checks(spoil: Spoiler, expected: set[str], tmp_path: Path) -> None:
    record = priced_record(tmp_path, spoil=spoil)
    assert failed(record) == expected
    assert all(outcomes(record)[name].need for name in expected)


def test_every_check_of_a_speed_has_been_seen_failing_and_passing(tmp_path: Path) -> None:
    assert {name for _, names in PLANTED for name in names} == set(NAMES)
    found = outcomes(priced_record(tmp_path))
    assert {found[name].status for name in NAMES} == {CheckStatus.PASSED}


def test_a_pause_as_long_as_a_twentieth_of_the_noise_of_the_machine_is_told(tmp_path: Path) -> None:
    """The machine gives the thread 70 to 95 % of the time, block by block; the pause takes 3 %."""

    def noisy(parts: FakeParts, *, pause: float) -> None:
        shares = {f"mt_bench-{81 + number}": 0.7 + 0.25 * number / 15 for number in range(16)}

        def busy(row: Generation) -> dict[str, object]:
            waits = pause if row.trial.arm in DRAFTING else 0.0
            return {"processor_s": (shares[row.trial.prompt_key] - waits) * row.wall_s}

        parts.edit(busy)

    quiet = priced_record(tmp_path / "none", spoil=lambda parts: noisy(parts, pause=0.0), num_prompts=16)
    paused = priced_record(tmp_path / "paused", spoil=lambda parts: noisy(parts, pause=0.03), num_prompts=16)
    assert failed(quiet) == set() and failed(paused) == {"processor_busy"}


def test_rejection_with_the_texts_of_typical_is_told(tmp_path: Path) -> None:
    record = priced_record(tmp_path, spoil=typical_texts)
    assert failed(record) == {"sampled_parity"}
    assert "0 of 32 identical, other: rejection" in outcomes(record)["sampled_parity"].found


def without(*names: str) -> Spoiler:
    def remove(parts: FakeParts) -> None:
        for name in names:
            setattr(parts, name, None)

    return remove


def older(parts: FakeParts) -> None:
    parts.edit(lambda row: {"processor_s": None})


def other_sizes(parts: FakeParts) -> None:
    assert parts.step_costs is not None
    parts.step_costs = StepCosts(costs=tuple(row for row in parts.step_costs.costs if row.arm is not None))
    parts.profile = None


@pytest.mark.parametrize(
    ("spoil", "skipped"),
    [
        (older, {"processor_busy"}),
        (without("profile"), {"profile_adds_up"}),
        (without("step_costs"), {"steps_as_timed_apart", "steps_as_priced", "heads_are_timed"}),
        (other_sizes, {"steps_as_priced", "heads_are_timed", "profile_adds_up"}),
    ],
)
def test_a_check_that_lacks_its_data_is_skipped(spoil: Spoiler, skipped: set[str], tmp_path: Path) -> None:
    found = outcomes(priced_record(tmp_path, spoil=spoil))
    assert {name for name in NAMES if found[name].status is CheckStatus.SKIPPED} == skipped
    assert all(found[name].status is not CheckStatus.FAILED for name in NAMES)
    assert all(found[name].found for name in skipped)


def test_few_prompts_show_no_spread(tmp_path: Path) -> None:
    found = outcomes(priced_record(tmp_path, num_prompts=3))
    skipped = {name for name in NAMES if found[name].status is CheckStatus.SKIPPED}
    assert skipped == {"steps_as_timed_apart", "vanilla_is_least", "vanilla_against_generate"}
    assert paired([1.0, 2.0, 3.0]) is None


def test_on_a_gpu_separate_steps_wait_for_it_and_the_host_for_the_gpu(tmp_path: Path) -> None:
    def on_gpu(parts: FakeParts, *, factor: float) -> None:
        device = parts.environment.device.model_copy(update={"kind": "cuda"})
        parts.environment = parts.environment.model_copy(update={"device": device})
        older(parts)
        scale_steps(parts, ("chain",), factor)

    statuses = {}
    for factor in (0.86, 0.72):
        record = priced_record(
            tmp_path / str(factor),
            spoil=lambda parts, factor=factor: on_gpu(parts, factor=factor),  # type: ignore[misc]
        )
        found = outcomes(record)
        assert found["processor_busy"].status is CheckStatus.SKIPPED
        statuses[factor] = found["steps_as_timed_apart"].status
    assert statuses == {0.86: CheckStatus.PASSED, 0.72: CheckStatus.FAILED}


def test_the_price_of_a_step_lies_between_the_sizes_that_were_timed(tmp_path: Path) -> None:
    record = priced_record(tmp_path)
    assert priced(record, 1, part="step") == pytest.approx(BACKBONE_ONE_NODE_S)
    for num_nodes in (2, 40, 64):
        whole = BACKBONE_ONE_NODE_S * node_cost(num_nodes) + OWN_PART_S
        assert priced(record, num_nodes, part="step") == pytest.approx(whole, rel=1e-3)
        assert priced(record, num_nodes, part="own") == pytest.approx(OWN_PART_S)
    assert priced(record, 1, part="own") is None
    assert priced(record, 1000, part="step") is None


def test_the_median_over_prompts_and_its_error_by_hand() -> None:
    """Of 1, 2, .., 5 the middle half is 2 to 4: a normal law as wide has a deviation of 2 / 1.349."""
    found = paired([5.0, 1.0, 4.0, 2.0, 3.0])
    assert found is not None and found.median == 3.0
    assert found.error == pytest.approx(1.2533 * (2 / 1.349) / 5**0.5)


def test_on_a_processor_steps_may_be_no_shorter_than_those_timed_apart(tmp_path: Path) -> None:
    """Only on a GPU do separate steps wait for it: 0.9 of them is allowed there alone."""
    record = priced_record(tmp_path / "record", spoil=lambda parts: scale_steps(parts, ["chain"], 0.9))
    assert "steps_as_timed_apart" in failed(record)


def test_all_parts_of_a_step_count_however_they_share_it(tmp_path: Path) -> None:
    def uneven(parts: FakeParts) -> None:
        """Give steps of ten seconds parts of a few seconds each, of which none may be left out."""
        assert parts.profile is not None
        shares = {"backbone_s": 2.0, "heads_s": 2.5, "candidates_s": 1.0, "acceptance_s": 3.0, "cache_s": 1.5}
        rows = (row.model_copy(update={"step_s": 10.0, **shares}) for row in parts.profile.rows)
        parts.profile = parts.profile.model_copy(update={"rows": tuple(rows)})

    outcome = outcomes(priced_record(tmp_path / "record", spoil=uneven))["profile_adds_up"]
    assert outcome.status is CheckStatus.PASSED and "0.0% to 0.0% of a step in no part" in outcome.found
    assert outcome.need == "parts within the step, and at most 2% or 0.5 ms in none"
