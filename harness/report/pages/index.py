"""The page over all committed records: what each is for, which claims it decides, arms, devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.judge.claims.standing import RecordVerdict
from harness.judge.history.provenance import origin_of, settings_of
from harness.judge.judgement import VerdictKind
from harness.records.folder import kind_of
from harness.records.opened import open_record
from harness.report.formatting import ABSENT, cell, table
from harness.report.pages.run import PAGE_FILE
from harness.report.pages.shared import Cell, SortedTable, plain, rendered, safe
from harness.report.tables.words import WORDS_NOTE, shown
from harness.specs.claims import ClaimsFile

INDEX_FILE = "index.html"
MEASURES_NOTHING = "smoke"  # records of that suite, which git ignores
_MARKS = {
    VerdictKind.REPRODUCED: "✓",
    VerdictKind.NOT_REPRODUCED: "✗",
    VerdictKind.INCONCLUSIVE: "?",
    VerdictKind.NOT_DECIDABLE: "·",
}


@dataclass(frozen=True)
class Entry:
    """One record of a results folder: where it lies, what it is, and what it is for."""

    place: str
    kind: str
    name: str
    machine: str
    device: str
    started: str
    commit: str
    purpose: str
    has_page: bool

    @property
    def link(self) -> str:
        """Return the page that tells it best, from the results folder."""
        return f"{self.place}/{PAGE_FILE if self.has_page else 'report.md'}"


def entries(results: Path) -> tuple[Entry, ...]:
    """Return every sealed record of a results folder that measures something, the newest of a name first.

    Raises: UserError for a record that is not as it was sealed.
    """
    found = []
    for manifest in sorted(results.rglob("manifest.json")):
        folder = manifest.parent
        if MEASURES_NOTHING in folder.relative_to(results).parts:
            continue
        record = open_record(folder)
        place = folder.relative_to(results).as_posix()
        origin = origin_of(record)
        found.append(
            Entry(
                place=place,
                kind=kind_of(folder),
                name=place.split("/")[-3],
                machine=place.split("/")[-2],
                device=origin.device.name,
                started=origin.started_utc[:10],
                commit=(origin.commit or ABSENT)[:8],
                purpose=str(getattr(settings_of(record), "description", ABSENT)),
                has_page=(folder / PAGE_FILE).is_file(),
            )
        )
    newest = sorted(found, key=lambda one: one.place.split("/")[-1], reverse=True)
    return tuple(sorted(newest, key=lambda one: (one.kind, one.name)))


def render_records_table(found: Sequence[Entry]) -> str:
    """Return all records as a table of a Markdown page in the results folder."""
    rows = [
        (
            one.kind,
            f"[`{one.name}`]({one.place}/report.md)",
            one.machine,
            one.started,
            f"`{one.commit}`",
            cell(one.purpose),
        )
        for one in found
    ]
    return table(["kind", "record", "machine", "date", "commit", "what it is for"], rows)


def render_index(
    found: Sequence[Entry], registry: ClaimsFile, verdicts: Mapping[str, Sequence[RecordVerdict]]
) -> str:
    """Return the page: records, and claims by record."""
    return rendered(
        "index.html.j2",
        title="All records of medusa-repro",
        about=f"{len(found)} sealed records, each with the page that was made from it.",
        tables=(_records(found), _claims(found, registry, verdicts)),
    )


def _records(found: Sequence[Entry]) -> SortedTable:
    rows = tuple(
        (
            Cell(one.kind),
            Cell(safe(one.name), link=one.link),
            Cell(safe(one.machine)),
            Cell(safe(one.device)),
            Cell(one.started),
            Cell(one.commit),
            Cell(safe(one.purpose)),
        )
        for one in found
    )
    headers = ("kind", "record", "machine", "device", "date", "commit", "what it is for")
    return SortedTable("Records", headers, rows)


def _claims(
    found: Sequence[Entry], registry: ClaimsFile, verdicts: Mapping[str, Sequence[RecordVerdict]]
) -> SortedTable:
    """Return the claims that any record tests, a column a record; the record that decides is marked."""
    judged = {row.record for rows in verdicts.values() for row in rows}
    places = [one for one in found if one.place in judged]
    rows = []
    for claim in registry.claims:
        of_record = {one.record: one for one in reversed(verdicts.get(claim.id, ()))}
        if not of_record:
            continue
        first = verdicts[claim.id][0]
        cells = [_claim_cell(of_record.get(one.place), decides=one.place == first.record) for one in places]
        rows.append((Cell(claim.id), Cell(safe(claim.stated)), *cells))
    headers = ("claim", "what is stated", *(f"{one.name}, {one.started}" for one in places))
    key = "✓ holds, ✗ fails, ? open, · cannot be decided there; in brackets: this record decides."
    note = f"{key} {plain(WORDS_NOTE)}"
    return SortedTable("Claims by record", headers, tuple(rows), note)


def _claim_cell(found: RecordVerdict | None, *, decides: bool) -> Cell:
    mark = _MARKS.get(found.verdict.kind) if found is not None else None
    if found is None or mark is None:
        return Cell(ABSENT)
    return Cell(f"[{mark}] {shown(found.verdict)}" if decides else mark)
