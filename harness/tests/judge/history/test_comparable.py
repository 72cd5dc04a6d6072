"""Which records' times may be held against each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.judge.history.comparable import bandwidth_of, machine_classes, why_not_compared
from harness.records.probes import DeviceLimits
from harness.records.run import RunRecord
from harness.tests.fake_latency import BANDWIDTH_BYTES_PER_S, write_fake_latency
from harness.tests.fake_record import FakeParts, write_fake_record


def limits(rate: float) -> DeviceLimits:
    return DeviceLimits(read_bandwidth_bytes_per_s=rate, matmul_flop_per_s=1e12, method="made up")


def reading(rate: float | None) -> Callable[[FakeParts], None]:
    def spoil(parts: FakeParts) -> None:
        parts.device_limits = None if rate is None else limits(rate)

    return spoil


def written(folder: Path, rates: list[float | None]) -> list[RunRecord]:
    return [
        write_fake_record(folder / str(number), spoil=reading(rate), num_prompts=8)
        for number, rate in enumerate(rates)
    ]


def test_groups_span_no_more_than_the_ratio(tmp_path: Path) -> None:
    """By hand: 30 and 38 belong together (1.27), 44 is 1.47 times 30 and begins the next, which holds 57."""
    rates = [44e9, 30e9, None, 38e9, 57e9, 57.3e9, None]
    found = machine_classes(written(tmp_path, rates))
    assert found == [[1, 3], [0, 4], [5], [2], [6]], "unmeasured ones may be of any machine"


def test_records_of_both_kinds_tell_their_bandwidth(tmp_path: Path) -> None:
    (run,) = written(tmp_path, [30e9])
    latency = write_fake_latency(tmp_path / "latency")
    assert bandwidth_of(run) == 30e9 and bandwidth_of(latency) == BANDWIDTH_BYTES_PER_S
    assert "GB/s" in str(why_not_compared(run, latency)), "40 is 1.33 times 30"
