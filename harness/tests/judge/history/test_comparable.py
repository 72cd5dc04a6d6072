"""Which records' times may be held against each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.judge.history.comparable import (
    bandwidth_of,
    limits_of,
    machine_classes,
    not_comparable,
    why_not_compared,
)
from harness.records.probes import DeviceLimits
from harness.records.run import RunRecord
from harness.tests.fake_latency import BANDWIDTH_BYTES_PER_S, fake_environment, write_fake_latency
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


def test_one_name_and_close_bandwidths_are_comparable() -> None:
    device = fake_environment().device
    near = (limits(40e9),), (limits(30e9), limits(51.9e9))
    assert not_comparable(device, device, limits=near[0], other_limits=near[1]) is None
    assert not_comparable(device, device, limits=near[0], other_limits=(limits(52e9),)) is None
    far = not_comparable(device, device, limits=near[0], other_limits=(limits(52.1e9),))
    assert far == "one machine name, but measured bandwidths 40 and 52.1 GB/s, more than 1.3 times apart"
    assert not_comparable(device, device, limits=(limits(52.1e9),), other_limits=near[0]) is not None


def test_other_names_and_unmeasured_machines_are_not() -> None:
    device = fake_environment().device
    other = device.model_copy(update={"name": "another CPU"})
    told = not_comparable(device, other, limits=(limits(4e10),), other_limits=(limits(4e10),))
    assert told == "another machine: cpu-made-up-cpu-2c against cpu-another-cpu-2c"
    for sides in ({"limits": (limits(4e10),)}, {"other_limits": (limits(4e10),)}, {}):
        assert "not both measured" in str(not_comparable(device, device, **sides))


def test_groups_span_no_more_than_the_ratio(tmp_path: Path) -> None:
    """By hand: 30 and 38 belong together (1.27), 44 is 1.47 times 30 and begins the next, which holds 57."""
    rates = [44e9, 30e9, None, 38e9, 57e9, 57.3e9]
    found = machine_classes(written(tmp_path, rates))
    assert found == [[1, 3], [0, 4], [5], [2]]


def test_records_of_both_kinds_tell_their_bandwidth(tmp_path: Path) -> None:
    (run,) = written(tmp_path, [30e9])
    latency = write_fake_latency(tmp_path / "latency")
    assert bandwidth_of(run) == 30e9 and bandwidth_of(latency) == BANDWIDTH_BYTES_PER_S
    assert len(limits_of(latency)) == 1
    assert "GB/s" in str(why_not_compared(run, latency)), "40 is 1.33 times 30"
