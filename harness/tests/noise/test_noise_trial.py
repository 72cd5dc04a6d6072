"""The trial next to a neighbour: its bursts, how a run is judged, and that it goes on after a cut."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from harness.judge.run import judge
from harness.records.run import RunRecord
from harness.tests.fake_record import FakeParts, write_fake_record
from harness.tests.judge.test_withheld import disturbed
from harness.tests.noise.burner import bursts
from harness.tests.noise.trial import (
    BURST_MEAN_S,
    BURST_SHARE,
    Told,
    Wanted,
    is_fit,
    misses,
    plan,
    rendered,
    saved,
    taken_up,
    told,
)
from harness.tests.noise.turns import SLOWED, Neighbour, newest_embedded, recorded_steps, schedule, spread


def test_bursts_take_their_share_of_the_time_and_follow_from_the_seed() -> None:
    drawn = list(islice(bursts(3, share=BURST_SHARE, mean_s=BURST_MEAN_S), 20_000))
    busy, free = sum(burst for _, burst in drawn), sum(pause for pause, _ in drawn)
    assert busy / (busy + free) == pytest.approx(BURST_SHARE, rel=0.03)
    assert busy / len(drawn) == pytest.approx(BURST_MEAN_S, rel=0.03)
    assert drawn == list(islice(bursts(3, share=BURST_SHARE, mean_s=BURST_MEAN_S), 20_000))
    assert drawn != list(islice(bursts(4, share=BURST_SHARE, mean_s=BURST_MEAN_S), 20_000))
    assert all(pause == 0 for pause, _ in islice(bursts(1, share=1.0, mean_s=1.0), 50))


def test_the_plan_begins_and_ends_quiet() -> None:
    runs = plan(num_bursts=10, num_steady=5)
    assert [one.load for one in runs] == ["quiet", *["bursts"] * 10, *["steady"] * 5, "quiet"]
    assert len({one.seed for one in runs if one.load == "bursts"}) == 10
    assert [one.number for one in runs] == list(range(17))


def run_of(folder: Path, *, chain_s: float = 0.0215, num_disturbed: int = 0) -> Told:
    def spoil(parts: FakeParts) -> None:
        disturbed(parts, num_disturbed)

    record = write_fake_record(
        folder, rounds=1, num_prompts=8, step_s={"chain": chain_s}, jitter=0.01, spoil=spoil
    )
    return told(Wanted(number=0, load="quiet"), RunRecord(folder), judge(record), minutes=1.0)


def test_a_run_is_held_against_the_quiet_one(tmp_path: Path) -> None:
    quiet, same = run_of(tmp_path / "a"), run_of(tmp_path / "b")
    slower = run_of(tmp_path / "c", chain_s=0.03)
    withheld = run_of(tmp_path / "d", num_disturbed=8)
    assert misses(same, quiet) == [] and is_fit(quiet, same) and quiet.withheld is None
    assert [one.split(":")[0] for one in misses(slower, quiet)] == ["chain"] and not is_fit(quiet, slower)
    assert misses(withheld, quiet) == [] and withheld.speedups == {} and not is_fit(quiet, withheld)
    assert withheld.withheld is not None and (withheld.num_quiet, withheld.num_blocks) == (0, 8)
    page = rendered([quiet, slower, withheld, same])
    assert "Of 3 runs after the first 1 said what it contradicts, and 1 withheld their speeds." in page
    assert "both quiet, agree" in page and "unfit" in rendered([quiet, slower])


def test_a_trial_goes_on_from_its_file(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a"), run_of(tmp_path / "b", num_disturbed=8)]
    saved(tmp_path / "runs.jsonl", runs)
    assert taken_up(tmp_path / "runs.jsonl") == runs and taken_up(tmp_path / "none.jsonl") == []


def test_turns_spread_a_burst_over_all_arms() -> None:
    """Fewer runs than `python -m harness.tests.noise.turns`, which prints 400."""
    steps = recorded_steps(newest_embedded())
    alone, turns = (spread(steps, turn_steps=turn_steps, mean_s=2.0, num_runs=60) for turn_steps in (0, 4))
    assert turns < alone / 3 and alone > 0.05


def test_a_neighbour_slows_by_its_share_of_the_time() -> None:
    """By hand: a third of the time at 1 / 1.8 of the speed leaves 2/3 + 1/3/1.8 of it."""
    machine = Neighbour(5, mean_s=0.5)
    took = sum(machine.takes(0.02) for _ in range(100_000))
    assert took == pytest.approx(2000 / (2 / 3 + 1 / 3 / SLOWED), rel=0.03)


def test_turns_and_one_after_another_take_the_same_steps() -> None:
    lengths = {"a": 5, "b": 2}
    assert list(schedule(lengths, "ab", 2)) == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
        ("a", 2),
        ("a", 3),
        ("a", 4),
    ]
    assert list(schedule(lengths, "ba", 0)) == [("b", 0), ("b", 1), *(("a", step) for step in range(5))]
