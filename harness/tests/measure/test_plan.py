"""The plan: every trial once, arms interleaved in blocks, an order that the plan seed alone decides."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path

from harness.measure.plan import PlannedTrial, _known_seconds, make_plan
from harness.records.machines.identity import machine_slug
from harness.records.provenance import DeviceInfo
from harness.specs.suite import SuiteSpec
from harness.tests.fake_record import FakeParts, write_fake_record
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


OLD = DeviceInfo(kind="cpu", name="box", num_cores=2, num_threads=2, memory_bytes=8_000_000_000)
HERE = OLD.model_copy(update={"details": {"family": "25", "model": "17", "stepping": "1"}})
OTHER = OLD.model_copy(update={"name": "abacus"})
GPU = OLD.model_copy(update={"kind": "cuda", "name": "card"})


def test_minutes_are_of_this_machine_before_one_of_its_name_before_any_other(tmp_path: Path) -> None:
    """Records of before machines said who they are lie under the plain name, and are still found."""

    def known() -> str | None:
        return _known_seconds(record.suite, results=tmp_path, device=HERE)[1]

    for device, stem, told in (
        (
            GPU,
            "20240104T000000Z-d",
            " of cuda-card-2c (another machine: kind cuda against cpu; name card against box)",
        ),
        (OTHER, "20240103T000000Z-c", " of cpu-abacus-2c (another machine: name abacus against box)"),
        (
            OLD,
            "20240101T000000Z-a",
            " of cpu-box-2c (perhaps another machine of that name: one does not tell its family, model, "
            "stepping, and not both measured their bandwidth)",
        ),
        (HERE, "20240102T000000Z-b", ""),
    ):

        def on_device(parts: FakeParts, device: DeviceInfo = device) -> None:
            parts.environment = parts.environment.model_copy(update={"device": device})

        record = write_fake_record(
            tmp_path / "fake" / machine_slug(device) / stem, rounds=1, num_prompts=2, spoil=on_device
        )
        assert known() == stem + told
