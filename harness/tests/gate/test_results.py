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


def record(
    *,
    slower: float = 0.0,
    withheld: bool = False,
    noise: float = 0.0,
    num_blocks: int = 8,
    quality_prompts: int = 0,
) -> GateRecord:
    spec = SPEC.model_copy(update={"quality_prompts": quality_prompts})
    turns = turns_of(
        spec,
        num_blocks=num_blocks,
        factor=lambda arm, block: 1 + slower,
        slower_part="heads" if slower else None,
        noise=noise,
    )
    timed = judge_timed(timed_changes(turns, spec), spec, num_blocks=8, judged_at=4)
    sides = pair(side(), side(dirty=True))
    findings = ((no_times(spec) if withheld else timed), judge_exact(turns, sides, spec))
    both, parts = (*findings[0], *findings[1]), parts_of(turns, spec)
    return GateRecord(
        gate=portable(spec),
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
        exit_code=exit_code(both, spec),
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


def judged(*changes: dict[str, object], code: int) -> GateRecord:
    """Return a quiet record in which some findings came out otherwise, by their names."""
    changed = {str(one["name"]): {key: one[key] for key in one if key != "name"} for one in changes}
    made = record()
    findings = tuple(one.model_copy(update=changed.get(one.name, {})) for one in made.findings)
    return made.model_copy(update={"findings": findings, "exit_code": code})


def test_what_was_decided_and_what_was_not_is_said_under_exit_code_0() -> None:
    """ "too noisy" stood under "no regression", and no word of what had been left open."""
    fine = render_gate_summary(record())
    assert "Decided: 13 of 13 quantities, none of them worse.\n" in fine and "Not decided" not in fine
    left = judged(
        {"name": "overhead/tree", "outcome": "inconclusive", "high": 0.061},
        {"name": "step_s/tree", "outcome": "equivalent", "sees": 0.08},
        code=ExitCode.OK,
    )
    text = render_gate_summary(left)
    assert text.startswith("## Gate `gate`: no regression in what was decided\n")
    assert (
        "Decided: 12 of 13 quantities, none of them worse. Not decided: overhead/tree, which may be up to "
        "6.1 % worse (margin 3.0 %). That does not fail the gate: by their intervals no arm's steps are "
        "5.0 % slower."
    ) in text
    assert "too noisy" not in text and "Whether steps are 5.0 % slower was decided here." in text
    assert "the slowdown that 95.0 % of them find is 8.0 %, by step_s/tree." in text
    assert gate_headline(left, "x")["undecided"] == ["overhead/tree"]


def test_what_was_not_decided_is_said_under_the_other_exit_codes() -> None:
    blind = judged(
        {"name": "step_s/tree", "outcome": "inconclusive", "high": 0.05, "sees": 0.08},
        code=ExitCode.INVALID_MEASUREMENT,
    )
    text = render_gate_summary(blind)
    assert (
        text.startswith("## Gate `gate`: not decided\n") and "This runner is too noisy to find steps" in text
    )
    assert "Not decided: step_s/tree, which may be up to 5.0 % worse (margin 2.5 %).\n" in text
    seen = judged(
        {"name": "step_s/tree", "outcome": "inconclusive", "high": 0.049, "sees": 0.08}, code=ExitCode.OK
    )
    assert "too noisy" not in render_gate_summary(seen)
    worse = judged(
        {"name": "overhead/tree", "outcome": "worse"},
        {"name": "step_s/tree", "outcome": "inconclusive", "high": 0.2, "sees": 0.08},
        code=ExitCode.GATE_REGRESSION,
    )
    text = render_gate_summary(worse)
    assert "Decided: 12 of 13 quantities, 1 of them worse. Not decided: step_s/tree" in text
    assert "does not fail" not in text and "This runner is too noisy" in text
    without = render_gate_summary(record(withheld=True))
    assert "Not decided: step_s/vanilla, of which there is no figure;" in without


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
    line = gate_headline(record(withheld=True), "x")
    assert line["valid"] == {"texts": True, "speeds": False} and line["exit_code"] == 2
    line = gate_headline(record(slower=0.08), "x")
    assert line["valid"] == {"texts": True, "speeds": True} and line["exit_code"] == 1
    assert line["slowed"]["part"] == "heads" and line["findings"]["step_s/tree"]["outcome"] == "worse"
    json.dumps(line, allow_nan=False)


def test_texts_are_valid_where_they_were_compared() -> None:
    """It was a constant: true of a gate that had decoded nothing."""
    nothing = record(num_blocks=0, withheld=True)
    left = {one.name for one in nothing.findings if one.outcome != "withheld"}
    assert left == {"tokens_per_step/tree"}, "which is replayed, not decoded"
    assert nothing.exit_code == ExitCode.INVALID_MEASUREMENT
    assert gate_headline(nothing, "x")["valid"] == {"texts": False, "speeds": False}
    unscored = record(quality_prompts=2)
    assert unscored.exit_code == ExitCode.INVALID_MEASUREMENT
    assert gate_headline(unscored, "x")["valid"] == {"texts": False, "speeds": True}
    assert gate_headline(unscored, "x")["undecided"] == ["quality/vanilla_sampled", "quality/typical"]
    for name, valid in (("parity/tree", False), ("acceptance/tree/depth_1", False), ("peak_memory", True)):
        lost = judged({"name": name, "outcome": "withheld"}, code=2)
        assert gate_headline(lost, "x")["valid"] == {"texts": valid, "speeds": True}, name
    timed = tuple(one for one in record().findings if one.quantity == "step_s")
    line = gate_headline(record().model_copy(update={"findings": timed}), "x")
    assert line["valid"] == {"texts": False, "speeds": True}, "nothing was checked of texts"


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
