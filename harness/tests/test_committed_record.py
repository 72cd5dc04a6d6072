"""What is committed under `results/` is sealed and sound, and the README's tables are what the record that
they link gives.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.judge.run import judge
from harness.judge.validate.record import validate_record
from harness.records.folder import kind_of
from harness.records.run import RunRecord
from harness.report.readme import run_block, shown_record
from harness.tests.readme_blocks import shows

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(
    path.parent
    for path in (ROOT / "results").rglob("manifest.json")
    if "smoke" not in path.relative_to(ROOT).parts
)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_records_are_sealed_and_sound(folder: Path) -> None:
    assert validate_record(folder) == ()


def test_records_of_every_kind_are_committed() -> None:
    assert {kind_of(folder) for folder in FOLDERS} == {"suite", "latency", "sweep", "ablation"}


def test_readme_tables_are_what_its_record_gives() -> None:
    readme = ROOT / "results" / "README.md"
    record = RunRecord(shown_record(readme, "results"))
    assert shows(readme, run_block(record, judge(record)))
