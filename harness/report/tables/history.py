"""A suite's history as a page: its records, the steps that stand out, the newest records' figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.judge.history.series import Entry, MachineClass, MachineHistory, MarkedStep, Series, Sort
from harness.judge.history.steps import FALSE_ALARM, LEAST_NOISE, LEAST_RECORDS, MOST_RECORDS
from harness.records.machines.comparable import MAX_BANDWIDTH_RATIO
from harness.report.formatting import (
    ABSENT,
    cell,
    count,
    page,
    paragraphs,
    percent,
    section,
    significant,
    table,
)

HISTORY_PAGE = "history.md"
_MOST_SHOWN = 6  # records whose figures stand in a table, the newest; the picture shows all
_MOST_DIFFERING = 6
_DIGITS = 4
NOTE = f"""\
*Steps*: tokens/step and failed checks have no noise, so that every change is one, but for changes that shown
rounding ties explain. Times and memory are searched for changes of their level (PELT, cost l2, on
logarithms), where at least {LEAST_RECORDS} records have the figure, in the newest {MOST_RECORDS}. The penalty
of a step is such that a series of noise alone shows any in about {100 * FALSE_ALARM:g} of 100 cases, its
noise being taken from the series itself and as {100 * LEAST_NOISE:g} % at least. *since* is the record before
the step, *made differently* what differs between the two. A gap is a record whose times do not hold, or that
lacks the arm."""


def history_name(machine: str) -> str:
    """Return the file of the picture of one machine's history."""
    return f"history-{machine}.svg"


def render_history(
    suite: str,
    machines: Sequence[MachineHistory],
    *,
    left_out: Sequence[str] = (),
    figures: Sequence[str] = (),
) -> str:
    """Return the page; `figures` names the pictures that lie next to it, `left_out` what was not read."""
    return page(
        f"# History of `{cell(suite)}`",
        "`medusa-repro history` makes this page from the records next to it; it needs no device.",
        paragraphs(*(f"Left out: {cell(one)}." for one in left_out)),
        *(_machine(one, figures=figures) for one in machines),
        NOTE,
    )


def history_headline(
    suite: str, machines: Sequence[MachineHistory], *, left_out: Sequence[str]
) -> dict[str, Any]:
    """Return the JSON object that ends the output."""
    return {
        "history": suite,
        "records": sum(len(one.entries) for one in machines),
        "left_out": len(left_out),
        "machines": {
            one.machine: {
                "records": len(one.entries),
                "classes": len(one.classes),
                "series": len(one.series),
                "searched": sum(_is_searched(series) for series in one.series),
                "steps": [_step_named(series, step) for series in one.series for step in series.steps],
            }
            for one in machines
        },
    }


def _step_named(series: Series, marked: MarkedStep) -> dict[str, Any]:
    return {
        "figure": f"{series.subject}: {series.name}",
        "record": marked.entry.name,
        "before": marked.step.before,
        "after": marked.step.after,
    }


def _machine(history: MachineHistory, *, figures: Sequence[str]) -> str:
    picture = history_name(history.machine)
    return section(
        cell(history.machine),
        _records(history),
        _split(history),
        _steps(history),
        f"![{picture}]({picture})" if picture in figures else "",
        _figures("Tokens/step and failed checks", history.entries, history.counts),
        *(_figures(_class_name(one, history), one.entries, one.series) for one in history.classes),
    )


def _records(history: MachineHistory) -> str:
    numbers = {
        id(entry): number for number, found in enumerate(history.classes, 1) for entry in found.entries
    }
    rows = [
        (
            f"`{one.name}`",
            one.started_utc[:10],
            (one.record.environment.commit or ABSENT)[:12]
            + (" with changes" if one.record.environment.dirty else ""),
            "hold" if one.holds.speeds else "hold not" if one.holds.asks_speeds else "none asked",
            ", ".join(one.holds.why) or ABSENT,
            numbers[id(one)],
        )
        for one in history.entries
    ]
    return table(["record", "begun", "commit", "times", "failed checks", "group"], rows)


def _split(history: MachineHistory) -> str:
    if len(history.classes) < 2:
        return ""
    told = "; ".join(
        f"group {number}: {_rates(found)}, {count(len(found.entries), 'record')}"
        for number, found in enumerate(history.classes, start=1)
    )
    return (
        f"**This name stands for machines whose times cannot be compared** (measured bandwidths more than "
        f"{MAX_BANDWIDTH_RATIO} times apart, or not measured): {told}. Their times are apart from here on."
    )


def _rates(found: MachineClass) -> str:
    if found.bandwidths is None:
        return "bandwidth not measured"
    low, high = (significant(rate / 1e9) for rate in found.bandwidths)
    return f"{low} GB/s" if low == high else f"{low} to {high} GB/s"


def _class_name(found: MachineClass, history: MachineHistory) -> str:
    where = f", group {history.classes.index(found) + 1}" if len(history.classes) > 1 else ""
    return f"Times and memory{where} ({_rates(found)})"


def _is_searched(series: Series) -> bool:
    least = 2 if series.sort in ("count", "checks") else LEAST_RECORDS
    return sum(series.value(one) is not None for one in series.entries) >= least


def _steps(history: MachineHistory) -> str:
    searched = [one for one in history.series if _is_searched(one)]
    short = len(history.series) - len(searched)
    few = f", {short} have too few records for one" if short else ""
    start = f"{count(len(searched), 'series', plural='series')} searched for steps{few}."
    rows = [
        (
            series.subject,
            series.name,
            f"`{marked.entry.name}`",
            " to ".join(
                _number(level, sort=series.sort) for level in (marked.step.before, marked.step.after)
            ),
            percent(marked.step.ratio - 1, signed=True)
            if marked.step.before and series.sort != "checks"
            else ABSENT,
            f"`{marked.since.name}`",
            _some(marked.differing),
        )
        for series in history.series
        for marked in series.steps
    ]
    if not rows:
        return f"{start} No step."
    headers = ["arm", "figure", "step at", "level", "change", "since", "made differently"]
    return paragraphs(start, table(headers, rows))


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _MOST_DIFFERING} more" if len(names) > _MOST_DIFFERING else ""
    return (", ".join(names[:_MOST_DIFFERING]) or ABSENT) + rest


def _figures(title: str, entries: Sequence[Entry], series: Sequence[Series]) -> str:
    """Return the newest records' figures, a column a record; a step is marked where it stands.

    One record is no history: its figures stand in its own report.
    """
    if not series or len(entries) < 2:
        return ""
    shown = entries[-_MOST_SHOWN:]
    rows = []
    for one in series:
        steps = {id(marked.entry) for marked in one.steps}
        cells = [
            ABSENT
            if (value := one.value(entry)) is None
            else _number(value.value, sort=one.sort) + (" (step)" if id(entry) in steps else "")
            for entry in shown
        ]
        rows.append((one.subject, one.name, *cells))
    left = f", the newest {len(shown)} of {len(entries)} records" if len(shown) < len(entries) else ""
    return paragraphs(
        f"{title}{left}:", table(["arm", "figure", *(f"`{entry.name}`" for entry in shown)], rows)
    )


def _number(value: float, *, sort: Sort) -> str:
    return f"{value:.0f}" if sort == "checks" else significant(value, digits=_DIGITS)
