"""What is wrong with a gate's record, one planted fault at a time, sealed again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.files import file_sha256
from harness.judge.validate.record import validate_record
from harness.records.gate.folder import GateFolder, stored_gate

FIXTURE = Path(__file__).parents[2] / "records" / "fixtures" / "v1" / "gate"
Data = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURE, tmp_path / "gate")
    return tmp_path / "gate"


def planted(folder: Path, change: Callable[[Data], object], *, file: str = "gate.json") -> list[str]:
    """Return the faults after a change of a file's data, under a seal that fits again."""
    data = json.loads((folder / file).read_text())
    change(data)
    (folder / file).write_text(json.dumps(data))
    if file != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"][file] = file_sha256(folder / file)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return list(validate_record(folder))


def turn(data: Data, purpose: str = "timed") -> Data:
    found: Data = next(one for one in data["turns"] if one["purpose"] == purpose)
    return found


def finding(data: Data, name: str) -> Data:
    found: Data = next(one for one in data["findings"] if one["quantity"] == name)
    return found


FAULTS: dict[str, Callable[[Data], object]] = {
    "found turn (0, ": lambda data: data["turns"].append(data["turns"][0]),
    "turns and 15 findings, need as many as in manifest.json": lambda data: data["turns"].pop(),
    "found blocks [9] of 7, need each from 0 on": lambda data: turn(data).update(block=9),
    "turn 1: found timed arm 'typical'": lambda data: turn(data).update(arm="typical"),
    "found two prompts in block 0, need one": lambda data: turn(data).update(prompt_key=""),
    "found two prompts in block 0": lambda data: turn(data).update(prompt_key="~"),
    "found 3 step times, need 4, one a step": lambda data: turn(data)["step_s"].pop(),
    "found step times or no likelihood": lambda data: turn(data, "scored").update(mean_log_likelihood=None),
    "found parts of different numbers": lambda data: turn(data)["parts_s"]["backbone"].append(0.1),
    "found looks [3, 7], need growing numbers of at most 6": lambda data: data.update(looks_taken=[3, 7]),
    "found looks [7], need growing": lambda data: data.update(looks_taken=[7]),
    "found looks [3, 3], need growing": lambda data: data.update(looks_taken=[3, 3]),
    "found looks [6, 3], need growing": lambda data: data.update(looks_taken=[6, 3]),
    "found a disturbed block without turns": lambda data: data.update(disturbed_blocks=[6]),
    "found finding parity/tree 2 times": lambda data: data["findings"].append(finding(data, "parity")),
    "found a margin of 0.9 for step_s/vanilla": lambda data: finding(data, "step_s").update(margin=0.9),
    "found bounds of step_s/vanilla the wrong way": lambda data: finding(data, "step_s").update(low=9.0),
    "found parity/tree equivalent without a change": lambda data: finding(data, "parity").update(change=None),
    "where something is worse": lambda data: finding(data, "parity").update(outcome="worse"),
    "found exit code 1 where nothing is worse": lambda data: data.update(exit_code=1),
    "found a slowed part that is none": lambda data: data.update(
        slowed={"arm": "tree", "part": "heads", "base_s": 1.0, "head_s": 2.0}
    ),
    "found an absolute path in 'notes'": lambda data: data.update(notes=["in /home/somebody/x"]),
    "found no head": lambda data: data["sides"].pop("head"),
    "need both versions": lambda data: data["sides"].pop("base"),
    "found margins.0.margin: ": lambda data: data["gate"]["margins"][0].update(margin=2.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told_of(folder: Path, fault: str) -> None:
    faults = planted(folder, FAULTS[fault])
    assert any(fault in line for line in faults), faults
    assert not any("SHA-256" in line for line in faults)


def test_one_arm_may_be_worse_and_the_record_is_sound(folder: Path) -> None:
    """The edges that are no faults: a last look at every block, a disturbed last block, equal bounds."""

    def change(data: Data) -> None:
        data.update(exit_code=1, disturbed_blocks=[5], slowed=data["parts"][0])
        finding(data, "step_s").update(outcome="worse", low=0.6, high=0.6)

    assert planted(folder, change) == []


def test_the_manifest_names_the_gate_and_its_counts(folder: Path) -> None:
    (fault,) = planted(folder, lambda data: data.update(gate="another"), file="manifest.json")
    assert fault == "gate.json: found the gate 'smoke', need the one in manifest.json"
    faults = planted(folder, lambda data: data.update(gate="smoke", num_findings=3), file="manifest.json")
    assert len(faults) == 1 and "15 findings, need as many as in manifest.json" in faults[0]


@pytest.mark.parametrize("name", ["bmf.json", "headline.json"])
def test_what_other_programs_read_is_json(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    assert validate_record(folder) == (f"{name}: found a file that is no JSON, need one JSON object",)


def test_a_baseline_is_opened_under_its_seal(folder: Path) -> None:
    assert stored_gate(folder)[1] and stored_gate(folder / "gate.json")[1]
    assert stored_gate(folder)[0] == GateFolder(folder).gate
    (folder / "gate.json").write_text((folder / "gate.json").read_text().replace("0.0", "0.1", 1))
    for path in (folder, folder / "gate.json"):
        with pytest.raises(UserError, match=r"as sealed; in gate\.json"):
            stored_gate(path)
    (folder / "manifest.json").unlink()
    assert stored_gate(folder)[1] is False, "of before gates were sealed"
    (fault,) = validate_record(folder)
    assert fault.startswith("manifest.json: found no manifest.json") and "run the gate again" in fault
