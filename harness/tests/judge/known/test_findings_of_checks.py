"""What each check of a run says, word for word, and the records at the edge of what it lets pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.judge.checks import run_checks
from harness.judge.judgement import CheckOutcome, CheckStatus, ClaimVerdict, Judgement, VerdictKind
from harness.records.probes import DeviceLimits, HeadsControl
from harness.records.run import RunRecord
from harness.records.trials import Generation
from harness.tests.fake_record import (
    EOS_ID,
    HEAD_HITS,
    MAX_NEW_TOKENS,
    STEP_S,
    VANILLA_BANDWIDTH_SHARE,
    FakeParts,
    write_fake_record,
)

PASSED, FAILED, SKIPPED = CheckStatus.PASSED, CheckStatus.FAILED, CheckStatus.SKIPPED
NUM_PROMPTS, ROUNDS, NUM_ARMS_GREEDY, NUM_SEEDED = 4, 2, 5, 6
NUM_GREEDY = NUM_PROMPTS * ROUNDS * NUM_ARMS_GREEDY
NUM = NUM_GREEDY + NUM_PROMPTS * ROUNDS * NUM_SEEDED
Change = Callable[[Generation], Mapping[str, Any]]


def checked(
    folder: Path, spoil: Callable[[FakeParts], object] | None = None, **options: Any
) -> dict[str, CheckOutcome]:
    record = write_fake_record(folder, spoil=spoil, num_prompts=NUM_PROMPTS, **options)
    return {one.name: one for one in run_checks(record)}


def edit(change: Change, *, arm: str | None = None, limit: int | None = 1) -> Callable[[FakeParts], object]:
    return lambda parts: parts.edit(change, arm=arm, limit=limit)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, dict[str, CheckOutcome]]:
    record = write_fake_record(tmp_path_factory.mktemp("sound"), num_prompts=NUM_PROMPTS, jitter=0)
    return record, {one.name: one for one in run_checks(record)}


def test_a_sound_records_findings(sound: tuple[RunRecord, dict[str, CheckOutcome]]) -> None:
    record, found = sound
    texts = sum(prompt.num_kept_tokens for prompt in record.trace.prompts) if record.trace else 0
    said = {name: (one.found, one.need) for name, one in found.items()}
    budget = f"{MAX_NEW_TOKENS} tokens"
    assert said["trials_complete"] == (
        f"{NUM} trials with an outcome",
        f"the {NUM} of the manifest, {NUM} of the suite",
    )
    assert said["no_failures"] == (f"{NUM} outcomes, 0 wrong", "no failed trial")
    assert said["token_counts"][0] == f"{NUM} generations, 0 wrong"
    assert (
        said["token_counts"][1]
        == f"steps of at least 1 token that sum to n - 1, a time each, n <= {MAX_NEW_TOKENS}"
    )
    assert said["stop_rule"] == (
        f"{NUM} generations, 1 end-of-sequence ids",
        f"end-of-sequence last or {budget}, at most 4 such ids",
    )
    assert said["vanilla_steps"] == (
        f"{3 * NUM_PROMPTS * ROUNDS} vanilla generations, 0 wrong",
        "n - 1 steps for n tokens",
    )
    assert said["equal_prompts"] == (f"{NUM_PROMPTS} prompts in 8 arms", "the same prompts in every arm")
    assert said["equal_budgets"] == (f"budgets of [{MAX_NEW_TOKENS}] tokens", f"{budget} in every arm")
    num_compared = 4 * NUM_PROMPTS * ROUNDS
    assert said["greedy_parity"] == (
        f"{num_compared} of {num_compared} identical, texts differ at 0 ties in {texts:,} tokens",
        "no bug, at most 1 tie",
    )
    num_pairs = 2 * NUM_PROMPTS * ROUNDS
    assert said["sampled_parity"] == (
        f"{num_pairs} of {num_pairs} identical",
        "the tokens of sampled vanilla, at most 0 parted by rounding",
    )
    assert said["replay_equals_decode"] == (
        f"{3 * NUM_PROMPTS * ROUNDS} generations, 0 with other steps than replayed",
        "the replayed steps, or a shown tie",
    )
    assert said["heads_beat_random"] == (
        ", ".join(f"{share:.3f} over 0.002" for share in HEAD_HITS) + " at 640 positions",
        "every head above random, the first by 3 standard errors",
    )
    assert said["repeats_agree"] == (
        f"{NUM_ARMS_GREEDY * NUM_PROMPTS} repeated trials, 0 wrong",
        "the same tokens every time",
    )
    assert said["seeds_matter"] == ("3 sampling arms, 0 wrong", "seeds that change the text of some prompt")
    assert said["acceptance_within_tree"] == ("5 trees, 0 wrong", "at most depth + 1 tokens a step")
    assert said["timings_valid"][0] == f"{NUM} generations, 0 timings left out"
    assert said["machine_quiet"] == (
        "median load 2.0 (highest 2.0) on 2 cores with 2 threads",
        "a median of at most 3.0",
    )
    assert (
        said["arms_interleaved"][0] == f"{NUM_PROMPTS * ROUNDS} blocks one after another in 8 orders of arms"
    )
    assert said["provenance_agrees"] == (
        "commit 01234567, clean",
        "a trace of the same backbone, heads and dtype",
    )
    sampled = VANILLA_BANDWIDTH_SHARE * STEP_S["vanilla"] / STEP_S["vanilla_sampled"]
    assert said["bandwidth_sane"] == (
        f"vanilla reads at {VANILLA_BANDWIDTH_SHARE:.2f} of the measured bandwidth, "
        f"vanilla_sampled reads at {sampled:.2f} of the measured bandwidth",
        "at most 1.1",
    )


@pytest.mark.parametrize(
    "change", [{"round": 9}, {"seed": 3}, {"arm": "strange"}, {"prompt_key": "elsewhere"}]
)
def test_a_trial_that_nobody_planned_is_told(tmp_path: Path, change: dict[str, Any]) -> None:
    """A trial too many once passed: only missing ones were looked for."""

    def add(parts: FakeParts) -> None:
        first = parts.outcomes[0]
        trial = first.trial.model_copy(update=change)
        parts.outcomes.append(first.model_copy(update={"trial": trial, "order": len(parts.outcomes)}))
        parts.manifest_changes["num_planned"] = NUM + ("prompt_key" in change) * 11 * ROUNDS

    outcome = checked(tmp_path, add)["trials_complete"]
    assert outcome.status is FAILED
    if "prompt_key" in change:  # a further prompt is planned for every arm, and the others lack it
        assert f"{NUM + 1} trials with an outcome, missing: " in outcome.found
        assert "and 20 more" in outcome.found
    else:
        assert f"{NUM + 1} trials with an outcome, not planned: " in outcome.found


def test_a_manifest_that_counts_other_trials_fails(tmp_path: Path) -> None:
    for number in (NUM - 1, NUM + 1):
        spoil = lambda parts, number=number: parts.manifest_changes.update(num_planned=number)  # noqa: E731
        outcome = checked(tmp_path / str(number), spoil)["trials_complete"]
        assert outcome.status is FAILED
        assert outcome.need == f"the {number} of the manifest, {NUM} of the suite"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda one: {}, PASSED),
        (lambda one: {"token_ids": one.token_ids[:1], "step_tokens": (), "step_times_s": ()}, PASSED),
        (lambda one: {"token_ids": (), "step_tokens": (), "step_times_s": ()}, FAILED),
        (lambda one: {"step_tokens": (*one.step_tokens[:-1], one.step_tokens[-1] + 1)}, FAILED),
        (
            lambda one: {"step_tokens": (*one.step_tokens, 0), "step_times_s": (*one.step_times_s, 0.1)},
            FAILED,
        ),
        (lambda one: {"step_times_s": (*one.step_times_s, 0.1)}, FAILED),
        (
            lambda one: {
                "token_ids": (9,) * (MAX_NEW_TOKENS + 1),
                "step_tokens": (1,) * MAX_NEW_TOKENS,
                "step_times_s": (0.1,) * MAX_NEW_TOKENS,
            },
            FAILED,
        ),
    ],
)
def test_tokens_and_times_add_up(tmp_path: Path, change: Change, status: CheckStatus) -> None:
    outcome = checked(tmp_path, edit(change))["token_counts"]
    assert outcome.status is status
    assert outcome.found.startswith(f"{NUM} generations, {int(status is FAILED)} wrong")


def ends(*ids: int) -> Callable[[FakeParts], object]:
    """Let as many generations of one arm end at other end-of-sequence ids."""

    def spoil(parts: FakeParts) -> None:
        left = list(ids)

        def change(one: Generation) -> dict[str, Any]:
            if one.ended_by != "budget" or not left:
                return {}
            return {"token_ids": (*[9] * (one.num_tokens - 1), left.pop()), "ended_by": "eos"}

        parts.edit(lambda one: {"token_ids": tuple(9 if i != EOS_ID else i for i in one.token_ids)})
        parts.edit(change, arm="hf_greedy")

    return spoil


def test_four_ids_may_end_a_text_and_five_may_not(tmp_path: Path) -> None:
    for ids, status in (((600, 601, 602), PASSED), ((600, 601, 602, 603), FAILED)):
        outcome = checked(tmp_path / str(len(ids)), ends(*ids))["stop_rule"]
        assert outcome.status is status
        assert outcome.found == f"{NUM} generations, {1 + len(ids)} end-of-sequence ids"


@pytest.mark.parametrize(
    ("change", "num_wrong"),
    [
        (lambda one: {"token_ids": (EOS_ID, *one.token_ids[1:-1], EOS_ID), "ended_by": "eos"}, 1),
        (lambda one: {"token_ids": (*one.token_ids[:-1], EOS_ID), "ended_by": "budget"}, 1),
        (lambda one: {"token_ids": one.token_ids[:-1], "ended_by": "budget"}, 1),
        (lambda one: {"token_ids": (*one.token_ids, 9), "ended_by": "budget"}, 1),
        (lambda one: {"token_ids": (*one.token_ids[:5], EOS_ID), "ended_by": "eos"}, 0),
        (lambda one: {"token_ids": (), "ended_by": "eos"}, 0),
        (lambda one: {"token_ids": (), "ended_by": "budget"}, 1),
    ],
)
def test_where_a_text_may_end(tmp_path: Path, change: Change, num_wrong: int) -> None:
    outcome = checked(tmp_path, edit(change, arm="typical"))["stop_rule"]
    assert outcome.status is (FAILED if num_wrong else PASSED)
    assert (", wrong: typical" in outcome.found) == bool(num_wrong)


@pytest.mark.parametrize("num_steps", [-1, 1])
def test_vanilla_takes_neither_fewer_nor_more_steps(tmp_path: Path, num_steps: int) -> None:
    def change(one: Generation) -> dict[str, Any]:
        return {"step_tokens": one.step_tokens[:-1] if num_steps < 0 else (*one.step_tokens, 1)}

    outcome = checked(tmp_path, edit(change, arm="vanilla_sampled"))["vanilla_steps"]
    assert outcome.status is FAILED and "1 wrong: vanilla_sampled" in outcome.found


def heads(
    trained: tuple[float, ...], random: tuple[float, ...], *, num: int = 900
) -> Callable[[FakeParts], object]:
    def spoil(parts: FakeParts) -> None:
        parts.heads_control = HeadsControl(
            num_positions=num, trained_top1=trained, random_top1=random, identity_top1=trained
        )

    return spoil


@pytest.mark.parametrize(
    ("trained", "random", "status"),
    [
        ((0.6, 0.6), (0.5, 0.5), PASSED),  # a standard error is sqrt((0.24 + 0.25) / 900) = 0.0233
        ((0.571, 0.9), (0.5, 0.1), PASSED),
        ((0.569, 0.9), (0.5, 0.1), FAILED),  # 2.96 standard errors
        ((0.6, 0.5), (0.5, 0.5), FAILED),
        ((0.6, 0.4), (0.5, 0.5), FAILED),
        ((0.4, 0.9), (0.5, 0.1), FAILED),
    ],
)
def test_heads_are_held_against_random_ones(
    tmp_path: Path, trained: tuple[float, ...], random: tuple[float, ...], status: CheckStatus
) -> None:
    error = float(np.sqrt(sum(one * (1 - one) for one in (trained[0], random[0])) / 900))
    holds = trained[0] - random[0] >= 3 * error and all(a > b for a, b in zip(trained, random, strict=True))
    assert holds == (status is PASSED)
    assert checked(tmp_path, heads(trained, random))["heads_beat_random"].status is status


def test_no_step_keeps_more_than_the_heads_of_the_arm_read(tmp_path: Path) -> None:
    def fewer_heads(parts: FakeParts) -> None:
        parts.suite_text = parts.suite_text.replace(
            'tree = {{ kind = "chain", depth = 5 }}'.format(),
            'num_heads = 2\ntree = { kind = "chain", depth = 5 }',
        )

    assert "num_heads = 2" in _text_after(fewer_heads, tmp_path / "text")
    found = checked(tmp_path / "record", fewer_heads)["acceptance_within_tree"]
    assert found.status is FAILED and "chain keeps 6 of 3" in found.found


def _text_after(spoil: Callable[[FakeParts], object], folder: Path) -> str:
    record = write_fake_record(folder, spoil=spoil, num_prompts=NUM_PROMPTS)
    return (record.folder / "suite.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("load", "status"), [(3.0, PASSED), (3.01, FAILED), (0.0, PASSED)])
def test_the_load_may_reach_its_bound(tmp_path: Path, load: float, status: CheckStatus) -> None:
    spoil = edit(lambda one: {"load_average": load}, limit=None)
    assert checked(tmp_path, spoil)["machine_quiet"].status is status


def test_an_unknown_load_is_skipped_and_one_known_load_counts(tmp_path: Path) -> None:
    unknown = edit(lambda one: {"load_average": None}, limit=None)
    assert checked(tmp_path / "none", unknown)["machine_quiet"].found == "no load was recorded"
    number = iter(range(NUM))
    one_known = edit(lambda one: {"load_average": None if next(number) else 2.5}, limit=None)
    assert checked(tmp_path / "one", one_known)["machine_quiet"].found.startswith("median load 2.5")


@pytest.mark.parametrize(("share", "status"), [(1.099, PASSED), (1.11, FAILED)])
def test_vanilla_reads_no_faster_than_the_device(tmp_path: Path, share: float, status: CheckStatus) -> None:
    def spoil(parts: FakeParts) -> None:
        limits = parts.device_limits
        assert limits is not None
        parts.device_limits = DeviceLimits(
            read_bandwidth_bytes_per_s=limits.read_bandwidth_bytes_per_s * VANILLA_BANDWIDTH_SHARE / share,
            matmul_flop_per_s=limits.matmul_flop_per_s,
            method="made up",
        )

    assert checked(tmp_path, spoil, jitter=0)["bandwidth_sane"].status is status


def verdict(*, decides: bool = True, is_ours: bool = False) -> ClaimVerdict:
    return ClaimVerdict(
        claim_id="X",
        stated="something",
        place="Table 1",
        paper_figure="1x",
        form="transfer",
        kind=VerdictKind.REPRODUCED,
        ours="1x",
        figure_kind="measured",
        reason="made up",
        decides=decides,
        is_ours=is_ours,
    )


def test_what_decides_and_is_the_papers_counts() -> None:
    assert verdict().counts and not verdict(decides=False).counts
    assert not verdict(is_ours=True).counts and not verdict(decides=False, is_ours=True).counts
    plain = {key: value for key, value in verdict().model_dump().items() if key not in ("decides", "is_ours")}
    assert ClaimVerdict.model_validate(plain) == verdict()


def test_a_skipped_check_leaves_a_run_valid_and_a_failed_one_does_not(
    sound: tuple[RunRecord, dict[str, CheckOutcome]],
) -> None:
    one = sound[1]["trials_complete"]
    for statuses, valid in (
        ((PASSED, SKIPPED), True),
        ((PASSED, FAILED), False),
        ((SKIPPED,), True),
        ((), True),
    ):
        checks = tuple(one.model_copy(update={"status": status}) for status in statuses)
        judged = Judgement.model_construct(checks=checks, reports_speed=False)
        assert judged.valid is valid
