"""A suite's records as series: order, gaps, groups of machines, and steps where they were planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.judge.history.series import MachineHistory, Series, _only_ties, machine_history
from harness.judge.latency import mode_rows
from harness.records.latency import LatencyRecord
from harness.records.probes import DeviceLimits
from harness.records.run import RunRecord
from harness.tests.fake_latency import backbone_s, write_fake_latency
from harness.tests.fake_record import STEP_S, FakeParts, write_fake_record

SPEED_OF = {"optimised_64": ("speedup", "overhead", "tokens/s", "wall tokens/s", "bandwidth share")}
SHARED = DeviceLimits(
    read_bandwidth_bytes_per_s=33.75e9, matmul_flop_per_s=4e12, row_product_bytes_per_s=27e9, method="made up"
)


def write(folder: Path, day: int, *, bandwidth: float | None = None, **changes: Any) -> RunRecord:
    """A run of a day of January and of a commit of its own; all machines' steps spread by half a percent."""

    def spoil(parts: FakeParts) -> None:
        parts.environment = parts.environment.model_copy(
            update={"commit": f"{day:040x}", "started_utc": f"2024-01-{day:02d}T10:00:00Z"}
        )
        if bandwidth is not None:
            parts.device_limits = SHARED.model_copy(update={"read_bandwidth_bytes_per_s": bandwidth})

    spread = 1 + 0.0025 * (day * 7 % 5 - 2)
    step_s = {arm: time * spread * changes.get(arm, 1.0) for arm, time in STEP_S.items()}
    world = {key: value for key, value in changes.items() if key not in STEP_S}
    return write_fake_record(
        folder / f"day{day:02d}", spoil=spoil, step_s=step_s, jitter=0.0, rounds=1, num_prompts=8, **world
    )


def series_of(history: MachineHistory, subject: str, name: str) -> Series:
    (found,) = [one for one in history.series if (one.subject, one.name) == (subject, name)]
    return found


def stepping(history: MachineHistory) -> set[tuple[str, str]]:
    return {(one.subject, one.name) for one in history.series if one.steps}


@pytest.fixture(scope="module")
def slowed(tmp_path_factory: pytest.TempPathFactory) -> MachineHistory:
    """Eight runs, handed over out of order; from the fifth on one arm's steps take a fifth longer."""
    folder = tmp_path_factory.mktemp("slowed")
    days = [write(folder, day, optimised_64=1.2 if day > 4 else 1.0) for day in (3, 1, 8, 2, 5, 4, 7, 6)]
    return machine_history("made-up", days)


def test_a_planted_step_is_marked_at_its_record_and_in_no_other_figure(slowed: MachineHistory) -> None:
    assert [one.name for one in slowed.entries] == [f"day{day:02d}" for day in range(1, 9)]
    assert stepping(slowed) == {("optimised_64", name) for name in SPEED_OF["optimised_64"]}
    (marked,) = series_of(slowed, "optimised_64", "overhead").steps
    assert (marked.entry.name, marked.since.name) == ("day05", "day04")
    assert marked.step.ratio == pytest.approx(1.2)
    assert marked.differing == ("commit",)


def test_every_quantity_has_its_series(slowed: MachineHistory) -> None:
    names = {one.name for one in slowed.series if one.subject == "optimised_64"}
    assert names == {
        "tokens/step",
        "speedup",
        "overhead",
        "step cost",
        "tokens/s",
        "wall tokens/s",
        "bandwidth share",
        "peak memory, MB",
    }
    assert {one.name for one in slowed.counts} == {"tokens/step", "failed checks"}
    first = slowed.entries[0]
    memory = series_of(slowed, "chain", "peak memory, MB").value(first)
    assert memory is not None and memory.value == 1500
    overhead = series_of(slowed, "chain", "overhead").value(first)
    assert overhead is not None and overhead.value == pytest.approx(STEP_S["chain"] / STEP_S["vanilla"])


def test_times_that_do_not_hold_leave_a_gap_and_tokens_a_step_stay(tmp_path: Path) -> None:
    """`hf_greedy` beats vanilla on the second day, so that day's speedups are over a slow baseline."""
    history = machine_history(
        "made-up", [write(tmp_path, day, hf_greedy=0.5 if day == 2 else 1.0) for day in (1, 2, 3)]
    )
    assert [one.holds.speeds for one in history.entries] == [True, False, True]
    speedup, rate = (series_of(history, "chain", name) for name in ("speedup", "tokens/step"))
    assert [speedup.value(one) is None for one in history.entries] == [False, True, False]
    assert all(rate.value(one) is not None for one in history.entries)
    checks = series_of(history, "whole record", "failed checks")
    assert [step.entry.name for step in checks.steps] == ["day02", "day03"]


def test_records_of_one_name_with_other_bandwidths_are_split(tmp_path: Path) -> None:
    records = [
        write(tmp_path, day, bandwidth=rate) for day, rate in ((1, 34e9), (2, 77e9), (3, 36e9), (4, 75e9))
    ]
    history = machine_history("made-up", records)
    assert [[one.name for one in found.entries] for found in history.classes] == [
        ["day01", "day03"],
        ["day02", "day04"],
    ]
    assert [found.bandwidths for found in history.classes] == [(34e9, 36e9), (75e9, 77e9)]
    assert len(series_of(history, "chain", "tokens/step").entries) == 4, "counts bend on no machine"


def test_tokens_a_step_have_no_noise_so_every_change_is_a_step(tmp_path: Path) -> None:
    """The third run's heads are another seed's; two records are enough to see it."""
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    third = write_fake_record(tmp_path / "third", rounds=1, num_prompts=8, seed=5, jitter=0.0)
    history = machine_history("made-up", [first, second, third])
    (marked,) = series_of(history, "optimised_64", "tokens/step").steps
    assert marked.entry.name == "third" and marked.since.name == "day02"
    assert series_of(history, "vanilla", "tokens/step").steps == ()
    assert marked.differing[0].startswith("tree of") and marked.differing[-1] == "commit", (
        "what decides first"
    )


def test_three_records_are_too_few_for_a_step_in_times(tmp_path: Path) -> None:
    records = [write(tmp_path, day, optimised_64=1.5 if day == 3 else 1.0) for day in (1, 2, 3)]
    assert stepping(machine_history("made-up", records)) == set()


def test_a_single_record_and_a_suite_without_speed_have_a_history(tmp_path: Path) -> None:
    history = machine_history("made-up", [write(tmp_path, 1, reports_speed=False)])
    assert {one.name for one in history.series} == {"tokens/step", "failed checks", "peak memory, MB"}
    assert stepping(history) == set()


def test_latency_records_have_modes_and_steps_at_the_smallest_context(tmp_path: Path) -> None:
    """By hand: a vanilla step takes the backbone's 10.125 ms and 1 ms; 64 nodes and 5 heads 18 + 2.5 + 1."""
    record = write_fake_latency(tmp_path / "a")
    assert isinstance(record, LatencyRecord)
    history = machine_history("made-up", [record])
    (entry,) = history.entries
    vanilla = series_of(history, "float32 packed", "vanilla step after 256 tokens, s").value(entry)
    assert vanilla is not None and vanilla.value == pytest.approx(backbone_s(1) + 0.001)
    name = "overhead of 64 nodes, 5 heads, after 256 tokens"
    overhead = series_of(history, "float32 packed", name).value(entry)
    assert overhead is not None and overhead.value == pytest.approx(0.0215 / 0.011125)
    share = series_of(history, "float32 packed", "bandwidth share").value(entry)
    (row,) = [one for one in mode_rows(record) if (one.dtype, one.mode) == ("float32", "packed")]
    assert share is not None and share.value == row.bandwidth_share and share.value > 0
    speed = series_of(history, "float32 packed", "tokens/s").value(entry)
    assert speed is not None and speed.value == pytest.approx(20)


def test_texts_that_do_not_hold_leave_a_gap_in_tokens_a_step(tmp_path: Path) -> None:
    def wrong(parts: FakeParts) -> None:
        parts.edit(lambda one: {"step_tokens": one.step_tokens[:-1]}, arm="chain", limit=1)

    record = write_fake_record(tmp_path, rounds=1, num_prompts=8, spoil=wrong)
    history = machine_history("made-up", [record])
    (entry,) = history.entries
    assert not entry.holds.texts and series_of(history, "vanilla", "tokens/step").value(entry) is None


def test_a_change_of_ties_alone_is_told_of_the_arm_itself(tmp_path: Path) -> None:
    """Of two runs of one tree and model `chain` has the same texts, `cartesian` one that nothing explains."""

    def other(parts: FakeParts) -> None:
        parts.edit(lambda one: {"token_ids": (*one.token_ids[:-1], 499)}, arm="cartesian", limit=1)

    since, record = (
        write(tmp_path / "a", 1),
        write_fake_record(tmp_path / "b", rounds=1, num_prompts=8, jitter=0.0, spoil=other),
    )
    assert _only_ties(since, record, arm="chain") and _only_ties(since, record, arm="vanilla")
    assert not _only_ties(since, record, arm="cartesian") and not _only_ties(since, record, arm="none")
