"""One record held against another: a page, and one JSON object for the last line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.judge.history.bands import Band
from harness.judge.history.compare import NOT_COMPARABLE, OUTSIDE, WITHIN, Compared, ComparedFigure
from harness.judge.history.provenance import origin_of, settings_of
from harness.records.opened import AnyRecord
from harness.report.formatting import (
    ABSENT,
    cell,
    count,
    heading,
    page,
    paragraphs,
    percent,
    section,
    significant,
    table,
)
from harness.report.provenance import describe_commit, describe_device, relative_folder
from harness.stats import Interval

_DIGITS = 4
_LONG = 40  # characters of a value in the table of differences; a hash needs no more to be told apart
BAND_NOTE = """\
*band*: where a second run of A lies if nothing but chance differs: sqrt(2) times A's interval, since two runs
of one size are compared; widened so that all figures of this page lie in theirs together as often as A's
interval says; and by the drift between runs of one commit, where such runs are kept. *B / A*: on the prompts
that both decoded to the same text, both resampled together; it holds far closer, and where the drift is known
it has to hold 1 too. Tokens/step of the same model, heads, tree and prompts have no band: they are the same,
but for shown rounding ties."""


def render_comparison(compared: Compared) -> str:
    """Return the whole page."""
    return page(
        heading(
            f"B against A: texts {compared.counts_outcome}, speeds {compared.times_outcome}",
            "`medusa-repro compare A B` makes this page from two records; it needs no device.",
            {"A": _named(compared.a), "B": _named(compared.b)},
        ),
        section("Outcome", _outcome(compared)),
        section("What was made differently", _differences(compared)),
        section("Texts", _texts(compared)),
        section("Figures", _figures(compared), BAND_NOTE if compared.figures else ""),
        section("Verdicts that differ", _verdicts(compared)),
    )


def comparison_headline(compared: Compared, *, base: Path | None = None) -> dict[str, Any]:
    """Return the JSON object that ends the output; paths are given from `base`, or the working directory."""
    where = base or Path.cwd()
    return {
        "compare": {
            "a": relative_folder(compared.a.folder, base=where),
            "b": relative_folder(compared.b.folder, base=where),
        },
        "outcome": compared.outcome,
        "texts": compared.counts_outcome,
        "speeds": compared.times_outcome,
        "valid": compared.valid,
        "speeds_not_compared": compared.no_times,
        "outside": [f"{one.subject}: {one.name}" for one in compared.figures if one.outcome == OUTSIDE],
        "num_figures": sum(one.outcome != NOT_COMPARABLE for one in compared.figures),
        "num_repeats": compared.num_repeats,
        "num_differences": len(compared.differences),
        "verdicts_that_differ": [one.claim_id for one in compared.verdicts],
    }


def _named(record: AnyRecord) -> str:
    origin = origin_of(record)
    name = getattr(settings_of(record), "name", ABSENT)
    return (
        f"`{record.folder.resolve().name}`, {cell(name)} on {cell(describe_device(origin))}, "
        f"{origin.started_utc[:10]}, commit {describe_commit(origin)}"
    )


def _outcome(compared: Compared) -> str:
    """Return the outcome of each kind of figure in a line, and what is to be known with it."""
    counts = [one for one in compared.figures if one.is_count]
    times = [one for one in compared.figures if not one.is_count]
    lines = [
        f"- Texts and tokens/step: **{compared.counts_outcome}**{_tally(counts)}.",
        f"- Times and speeds: **{compared.times_outcome}**{_tally(times)}.",
    ]
    if compared.no_times is not None:
        lines.append(f"- Times are not compared: {cell(compared.no_times)}.")
    elif times:
        lines.append(f"- {_drift_words(compared)}")
    for name, subjects in (("A", compared.only_in_a), ("B", compared.only_in_b)):
        if subjects:
            lines.append(f"- Only {name} has: {cell(', '.join(subjects))}.")
    for name, record in (("A", compared.a), ("B", compared.b)):
        if record.unsealed is not None:
            lines.append(f"- **{name} is not as it was sealed: {cell(record.unsealed)}.**")
    return "\n".join(lines)


def _tally(figures: list[ComparedFigure]) -> str:
    if not figures:
        return ""
    found = {word: sum(one.outcome == word for one in figures) for word in (WITHIN, OUTSIDE, NOT_COMPARABLE)}
    told = ", ".join(f"{number} {word}" for word, number in found.items() if number)
    return f" ({count(len(figures), 'figure')}: {told})"


def _drift_words(compared: Compared) -> str:
    if not compared.num_repeats:
        return (
            "The drift between runs of one commit is not known here: no run of A's commit and settings was "
            "repeated on this machine. So B over A alone puts no figure outside."
        )
    worst = max((one.drift for one in compared.figures if one.drift is not None), default=0.0)
    pairs = count(compared.num_repeats, "pair")
    return f"Runs of one commit differed by up to {percent(worst)} here ({pairs} of records)."


def _differences(compared: Compared) -> str:
    if not compared.differences:
        return "Nothing that the records keep."
    rows = [(one.group, one.name, _short(one.a), _short(one.b)) for one in compared.differences]
    return table(["of", "what", "A", "B"], rows)


def _short(value: str | None) -> str:
    if value is None:
        return ABSENT
    return value if len(value) <= _LONG else f"{value[: _LONG - 2]}.."


def _texts(compared: Compared) -> str:
    rows = [
        (
            one.arm,
            one.num_compared,
            one.num_same,
            one.num_ties if one.is_exact else ABSENT,
            one.num_other if one.is_exact else ABSENT,
            ", ".join(one.inputs) or ABSENT,
        )
        for one in compared.texts
    ]
    if not rows:
        return ""
    headers = ["arm", "generations", "same text", "ties", "unexplained", "inputs that differ"]
    note = (
        "*same text*: token for token. *ties*: texts or steps that part where the two best tokens, or two "
        "candidates of a head, lie within rounding of each other in A's trace."
    )
    return paragraphs(table(headers, rows), note)


def _figures(compared: Compared) -> str:
    """Return the figures; times that are not to be compared do not stand side by side."""
    shown = [one for one in compared.figures if one.is_count or compared.no_times is None]
    if not shown:
        return ""
    rows = [
        (
            one.subject,
            one.name,
            _interval(one.a),
            _interval(one.b),
            _interval(one.change),
            _band(one.band),
            one.outcome,
            one.reason or ABSENT,
        )
        for one in shown
    ]
    return table(["arm", "figure", "A", "B", "B / A", "band", "outcome", "why"], rows)


def _interval(one: Interval | None) -> str:
    if one is None:
        return ABSENT
    low, high = (significant(bound, digits=_DIGITS) for bound in (one.low, one.high))
    return f"{significant(one.estimate, digits=_DIGITS)} [{low}, {high}]"


def _band(band: Band | None) -> str:
    if band is None:
        return ABSENT
    return f"{significant(band.low, digits=_DIGITS)} to {significant(band.high, digits=_DIGITS)}"


def _verdicts(compared: Compared) -> str:
    if not compared.verdicts:
        return ""
    rows = [(one.claim_id, one.form, one.a, one.b) for one in compared.verdicts]
    return table(["claim", "form", "A", "B"], rows)
