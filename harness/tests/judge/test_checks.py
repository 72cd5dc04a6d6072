"""Every validity check passes on a sound record and fails on one spoilt for it; a check nobody has seen
failing fails here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.judge.checks import CHECKS, run_checks
from harness.judge.judgement import CheckOutcome, CheckStatus
from harness.records.probes import HeadsControl
from harness.records.run import RunRecord
from harness.records.trace import Trace
from harness.records.trials import Failure, Generation
from harness.tests.fake_record import EOS_ID, FakeParts, fake_rounding, write_fake_record
from harness.tests.judge.test_speed_checks import NAMES as SPEED_CHECKS

NUM_PROMPTS = 4
Spoiler = Callable[[FakeParts], object]


@dataclass(frozen=True)
class SpoiltRecord:
    """One way to make one check fail, and words that its finding must hold."""

    check: str
    spoil: Spoiler
    found: str


def edits(
    change: Callable[[Generation], Mapping[str, Any]], *, arm: str | None = None, limit: int | None = 1
) -> Spoiler:
    return lambda parts: parts.edit(change, arm=arm, limit=limit)


def drop_one(parts: FakeParts) -> None:
    del parts.outcomes[5]


def fail_one(parts: FakeParts) -> None:
    trial = parts.outcomes[3].trial
    parts.outcomes[3] = Failure(trial=trial, order=3, error_type="OutOfMemoryError", message="made up")


def unsealed(parts: FakeParts) -> None:
    parts.manifest_changes["sha256"] = {"suite.toml": "0" * 64}


def part_a_text(generation: Generation) -> dict[str, Any]:
    ids = generation.token_ids
    return {"token_ids": (*ids[:7], ids[7] + 1, *ids[8:])}


def merge_two_steps(generation: Generation) -> dict[str, Any]:
    first, second, *rest = generation.step_tokens
    return {"step_tokens": (first + second, *rest), "step_times_s": generation.step_times_s[1:]}


def swap_unequal_steps(generation: Generation) -> dict[str, Any]:
    return {"step_tokens": tuple(sorted(generation.step_tokens, reverse=True))}


def same_text_for_all_seeds(parts: FakeParts) -> None:
    texts: dict[str, tuple[int, ...]] = {}

    def copy(generation: Generation) -> dict[str, Any]:
        return {"token_ids": texts.setdefault(generation.trial.prompt_key, generation.token_ids)}

    parts.edit(copy, arm="vanilla_sampled")


def weak_heads(parts: FakeParts) -> None:
    parts.heads_control = HeadsControl(
        num_positions=640, trained_top1=(0.01,), random_top1=(0.002,), identity_top1=(0.05,)
    )


def one_weak_head(parts: FakeParts) -> None:
    parts.heads_control = HeadsControl(
        num_positions=640, trained_top1=(0.5, 0.0), random_top1=(0.0, 0.0), identity_top1=(0.0, 0.0)
    )


def one_arm_after_another(parts: FakeParts) -> None:
    arms = [arm.name for arm in parts.suite.arms]
    trials = sorted(parts.outcomes, key=lambda outcome: arms.index(outcome.trial.arm))
    parts.outcomes = [outcome.model_copy(update={"order": order}) for order, outcome in enumerate(trials)]


def always_the_same_order(parts: FakeParts) -> None:
    def key(outcome: Generation | Failure) -> tuple[int, str, str, int]:
        trial = outcome.trial
        return trial.round, trial.prompt_key, trial.arm, trial.seed or 0

    parts.outcomes = [
        outcome.model_copy(update={"order": order})
        for order, outcome in enumerate(sorted(parts.outcomes, key=key))
    ]


def other_heads(parts: FakeParts) -> None:
    parts.environment = parts.environment.model_copy(update={"heads_sha256": "e" * 64})


def longer_trace(parts: FakeParts) -> None:
    assert parts.trace is not None
    provenance = parts.trace.provenance.model_copy(update={"max_new_tokens": 80})
    prompts = tuple(replace(prompt, ended_by="eos") for prompt in parts.trace.prompts)
    parts.trace = Trace(provenance=provenance, prompts=prompts)


def without(name: str) -> Spoiler:
    return lambda parts: setattr(parts, name, None)


def slow_products(parts: FakeParts) -> None:
    """Limits whose products are slower than those of the run's own steps."""
    assert parts.device_limits is not None
    parts.device_limits = parts.device_limits.model_copy(update={"matmul_flop_per_s": 2e11})


SPOILT = (
    SpoiltRecord("trials_complete", drop_one, "missing: "),
    SpoiltRecord(
        "trials_complete",
        lambda parts: parts.manifest_changes.update(num_planned=10_000),
        "trials with an outcome",
    ),
    SpoiltRecord("no_failures", fail_one, "OutOfMemoryError"),
    SpoiltRecord("seal_intact", unsealed, "SHA-256"),
    SpoiltRecord(
        "token_counts",
        edits(lambda row: {"step_tokens": (*row.step_tokens, 1)}, arm="chain"),
        "1 wrong: chain",
    ),
    SpoiltRecord(
        "token_counts",
        edits(lambda row: {"step_tokens": (row.step_tokens[0] + 1, *row.step_tokens[1:-1], 0)}),
        "1 wrong",
    ),
    SpoiltRecord("token_counts", edits(lambda row: {"step_times_s": row.step_times_s[1:]}), "1 wrong"),
    SpoiltRecord("token_counts", edits(lambda row: {"token_ids": row.token_ids * 3}), "1 wrong"),
    SpoiltRecord(
        "stop_rule",
        edits(lambda row: {"token_ids": (*row.token_ids[:3], EOS_ID, *row.token_ids[4:])}),
        "wrong: ",
    ),
    SpoiltRecord(
        "stop_rule", edits(lambda row: {"token_ids": row.token_ids[:-1], "ended_by": "budget"}), "wrong: "
    ),
    SpoiltRecord("stop_rule", edits(lambda row: {"ended_by": "eos"}, limit=None), "end-of-sequence ids"),
    SpoiltRecord("vanilla_steps", edits(merge_two_steps, arm="vanilla"), "1 wrong: vanilla"),
    SpoiltRecord(
        "equal_prompts",
        edits(lambda row: {"prompt_tokens": row.prompt_tokens + 1}, arm="hf_greedy", limit=None),
        "hf_greedy",
    ),
    SpoiltRecord(
        "equal_budgets",
        edits(lambda row: {"token_ids": row.token_ids + row.token_ids, "ended_by": "budget"}),
        "80",
    ),
    SpoiltRecord("equal_budgets", longer_trace, "80"),
    SpoiltRecord("greedy_parity", edits(part_a_text, arm="optimised_64"), "1 bugs: optimised_64"),
    SpoiltRecord(
        "greedy_parity",
        edits(lambda row: {"token_ids": row.token_ids[:-2]}, arm="hf_greedy"),
        "1 bugs: hf_greedy",
    ),
    SpoiltRecord(
        "sampled_parity", edits(part_a_text, arm="rejection", limit=1), "identical, other: rejection"
    ),
    SpoiltRecord("replay_equals_decode", edits(swap_unequal_steps, arm="chain"), "unexplained: chain"),
    SpoiltRecord("replay_equals_decode", without("trace"), "no trace"),
    SpoiltRecord("heads_beat_random", weak_heads, "0.010 over 0.002"),
    SpoiltRecord("heads_beat_random", one_weak_head, "0.000 over 0.000"),
    SpoiltRecord("heads_beat_random", without("heads_control"), "no control"),
    SpoiltRecord("repeats_agree", edits(part_a_text, arm="vanilla"), "1 wrong: vanilla"),
    SpoiltRecord("seeds_matter", same_text_for_all_seeds, "1 wrong: vanilla_sampled"),
    SpoiltRecord(
        "acceptance_within_tree",
        edits(lambda row: {"step_tokens": (20, *row.step_tokens)}, arm="typical"),
        "typical keeps 20 of 5",
    ),
    SpoiltRecord(
        "timings_valid", edits(lambda row: {"step_times_s": (0.0, *row.step_times_s[1:])}), "unusable: "
    ),
    SpoiltRecord("timings_valid", edits(lambda row: {"prefill_s": -1.0}), "prefill_s: Input should be "),
    SpoiltRecord("timings_valid", edits(lambda row: {"timing_valid": False}), "1 timings left out, unusable"),
    SpoiltRecord("machine_quiet", edits(lambda row: {"load_average": 9.0}, limit=None), "median load 9.0"),
    SpoiltRecord("arms_interleaved", one_arm_after_another, "overlap"),
    SpoiltRecord("arms_interleaved", always_the_same_order, "in 1 orders"),
    SpoiltRecord("provenance_agrees", other_heads, "disagreeing: heads"),
    SpoiltRecord(
        "bandwidth_sane",
        edits(lambda row: {"step_times_s": (0.001,) * row.num_steps}, arm="vanilla", limit=None),
        "reads at",
    ),
    SpoiltRecord("within_limits", slow_products, "products over 64 nodes at 3.81"),
)


def outcomes(record: RunRecord) -> dict[str, CheckOutcome]:
    return {outcome.name: outcome for outcome in run_checks(record)}


def test_a_sound_record_passes_every_check(tmp_path: Path) -> None:
    found = run_checks(write_fake_record(tmp_path, num_prompts=NUM_PROMPTS))
    assert [outcome for outcome in found if outcome.status is not CheckStatus.PASSED] == []
    assert [outcome.name for outcome in found] == [check.__name__ for check in CHECKS]


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_every_check_has_a_record_that_makes_it_fail(check: str) -> None:
    """Those that guard a speed have theirs in `test_speed_checks`."""
    assert check in {spoilt.check for spoilt in SPOILT} | set(SPEED_CHECKS)


@pytest.mark.parametrize("spoilt", SPOILT, ids=[f"{row.check}-{number}" for number, row in enumerate(SPOILT)])
def test_a_spoilt_record_fails_its_check(spoilt: SpoiltRecord, tmp_path: Path) -> None:
    outcome = outcomes(write_fake_record(tmp_path, spoil=spoilt.spoil, num_prompts=NUM_PROMPTS))[spoilt.check]
    assert outcome.status is CheckStatus.FAILED
    assert spoilt.found in outcome.found
    assert outcome.need


def test_no_check_is_left_out_of_the_list() -> None:
    import harness.judge.checks

    public = {
        name
        for name, value in vars(harness.judge.checks).items()
        if getattr(value, "__module__", "") == "harness.judge.checks"
    }
    written = {name for name in public if not name.startswith("_") and name not in ("run_checks",)}
    assert written == {check.__name__ for check in CHECKS}


def test_without_a_manifest_the_run_is_unfinished(tmp_path: Path) -> None:
    found = outcomes(write_fake_record(tmp_path, omit=["manifest.json"], num_prompts=NUM_PROMPTS))
    assert {name for name, row in found.items() if row.status is CheckStatus.FAILED} == {
        "seal_intact",
        "trials_complete",
    }


def test_an_unsealed_extra_file_is_named(tmp_path: Path) -> None:
    def forget_trees(parts: FakeParts) -> None:
        parts.manifest_changes["sha256"] = {}

    found = outcomes(write_fake_record(tmp_path, spoil=forget_trees, num_prompts=NUM_PROMPTS))["seal_intact"]
    assert "a file that the manifest does not seal" in found.found


def test_a_check_that_cannot_read_its_file_fails(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path, num_prompts=NUM_PROMPTS)
    (tmp_path / "heads_control.json").write_text("{}")
    found = outcomes(record)
    assert found["heads_beat_random"].status is CheckStatus.FAILED
    assert "heads_control.json" in found["heads_beat_random"].found


def test_timing_checks_are_skipped_where_no_speed_is_reported(tmp_path: Path) -> None:
    found = outcomes(write_fake_record(tmp_path, reports_speed=False, num_prompts=NUM_PROMPTS))
    skipped = {name for name, row in found.items() if row.status is CheckStatus.SKIPPED}
    own = {"timings_valid", "machine_quiet", "arms_interleaved", "bandwidth_sane", "within_limits"}
    assert skipped == own | set(SPEED_CHECKS)
    assert not any(row.status is CheckStatus.FAILED for row in found.values())


def test_a_timing_repeated_after_a_cut_block_counts_and_the_first_is_left_out(tmp_path: Path) -> None:
    def repeat_first(parts: FakeParts) -> None:
        first = parts.outcomes[0]
        assert isinstance(first, Generation)
        parts.outcomes[0] = first.model_copy(update={"timing_valid": False})
        parts.outcomes.append(first.model_copy(update={"attempt": 1}))

    found = outcomes(write_fake_record(tmp_path, spoil=repeat_first, num_prompts=NUM_PROMPTS))
    assert {row.status for row in found.values()} == {CheckStatus.PASSED}
    assert "1 timings left out" in found["timings_valid"].found


def test_uncommitted_changes_are_shown_and_do_not_fail(tmp_path: Path) -> None:
    def make_dirty(parts: FakeParts) -> None:
        parts.environment = parts.environment.model_copy(update={"dirty": True})

    found = outcomes(write_fake_record(tmp_path, spoil=make_dirty, num_prompts=NUM_PROMPTS))[
        "provenance_agrees"
    ]
    assert (found.status, "uncommitted" in found.found) == (CheckStatus.PASSED, True)


def test_a_shown_tie_passes_and_many_do_not(tmp_path: Path) -> None:
    def part_at_a_tie(parts: FakeParts, *, num_prompts: int) -> None:
        assert parts.trace is not None
        keys = [prompt.key for prompt in parts.trace.prompts[:num_prompts]]
        for arm in ("chain", "hf_greedy"):
            for key in keys:
                parts.edit(part_a_text, arm=arm, prompt_key=key)
        parts.trace = with_gap(parts.trace, position=7, gap=1e-5)

    few = write_fake_record(
        tmp_path / "few", spoil=lambda parts: part_at_a_tie(parts, num_prompts=1), num_prompts=NUM_PROMPTS
    )
    many = write_fake_record(
        tmp_path / "many", spoil=lambda parts: part_at_a_tie(parts, num_prompts=3), num_prompts=NUM_PROMPTS
    )
    assert outcomes(few)["greedy_parity"].status is CheckStatus.PASSED
    assert "1 ties" in outcomes(few)["greedy_parity"].found
    assert outcomes(many)["greedy_parity"].status is CheckStatus.FAILED


def test_parity_in_half_precision_is_shown_and_not_judged(tmp_path: Path) -> None:
    record = write_fake_record(
        tmp_path, spoil=edits(part_a_text, arm="chain"), dtype="bfloat16", num_prompts=NUM_PROMPTS
    )
    outcome = outcomes(record)["greedy_parity"]
    assert outcome.status is CheckStatus.SKIPPED
    assert "1 bugs" in outcome.found and "bfloat16, whose rounding is not measured" in outcome.found
    assert outcomes(record)["replay_equals_decode"].status is CheckStatus.SKIPPED


@pytest.mark.parametrize(("gap", "status"), [(0.24, CheckStatus.PASSED), (0.26, CheckStatus.FAILED)])
def test_parity_in_half_precision_is_judged_by_its_measured_rounding(
    gap: float, status: CheckStatus, tmp_path: Path
) -> None:
    """Three ties in a few hundred tokens are too many in float32 and none too many here."""

    def part_three_texts(parts: FakeParts) -> None:
        assert parts.trace is not None
        for prompt in parts.trace.prompts[:3]:
            parts.edit(part_a_text, arm="hf_greedy", prompt_key=prompt.key)
        parts.trace = with_gap(parts.trace, position=7, gap=gap)
        parts.rounding = fake_rounding(0.125)

    found = outcomes(
        write_fake_record(tmp_path, spoil=part_three_texts, dtype="bfloat16", num_prompts=NUM_PROMPTS)
    )
    outcome = found["greedy_parity"]
    assert outcome.status is status, outcome
    assert ("texts differ at 3 ties in" in outcome.found) is (status is CheckStatus.PASSED)
    assert "bfloat16 texts are equal only up to ties" in outcome.found and "below 0.25" in outcome.need
    assert found["replay_equals_decode"].status is CheckStatus.PASSED, found["replay_equals_decode"]


def test_replay_in_half_precision_is_judged_where_rounding_is_measured(tmp_path: Path) -> None:
    def spoil(parts: FakeParts, *, steps: Spoiler) -> None:
        parts.rounding = fake_rounding(0.125)
        steps(parts)

    wrong = edits(swap_unequal_steps, arm="chain")
    for name, steps, status in (
        ("sound", lambda parts: None, CheckStatus.PASSED),
        ("spoilt", wrong, CheckStatus.FAILED),
    ):
        spoiler: Spoiler = functools.partial(spoil, steps=steps)
        record = write_fake_record(tmp_path / name, spoil=spoiler, dtype="bfloat16", num_prompts=NUM_PROMPTS)
        outcome = outcomes(record)["replay_equals_decode"]
        assert outcome.status is status, outcome
        medusa = [
            one for one in record.generations if one.trial.arm in ("chain", "cartesian", "optimised_64")
        ]
        total = sum(one.num_steps for one in medusa)
        assert f"{total} steps before the texts differ, and in {total} of them" in outcome.found


def test_a_rounding_of_another_precision_is_told(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.rounding = fake_rounding(0.125, dtype="float16")

    outcome = outcomes(write_fake_record(tmp_path, spoil=spoil, dtype="bfloat16", num_prompts=NUM_PROMPTS))[
        "provenance_agrees"
    ]
    assert outcome.status is CheckStatus.FAILED and "dtype of the rounding" in outcome.found


def with_gap(trace: Trace, *, position: int, gap: float) -> Trace:
    prompts = []
    for prompt in trace.prompts:
        assert prompt.gaps is not None
        gaps = np.array(prompt.gaps)
        gaps[position] = gap
        prompts.append(replace(prompt, gaps=gaps))
    return Trace(provenance=trace.provenance, prompts=tuple(prompts))
