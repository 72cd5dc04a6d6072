"""A run on a GPU that another process begins to use: its trials are marked, and nothing is lost."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import tomli_w
from pytest import MonkeyPatch

from harness.device.gpu.driver import GpuDriver
from harness.device.gpu.watch import GpuWatch
from harness.judge.run import judge
from harness.judge.validate.record import validate_record
from harness.measure import run as run_module
from harness.measure.latency import run as latency_module
from harness.measure.latency.run import LatencyOptions, run_latency
from harness.measure.run import RunOptions, run_suite
from harness.records.latency import LatencyRecord
from harness.records.run import RunRecord
from harness.report.latency import render_latency_report
from harness.report.run import render_report
from harness.safe_text import SafeConsole
from harness.specs.latency import parse_latency_spec
from harness.specs.suite import parse_suite
from harness.tests.device.gpu.fake_nvml import FakeNvml
from harness.tests.tiny_suite import (
    BESIDE_ANYTHING,
    CHAIN,
    UNDISTURBED,
    VANILLA,
    micro_data,
    small_device_limits,
    smoke_suite,
)

QUIET_LOOKS = 3


class BusyLater(FakeNvml):
    """A GPU on which we are process 4007 of the host, and another process appears after a few looks."""

    looks = 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int | str) -> list[object]:  # type: ignore[override]
        self.looks += 1
        pids = [] if self.looks == 1 else [4007] if self.looks <= 1 + QUIET_LOOKS else [4007, 4008]
        self.listed = {0: [(pid, None) for pid in pids]}
        return list(super().nvmlDeviceGetComputeRunningProcesses(handle))


@pytest.fixture
def watch() -> GpuWatch:
    nvml = BusyLater()
    nvml.answers = {"sm_clock": 1980, "reasons": 0x4}
    nvml.nvmlInit()
    is_used = iter([False])
    return GpuWatch(GpuDriver(nvml, 0), pid=7, uses_gpu=lambda: next(is_used, True), own_bytes=lambda: 0)


def test_trials_next_to_another_process_are_marked(
    heads_file: Path, watch: GpuWatch, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "require_own_gpu", lambda: watch)
    out = io.StringIO()
    alone = {**UNDISTURBED, "turn_steps": 0}  # a look after each trial
    suite = parse_suite(
        tomli_w.dumps(micro_data(heads_file, arms=[VANILLA, CHAIN], disturbance=alone)), where="the test"
    )
    with small_device_limits():
        folder = run_suite(
            suite, suite_file=None, options=RunOptions(results=tmp_path), console=SafeConsole(file=out)
        )
    record = RunRecord(folder)
    assert validate_record(folder) == () and not record.failures
    seen = [one.gpu for one in record.generations]
    assert len(seen) == 8 and all(one is not None and one.sm_clock_mhz == 1980 for one in seen)
    assert [one is not None and one.is_shared for one in seen] == [False] * QUIET_LOOKS + [True] * 5
    assert out.getvalue().count("another process uses the GPU") == 5
    page = render_report(record, judge(record))
    assert "seen in 5 of 8 trials" in page and "software power cap (8 of 8 trials)" in page


def test_without_a_watch_nothing_is_noted(heads_file: Path, tmp_path: Path) -> None:
    suite = parse_suite(tomli_w.dumps(micro_data(heads_file, arms=[VANILLA])), where="the test")
    with small_device_limits():
        options = RunOptions(results=tmp_path, limit=1)
        folder = run_suite(suite, suite_file=None, options=options, console=SafeConsole(quiet=True))
    assert [one.gpu for one in RunRecord(folder).generations] == [None]


def test_points_of_a_latency_run_hold_what_became_of_the_gpu(
    heads_file: Path, watch: GpuWatch, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_module, "require_own_gpu", lambda: watch)
    model = smoke_suite().model_dump(mode="json", exclude_none=True)["model"]
    grids = [{"num_nodes": [1, 4], "num_heads": [2], "context_tokens": [24], "batch": [1, 2, 3, 4]}]
    data = {
        "schema_version": 1,
        "kind": "latency",
        "name": "tiny",
        "description": "for tests",
        "model": model,
        "heads": {"path": str(heads_file)},
        "dtypes": ["float32"],
        "modes": ["eager"],
        "repeats": 1,
        "prompts": {"source": "random", "prompt_tokens": 9},
        "grids": grids,
        "disturbance": BESIDE_ANYTHING,
    }
    with small_device_limits():
        folder = run_latency(
            parse_latency_spec(tomli_w.dumps(data), where="the test"),
            spec_file=None,
            options=LatencyOptions(results=tmp_path),
            console=SafeConsole(quiet=True),
        )
    record = LatencyRecord(folder)
    assert validate_record(folder) == ()
    seen = {point.batch: point.gpu for point in record.points}
    assert len(record.points) == 8 and all(point.gpu == seen[point.batch] for point in record.points)
    shared = [one is not None and one.is_shared for _, one in sorted(seen.items())]
    assert shared == [False] * QUIET_LOOKS + [True]
    assert "seen in 2 of 8 points" in render_latency_report(record)
