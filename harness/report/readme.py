"""Generated blocks of the README and of results/README.md, so that no figure in them is typed by hand.

Every block stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`. `medusa-repro report RECORD --readme
README.md` writes the block of a record of any kind:

    NAME              shows
    results           a run
    answer            the headline run and the claims that people know, over all records
    claims            all claims, over all records
    records           all records, over all records
    trees             which tree pays on which device, of a sweep
    modes             a latency record
    sweep             a sweep
    devices           what a step costs by device, over all latency records (`medusa-repro devices`)
    the suite's name  an ablation
    training          the profiles of trainings
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.compose.prices.table import MeasuredRow, PredictedRow
from harness.errors import InvalidMeasurement, UserError
from harness.files import read_text, write_bytes
from harness.judge.ablation import AblationRow
from harness.judge.claims.standing import Standing
from harness.judge.judgement import ClaimVerdict, Judgement
from harness.records.ablation import AblationRecord
from harness.records.latency import LatencyRecord
from harness.records.run import RunRecord
from harness.records.sweep import SweepRecord
from harness.report.ablation import render_readme_ablation
from harness.report.claims import render_readme_answer, render_readme_claims
from harness.report.devices import render_readme_devices
from harness.report.formatting import VERDICT_COLUMNS, paragraphs
from harness.report.latency import render_readme_modes
from harness.report.pages.index import Entry, render_records_table
from harness.report.profiles import render_readme_training
from harness.report.provenance import describe_origin, record_link
from harness.report.run import render_headline_arm
from harness.report.sweep import render_readme_sweep, render_readme_trees
from harness.report.tables.run import (
    render_arms_table,
    render_verdicts,
    verdicts_in_words,
    verdicts_on_run,
)
from harness.report.tables.words import WORDS_NOTE
from harness.safe_text import page_text
from harness.specs.claims import ClaimsFile

_ARM_COLUMNS = ("arm", "against", "nodes", "tokens/step", "overhead", "speedup", "tokens/s")
_VERDICT_NOTE = f"""\
{WORDS_NOTE} Claims in one row are decided by one test and count once. Why each verdict is what it is, and the
claims that rest on the paper's own figures, stand in the report."""
_ARMS_NOTE = """\
*tokens/step*: tokens that one decoding step yields on average; vanilla's is 1. *overhead*: mean step
latency against the baseline arm's, draft heads and bookkeeping included. *speedup*: tokens/s against the
baseline arm, from the first token on. It is tokens/step over overhead, so more tokens a step help only where
the step does not become as much more expensive. `tuned` and `medusa2` arms decode on the backbone of
Medusa-2."""
README_FIGURES = ("figures/fig4_nodes.svg", "figures/devices.svg")


@dataclass(frozen=True)
class Block:
    """One generated block of a README: the name in its markers, and its text.

    The text is given the README's folder, which links start from.
    """

    name: str
    render: Callable[[Path], str]


def run_block(record: RunRecord, judgement: Judgement) -> Block:
    """Return a run's block; rendering an invalid run raises InvalidMeasurement."""
    return Block("results", lambda base: render_results(record, judgement, base=base))


def latency_block(record: LatencyRecord) -> Block:
    """Return the block of a latency record's table of modes.

    Raises: UserError for a record that is not sealed, was altered or has no table of modes.
    """
    record.check_seal()
    if record.modes is None:
        raise UserError(
            found="no table of modes", need="a record of a spec with modes_table", where=record.folder.name
        )
    return Block("modes", lambda base: render_readme_modes(record, base=base))


def sweep_block(record: SweepRecord, *, figures: Sequence[str] = ()) -> Block:
    """Return the block of a sweep's table of devices, with those of two figures that `figures` names.

    Raises: UserError for a record that is not sealed or was altered.
    """
    record.check_seal()
    shown = [name for name in README_FIGURES if name in figures]
    return Block("sweep", lambda base: render_readme_sweep(record, base=base, figures=shown))


def trees_block(record: SweepRecord) -> Block:
    """Return the block of a sweep's short table: which tree on which measured device.

    Raises: UserError for a record that is not sealed or was altered.
    """
    record.check_seal()
    return Block("trees", lambda base: render_readme_trees(record, base=base))


def ablation_block(
    record: AblationRecord,
    rows: Sequence[AblationRow],
    verdicts: Sequence[ClaimVerdict],
    *,
    elsewhere: Mapping[str, str],
) -> Block:
    """Return an ablation's block.

    `elsewhere` names the suite that decides a claim instead of this one.
    Raises: UserError for a record that is not sealed or was altered.
    """
    record.check_seal()
    return Block(
        record.spec.name,
        lambda base: render_readme_ablation(record, rows, verdicts, base=base, elsewhere=elsewhere),
    )


def claims_block(standings: Sequence[Standing], *, results: Path) -> Block:
    """Return the block of all claims together, over the records of a results folder."""
    return Block("claims", lambda base: render_readme_claims(standings, results=results, base=base))


def answer_block(registry: ClaimsFile, standings: Sequence[Standing], *, results: Path) -> Block:
    """Return the block of a README's answer: the headline run and the claims that people know."""
    return Block("answer", lambda base: render_readme_answer(registry, standings, results=results, base=base))


def records_block(found: Sequence[Entry]) -> Block:
    """Return the block of all committed records, for a page in the results folder."""
    return Block("records", lambda base: render_records_table(found))


def devices_block(
    measured: Sequence[MeasuredRow], predicted: Sequence[PredictedRow], *, results: Path
) -> Block:
    """Return the block of what a step costs by device, over the records of a results folder."""
    return Block(
        "devices", lambda base: render_readme_devices(measured, predicted, results=results, base=base)
    )


def training_block(paths: Sequence[Path]) -> Block:
    """Return the block of some profiles of trainings."""
    return Block("training", lambda base: render_readme_training(paths, base=base))


def update_readme(readme: Path, *blocks: Block) -> None:
    """Write blocks into a README, those that it has markers for; one that shows them already is not touched.

    Raises: UserError for a README that cannot be read, or has markers of none of them.
    """
    text = updated = read_text(readme, need="a Markdown file with markers")
    shown = [one for one in blocks if f"<!-- begin:{one.name} -->" in text] or blocks[:1]
    for block in shown:
        content = page_text(block.render(readme.parent))
        try:
            updated = replace_block(updated, name=block.name, content=content)
        except UserError as error:
            raise UserError(found=error.found, need=error.need, where=readme.name, do=error.do) from error
    if updated != text:
        write_bytes(readme, updated.encode())


def replace_block(text: str, *, name: str, content: str) -> str:
    """Return the text with what stands between a block's markers replaced; the markers stay.

    Raises: UserError if a marker is missing, occurs twice, or the end comes before the beginning; or if the
    content holds a marker.
    """
    begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
    for mark in (begin, end):
        if text.count(mark) != 1:
            raise UserError(
                found=f"{text.count(mark)} times the marker {mark}",
                need="exactly one",
                do=f"write {begin} and {end} once each",
            )
        if mark in content:
            raise UserError(found=f"the marker {mark} in the new content", need="content without markers")
    start, stop = text.index(begin) + len(begin), text.index(end)
    if stop < start:
        raise UserError(found=f"{end} before {begin}", need="the beginning first", do="swap the two markers")
    return f"{text[:start]}\n{content.strip()}\n{text[stop:]}"


def block_names(readme: Path) -> tuple[str, ...]:
    """Return the names of a README's blocks, in order. Raises: UserError for a README that cannot be read."""
    return tuple(re.findall(r"<!-- begin:([\w-]+) -->", read_text(readme)))


def shown_record(readme: Path, name: str) -> Path:
    """Return the folder of the record that a block of a README shows: the one whose report it links.

    Raises: UserError for a block that lacks its end, or links no report or several.
    """
    _, _, rest = read_text(readme).partition(f"<!-- begin:{name} -->")
    block, end, _ = rest.partition(f"<!-- end:{name} -->")
    linked: list[str] = sorted(set(re.findall(r"\(([\w./-]+)/report\.md\)", block)))
    if not end or len(linked) != 1:
        raise UserError(
            found=f"{len(linked)} reports linked in the block {name!r}",
            need="one, which says what record the block shows, and the block's end",
            where=readme.name,
            do="name the record with: medusa-repro report RECORD --readme README.md",
        )
    return readme.parent / linked[0]


def render_results(record: RunRecord, judgement: Judgement, *, base: Path) -> str:
    """Return what a newcomer reads of a run: where it was measured, its verdicts, its arms.

    The report has the other columns and the verdicts that rest on arithmetic alone. `base` is the README's
    folder, which the link to the record is given from.
    Raises: InvalidMeasurement for a run whose texts failed a validity check: no figure of it may be shown in
    a README. Where only its times did, no speed is shown.
    """
    if not judgement.valid_texts:
        failed = [check.name for check in judgement.failed]
        raise InvalidMeasurement(
            f"found failed validity checks ({', '.join(failed)}); need a valid record for the README"
        )
    withheld = f"*Speeds are withheld*: {judgement.withheld}." if judgement.withheld is not None else ""
    return paragraphs(
        f"Suite `{record.suite.name}` with {describe_origin(record.environment)}.",
        f"Claims: {verdicts_in_words(judgement)}",
        withheld,
        render_headline_arm(record, judgement),
        render_verdicts(on_run, columns=VERDICT_COLUMNS) if (on_run := verdicts_on_run(judgement)) else "",
        _VERDICT_NOTE,
        render_arms_table(record, judgement, columns=_ARM_COLUMNS if record.reports_speed else None),
        _ARMS_NOTE if record.reports_speed else "",
        record_link(record.folder, base=base, label="Full report and raw data"),
    )
