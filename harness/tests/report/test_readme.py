"""The README's generated part: replaced exactly between its markers, never from an invalid run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import harness.report.readme
from harness.errors import InvalidMeasurement, UserError
from harness.judge.judgement import Judgement
from harness.records.ablation import newest_ablations
from harness.records.run import RunRecord
from harness.report.readme import replace_block, run_block, update_readme
from harness.tests.fake_judgement import FAILED_CHECK, judge
from harness.tests.fake_record import write_fake_record
from harness.tests.readme_blocks import shows

ROOT = Path(__file__).resolve().parents[3]
PAGE = "# Title\n\n<!-- begin:results -->\nold\n<!-- end:results -->\n\nRest.\n"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return write_fake_record(
        tmp_path_factory.mktemp("repo") / "results" / "some-run", num_prompts=8, rounds=1, jitter=0.0
    )


@pytest.fixture(scope="module")
def judgement(record: RunRecord) -> Judgement:
    return judge(record)


def test_only_what_stands_between_the_markers_changes() -> None:
    updated = replace_block(PAGE, name="results", content="new\n\n")
    assert updated == PAGE.replace("old", "new")
    assert replace_block(updated, name="results", content="new") == updated


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no marker", "0 times the marker <!-- begin:results -->"),
        ("<!-- begin:results -->", "0 times the marker <!-- end:results -->"),
        (PAGE + PAGE, "2 times"),
        ("<!-- end:results --><!-- begin:results -->", "<!-- end:results --> before"),
    ],
)
def test_wrong_markers_are_refused(text: str, found: str) -> None:
    with pytest.raises(UserError, match=found):
        replace_block(text, name="results", content="new")


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_every_block_of_a_page_is_of_one_form_and_has_its_command(page: str) -> None:
    """Two blocks had markers of a form of their own, and the table of trainings was written into the one of
    results when the two lists of markers met in one file.
    """
    text, told = (ROOT / page).read_text(), harness.report.readme.__doc__ or ""
    names = re.findall(r"<!-- begin:(\w+) -->", text)
    assert re.findall(r"<!-- end:(\w+) -->", text) == names and not re.search(
        r"<!-- \w+:(begin|end) -->", text
    )
    suites = {record.spec.name for record in newest_ablations(ROOT / "results")}
    assert all(name in suites or f"    {name} " in told for name in names)


def test_the_readme_is_read_in_one_sitting() -> None:
    """It had 450 lines, 39 kB of them tables, and the map of the repository at line 269."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    rows = [line for line in lines[: lines.index("## Which tree on which device")] if line.startswith("| ")]
    assert 2 < len(rows) <= 13, "the claims people know, at most twelve, and the table's head"
    trees = lines[lines.index("## Which tree on which device") : lines.index("## Your own model")]
    assert 2 < sum(line.startswith("| ") for line in trees) <= 11


def test_content_with_a_marker_is_refused() -> None:
    with pytest.raises(UserError, match="content without markers"):
        replace_block(PAGE, name="results", content="<!-- end:results -->")


def test_updated_readme_agrees_with_its_record_until_a_figure_is_typed_by_hand(
    record: RunRecord, judgement: Judgement
) -> None:
    readme = record.folder.parent.parent / "README.md"
    readme.write_text(PAGE)
    assert not shows(readme, run_block(record, judgement))
    update_readme(readme, run_block(record, judgement))
    assert shows(readme, run_block(record, judgement))
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\n\nRest.\n")
    assert "T3-9" in text and "optimised_64" in text and "(results/some-run/report.md)" in text
    readme.write_text(text.replace("2.20x", "2.90x"))
    assert not shows(readme, run_block(record, judgement))


def test_record_elsewhere_is_named_without_its_place(
    record: RunRecord, judgement: Judgement, tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    update_readme(readme, run_block(record, judgement))
    assert (
        "From the record `some-run`." in readme.read_text()
        and str(record.folder.parent) not in readme.read_text()
    )


def test_invalid_run_never_reaches_the_readme(
    record: RunRecord, judgement: Judgement, tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    with pytest.raises(InvalidMeasurement, match="greedy_parity"):
        invalid = judgement.model_copy(update={"checks": (FAILED_CHECK,)})
        update_readme(readme, run_block(record, invalid))
    assert readme.read_text() == PAGE


def test_readme_without_markers_or_missing_is_a_user_error(
    record: RunRecord, judgement: Judgement, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no readable file .* a Markdown file with markers"):
        update_readme(tmp_path / "README.md", run_block(record, judgement))
    (tmp_path / "README.md").write_text("# Title\n")
    with pytest.raises(UserError, match=r"in README\.md"):
        update_readme(tmp_path / "README.md", run_block(record, judgement))
