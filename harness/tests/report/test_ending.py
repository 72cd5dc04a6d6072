"""How a run ends in a terminal: an answer, a line a test, and where to read on, in 25 lines of 80 columns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from harness.judge.judgement import Divergence, Judgement, VerdictKind
from harness.judge.run import judge as judged_by_all_claims
from harness.records.run import RunRecord
from harness.report.tables.ending import answer, print_ending
from harness.safe_text import SafeConsole
from harness.specs.suite import SuiteSpec
from harness.tests.fake_judgement import FAILED_CHECK, VERDICTS, judge, verdict
from harness.tests.fake_record import write_fake_record

ROOT = Path(__file__).resolve().parents[3]
DEFAULT = ROOT / "results" / "embedded" / "cpu-amd-epyc-2c" / "20261125T202908Z-e4ce6458"


def printed(record: RunRecord, judgement: Judgement, *, encoding: str = "utf-8", **options: Any) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    width = options.pop("width", 80)
    print_ending(SafeConsole(file=stream, width=width), record, judgement, report="r/report.md", **options)
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(encoding)


@pytest.fixture(scope="module")
def default() -> tuple[RunRecord, Judgement]:
    record = RunRecord.open(DEFAULT)
    return record, judged_by_all_claims(record)


@pytest.fixture
def fake(tmp_path: Path) -> tuple[RunRecord, Judgement]:
    record = write_fake_record(tmp_path / "fake", rounds=1, num_prompts=4)
    return record, judge(record).model_copy(update={"verdicts": VERDICTS})


def test_the_default_run_ends_in_25_lines_of_80_columns(default: tuple[RunRecord, Judgement]) -> None:
    """With the JSON line after it. It ended in 170."""
    text = printed(*default)
    lines = text.splitlines()
    assert len(lines) <= 24 and all(len(line) <= 80 for line in lines)
    assert text.startswith("Medusa (arm fastest) decodes 1.13 [1.07, 1.21] times as fast as vanilla on this")
    first = " ".join(lines[:3])
    assert "the paper says > 2.2x of models from 7B on" in first.replace("  ", " ")
    assert "Outputs identical: yes, all 128 greedy texts." in first.replace("  ", " ")
    marks = [line[0] for line in lines]
    assert (
        marks.count("✓") + marks.count("?") + marks.count("·") == 17 and "  and 3 more in the report" in text
    )
    assert "CK1" not in text and "RL-64" not in text, "arithmetic on the paper's own figures"
    assert lines[-2] == "Report: r/report.md"
    assert lines[-1] == f"All of it here: medusa-repro report --all {DEFAULT.name}"


def test_all_tells_the_papers_arithmetic_as_well(default: tuple[RunRecord, Judgement]) -> None:
    text = printed(*default, shows_all=True)
    assert "\n✓ CK1 " in text and "more in the report" not in text and "report --all" not in text


def test_marks_and_dots_are_plain_where_the_terminal_is(default: tuple[RunRecord, Judgement]) -> None:
    text = printed(*default, encoding="ascii", width=60)
    assert "\n+ A1 +3 " in text and "..." in text and all(len(line) <= 60 for line in text.splitlines()[:-1])
    narrow = printed(*default, width=30).splitlines()
    assert all(len(line) <= 30 for line in narrow if line[:1] in "✓?·")


def test_each_outcome_has_its_mark_and_none_of_others_steers(fake: tuple[RunRecord, Judgement]) -> None:
    record, judgement = fake
    planted = verdict("X9", ours="[red]5[/red]\x1b[2J", kind=VerdictKind.NOT_REPRODUCED)
    text = printed(record, judgement.model_copy(update={"verdicts": (*VERDICTS, planted)}), width=120)
    assert "✓ T3-9" in text and "BIG-1" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("✗ X9")]
    assert "[red]5[/red]\\x1b[2J" in line and "\x1b" not in text
    assert "✗ 2 fail" in text and "? 1 open" in text


def test_answers_of_runs_that_show_no_speed(fake: tuple[RunRecord, Judgement]) -> None:
    record, judgement = fake
    invalid = judgement.model_copy(update={"checks": (FAILED_CHECK,)})
    assert answer(record, invalid).startswith("INVALID: a validity check of the texts failed")
    of_times = judgement.model_copy(update={"checks": (FAILED_CHECK.model_copy(update={"of_times": True}),)})
    told = answer(record.withholding("x"), of_times)
    assert "tokens/step. No speed is shown, since checks of times failed: " in told
    assert "times as fast" not in told and "Outputs identical: yes" in told
    silent = judgement.model_copy(update={"reports_speed": False})
    suite: SuiteSpec = record.suite.model_copy(update={"reports_speed": False})
    record.suite = suite
    assert "No speed is shown: suite fake reports no speed." in answer(record, silent)


def test_texts_that_differ_are_told(fake: tuple[RunRecord, Judgement]) -> None:
    record, judgement = fake

    def with_divergences(*kinds: Any) -> str:
        found = tuple(
            Divergence(arm="a", reference="b", prompt_key="p", position=1, gap=None, kind=kind)
            for kind in kinds
        )
        parity = judgement.parity.model_copy(update={"divergences": found})
        return answer(record, judgement.model_copy(update={"parity": parity}))

    number = judgement.parity.num_compared
    assert with_divergences("tie").endswith(f"yes, all {number} greedy texts, but for 1 tie of rounding.")
    assert with_divergences("bug", "tie").endswith(f"Outputs identical: NO, 1 of {number} differ.")
    none = judgement.parity.model_copy(update={"num_compared": 0})
    told = answer(record, judgement.model_copy(update={"parity": none}))
    assert told.endswith("No greedy outputs were compared.")
