"""The plan: every trial once, arms interleaved in blocks, an order that the plan seed alone decides."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from harness.measure.plan import PlannedTrial, make_plan
from harness.specs.suite import SuiteSpec
from harness.tests.tiny_suite import smoke_suite

KEYS = [f"prompt-{number}" for number in range(12)]


def planned(**changes: object) -> tuple[PlannedTrial, ...]:
    suite: SuiteSpec = smoke_suite().model_copy(update=changes)
    return make_plan(suite, KEYS)


def test_every_trial_stands_in_the_plan_once() -> None:
    plan = planned(rounds=2)
    assert [trial.order for trial in plan] == list(range(len(plan)))
    assert max(Counter(trial.trial for trial in plan).values()) == 1
    per_block = sum(max(1, len(arm.seeds)) for arm in smoke_suite().arms)
    assert len(plan) == 2 * len(KEYS) * per_block


def test_a_block_is_one_prompt_in_one_round_with_every_arm_and_seed() -> None:
    plan = planned(rounds=2)
    wanted = {(arm.name, seed) for arm in smoke_suite().arms for seed in (arm.seeds or (None,))}
    blocks = [(number, list(block)) for number, block in groupby(plan, key=lambda trial: trial.block)]
    assert [number for number, _ in blocks] == list(range(2 * len(KEYS)))
    for number, block in blocks:
        assert {(trial.trial.prompt_key, trial.trial.round) for trial in block} == {
            (KEYS[number % len(KEYS)], number // len(KEYS))
        }
        assert {(trial.trial.arm, trial.trial.seed) for trial in block} == wanted


def test_arms_take_turns_in_coming_first() -> None:
    first = [next(iter(block)).trial.arm for _, block in groupby(planned(), key=lambda trial: trial.block)]
    assert len(set(first)) > 3


def test_order_follows_the_plan_seed_and_nothing_else() -> None:
    assert planned(plan_seed=5) == planned(plan_seed=5)
    assert [trial.trial for trial in planned(plan_seed=5)] != [trial.trial for trial in planned(plan_seed=6)]
    assert {trial.trial for trial in planned(plan_seed=5)} == {trial.trial for trial in planned(plan_seed=6)}


def test_rounds_differ_in_order() -> None:
    plan = planned(rounds=2)
    half = len(plan) // 2
    assert [trial.trial.arm for trial in plan[:half]] != [trial.trial.arm for trial in plan[half:]]


def test_fewer_prompts_are_a_prefix_of_more() -> None:
    """So `--limit` and a time budget measure the same trials in the same order, only fewer."""
    assert make_plan(smoke_suite(), KEYS[:5]) == planned()[: len(planned()) * 5 // 12]
