"""A machine's history as one picture: a panel a figure, a line an arm, records from left to right in order of
time; a bar marks each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.judge.history.series import Entry, MachineHistory, Series
from harness.report.figures.canvas import new_figure, save_figure, styled

_PANEL = (4.6, 3.0)  # inches
_COLUMNS = 3
_MOST_LABELS = 12
_STYLE = {"svg.hashsalt": "history"}  # the same picture gives the same bytes


def draw_history(history: MachineHistory, path: Path) -> bool:
    """Draw the figures that at least two records have; return whether there are any.

    Raises: UserError without matplotlib.
    """
    drawn = [one for one in history.series if len(_points(one)) > 1]
    if not drawn:
        return False
    with styled(_STYLE):
        save_figure(history_figure(history, drawn), path, dpi=100)
    return True


def history_figure(history: MachineHistory, drawn: Sequence[Series]) -> Any:
    """Return the picture as matplotlib's figure: lines of groups that cannot be compared are not joined."""
    names = list(dict.fromkeys(one.name for one in drawn))
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(width=_PANEL[0] * columns, height=_PANEL[1] * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    places = {id(entry): place for place, entry in enumerate(history.entries)}
    colours = {
        arm: f"C{number % 10}" for number, arm in enumerate(dict.fromkeys(one.subject for one in drawn))
    }
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels.flat, names, strict=False):
        for series in (one for one in drawn if one.name == name):
            _line(axes, series, places=places, colour=colours[series.subject])
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        _commits(axes, history.entries)
    for arm, colour in colours.items():
        panels.flat[0].plot([], [], color=colour, label=arm)
    figure.legend(loc="outside lower center", ncols=min(len(colours), 2 * columns), fontsize=7)
    figure.suptitle(history.machine, fontsize=10)
    return figure


def _points(series: Series) -> list[tuple[Entry, float]]:
    return [(one, value.value) for one in series.entries if (value := series.value(one)) is not None]


def _line(axes: Any, series: Series, *, places: dict[int, int], colour: str) -> None:
    """Draw one series; a record without the figure leaves a gap in its line."""
    values = [series.value(entry) for entry in series.entries]
    axes.plot(
        [places[id(entry)] for entry in series.entries],
        [float("nan") if value is None else value.value for value in values],
        marker="o",
        markersize=3,
        linewidth=1,
        color=colour,
    )
    for marked in series.steps:
        axes.axvline(places[id(marked.entry)] - 0.5, color=colour, linestyle="--", linewidth=1)


def _commits(axes: Any, entries: Sequence[Entry]) -> None:
    """Write commits along the bottom, all of them or some that lie evenly."""
    every = -(-len(entries) // _MOST_LABELS)
    shown = range(0, len(entries), every)
    labels = [(entries[place].record.environment.commit or "?")[:8] for place in shown]
    axes.set_xticks(list(shown), labels, rotation=60, fontsize=6)
    axes.set_xlim(-0.6, len(entries) - 0.4)  # all panels alike, whichever records have the figure
    axes.tick_params(axis="y", labelsize=7)
