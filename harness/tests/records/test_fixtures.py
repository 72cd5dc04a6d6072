"""Records of every version so far: each kind loads, validates and reports; none of its files may be newer.

The fixtures are made by `cut_record.py`; a change of a schema's version adds a folder, and changes none.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from harness.compose.replay import replay
from harness.errors import UserError
from harness.judge.ablation import ablation_rows
from harness.judge.claims.ablation import training_verdicts
from harness.judge.run import judge
from harness.judge.validate.record import validate_record
from harness.records.ablation import ARMS_FILE, AblationRecord
from harness.records.folder import RecordKind, kind_of
from harness.records.gate.folder import GateFolder
from harness.records.gpu.record import GpuRecord
from harness.records.latency import LatencyRecord
from harness.records.profiles.step import read_step_profile
from harness.records.profiles.training import read_training_profile
from harness.records.run import RunRecord, read_arm_steps
from harness.records.sweep import SweepRecord
from harness.records.trace import Trace
from harness.report.ablation import render_ablation
from harness.report.latency import render_latency_report
from harness.report.profiles import render_step_profile, training_headline
from harness.report.run import render_report
from harness.report.sweep import render_sweep_report
from harness.report.tables.gate import render_gate_report
from harness.report.tables.gpu import render_gpu_report
from harness.specs.claims import load_claims
from harness.tests.records.cut_record import cut
from medusa_impl.tree import DraftTree

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir())


def report_of(folder: Path) -> str:
    """Return the report of a record of any kind."""
    kind, claims = kind_of(folder), load_claims(None)
    if kind == "latency":
        return render_latency_report(LatencyRecord(folder))
    if kind == "sweep":
        return render_sweep_report(SweepRecord(folder), claims=claims, figures=())
    if kind == "ablation":
        ablation = AblationRecord(folder)
        verdicts = training_verdicts(claims, ablation)
        return render_ablation(ablation, ablation_rows(ablation), verdicts, has_curves=False)
    if kind == "gpu":
        return render_gpu_report(GpuRecord(folder))
    if kind == "gate":
        return render_gate_report(GateFolder(folder))
    run = RunRecord(folder)
    return render_report(run, judge(run, claims=claims))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", get_args(RecordKind))
def test_a_record_of_every_version_loads_validates_and_reports(version: str, kind: RecordKind) -> None:
    folder = FIXTURES / version / kind
    assert kind_of(folder) == kind
    assert validate_record(folder) == ()
    report = report_of(folder)
    assert report.startswith("# ") and "ommit" in report and "| " in report


@pytest.mark.parametrize("kind", ["suite", "latency"])
def test_limits_of_version_1_are_shown_as_under_measured(kind: RecordKind) -> None:
    """Their probe used fixed sizes, and has no product of one row."""
    folder = FIXTURES / "v1" / kind
    limits = RunRecord(folder).device_limits if kind == "suite" else LatencyRecord(folder).limits("float32")
    assert limits is not None and limits.are_under_measured and limits.schema_version == 2
    assert "limits under-measured" in report_of(folder)


def test_a_record_from_before_kinds_were_written_says_none() -> None:
    for kind in ("suite", "latency", "sweep", "ablation"):
        assert "kind" not in json.loads((FIXTURES / "v1" / kind / "manifest.json").read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_profiles_of_every_version_load_and_report(version: str) -> None:
    step = read_step_profile(FIXTURES / version / "step_profile.json")
    assert [size.num_nodes for size in step.sizes] == [1, 8, 64]
    assert "| backbone" in render_step_profile(step)
    training = read_training_profile(FIXTURES / version / "training_profile.json")
    assert 0 < training.share < 1
    assert training_headline(training)["recipe"] == "embedded_medusa1"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_trace_of_every_version_loads_and_is_replayed(version: str) -> None:
    trace = Trace.load(FIXTURES / version / "trace.npz")
    assert len(trace.prompts) == 2 and trace.num_heads == 5
    assert replay(trace, DraftTree.chain(3)).tokens_per_step > 1


def test_every_step_log_and_separate_step_of_the_fixtures_is_read() -> None:
    ablation = AblationRecord(FIXTURES / "v1" / "ablation")
    assert [len(ablation.steps(result)) for result in ablation.results] == [0, 4, 4]
    assert {cost.arm for cost in read_arm_steps(FIXTURES / "v1" / "suite" / "arm_steps.jsonl")} >= {"vanilla"}


def faults_of(folder: Path) -> list[str]:
    """Return what is wrong with the files of a version's fixtures, each of them read."""
    told = [fault for kind in get_args(RecordKind) for fault in validate_record(folder / kind)]
    readers: tuple[tuple[Callable[[Path], object], str], ...] = (
        (read_arm_steps, "suite/arm_steps.jsonl"),
        (Trace.load, "suite/calibration.npz"),
        (Trace.load, "suite/calibration-tuned.npz"),
        (Trace.load, "trace.npz"),
        (read_step_profile, "step_profile.json"),
        (read_training_profile, "training_profile.json"),
    )
    for read, name in readers:
        try:
            read(folder / name)
        except UserError as error:
            told.append(str(error))
    return told


def raised(path: Path) -> None:
    """Let a file say that it is of version 99."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
        header = {**json.loads(arrays.pop("header").tobytes()), "schema_version": 99}
        buffer = io.BytesIO()
        np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)
        path.write_bytes(buffer.getvalue())
    elif path.suffix == ".toml":
        path.write_text(
            path.read_text(encoding="utf-8").replace("schema_version = 1", "schema_version = 99"),
            encoding="utf-8",
        )
    elif path.suffix == ".jsonl":
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        newer = json.dumps({**json.loads(first), "schema_version": 99})
        path.write_text("\n".join((newer, *rest, "")), encoding="utf-8")
    else:
        path.write_text(
            json.dumps({**json.loads(path.read_text(encoding="utf-8")), "schema_version": 99}),
            encoding="utf-8",
        )


FOR_OTHERS = ("bmf.json", "headline.json", "junit.xml")  # forms of other programs, without a version of ours
FILES = sorted(
    path.relative_to(FIXTURES / "v1").as_posix()
    for path in (FIXTURES / "v1").rglob("*")
    if path.is_file() and path.name not in FOR_OTHERS
)


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_newer_version_is_read(tmp_path: Path, name: str) -> None:
    """Each reader on its own: a file that one of them read past its version would pass here."""
    shutil.copytree(FIXTURES / "v1", tmp_path / "v1")
    raised(tmp_path / "v1" / name)
    told = faults_of(tmp_path / "v1")
    newest = 2 if name.endswith("device_limits.json") or "device_limits_" in name else 1
    words = ("found schema_version 99", f"need at most {newest}", "to mend it: update medusa-repro")
    assert any(all(word in line for word in words) for line in told), told


def test_the_fixtures_hold_a_file_of_every_kind() -> None:
    names = {Path(name).name for name in FILES}
    assert {"generations.jsonl", "points.jsonl", "cells.jsonl", ARMS_FILE, "environment.json"} <= names
    assert {"origin.json", "trees.json", "tree.json", "step_costs.json", "rounding.json"} - names == {
        "rounding.json"
    }, "no committed record is in half precision"


def test_cutting_a_cut_record_changes_nothing(tmp_path: Path) -> None:
    """So that fixtures can be made again after a fix of the script."""
    source = FIXTURES / "v1" / "ablation"
    cut(source, tmp_path)
    assert validate_record(tmp_path) == ()
    assert (tmp_path / "arms.jsonl").read_bytes() == (source / "arms.jsonl").read_bytes()
