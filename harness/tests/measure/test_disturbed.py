"""A run whose blocks are disturbed: it repeats them while there is time, and keeps both tries."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from harness.device.arms import TimedSteps
from harness.device.noise import ProcessorMoment
from harness.judge.run import judge
from harness.judge.validate.record import validate_record
from harness.measure import trials
from harness.measure.plan import PlannedTrial
from harness.records.run import RunRecord
from harness.records.trials import Generation, ProcessorObservation, TrialKey
from harness.tests.records.test_disturbance import seen
from harness.tests.tiny_suite import CHAIN, SAMPLED, VANILLA, micro_data, run

# Each block is looked at twice: while its trials take turns, and while its separate steps do.
RULE = {"max_others_share": 0.05, "max_long_share": 1.0, "max_repeats": 2}


def disturb(monkeypatch: pytest.MonkeyPatch, looks: set[int]) -> None:
    """Let others take half of all cores in some looks at the machine, counted from 0, and none in others."""
    numbers = itertools.count()

    def until(self: ProcessorMoment, after: ProcessorMoment) -> ProcessorObservation:
        return seen(0.5 if next(numbers) in looks else 0.0)

    monkeypatch.setattr(ProcessorMoment, "until", until)


def timed(heads_file: Path, **changes: object) -> dict[str, object]:
    return micro_data(
        heads_file, arms=[VANILLA, CHAIN], **{"reports_speed": True, "disturbance": RULE, **changes}
    )


def tries(record: RunRecord) -> list[tuple[str, bool]]:
    return [(one.prompt_key, one.is_quiet) for one in record.tries]


def test_a_disturbed_block_is_repeated_once_all_have_run(
    heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, {0})
    record = RunRecord(run(timed(heads_file), tmp_path))
    first, *_, last = tries(record)
    assert len(record.tries) == 5 and first == (last[0], False) and last[1]
    assert [one.attempt for one in record.outcomes if one.trial.prompt_key == first[0]] == [0, 0, 1, 1]
    assert all(record.is_timed(one) for one in record.generations)
    texts = [one.token_ids for one in record.outcomes if isinstance(one, Generation)]
    assert texts[:2] == texts[-2:], "the same texts, in the same order of arms"
    assert validate_record(record.folder) == ()
    assert judge(record).valid_texts


def test_disturbed_separate_steps_are_left_out(
    heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, {1})
    record = RunRecord(run(timed(heads_file), tmp_path))
    assert len(record.tries) == 4, "steps apart make no block disturbed"
    costs = record.step_costs.costs if record.step_costs is not None else ()
    first = record.tries[0].prompt_key
    assert len([one for one in record.arm_steps if one.prompt_key == first]) == 2
    assert [one for one in costs if one.prompt_key == first] == []
    assert len([one for one in costs if one.arm is not None]) == 6


def test_a_neighbour_that_stays_is_not_waited_for(
    heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, set(range(10_000)))
    record = RunRecord(run(timed(heads_file), tmp_path))
    assert [quiet for _, quiet in tries(record)] == [False] * 8, "one round of repeats, which helped nobody"
    found = judge(record)
    assert found.valid_texts and found.withheld is not None and "0 of 4 prompts" in found.withheld


def test_rounds_of_repeats_end_with_the_rule(
    heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_but_one = set(range(10_000)) - {8}  # the first repeat of the first round
    disturb(monkeypatch, all_but_one)
    record = RunRecord(run(timed(heads_file), tmp_path))
    assert [quiet for _, quiet in tries(record)] == [False] * 4 + [True] + [False] * 6


def test_without_time_nothing_is_repeated(
    heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, {0})
    monkeypatch.setattr("harness.measure.trials.time.monotonic", itertools.count(step=1.0).__next__)
    record = RunRecord(run(timed(heads_file), tmp_path, time_budget_s=0.0))
    assert len(record.tries) == 1


def test_a_killed_repeat_goes_on(heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of a repeat leaves a try that is not whole; the block is run again."""
    rule = {**RULE, "turn_steps": 0}
    disturb(monkeypatch, {1})
    real, number = trials._run_in_turns, itertools.count()

    def dies(*arguments: object, **named: object) -> object:
        if next(number) == 9:  # the second trial of the repeat
            raise KeyboardInterrupt
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(trials, "_run_in_turns", dies)
    with pytest.raises(KeyboardInterrupt):
        run(timed(heads_file, disturbance=rule), tmp_path)
    (folder,) = (path.parent for path in tmp_path.rglob("generations.jsonl"))
    assert [one.is_whole for one in RunRecord(folder).tries] == [True] * 4 + [False]
    record = RunRecord(run(timed(heads_file, disturbance=rule), tmp_path, resume=folder))
    assert [one.is_quiet for one in record.tries] == [False, True, True, True, False, True]
    assert all(record.is_timed(one) for one in record.generations)
    assert validate_record(record.folder) == ()


def test_a_suite_without_a_rule_gets_the_default_one(heads_file: Path, tmp_path: Path) -> None:
    data = timed(heads_file)
    del data["disturbance"]
    rule = RunRecord(run({**data, "prompts": {"source": "random", "limit": 1}}, tmp_path)).suite.disturbance
    assert rule is not None and rule.reason and rule.max_repeats > 0


def test_arms_take_turns_and_their_texts_are_the_same(
    heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[int, int | None]] = []
    take = TimedSteps.take

    def noting(steps: TimedSteps, num_steps: int | None) -> bool:
        turns.append((id(steps), num_steps))
        return take(steps, num_steps)

    def texts(folder: Path) -> list[tuple[TrialKey, tuple[int, ...], int]]:
        record = RunRecord(folder)
        assert all(len(one.step_times_s) == one.num_steps for one in record.generations)
        return [(one.trial, one.token_ids, one.num_steps) for one in record.generations]

    arms = [VANILLA, CHAIN, SAMPLED]
    data = {**timed(heads_file, prompts={"source": "random", "limit": 1}), "arms": arms}
    alone = texts(run({**data, "disturbance": {**RULE, "turn_steps": 0}}, tmp_path / "alone"))
    monkeypatch.setattr(TimedSteps, "take", noting)
    disturb(monkeypatch, set())
    in_turns = texts(run({**data, "disturbance": {**RULE, "turn_steps": 2}}, tmp_path / "turns"))
    assert in_turns == alone
    measured = [one for one, num_steps in turns if num_steps == 2]
    switches = sum(one != other for one, other in itertools.pairwise(measured))
    assert len(set(measured)) >= 3 and switches > len(measured) / 2, "one arm after another, again and again"


def test_a_block_is_in_groups_of_one_trial_an_arm() -> None:
    """An arm keeps one cache, so its second seed waits until its first is done."""
    keys = [("a", 1), ("b", None), ("a", 2), ("c", 1), ("c", 2), ("a", 3)]
    block = [
        PlannedTrial(order=at, block=0, trial=TrialKey(arm=arm, prompt_key="x", round=0, seed=seed))
        for at, (arm, seed) in enumerate(keys)
    ]
    groups = [[(one.trial.arm, one.trial.seed) for one in group] for group in trials._groups(block)]
    assert groups == [[("a", 1), ("b", None), ("c", 1)], [("a", 2), ("c", 2)], [("a", 3)]]
