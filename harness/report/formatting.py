"""Figures, names and tables as text: sensible digits and units, and no absolute path."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime

from tabulate import tabulate

from harness.paths import without_paths
from harness.safe_text import field_text, page_text
from harness.stats import Interval

ABSENT = "–"
WITHHELD = "error > effect"  # instead of a figure whose error band is wider than what it tells
VERDICT_COLUMNS = ("claim", "what the paper states", "paper", "ours", "verdict")  # what a README shows
_WIDE_CELL = 40
# What may lie between the two clocks of a run that was not resumed: its start is noted in whole seconds, and
# just before or after the model is loaded.
_START_S = 60.0


def significant(value: float | None, *, digits: int = 3) -> str:
    """Return a number with so many significant digits, never in exponent form, thousands grouped."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])  # of the rounded figure: 9.996 counts as 10.0
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def ratio(value: float | None) -> str:
    """Return a ratio with two decimals, so that figures in one column line up."""
    return f"{value:.2f}" if value is not None and math.isfinite(value) else ABSENT


def ratio_interval(interval: Interval | None, *, digits: int = 2) -> str:
    """Return `1.83 [1.71, 1.95]` with as many decimals."""
    if interval is None or not math.isfinite(interval.estimate):
        return ABSENT
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def rate_interval(interval: Interval | None) -> str:
    """Return an estimate and its bounds with three significant digits."""
    if interval is None or not math.isfinite(interval.estimate):
        return ABSENT
    return f"{significant(interval.estimate)} [{significant(interval.low)}, {significant(interval.high)}]"


def percent(value: float | None, *, signed: bool = False) -> str:
    """Return a share as a percentage with one decimal."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{round(100 * value, 1) + 0.0:{'+' if signed else ''}.1f} %"  # + 0.0: no minus sign on a zero


def milliseconds(seconds: float | None) -> str:
    """Return seconds as milliseconds with three significant digits, without the unit."""
    return ABSENT if seconds is None else significant(1000 * seconds)


def megabytes(count_bytes: int | None) -> str:
    """Return bytes as whole megabytes (10^6 bytes; three significant digits below 100), without the unit."""
    if count_bytes is None:
        return ABSENT
    return f"{count_bytes / 1e6:,.0f}" if count_bytes >= 100e6 else significant(count_bytes / 1e6)


def count(number: int, noun: str, *, plural: str | None = None) -> str:
    """Return `1 check`, `2 checks`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def describe_end(started_utc: str, finished_utc: str, *, elapsed_s: float) -> str:
    """Return when a run ended and how many minutes it took.

    A resumed run counts `elapsed_s` from its last start, and the text says so.
    """
    between_s = (datetime.fromisoformat(finished_utc) - datetime.fromisoformat(started_utc)).total_seconds()
    resumed = between_s > elapsed_s + _START_S
    return f"{finished_utc} ({elapsed_s / 60:.1f} minutes{' since it was resumed' if resumed else ''})"


def cell(value: object) -> str:
    """Return a value as one table cell: one line, no column mark, no link or tag, no absolute path."""
    return field_text(without_paths(" ".join(str(value).split()))).replace("|", "\\|")


def table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], *, columns: Sequence[str] | None = None
) -> str:
    """Return a Markdown table of all columns, or of those that `columns` names.

    Columns are padded to line up unless a cell is too long for that to help.
    """
    if columns is not None:
        chosen = [headers.index(name) for name in columns]
        headers, rows = columns, [[row[index] for index in chosen] for row in rows]
    cells = [[cell(value) for value in row] for row in rows]
    text = tabulate(
        cells, headers=[cell(header) for header in headers], tablefmt="pipe", disable_numparse=True
    )
    if any(len(value) > _WIDE_CELL for row in cells for value in row):
        text = re.sub(r"-{4,}", "---", re.sub(r" {2,}", " ", text))
    return text


def merged(rows: Sequence[tuple[str, ...]], *, column: int) -> list[tuple[str, ...]]:
    """Return rows in their order, those that differ in one column alone as one row, its entries listed."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        groups.setdefault((*row[:column], *row[column + 1 :]), []).append(row[column])
    return [
        (*rest[:column], ", ".join(dict.fromkeys(names)), *rest[column:]) for rest, names in groups.items()
    ]


def pairs(values: Mapping[str, str]) -> str:
    """Return names and values as one line, by name."""
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items())) or ABSENT


def paragraphs(*parts: str) -> str:
    """Return the parts that are not empty, a blank line between them."""
    return "\n\n".join(part for part in parts if part)


def section(title: str, *parts: str) -> str:
    """Return a second-level section of the parts that are not empty; empty where all are."""
    said = paragraphs(*parts)
    return f"## {title}\n\n{said}" if said else ""


def heading(title: str, description: str, facts: Mapping[str, str]) -> str:
    """Return a page's title, what it is about, and the facts to know first, one a line."""
    listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    return paragraphs(f"# {title}", cell(description), listed)


def marked_page(text: str, *, unsealed: str | None) -> str:
    """Return a page that says first, and loudly, what is wrong with its record's seal; else as it is."""
    if unsealed is None:
        return text
    return paragraphs(f"**UNSEALED: {cell(unsealed)}. No figure on this page may be cited.**", text)


def page(*parts: str) -> str:
    """Return a whole page of the parts that are not empty, safe to be shown."""
    return page_text(paragraphs(*parts)) + "\n"
