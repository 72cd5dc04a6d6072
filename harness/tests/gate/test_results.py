"""A gate's record in the forms that other programs and people read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.errors import ExitCode
from harness.gate.results import append_summary, bmf, junit, write_gate
from harness.judge.gate.exact import judge_exact
from harness.judge.gate.looks import exit_code
from harness.judge.gate.timed import judge_timed, most_slowed, no_times, parts_of, timed_changes
from harness.judge.validate.record import validate_record
from harness.records.gate.folder import GateFolder
from harness.records.gate.record import GateRecord, read_gate
from harness.records.store import portable
from harness.report.tables.gate import gate_headline, render_gate_summary
from harness.tests.fake_gate import pair, side, spec_of, turns_of

SPEC = spec_of((4, 8))
REPEAT = "nox -s gate -- --base " + "a" * 40


def record(*, slower: float = 0.0, withheld: bool = False, noise: float = 0.0) -> GateRecord:
    turns = turns_of(
        SPEC,
        num_blocks=8,
        factor=lambda arm, block: 1 + slower,
        slower_part="heads" if slower else None,
        noise=noise,
    )
    timed = judge_timed(timed_changes(turns, SPEC), SPEC, num_blocks=8, judged_at=4)
    sides = pair(side(), side(dirty=True))
    findings = ((no_times(SPEC) if withheld else timed), judge_exact(turns, sides, SPEC))
    both, parts = (*findings[0], *findings[1]), parts_of(turns, SPEC)
    return GateRecord(
        gate=portable(SPEC),
        command="medusa-repro gate",
        repeat=REPEAT,
        started_utc="2026-11-27T20:00:00Z",
        elapsed_s=300.0,
        sides=sides,
        base_from="merge base with main",
        disturbed_blocks=(2,),
        looks_taken=() if withheld else (4, 8),
        findings=both,
        slowed=most_slowed(parts, both),
        parts=parts,
        notes=("the head's checkout differs from its commit: it was measured as it is",),
        exit_code=exit_code(both, SPEC),
        turns=turns,
    )


def test_a_summary_names_the_part_that_got_slower_and_ends_with_the_command() -> None:
    text = render_gate_summary(record(slower=0.08))
    assert text.startswith("## Gate `gate`: REGRESSION")
    assert "The part that got slower most: heads of tree, from" in text and "(+80.0 %)" in text
    assert text.rstrip().endswith(f"```\n{REPEAT}\n```") and "1 disturbed block" in text
    fine = render_gate_summary(record())
    assert fine.startswith("## Gate `gate`: no regression") and "got slower" not in fine
    assert "not decided" in render_gate_summary(record(withheld=True)).splitlines()[0]


def test_a_runner_that_is_too_noisy_says_what_it_can_hold() -> None:
    noisy = record(noise=0.3)
    steps = [one for one in noisy.findings if one.quantity == "step_s" and one.sees is not None]
    worst = max(steps, key=lambda one: one.sees or 0)
    text = render_gate_summary(noisy)
    assert "too noisy to find steps that are 5.0 % slower in 95.0 % of gates: what it can hold is" in text
    assert f"{100 * (worst.sees or 0):.1f} %, by {worst.name}." in text
    assert "too noisy" not in render_gate_summary(record())


def test_junit_has_a_test_a_quantity_whose_result_is_its_outcome() -> None:
    kinds = {"worse": "failure", "withheld": "error", "inconclusive": "skipped"}
    for made, outcome in (
        (record(slower=0.08), "worse"),
        (record(withheld=True), "withheld"),
        (record(noise=0.3), "inconclusive"),
    ):
        root = ElementTree.fromstring(junit(made))
        cases = {case.attrib["name"]: case for case in root.iter("testcase")}
        assert set(cases) == {one.name for one in made.findings}
        assert outcome in {one.outcome for one in made.findings}
        for one in made.findings:
            found = [child.tag for child in cases[one.name] if child.tag != "system-out"]
            assert found == ([kinds[one.outcome]] if one.outcome in kinds else []), one.name


def test_bencher_gets_the_heads_value_within_bounds() -> None:
    made = record(slower=0.08)
    data = json.loads(json.dumps(bmf(made), allow_nan=False))
    assert {"gate/vanilla", "gate/tree", "gate/all"} == set(data)
    rate = data["gate/tree"]["tokens_per_s"]
    assert rate["lower_value"] <= rate["value"] * 1.0001 and rate["value"] <= rate["upper_value"] * 1.0001
    step = data["gate/tree"]["step_s"]
    assert step["lower_value"] <= step["value"] * 1.0001 and step["value"] <= step["upper_value"] * 1.0001
    assert step["value"] == next(one.head for one in made.findings if one.name == "step_s/tree")
    assert "step_s" not in bmf(record(withheld=True))["gate/tree"]
    assert bmf(record(withheld=True))["gate/tree"]["tokens_per_step"] == {"value": 2.0}


def test_the_last_line_says_which_kind_of_figure_is_valid() -> None:
    line = gate_headline(record(withheld=True), folder="x")
    assert line["valid"] == {"texts": True, "speeds": False} and line["exit_code"] == 2
    line = gate_headline(record(slower=0.08), folder="x")
    assert line["valid"] == {"texts": True, "speeds": True} and line["exit_code"] == 1
    assert line["slowed"]["part"] == "heads" and line["findings"]["step_s/tree"]["outcome"] == "worse"
    json.dumps(line, allow_nan=False)


def test_a_record_is_written_whole_and_read_back(tmp_path: Path) -> None:
    made = record(slower=0.08)
    headline = partial(gate_headline, made)
    folder = write_gate(tmp_path, made, headline=headline)
    assert folder.relative_to(tmp_path).parts[:3] == ("gate", "gate", "cpu-a-processor-2c")
    assert read_gate(folder) == made and read_gate(folder / "gate.json") == made
    assert json.loads((folder / "headline.json").read_text()) == headline(folder.name)
    assert GateFolder.open(folder).gate == made and validate_record(folder) == ()
    assert write_gate(tmp_path, made, headline=headline) != folder, "no record is written over"
    assert made.exit_code == ExitCode.GATE_REGRESSION


def test_the_jobs_page_gets_the_summary_where_the_environment_names_one(tmp_path: Path) -> None:
    append_summary("nobody reads this", {})
    for text in ("one", "two"):
        append_summary(text, {"GITHUB_STEP_SUMMARY": str(tmp_path / "page.md")})
    assert (tmp_path / "page.md").read_text().split() == ["one", "two"]


@pytest.mark.parametrize("name", ["[link](https://example.org)", "<script>", "a\x1b[2J"])
def test_what_a_record_says_of_itself_steers_no_page(name: str) -> None:
    made = record()
    sides = {**made.sides, "head": side(device=made.sides["head"].device.model_copy(update={"name": name}))}
    text = render_gate_summary(made.model_copy(update={"sides": sides}))
    assert "](https" not in text and "<script" not in text and "\x1b" not in text
