"""A gate's record on disk, and the forms of it that other programs read: JUnit XML and Bencher's BMF."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from harness.errors import ExitCode
from harness.files import write_bytes, write_json, write_text
from harness.records.folder import MANIFEST_FILE
from harness.records.gate.folder import GateManifest
from harness.records.gate.record import (
    BMF_FILE,
    GATE_FILE,
    HEADLINE_FILE,
    JUNIT_FILE,
    Finding,
    GateRecord,
)
from harness.records.machines.identity import machine_slug
from harness.records.store import begun_folder, hashes, utc_now
from harness.specs.gate import TIMED

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def write_gate(results: Path, record: GateRecord, *, headline: Callable[[str], Mapping[str, Any]]) -> Path:
    """Write a gate's folder, its seal last, and return it; `headline` gives its last line by its name."""
    head = record.sides["head"]
    home = results / "gate" / record.gate["name"] / machine_slug(head.device)
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{(head.commit or 'nocommit')[:8]}"

    def begin(draft: Path) -> None:
        write_text(draft / GATE_FILE, record.model_dump_json() + "\n")
        write_bytes(draft / JUNIT_FILE, junit(record))
        write_text(draft / BMF_FILE, json.dumps(bmf(record), indent=1, allow_nan=False) + "\n")

    folder = begun_folder(home, stem, begin)
    write_text(folder / HEADLINE_FILE, json.dumps(headline(folder.name), allow_nan=False) + "\n")
    manifest = GateManifest(
        kind="gate",
        gate=record.gate["name"],
        num_turns=len(record.turns),
        num_findings=len(record.findings),
        finished_utc=utc_now(),
        elapsed_s=record.elapsed_s,
        sha256=hashes(folder),
    )
    write_json(folder / MANIFEST_FILE, manifest)
    return folder


def append_summary(summary: str, environ: Mapping[str, str]) -> None:
    """Append a summary to the file that the environment names for the job's page, where it names one."""
    if named := environ.get(SUMMARY_VARIABLE):
        with Path(named).open("a", encoding="utf-8") as file:
            file.write(summary + os.linesep)


def junit(record: GateRecord) -> bytes:
    """Return a gate as JUnit XML: a test a quantity; worse fails, withheld is an error, open is skipped."""
    suite = TestSuite(f"gate {record.gate['name']}")
    for finding in record.findings:
        case = TestCase(finding.name, classname=f"gate.{record.gate['name']}")
        case.system_out = told(finding)
        if finding.outcome == "worse":
            case.result = [Failure(f"worse: {told(finding)}", "worse")]
        elif finding.outcome == "withheld":
            why = "too few quiet blocks in the time that there was"
            if finding.quantity not in TIMED:
                why = "nothing that both versions decoded"
            case.result = [Error(f"withheld: {why}", "withheld")]
        elif finding.outcome == "inconclusive":
            case.result = [Skipped(f"inconclusive: {told(finding)}", "inconclusive")]
        suite.add_testcase(case)
    suite.time = record.elapsed_s
    xml = JUnitXml()
    xml.add_testsuite(suite)
    text = xml.tostring()
    return text if isinstance(text, bytes) else str(text).encode()


def told(finding: Finding) -> str:
    """Return a finding in one line of plain figures."""
    if finding.change is None:
        return "no figure"
    line = f"change {finding.change:+.4g}"
    if finding.low is not None and finding.high is not None:
        line += f" [{finding.low:+.4g}, {finding.high:+.4g}]"
    return f"{line}, margin {finding.margin:g}: base {finding.base:.6g}, head {finding.head:.6g}"


def bmf(record: GateRecord) -> dict[str, Any]:
    """Return the head's figures as Bencher's metric format: a benchmark an arm, a measure a quantity.

    Bounds are those of the change, applied to the base's value.
    """
    found: dict[str, Any] = {}
    for finding in record.findings:
        if finding.head is None:
            continue
        measure: dict[str, float] = {"value": finding.head}
        if finding.base is not None and finding.low is not None and finding.high is not None:
            sign = -1 if finding.quantity in ("speedup", "tokens_per_s") else 1
            ends = sorted(finding.base * (1 + sign * bound) for bound in (finding.low, finding.high))
            measure |= {"lower_value": ends[0], "upper_value": ends[1]}
        name = finding.quantity if finding.depth is None else f"{finding.quantity}_depth_{finding.depth}"
        found.setdefault(f"gate/{finding.arm or 'all'}", {})[name] = measure
    return found


def outcome_word(code: int) -> str:
    """Return what a gate's exit code says."""
    return {ExitCode.OK: "ok", ExitCode.GATE_REGRESSION: "regression"}.get(ExitCode(code), "invalid")
