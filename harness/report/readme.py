"""The README's generated tables, written between markers so that they are never typed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import InvalidMeasurement, UserError
from harness.files import write_bytes
from harness.judge.ablation import AblationRow
from harness.judge.judgement import CheckStatus, ClaimVerdict, Judgement
from harness.records.ablation import AblationRecord
from harness.records.latency import LatencyRecord
from harness.records.run import RunRecord
from harness.records.sweep import SweepRecord
from harness.report.ablation import render_readme_ablation
from harness.report.formatting import cell
from harness.report.latency import render_readme_modes
from harness.report.profiles import render_readme_training
from harness.report.provenance import describe_commit, describe_device
from harness.report.run import render_best_arm
from harness.report.run_tables import (
    VERDICT_NOTE,
    arms_note,
    render_arms_table,
    render_verdict_table,
    verdicts_in_words,
)
from harness.report.sweep import render_readme_sweep

MARKER = "results"
MODES_MARKERS = ("<!-- modes:begin -->", "<!-- modes:end -->")
SWEEP_MARKERS = ("<!-- sweep:begin -->", "<!-- sweep:end -->")
README_FIGURES = ("figures/fig4_nodes.svg", "figures/devices.svg")


def update_between_markers(text: str, *, marker: str, content: str) -> str:
    """Return the text with what stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->` replaced; the
    markers stay.

    Raises: UserError if a marker is missing, occurs twice, or the end comes before the beginning; or if the
    content holds a marker.
    """
    return replace_between(
        text, begin=f"<!-- begin:{marker} -->", end=f"<!-- end:{marker} -->", content=content
    )


def replace_between(text: str, *, begin: str, end: str, content: str) -> str:
    """Return the text with what stands between two marks replaced; the marks stay.

    Raises: UserError as `update_between_markers` does.
    """
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


def render_results(record: RunRecord, judgement: Judgement, *, base: Path) -> str:
    """Return what the README shows of a record: where it was measured, the verdicts, the arms.

    `base` is the README's folder, which the link to the record is given from.
    Raises: InvalidMeasurement for a run that failed a validity check: such a run has no place in a README.
    """
    if failed := [check.name for check in judgement.checks if check.status is CheckStatus.FAILED]:
        raise InvalidMeasurement(
            f"found failed validity checks ({', '.join(failed)}); need a valid record for the README"
        )
    environment = record.environment
    origin = (
        f"Suite `{record.suite.name}` with {cell(environment.model_name)} on "
        f"{cell(describe_device(environment))}, "
        f"{environment.started_utc[:10]}, commit {describe_commit(environment)}."
    )
    parts = [
        origin,
        f"Claims: {verdicts_in_words(judgement)}",
        render_best_arm(record, judgement),
        render_verdict_table(judgement),
        VERDICT_NOTE,
        render_arms_table(record, judgement),
        arms_note(record),
        _link(record.folder, base=base),
    ]
    return "\n\n".join(part for part in parts if part)


def update_readme(readme: Path, record: RunRecord, judgement: Judgement) -> None:
    """Write the record's tables between the README's `results` markers; a README that says so already is not
    touched.

    Raises: UserError for a README without its markers, InvalidMeasurement for an invalid record.
    """
    text = _read(readme)
    updated = _updated(text, readme, record, judgement)
    if updated != text:
        write_bytes(readme, updated.encode())


def check_readme(readme: Path, record: RunRecord, judgement: Judgement) -> bool:
    """Whether the README shows exactly what the record gives."""
    text = _read(readme)
    return _updated(text, readme, record, judgement) == text


def update_modes(readme: Path, record: LatencyRecord) -> None:
    """Write a latency record's table of modes between the README's markers for it; a README that says so
    already is not touched.

    Raises: UserError for a README without its markers, or a record that is not sealed, was altered or has no
    table of modes.
    """
    text = _read(readme)
    updated = _with_modes(text, readme, record)
    if updated != text:
        write_bytes(readme, updated.encode())


def check_modes(readme: Path, record: LatencyRecord) -> bool:
    """Whether the README shows exactly the table of modes that the record gives."""
    text = _read(readme)
    return _with_modes(text, readme, record) == text


def update_sweep(readme: Path, record: SweepRecord, *, figures: Sequence[str] = ()) -> None:
    """Write a sweep's table of devices and two of its figures between the README's markers; one that says so
    already is not touched.

    Raises: UserError for a README without its markers, or a record that is not sealed or was altered.
    """
    text = _read(readme)
    updated = _with_sweep(text, readme, record, figures=figures)
    if updated != text:
        write_bytes(readme, updated.encode())


def check_sweep(readme: Path, record: SweepRecord, *, figures: Sequence[str] = ()) -> bool:
    """Whether the README shows exactly the table of devices that the record gives."""
    text = _read(readme)
    return _with_sweep(text, readme, record, figures=figures) == text


def _with_sweep(text: str, readme: Path, record: SweepRecord, *, figures: Sequence[str]) -> str:
    record.check_seal()
    begin, end = SWEEP_MARKERS
    content = render_readme_sweep(
        record, base=readme.parent, figures=[name for name in README_FIGURES if name in figures]
    )
    try:
        return replace_between(text, begin=begin, end=end, content=content)
    except UserError as error:
        raise UserError(found=error.found, need=error.need, where=readme.name, do=error.do) from error


def _with_modes(text: str, readme: Path, record: LatencyRecord) -> str:
    record.check_seal()
    if record.modes is None:
        raise UserError(
            found="no table of modes", need="a record of a spec with modes_table", where=record.folder.name
        )
    begin, end = MODES_MARKERS
    try:
        return replace_between(
            text, begin=begin, end=end, content=render_readme_modes(record, base=readme.parent)
        )
    except UserError as error:
        raise UserError(found=error.found, need=error.need, where=readme.name, do=error.do) from error


def _updated(text: str, readme: Path, record: RunRecord, judgement: Judgement) -> str:
    content = render_results(record, judgement, base=readme.parent)
    try:
        return update_between_markers(text, marker=MARKER, content=content)
    except UserError as error:
        raise UserError(found=error.found, need=error.need, where=readme.name, do=error.do) from error


def _read(readme: Path) -> str:
    try:
        return readme.read_text()
    except OSError as error:
        raise UserError(
            found=f"no readable README ({error.strerror})",
            need="a Markdown file with markers",
            where=readme.name,
        ) from error


def _link(folder: Path, *, base: Path) -> str:
    absolute, start = folder.resolve(), base.resolve()
    if not absolute.is_relative_to(start):
        return f"From the record `{absolute.name}`."
    return (
        f"Full report and raw data: [`{absolute.name}`]({absolute.relative_to(start).as_posix()}/report.md)."
    )


def update_ablation(
    readme: Path,
    record: AblationRecord,
    rows: Sequence[AblationRow],
    verdicts: Sequence[ClaimVerdict],
    *,
    elsewhere: Mapping[str, str],
) -> None:
    """Write an ablation's table between the README's markers of the suite's name; a README that says so
    already is not touched.

    Raises: UserError for a README without its markers, or a record that is not sealed or was altered.
    """
    record.check_seal()
    try:
        text = readme.read_text()
        content = render_readme_ablation(record, rows, verdicts, base=readme.parent, elsewhere=elsewhere)
        updated = update_between_markers(text, marker=record.spec.name, content=content)
    except OSError as error:
        raise UserError(
            found=f"no readable README ({error.strerror})",
            need="a Markdown file with markers",
            where=readme.name,
        ) from error
    except UserError as error:
        raise UserError(found=error.found, need=error.need, where=readme.name, do=error.do) from error
    if updated != text:
        write_bytes(readme, updated.encode())


def update_training(readme: Path, paths: Sequence[Path]) -> None:
    """Write the table between the README's `training` markers.

    Raises: UserError for a README without its markers.
    """
    try:
        text = readme.read_text()
        updated = update_between_markers(
            text, marker=MARKER, content=render_readme_training(paths, base=readme.parent)
        )
    except OSError as error:
        raise UserError(
            found=f"no readable README ({error.strerror})",
            need="a Markdown file with markers",
            where=readme.name,
        ) from error
    if updated != text:
        write_bytes(readme, updated.encode())
