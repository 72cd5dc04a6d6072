"""The page over all records: each record once, and each tested claim by record."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.judge.claims.standing import Records, finished_records, standings_of, verdicts_by_claim
from harness.report.pages.index import INDEX_FILE, entries, render_index, render_records_table
from harness.report.readme import records_block
from harness.specs.claims import load_registry
from harness.tests.readme_blocks import shows

ROOT = Path(__file__).resolve().parents[4]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def records() -> Records:
    return finished_records(RESULTS)


def test_committed_pages_show_every_record_once(records: Records) -> None:
    found, registry = entries(RESULTS), load_registry(None)
    places = [path.parent.relative_to(RESULTS).as_posix() for path in sorted(RESULTS.rglob("manifest.json"))]
    assert sorted(one.place for one in found) == sorted(one for one in places if not one.startswith("smoke/"))
    page = render_index(found, registry, verdicts_by_claim(registry, records))
    assert (RESULTS / INDEX_FILE).read_text(encoding="utf-8") == page
    for one in found:
        assert page.count(f'href="{one.link}"') == 1 and (RESULTS / one.link).is_file()
    assert shows(RESULTS / "README.md", records_block(found))
    assert render_records_table(found).count("\n| ") == len(found)
    assert len(page.encode()) < 500_000


def test_the_record_that_decides_a_claim_is_marked(records: Records) -> None:
    registry = load_registry(None)
    verdicts = verdicts_by_claim(registry, records)
    page = render_index(entries(RESULTS), registry, verdicts)
    rows = {
        cells[0]: cells[2:]
        for row in re.findall(r"<tr>(.*?)</tr>", page, flags=re.S)
        if (cells := re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.S))
    }
    standings = {one.claim.id: one for one in standings_of(registry, verdicts)}
    for claim_id in ("A1", "A6", "A2", "F5-1"):
        marked = [cell for cell in rows[claim_id] if cell.startswith("[")]
        assert len(marked) == 1, claim_id
        decides = standings[claim_id].decides
        assert decides is not None
    assert "[✓] direction holds" in rows["A6"]
