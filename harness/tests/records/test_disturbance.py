"""Which trials and blocks count as disturbed, and which of several tries a record takes times from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from harness.records.export import generations_frame, steps_frame
from harness.records.run import RunRecord
from harness.records.trials import (
    Failure,
    Generation,
    GpuObservation,
    ProcessorObservation,
    TrialKey,
    block_tries,
    disturbances,
)
from harness.specs.disturbance import DisturbanceRule
from harness.stats import long_share
from harness.tests.fake_record import FakeParts, write_fake_record
from harness.tests.test_layers import ROOT

RULE = DisturbanceRule()
STEADY = (0.02,) * 20


def seen(others_share: float, *, clock_s: float = 4.0) -> ProcessorObservation:
    """What two cores did of which others certainly took that share."""
    return ProcessorObservation(
        clock_s=clock_s,
        num_cores=2,
        others_s=others_share * 2 * clock_s + 0.02,
        steal_s=0.0,
        forced_switches=3,
        clock_mhz=2500.0,
    )


@pytest.mark.parametrize(
    ("times", "share"),
    [
        (STEADY, 0.0),
        ((0.02,) * 9 + (0.06,) + (0.02,) * 9, 0.06 / 0.42),
        ((0.02,) * 9 + (0.04,) + (0.02,) * 9, 0.0),  # twice is not more than twice
        (
            (0.02,) * 20 + (0.06,) * 20,
            0.0,
        ),  # what stays long is not long beside its neighbours
        ((0.02,) * 20 + (0.06,) * 7 + (0.02,) * 20, 0.0),  # nor where most of the nine around are as long
        ((0.02, 0.5), 0.0),
        ((0.02, 0.5, 0.02), 0.5 / 0.54),
        ((), 0.0),
    ],
)
def test_the_share_of_time_in_long_steps(times: tuple[float, ...], share: float) -> None:
    assert long_share(times, factor=2.0) == pytest.approx(share)


def test_what_disturbs_a_trial_is_said_in_words() -> None:
    assert disturbances(STEADY, seen(0.05), None, rule=RULE) == ()
    assert disturbances(STEADY, None, None, rule=RULE) == ()
    assert disturbances(STEADY, seen(0.3), None, rule=RULE) == ("others used 30% of all cores",)
    bursts = ((0.02,) * 4 + (0.1,)) * 5
    assert disturbances(bursts, None, None, rule=RULE) == (
        "56% of the time in steps of over 2 times the median",
    )
    assert disturbances(STEADY, None, GpuObservation(num_others=1), rule=RULE) == (
        "another process used the GPU",
    )
    hot = GpuObservation(num_others=0, throttle_reasons=("idle", "hardware thermal slowdown"))
    assert disturbances(STEADY, None, hot, rule=RULE) == ("the GPU's clocks were lowered",)
    own = GpuObservation(num_others=0, throttle_reasons=("software power cap", "idle"))
    assert disturbances(STEADY, seen(0.0), own, rule=RULE) == ()


def generation(arm: str, key: str, *, attempt: int = 0, number: int = 0, **changes: Any) -> Generation:
    fields: dict[str, Any] = {
        "trial": TrialKey(arm=arm, prompt_key=key, round=number),
        "order": 0,
        "attempt": attempt,
        "category": None,
        "prompt_tokens": 3,
        "token_ids": (1,) * 21,
        "ended_by": "budget",
        "step_tokens": (1,) * 20,
        "step_times_s": STEADY,
        "prefill_s": 0.1,
    }
    return Generation(**{**fields, **changes})


def test_a_block_is_run_as_often_as_one_of_its_trials() -> None:
    outcomes: list[Generation | Failure] = [
        generation("vanilla", "a"),
        generation("chain", "a", processor=seen(0.4)),
        generation("chain", "b"),
        Failure(trial=TrialKey(arm="vanilla", prompt_key="b", round=0), order=1, error_type="X", message="y"),
        generation("vanilla", "a", number=1),
        generation("chain", "a", number=1),
        generation("vanilla", "a", attempt=1),
        generation("chain", "a", attempt=1),
        generation("chain", "a", attempt=2),
    ]
    tries = block_tries(outcomes, rule=RULE)
    assert [(one.prompt_key, one.round, len(one.outcomes)) for one in tries] == [
        ("a", 0, 2),
        ("b", 0, 2),
        ("a", 1, 2),
        ("a", 0, 2),
        ("a", 0, 1),
    ]
    assert [one.is_whole for one in tries] == [True, True, True, True, False]
    assert tries[0].disturbances == ("chain: others used 40% of all cores",)
    assert [one.is_quiet for one in tries] == [False, True, True, True, False]
    assert all(one.disturbances == () for one in block_tries(outcomes, rule=None))


def with_rule(parts: FakeParts, **changes: object) -> None:
    lines = "".join(f"{name} = {value}\n" for name, value in changes.items())
    parts.suite_text += f"\n[disturbance]\n{lines}"


def repeated(parts: FakeParts, key: str) -> None:
    """Disturb all trials of a prompt, at twice the time, and add a quiet try of the block."""
    again = []
    for index, one in enumerate(parts.outcomes):
        if isinstance(one, Generation) and one.trial.prompt_key == key:
            slow = tuple(2 * time for time in one.step_times_s)
            parts.outcomes[index] = one.model_copy(update={"step_times_s": slow, "processor": seen(0.5)})
            again.append(one.model_copy(update={"attempt": 1, "processor": seen(0.0)}))
    parts.outcomes.extend(again)


def test_times_come_from_the_quiet_try_and_both_are_kept(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        with_rule(parts)
        repeated(parts, "mt_bench-82")

    plain = write_fake_record(tmp_path / "plain", rounds=1, num_prompts=4, jitter=0)
    record = write_fake_record(tmp_path / "again", rounds=1, num_prompts=4, jitter=0, spoil=spoil)
    assert len(record.outcomes) > len(plain.outcomes) and len(record.tries) == 5
    assert [one.step_times_s for one in record.generations] == [one.step_times_s for one in plain.generations]
    assert all(record.is_timed(one) for one in record.generations)
    assert [one.attempt for one in record.generations if one.trial.prompt_key == "mt_bench-82"] == [1] * sum(
        one.trial.prompt_key == "mt_bench-82" for one in plain.generations
    )


def test_without_a_rule_nothing_is_disturbed(tmp_path: Path) -> None:
    record = write_fake_record(
        tmp_path,
        rounds=1,
        num_prompts=2,
        spoil=lambda parts: parts.edit(lambda one: {"processor": seen(1.0)}),
    )
    assert all(record.is_timed(one) for one in record.generations)


def test_a_rule_has_no_share_above_one() -> None:
    for wrong in ({"max_others_share": 1.5}, {"long_step": 1.0}, {"max_repeats": -1}, {"min_quiet_share": 2}):
        with pytest.raises(ValidationError):
            DisturbanceRule.model_validate(wrong)


def test_a_withheld_record_is_a_view(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path, rounds=1, num_prompts=2)
    view = record.withholding("the checks say so")
    assert record.reports_speed and not view.reports_speed and record.withholding(None) is record
    assert view.generations == record.generations and "withheld" in view.why_no_speed
    assert record.why_no_speed == "suite fake reports no speed"


def test_an_exported_table_says_whose_times_may_not_be_used(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        with_rule(parts)
        parts.edit(lambda one: {"processor": seen(0.5)}, prompt_key="mt_bench-81", arm="chain")

    record = write_fake_record(tmp_path, rounds=1, num_prompts=2, spoil=spoil)
    for frame in (generations_frame(record), steps_frame(record)):
        assert not frame[frame.prompt_key == "mt_bench-81"].timing_valid.any(), "all arms of the block"
        assert frame[frame.prompt_key != "mt_bench-81"].timing_valid.all()


def test_steps_of_many_widths_are_no_long_ones(tmp_path: Path) -> None:
    """An arm of `generate`, such as prompt lookup, takes steps of as many tokens as it finds."""
    bursts = ((0.02,) * 4 + (0.1,)) * 5

    def spoil(parts: FakeParts, arm: str) -> None:
        with_rule(parts)
        parts.edit(lambda one: {"step_times_s": (*bursts, *bursts)[: one.num_steps]}, arm=arm)

    def tries(arm: str) -> list[bool]:
        folder = tmp_path / arm
        record = write_fake_record(folder, rounds=1, num_prompts=2, spoil=lambda parts: spoil(parts, arm))
        return [one.is_quiet for one in record.tries]

    assert tries("hf_greedy") == [True, True] and tries("chain") == [False, False]


def test_a_trial_that_fails_after_it_succeeded_is_a_failure(tmp_path: Path) -> None:
    def spoil(parts: FakeParts, *, first: bool) -> None:
        trial, num = parts.outcomes[0].trial, len(parts.outcomes)
        failure = Failure(
            trial=trial, attempt=0 if first else 1, order=0, error_type="RuntimeError", message="planted"
        )
        parts.outcomes.insert(0 if first else num, failure)
        if first:
            parts.outcomes[1] = parts.outcomes[1].model_copy(update={"attempt": 1})

    mended = write_fake_record(
        tmp_path / "mended", rounds=1, num_prompts=2, spoil=lambda parts: spoil(parts, first=True)
    )
    broken = write_fake_record(
        tmp_path / "broken", rounds=1, num_prompts=2, spoil=lambda parts: spoil(parts, first=False)
    )
    assert mended.failures == () and len(broken.failures) == 1


def test_the_reason_of_the_default_rule_is_what_the_committed_records_give() -> None:
    folders = [path.parent for path in (ROOT / "results").glob("embedded*/cpu-*/*/generations.jsonl")]
    records = [one for one in map(RunRecord.open, folders) if one.suite.disturbance is None]
    own = [
        long_share(one.step_times_s, factor=RULE.long_step) > RULE.max_long_share
        for record in records
        for one in record.generations
        if record.suite.arm(one.trial.arm).method in ("vanilla", "medusa")
    ]
    assert f"{sum(own)} of {len(own):,} trials of this engine" in RULE.reason
