"""Whether the record of a GPU machine's acceptance is sound: each rule with a record that breaks it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.files import file_sha256, write_json
from harness.judge.validate.gpu import gpu_faults
from harness.judge.validate.record import validate_record
from harness.records.gpu.parts import PartResult, TestCounts
from harness.records.gpu.record import GPU, PARTS_FILE, TESTS_FILE, GpuManifest, GpuRecord
from harness.records.provenance import DeviceInfo, Provenance
from harness.records.store import Store
from harness.report.tables.gpu import gpu_headline, is_accepted, render_gpu_report
from harness.specs.gpu import GpuSpec

SPEC = GpuSpec.model_validate(
    {
        "schema_version": 1,
        "name": "x",
        "description": "for tests",
        "parts": [
            {"part": "tests", "marker": "gpu", "limit_s": 60},
            {
                "part": "latency",
                "spec": "latency/tiny.toml",
                "limit_s": 60,
                "least_s": 20,
                "reserve_s": 10,
            },
        ],
    }
)
ORIGIN = Provenance(
    commit="a" * 40,
    dirty=False,
    command="medusa-repro gpu",
    python="3.12.0",
    packages={"torch": "2.13.0"},
    device=DeviceInfo(kind="cuda", name="NVIDIA X", num_cores=2, num_threads=2, memory_bytes=1),
    started_utc="2026-11-27T12:00:00Z",
)
TESTS = PartResult(
    part="tests", outcome="ok", elapsed_s=9, limit_s=60, told="9 passed | 0 failed", files=(TESTS_FILE,)
)
LATENCY = PartResult(
    part="latency",
    outcome="ok",
    elapsed_s=50,
    limit_s=60,
    told="6 sizes timed",
    record="latency/tiny/x/y",
    manifest_sha256="b" * 64,
)


def write(folder: Path, *parts: PartResult, **manifest: Any) -> Path:
    """Write a sealed record of these parts."""
    store = Store.open(folder, kind=GPU, spec=SPEC, provenance=ORIGIN)
    store.append(*parts)
    write_json(store.folder / TESTS_FILE, TestCounts(num_passed=9, num_failed=0, num_skipped=0))
    counts = {"num_planned": 2, "num_accepted": 2, "elapsed_s": 60.0, **manifest}
    store.seal(GpuManifest, plan=SPEC.name, **counts)
    return store.folder


def test_a_sound_record_has_no_faults_and_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path, TESTS, LATENCY)
    assert gpu_faults(folder) == validate_record(folder) == ()
    record = GpuRecord.open(folder)
    report = render_gpu_report(record)
    assert "NVIDIA X" in report and "9 passed \\| 0 failed" in report and "| latency/tiny/x/y" in report
    assert is_accepted(record)
    assert gpu_headline(record, base=tmp_path)["parts"] == [
        {
            "part": "tests",
            "outcome": "ok",
            "seconds": 9.0,
            "record": folder.relative_to(tmp_path).as_posix(),
        },
        {"part": "latency", "outcome": "ok", "seconds": 50.0, "record": "latency/tiny/x/y"},
    ]


def test_records_outside_of_the_working_folder_are_named_from_that_of_the_results(tmp_path: Path) -> None:
    """The last line gave the bare name of a record there, and nobody could tell where it lies."""
    folder, elsewhere = write(tmp_path / "out", TESTS, LATENCY), tmp_path / "elsewhere"
    elsewhere.mkdir()
    told = gpu_headline(GpuRecord.open(folder), base=elsewhere)
    home = folder.relative_to(tmp_path).as_posix()
    assert home.startswith("out/gpu/") and told["record"] == home
    assert [one["record"] for one in told["parts"]] == [home, "out/latency/tiny/x/y"]


def changed(result: PartResult, /, **changes: Any) -> PartResult:
    return result.model_copy(update=changes)


@pytest.mark.parametrize(
    ("parts", "manifest", "fault"),
    [
        ((TESTS, TESTS), {}, f"{PARTS_FILE}: found part tests 2 times, need it once"),
        (
            (TESTS, changed(LATENCY, part="suite")),
            {},
            f"{PARTS_FILE}:2: found part 'suite', need one of plan.toml",
        ),
        (
            (changed(TESTS, files=("corpus.json",)), LATENCY),
            {},
            f"{PARTS_FILE}:1: found no corpus.json, need the file that the part wrote",
        ),
        (
            (changed(TESTS, files=()), LATENCY),
            {},
            f"{PARTS_FILE}:1: found part 'tests' ended well without a record or file, need one",
        ),
        (
            (TESTS, changed(LATENCY, manifest_sha256=None)),
            {},
            f"{PARTS_FILE}:2: found no hash of the manifest in latency/tiny/x/y, need that of a sealed "
            "record",
        ),
        (
            (TESTS, changed(LATENCY, told="at /root/secret/place")),
            {},
            f"{PARTS_FILE}:2: found an absolute path in 'told', need none: it tells a machine or a user "
            "apart",
        ),
        (
            (TESTS,),
            {"num_accepted": 1},
            f"{PARTS_FILE}: found 1 of 2 planned parts, need all (to mend it: resume the run)",
        ),
        (
            (TESTS, changed(LATENCY, outcome="stopped")),
            {},
            f"{PARTS_FILE}: found 1 parts that ended well, need as many as in manifest.json",
        ),
        (
            (TESTS, LATENCY),
            {"num_accepted": 1},
            f"{PARTS_FILE}: found 2 parts that ended well, need as many as in manifest.json",
        ),
    ],
)
def test_each_fault_is_named(
    parts: tuple[PartResult, ...], manifest: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    assert gpu_faults(write(tmp_path, *parts, **manifest)) == (fault,)


@pytest.mark.parametrize("record", [None, "latency/tiny/x/y"])
@pytest.mark.parametrize("outcome", ["stopped", "failed", "invalid", "skipped"])
def test_a_part_that_did_not_end_well_needs_no_sealed_record_and_is_not_accepted(
    outcome: Any, record: str | None, tmp_path: Path
) -> None:
    part = changed(LATENCY, outcome=outcome, record=record, manifest_sha256=None)
    folder = write(tmp_path, TESTS, part, num_accepted=1)
    assert gpu_faults(folder) == () and not is_accepted(GpuRecord(folder))


def test_a_part_that_its_budget_cut_short_is_accepted(tmp_path: Path) -> None:
    folder = write(tmp_path, TESTS, changed(LATENCY, outcome="short"))
    assert gpu_faults(folder) == () and is_accepted(GpuRecord(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / PARTS_FILE).write_text("{}\n"), f"{PARTS_FILE}: found "),
        (lambda folder: (folder / TESTS_FILE).unlink(), f"{TESTS_FILE}: found no file, need SHA-256"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: found no manifest.json"),
        (lambda folder: (folder / "corpus.json").write_text("{}"), "corpus.json: found "),
    ],
)
def test_a_file_that_was_changed_is_found(
    change: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    whole = write(tmp_path / "whole", TESTS, LATENCY)
    folder = shutil.copytree(whole, tmp_path / "changed")
    change(folder)
    assert any(fault.startswith(words) for fault in gpu_faults(folder)), gpu_faults(folder)
    assert file_sha256(whole / PARTS_FILE) and gpu_faults(whole) == ()
