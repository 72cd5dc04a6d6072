"""Changes of step times: pairs of steps, disturbed blocks, parts, calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.judge.gate.looks import log_margin, smallest_seen
from harness.judge.gate.timed import (
    RATIOS,
    Change,
    calibrated,
    disturbed_blocks,
    for_baseline,
    is_marked,
    judge_timed,
    most_slowed,
    next_prompt,
    no_times,
    parts_of,
    quiet_turns,
    tails_apart,
    timed_changes,
    timed_names,
)
from harness.records.gate.record import Turn
from harness.tests.fake_gate import spec_of, turns_of

SPEC = spec_of((4, 8))


def by_name(changes: tuple[Change, ...]) -> dict[str, Change]:
    return {one.name: one for one in changes}


def test_a_slowdown_of_one_arm_is_found_in_each_quantity_that_it_moves() -> None:
    """Steps with a tree take 4 % longer, on a machine that slows down by a third meanwhile."""
    turns = turns_of(SPEC, num_blocks=8, factor=lambda arm, block: 1.04 if arm == "tree" else 1.0)
    found = by_name(timed_changes(turns, SPEC))
    assert set(found) == {f"{quantity}/{arm}" for quantity, arm in timed_names(SPEC)}
    for name in ("step_s/tree", "overhead/tree", "speedup/tree", "tokens_per_s/tree", "step_cost/tree"):
        assert found[name].values == pytest.approx([math.log(1.04)] * 8), name
    for name in ("step_s/vanilla", "tokens_per_s/vanilla"):
        assert found[name].values == pytest.approx([0] * 8), name
    assert np.exp(found["overhead/tree"].base) == pytest.approx([1.5] * 8, rel=0.02)
    judged = {one.name: one for one in judge_timed(tuple(found.values()), SPEC, num_blocks=8, judged_at=0)}
    assert judged["step_s/tree"].outcome == "worse" and judged["step_s/vanilla"].outcome == "equivalent"
    assert judged["step_s/tree"].change == pytest.approx(0.04)
    assert judged["tokens_per_s/tree"].change == pytest.approx(1 - 1 / 1.04)
    assert judged["speedup/tree"].outcome == "worse" and judged["speedup/tree"].base == pytest.approx(
        22 / 12 / 1.5, rel=0.02
    )


def test_a_faster_head_is_better_and_fewer_tokens_a_step_are_slower() -> None:
    faster = turns_of(SPEC, num_blocks=8, factor=lambda arm, block: 0.9)
    judged = judge_timed(timed_changes(faster, SPEC), SPEC, num_blocks=8, judged_at=0)
    assert {one.outcome for one in judged if one.quantity == "step_s"} == {"better"}
    assert {one.outcome for one in judged if one.quantity == "overhead"} == {"equivalent"}
    whole, fewer = turns_of(SPEC, num_blocks=8), turns_of(SPEC, num_blocks=8, tree_tokens=(2, 1) * 6)
    mixed = [turn for turn in whole if turn.side == "base"] + [turn for turn in fewer if turn.side == "head"]
    found = by_name(timed_changes(mixed, SPEC))
    assert found["tokens_per_s/tree"].values == pytest.approx([math.log(22 / 18)] * 8)
    assert found["step_s/tree"].values == pytest.approx([0] * 8)


def test_a_burst_in_a_few_steps_does_not_count_and_is_told_of() -> None:
    turns = [
        turn.model_copy(update={"step_s": (turn.step_s[0], 50 * turn.step_s[1], *turn.step_s[2:])})
        if turn.side == "head" and turn.arm == "vanilla"
        else turn
        for turn in turns_of(SPEC, num_blocks=4)
    ]
    assert by_name(timed_changes(turns, SPEC))["step_s/vanilla"].values == pytest.approx([0] * 4)
    assert tails_apart(turns, SPEC, share=0.05) == ("vanilla",)
    assert tails_apart(turns_of(SPEC, num_blocks=4), SPEC, share=0.05) == ()
    slower = turns_of(SPEC, num_blocks=4, factor=lambda arm, block: 1.5)
    assert tails_apart(slower, SPEC, share=0.05) == (), "all of its steps took longer"


def test_marked_steps_tell_the_step_cost_and_no_step_time() -> None:
    assert [is_marked(index, mark_every=3) for index in range(6)] == [False, False, True] * 2
    turns = [
        turn.model_copy(
            update={
                "step_s": tuple(
                    9 * s if is_marked(i, mark_every=SPEC.mark_every) and turn.side == "head" else s
                    for i, s in enumerate(turn.step_s)
                )
            }
        )
        for turn in turns_of(SPEC, num_blocks=4)
    ]
    assert by_name(timed_changes(turns, SPEC))["step_s/tree"].values == pytest.approx([0] * 4)


def test_a_text_of_one_step_leaves_its_prompt_out() -> None:
    turns = [
        turn.model_copy(
            update={"step_s": turn.step_s[:1], "step_tokens": turn.step_tokens[:1], "parts_s": {}}
        )
        if (turn.prompt_key, turn.arm) == ("prompt-2", "tree")
        else turn
        for turn in turns_of(SPEC, num_blocks=4)
    ]
    assert all(len(one.values) == 3 for one in timed_changes(turns, SPEC))
    assert all(len(one.values) == 0 for one in timed_changes((), SPEC))
    judged = judge_timed(timed_changes((), SPEC), SPEC, num_blocks=4, judged_at=0)
    assert {one.outcome for one in judged} == {"withheld"}


def test_disturbed_blocks_are_left_out_and_another_block_of_the_prompt_takes_their_place() -> None:
    limit = SPEC.disturbance.others_share
    turns = turns_of(SPEC, num_blocks=4, others=lambda block: limit + 0.01 if block == 1 else limit)
    assert disturbed_blocks(turns, SPEC) == {1}
    assert {turn.prompt_key for turn in quiet_turns(turns, SPEC)} == {"prompt-0", "prompt-2", "prompt-3"}
    again = [turn.model_copy(update={"block": 4, "others_share": 0.0}) for turn in turns if turn.block == 1]
    quiet = quiet_turns((*turns, *again), SPEC)
    assert {turn.block for turn in quiet} == {0, 2, 3, 4}
    twice = [turn.model_copy(update={"block": 5}) for turn in again]
    assert {turn.block for turn in quiet_turns((*turns, *again, *twice), SPEC)} == {0, 2, 3, 4}
    foreign = [turn.model_copy(update={"num_foreign": int(turn.block == 3)}) for turn in turns]
    assert disturbed_blocks(foreign, SPEC) == {1, 3}, "another process on the GPU"


def test_the_next_prompt_is_a_new_one_then_the_one_that_waited_longest() -> None:
    keys = ["a", "b", "c", "d"]

    def after(tried: list[str], quiet: set[str], wanted: int) -> str | None:
        return next_prompt(keys, tried=tried, quiet=quiet, wanted=wanted)

    assert after([], set(), 3) == "a"
    assert after(["a", "b"], {"a"}, 3) == "c"
    assert after(["a", "b", "c"], {"a"}, 3) == "b"
    assert after(["a", "b", "c", "b"], {"a"}, 3) == "c"
    assert after(["a", "b", "c"], {"a", "b", "c"}, 3) is None
    assert after(["a", "b", "c"], {"a", "b", "c"}, 4) == "d"


def test_the_part_that_got_slower_is_named() -> None:
    turns = turns_of(
        SPEC, num_blocks=8, factor=lambda arm, block: 1.05 if arm == "tree" else 1.0, slower_part="heads"
    )
    parts = parts_of(turns, SPEC)
    judged = judge_timed(timed_changes(turns, SPEC), SPEC, num_blocks=8, judged_at=0)
    slowed = most_slowed(parts, judged)
    assert slowed is not None and (slowed.arm, slowed.part) == ("tree", "heads")
    assert slowed.head_s / slowed.base_s == pytest.approx(1.5, rel=1e-6)
    in_host = turns_of(SPEC, num_blocks=8, factor=lambda arm, block: 1.05, slower_part="nothing marked")
    found = most_slowed(parts_of(in_host, SPEC), judged)
    assert found is not None and found.part == "host"
    same = turns_of(SPEC, num_blocks=8)
    fine = judge_timed(timed_changes(same, SPEC), SPEC, num_blocks=8, judged_at=0)
    assert most_slowed(parts_of(same, SPEC), fine) is None


def test_a_stored_baseline_is_compared_by_ratios() -> None:
    """The whole machine is half as fast today: step times say so, ratios do not."""
    stored = for_baseline(turns_of(SPEC, num_blocks=8))
    assert {turn.side for turn in stored} == {"base"} and len(stored) == 16
    today: list[Turn] = [
        turn for turn in turns_of(SPEC, num_blocks=8, factor=lambda arm, block: 2.0) if turn.side == "head"
    ]
    found = timed_changes((*stored, *today), SPEC, only=RATIOS)
    assert [one.quantity for one in found] == ["step_cost", "overhead", "speedup"]
    for one in found:
        assert one.values == pytest.approx([0] * 8), one.quantity


def test_withheld_times_name_every_quantity() -> None:
    blank = no_times(SPEC)
    assert [(one.quantity, one.arm) for one in blank] == list(timed_names(SPEC))
    assert all(one.outcome == "withheld" and one.head is None for one in blank)


def test_looks_before_the_last_have_wider_intervals() -> None:
    changes = timed_changes(turns_of(SPEC, num_blocks=4, noise=0.02), SPEC)
    early = judge_timed(changes, SPEC, num_blocks=4, judged_at=0)
    late = judge_timed(changes, SPEC, num_blocks=8, judged_at=4)
    for one, other in zip(early, late, strict=True):
        assert one.low is not None and other.low is not None and one.low < other.low
        assert one.level is not None and other.level is not None and one.level > other.level


def test_a_calibration_tells_blocks_from_processes() -> None:
    """Blocks of 1 % noise; whole runs differ by 2 %: no number of blocks averages that away."""
    rng, spec = np.random.default_rng(5), spec_of((8, 16, 24))

    def run(offset: float) -> tuple[Change, ...]:
        values = offset + rng.normal(0, 0.01, 24)
        return (Change("step_s", "tree", values, values, values),)

    same = calibrated([run(0.0) for _ in range(40)], spec)["step_s/tree"]
    assert same.spread == pytest.approx(0.01, rel=0.1) and same.between < 0.002
    apart = calibrated([run(rng.normal(0, 0.02)) for _ in range(40)], spec)["step_s/tree"]
    assert apart.spread == pytest.approx(0.01, rel=0.1) and apart.between == pytest.approx(0.02, rel=0.3)
    assert apart.floor > 0.03 > same.floor and apart.sees > same.sees > 0.025
    tail = 1e-3
    alone = smallest_seen(0.01, margin=log_margin("step_s", 0.025), num_blocks=24, tail=tail, power=0.95)
    assert same.sees == pytest.approx(math.expm1(alone), rel=0.3)
    with pytest.raises(ValueError, match="found no run"):
        calibrated([], spec)
