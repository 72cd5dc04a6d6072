"""Speeds come from blocks that nothing disturbed; where too few are quiet, they alone are withheld."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.compose.prices.measured import newest_runs
from harness.errors import ExitCode, InvalidMeasurement
from harness.judge.judgement import CheckStatus, Judgement, VerdictKind
from harness.judge.metrics import comparisons
from harness.judge.run import judge
from harness.judge.validate.record import validate_record
from harness.records.run import RunRecord
from harness.records.trials import Generation
from harness.report.readme import render_results
from harness.report.run import headline, render_headline_arm, render_report
from harness.tests.fake_judgement import judge as unchecked
from harness.tests.fake_record import FakeParts, write_fake_record
from harness.tests.records.test_disturbance import repeated, seen, with_rule
from harness.tests.report.test_run import SPEED_WORDS
from harness.tests.tiny_suite import command

NUM_PROMPTS = 8


def disturbed(parts: FakeParts, num_prompts: int) -> None:
    """Disturb every block of the first prompts: each trial takes three times as long."""
    with_rule(parts)
    keys = sorted({one.trial.prompt_key for one in parts.outcomes})[:num_prompts]
    for key in keys:
        parts.edit(
            lambda one: {
                "step_times_s": tuple(3 * time for time in one.step_times_s),
                "processor": seen(0.5),
            },
            prompt_key=key,
        )


def write(folder: Path, num_disturbed: int) -> RunRecord:
    return write_fake_record(
        folder,
        rounds=1,
        num_prompts=NUM_PROMPTS,
        jitter=0,
        spoil=lambda parts: disturbed(parts, num_disturbed),
    )


def the_check(judgement: Judgement) -> tuple[CheckStatus, str]:
    (one,) = (check for check in judgement.checks if check.name == "machine_quiet")
    return one.status, one.found


def test_the_speed_of_the_quiet_prompts_stands(tmp_path: Path) -> None:
    plain, half = judge(write(tmp_path / "plain", 0)), judge(write(tmp_path / "half", 4))
    assert half.valid and half.valid_speeds and half.withheld is None
    assert the_check(half) == (
        CheckStatus.PASSED,
        "4 of 8 prompts with a quiet block, 4 blocks disturbed, by: " + the_check(half)[1].split("by: ")[1],
    )
    for one, other in zip(half.comparisons, plain.comparisons, strict=True):
        assert one.overhead.estimate == pytest.approx(other.overhead.estimate)
        assert one.overhead.num_prompts == 4 and other.overhead.num_prompts == NUM_PROMPTS
    assert [one.acceleration_rate for one in half.arms] == [one.acceleration_rate for one in plain.arms]
    told = render_headline_arm(write(tmp_path / "again", 4), half)
    assert "over 8 prompts. Speeds are of the 4 prompts with a quiet block, tokens/step of all." in told
    assert "Speeds are of" not in render_headline_arm(write(tmp_path / "whole", 0), plain)


def test_too_few_quiet_prompts_lose_the_speeds_and_nothing_else(tmp_path: Path) -> None:
    plain, record = judge(write(tmp_path / "plain", 0)), write(tmp_path / "five", 5)
    found = judge(record)
    assert found.valid_texts and found.valid_speeds is False and not found.valid
    assert the_check(found)[0] is CheckStatus.FAILED and found.withheld is not None
    assert "3 of 8 prompts with a quiet block" in found.withheld
    assert found.comparisons == () and all(one.tokens_per_s is None for one in found.arms)
    assert [one.acceleration_rate for one in found.arms] == [one.acceleration_rate for one in plain.arms]
    by_id = {one.claim_id: one for one in plain.verdicts if one.decides}
    lost = {
        one.claim_id for one in found.verdicts if one.decides and one.kind is not by_id[one.claim_id].kind
    }
    assert {"T3-1", "DEF-spd"} <= lost and not lost & {"A6", "Q-loss", "RL-acc"}
    assert by_id["Q-loss"].kind is not VerdictKind.NOT_TESTED
    (speed,) = (one for one in found.verdicts if one.claim_id == "T3-1" and one.decides)
    assert speed.kind is VerdictKind.NOT_TESTED and "withheld" in speed.reason

    shown = record.withholding(found.withheld)
    page = render_report(shown, found)
    summary = page.split("## Summary")[1].split("\n## ")[0]
    assert summary.strip().startswith("**Texts valid, speeds withheld.** 1 validity check of")
    assert "tokens/step" in summary and "at times" not in summary
    arms = page.split("## Arms")[1].split("\n## ")[0]
    assert not SPEED_WORDS.search(arms.replace("no speed is reported", ""))
    told = headline(found, shown)
    assert told["valid"] == {"texts": True, "speeds": False} and told["failed_checks"] == ["machine_quiet"]
    assert set(told["headline_arm"]) == {"arm", "num_nodes", "tokens_per_step"}
    readme = render_results(shown, found, base=tmp_path)
    assert "*Speeds are withheld*: machine_quiet found 3 of 8" in readme and "tokens/s " not in readme


def test_checks_without_a_quiet_step_say_so(tmp_path: Path) -> None:
    """They said that no bandwidth was measured, which it was."""
    checks = {one.name: one for one in judge(write(tmp_path, NUM_PROMPTS)).checks}
    told = {name: checks[name].found for name in ("bandwidth_sane", "steps_as_timed_apart")}
    assert told["bandwidth_sane"] == "no quiet step"
    assert told["steps_as_timed_apart"] == "no arm has quiet steps, separate ones too, on four prompts"


def test_the_page_of_devices_passes_over_it(tmp_path: Path) -> None:
    place = tmp_path / "fake" / "machine"
    older, newer = write(place / "20240101T000000Z-a", 0), write(place / "20240102T000000Z-b", 5)
    assert [one.folder for one in newest_runs(tmp_path)] == [older.folder]
    assert newer.num_quiet_needed == 4 and len(newer.quiet_prompts) == 3 and older.num_quiet_needed == 4


def test_the_command_ends_with_code_2(tmp_path: Path) -> None:
    ran = command("report", write(tmp_path / "five", 5).folder)
    assert ran.code == ExitCode.INVALID_MEASUREMENT
    assert json.loads(ran.out.splitlines()[-1])["valid"] == {"texts": True, "speeds": False}
    assert "No speed is shown" in ran.out


def test_invalid_texts_show_nothing_in_a_readme(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        disturbed(parts, NUM_PROMPTS)
        parts.edit(lambda one: {"step_tokens": one.step_tokens[:-1]}, arm="chain", limit=1)

    record = write_fake_record(tmp_path, rounds=1, num_prompts=NUM_PROMPTS, jitter=0, spoil=spoil)
    found = judge(record)
    assert not found.valid_texts and found.valid_speeds is False
    assert headline(found, record)["headline_arm"] is None
    with pytest.raises(InvalidMeasurement, match="token_counts"):
        render_results(record, found, base=tmp_path)


def test_a_repeat_is_sound_and_told(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        with_rule(parts)
        repeated(parts, "mt_bench-82")

    record = write_fake_record(tmp_path, rounds=1, num_prompts=NUM_PROMPTS, jitter=0, spoil=spoil)
    assert not [one for one in validate_record(record.folder) if "valid timing" in one]
    found = judge(record)
    assert found.valid and all(one.overhead.num_prompts == NUM_PROMPTS for one in found.comparisons)
    section = render_report(record, found).split("## Disturbance")[1].split("\n## ")[0]
    assert "8 of 9 blocks were quiet, 1 are repeats" in section
    assert "| mt_bench-82 | 0" in section.replace("  ", " ") and "others used 50% of all cores" in section


def test_long_steps_part_the_two_estimates(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        def one_long(one: Generation) -> dict[str, object]:
            first, *rest = one.step_times_s
            return {"step_times_s": (first + sum(rest), *rest)}

        parts.edit(one_long, arm="chain")

    plain = write_fake_record(tmp_path / "plain", rounds=1, num_prompts=4, jitter=0)
    record = write_fake_record(tmp_path / "long", rounds=1, num_prompts=4, jitter=0, spoil=spoil)
    before, after = (next(one for one in comparisons(run) if one.arm == "chain") for run in (plain, record))
    assert before.speedup_by_medians == pytest.approx(before.speedup.estimate) and before.estimates_agree
    assert after.speedup_by_medians == pytest.approx(before.speedup_by_medians)
    assert after.speedup.estimate < 0.6 * before.speedup.estimate and not after.estimates_agree
    page = render_report(record, unchecked(record))
    assert "**More than 10% from those by totals**: `chain`." in page
