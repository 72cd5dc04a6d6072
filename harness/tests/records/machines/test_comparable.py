"""Which machines may be compared: one identity, and measured bandwidths within 1.3 of each other."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from harness.records.machines.comparable import (
    MAX_BANDWIDTH_RATIO,
    MeasuredMachine,
    not_comparable,
)
from harness.records.machines.identity import machine_slug
from harness.records.opened import machine_of, open_record
from harness.records.probes import DeviceLimits
from harness.records.provenance import DeviceInfo
from harness.tests.processors import EPYC, EPYC_CACHES, XEON, XEON_CACHES, cpu
from harness.tests.test_layers import ROOT

OLD = DeviceInfo(kind="cpu", name="AMD EPYC", num_cores=2, num_threads=2, memory_bytes=25276502016)


@pytest.fixture
def epyc(tmp_path: Path) -> DeviceInfo:
    return cpu(tmp_path / "epyc", EPYC, EPYC_CACHES)


@pytest.fixture
def xeon(tmp_path: Path) -> DeviceInfo:
    return cpu(tmp_path / "xeon", XEON, XEON_CACHES)


def limits(gb_per_s: float) -> DeviceLimits:
    return DeviceLimits(read_bandwidth_bytes_per_s=1e9 * gb_per_s, matmul_flop_per_s=1e11, method="made up")


def at(device: DeviceInfo, gb_per_s: float | None) -> MeasuredMachine:
    return MeasuredMachine(device, None if gb_per_s is None else 1e9 * gb_per_s)


def test_one_machine_is_compared_with_and_without_measured_limits(epyc: DeviceInfo) -> None:
    for one, other in ((None, None), (60, None), (None, 60), (60, 60), (60, 46.2), (46.2, 60)):
        assert not_comparable(at(epyc, one), at(epyc, other)) is None


def test_another_machine_is_not_whatever_was_measured(epyc: DeviceInfo, xeon: DeviceInfo) -> None:
    for rate in (None, 60.0):
        found = not_comparable(at(epyc, rate), at(xeon, rate))
        assert found is not None and found.startswith("another machine: name AMD EPYC 9554 64-Core Processor")
        assert "stepping 1 against 8" in found


def test_one_name_of_two_bandwidths_is_not_and_says_both(epyc: DeviceInfo) -> None:
    words = "one machine name, but measured bandwidths {} GB/s, more than 1.3 times apart"
    for device in (epyc, OLD):
        assert not_comparable(at(device, 34), at(device, 77)) == words.format("34.0 and 77.0")
        assert not_comparable(at(device, 77), at(device, 34)) == words.format("77.0 and 34.0")
    gpu = epyc.model_copy(update={"kind": "cuda"})
    assert not_comparable(at(gpu, 3100), at(gpu, 4252)) == words.format("3,100.0 and 4,252.0")


@pytest.mark.parametrize(("ratio", "are_comparable"), [(1.29, True), (1.3, True), (1.31, False)])
def test_the_ratio_is_the_largest_that_one_machine_may_show(
    epyc: DeviceInfo, ratio: float, are_comparable: bool
) -> None:
    for rates in ((100.0, 100.0 * ratio), (100.0 * ratio, 100.0)):
        found = not_comparable(*(at(epyc, rate) for rate in rates))
        assert (found is None) is are_comparable
    assert MAX_BANDWIDTH_RATIO == 1.3


def test_an_older_record_is_placed_by_its_bandwidth_alone(epyc: DeviceInfo) -> None:
    new = epyc.model_copy(update={"name": OLD.name})
    assert (
        not_comparable(at(OLD, 60), at(new, 70)) is None and not_comparable(at(OLD, 60), at(OLD, 70)) is None
    )
    apart = not_comparable(at(OLD, 34), at(new, 77))
    assert apart is not None and apart.startswith("one machine name, but")
    for rates in ((60, None), (None, 60), (None, None)):
        unknown = not_comparable(at(OLD, rates[0]), at(new, rates[1]))
        assert unknown is not None and unknown.startswith(
            "perhaps another machine of that name: one does not "
        )
        assert "stepping" in unknown and "not both measured" in unknown
        neither = not_comparable(at(OLD, rates[0]), at(OLD, rates[1]))
        assert neither is not None and "neither tells more than its name" in neither


def test_the_best_bandwidth_of_all_dtypes_counts(epyc: DeviceInfo) -> None:
    assert MeasuredMachine.of(epyc, [limits(34), None, limits(50)]) == at(epyc, 50)
    assert MeasuredMachine.of(epyc, [None]) == MeasuredMachine.of(epyc) == at(epyc, None)


def test_a_machine_is_told_from_others_of_its_name_by_what_is_known(epyc: DeviceInfo) -> None:
    name = machine_slug(epyc)
    assert at(epyc, 60).which == f"{name}, reads 60.0 GB/s" and at(epyc, None).which == name
    assert at(OLD, 60).which == "reads 60.0 GB/s" and at(OLD, None).which == "cpu-amd-epyc-2c"


@pytest.fixture(scope="module")
def committed() -> dict[str, MeasuredMachine]:
    found = {}
    for manifest in sorted((ROOT / "results").rglob("manifest.json")):
        found[manifest.parent.relative_to(ROOT / "results").as_posix()] = machine_of(
            open_record(manifest.parent)
        )
    return found


def test_committed_records_give_the_reason_for_the_ratio(committed: dict[str, MeasuredMachine]) -> None:
    rates = {
        name: sorted(
            one.read_bytes_per_s
            for one in committed.values()
            if one.device.name == name and one.read_bytes_per_s
        )
        for name in ("NVIDIA H200", "AMD EPYC")
    }
    (least, *_, most), (slowest, *_, fastest) = rates["NVIDIA H200"], rates["AMD EPYC"]
    assert most / least < 1.21 < MAX_BANDWIDTH_RATIO < fastest / slowest
    assert round(fastest / slowest, 1) == 2.3


def test_committed_runs_of_one_machine_name_are_not_all_of_one_machine(
    committed: dict[str, MeasuredMachine],
) -> None:
    (older,), (newer,) = (
        [one for name, one in committed.items() if name.startswith(f"embedded/cpu-amd-epyc-2c/{date}")]
        for date in ("20261123", "20261125")
    )
    assert not_comparable(older, newer) == (
        "one machine name, but measured bandwidths 33.9 and 77.1 GB/s, more than 1.3 times apart"
    )
    gpus = [one for one in committed.values() if one.device.kind == "cuda" and one.read_bytes_per_s]
    assert len(gpus) >= 3 and all(not_comparable(*pair) is None for pair in combinations(gpus, 2))
    for one in gpus:
        found = not_comparable(older, one)
        assert found is not None and found.startswith("another machine: kind cpu against cuda")


def test_trainings_and_sweeps_measure_no_bandwidth(committed: dict[str, MeasuredMachine]) -> None:
    without = {name.split("/")[0] for name, one in committed.items() if one.read_bytes_per_s is None}
    assert without == {"embedded_training", "embedded_training_long", "embedded_training_quick", "sweep"}
