"""A run as two pictures: how fast each arm is and why, and how acceptance falls with depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.judge.anatomy.acceptance import Acceptance, acceptances
from harness.judge.anatomy.oracle import oracles
from harness.judge.judgement import Comparison, Judgement
from harness.records.run import RunRecord
from harness.report.figures.canvas import bar_lengths, bars, new_figure, save_figure, styled
from harness.report.formatting import ratio_interval
from harness.report.tables.run import comparisons_by_arm, headline_arm

SPEED_FILE, ACCEPTANCE_FILE = "speed.svg", "acceptance.svg"
_COLOURS = ("#1f5a99", "#c8641b", "#2e7d4f", "#7a3b8f", "#7a7a7a", "#a8892c", "#4c4c4c", "#b04a5a")
_MARKS = "osD^v<>P"
_STYLE: Any = {
    "svg.hashsalt": "medusa-repro",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_WIDTH, _ROW, _DPI = 6.4, 0.34, 100  # inches


def draw_run(record: RunRecord, judgement: Judgement, folder: Path) -> tuple[str, ...]:
    """Draw what a run's figures allow into a folder; return the names of the files.

    A run whose texts are invalid has none, one that shows no speed has none of speed.
    Raises: UserError without matplotlib.
    """
    if not judgement.valid_texts:
        return ()
    drawn = []
    with styled(_STYLE):
        compared = [one for one in judgement.comparisons if one.arm in _drafting(record)]
        if record.reports_speed and compared:
            folder.mkdir(parents=True, exist_ok=True)
            save_figure(speed_figure(record, judgement, compared), folder / SPEED_FILE, dpi=_DPI)
            drawn.append(SPEED_FILE)
            if found := acceptances(record):
                save_figure(acceptance_figure(record, found), folder / ACCEPTANCE_FILE, dpi=_DPI)
                drawn.append(ACCEPTANCE_FILE)
    return tuple(drawn)


def _drafting(record: RunRecord) -> set[str]:
    return {arm.name for arm in record.suite.arms if arm.method == "medusa"}


def speed_figure(record: RunRecord, judgement: Judgement, compared: Sequence[Comparison]) -> Any:
    """Return speedup, tokens/step and overhead by arm, with intervals, and the oracle's speedup as a bar."""
    rows = list(compared)[::-1]
    best = {one.arm: one.speedup.estimate for one in oracles(record)}
    rates = {arm.arm: arm.acceleration_rate for arm in judgement.arms}
    figure = new_figure(width=_WIDTH, height=1.5 + _ROW * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    at = list(range(len(rows)))
    low, high = bar_lengths([one.speedup for one in rows])
    left.errorbar(
        [one.speedup.estimate for one in rows],
        at,
        xerr=[low, high],
        fmt="o",
        color=_COLOURS[0],
        capsize=2,
        label="speedup",
    )
    known = [(best[one.arm], place) for place, one in enumerate(rows) if one.arm in best]
    if known:
        left.plot(*zip(*known, strict=True), "|", color=_COLOURS[4], markersize=11, label="its oracle")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(at, [one.arm for one in rows])
    left.set_xlabel("speedup over its baseline")
    left.set_xlim(left=0)
    for values, mark, colour, name in (
        ([rates[one.arm] for one in rows], "s", _COLOURS[2], "tokens/step"),
        ([one.overhead for one in rows], "D", _COLOURS[1], "overhead"),
    ):
        low, high = bar_lengths(values)
        right.errorbar(
            [one.estimate for one in values],
            at,
            xerr=[low, high],
            fmt=mark,
            color=colour,
            capsize=2,
            markersize=4,
            label=name,
        )
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("times vanilla's")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(speed_title(record, judgement), fontsize=10)
    figure.supxlabel(_source(record), fontsize=7)
    return figure


def speed_title(record: RunRecord, judgement: Judgement) -> str:
    """Return what the picture of speeds shows, in a sentence."""
    arm = headline_arm(record, judgement)
    compared = comparisons_by_arm(judgement).get(arm.arm) if arm is not None else None
    if arm is None or compared is None:
        return "Speedup of each arm over its baseline"
    return (
        f"{arm.arm} is {ratio_interval(compared.speedup)} times as fast as {compared.baseline}:\n"
        f"{ratio_interval(arm.acceleration_rate)} tokens/step at {ratio_interval(compared.overhead)} times "
        "the step"
    )


def acceptance_figure(record: RunRecord, found: Sequence[Acceptance]) -> Any:
    """Return, for each arm, the share of steps that accept a draft at a depth once the depth before was."""
    figure = new_figure(width=_WIDTH, height=3.6)
    axes = figure.subplots()
    for number, one in enumerate(found):
        rates = [(depth, rate) for depth, rate in enumerate(one.conditional, 1) if rate is not None]
        shift = 0.06 * (number - (len(found) - 1) / 2)
        style = {"mark": _MARKS[number % len(_MARKS)], "colour": _COLOURS[number % len(_COLOURS)]}
        places, intervals = [depth + shift for depth, _ in rates], [rate for _, rate in rates]
        bars(axes, places, intervals, **style, name=one.arm)
        axes.plot(places, [one.estimate for one in intervals], color=style["colour"], linewidth=1)
    axes.set_xticks(range(1, max(len(one.conditional) for one in found) + 1))
    axes.set_xlabel("depth of the draft")
    axes.set_ylabel("accepted, once the depth before was")
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.suptitle(acceptance_title(found), fontsize=10)
    figure.supxlabel(_source(record), fontsize=7)
    return figure


def acceptance_title(found: Sequence[Acceptance]) -> str:
    """Return what the picture of acceptance shows, of the arm with the most nodes."""
    one = max(found, key=lambda one: (sum(one.drafted), len(one.drafted)))
    rates = [rate.estimate for rate in one.conditional[:2] if rate is not None and math.isfinite(rate.low)]
    if len(rates) < 2:
        return "How acceptance falls with depth"
    return (
        f"{one.arm} accepts a first draft in {100 * rates[0]:.0f} % of its steps,\n"
        f"and after that a second in {100 * rates[1]:.0f} %"
    )


def _source(record: RunRecord) -> str:
    prompts = len({one.trial.prompt_key for one in record.generations})
    level = 100 * record.suite.interval.level
    return f"{record.folder.name}; bars: {level:g} % intervals over {prompts} prompts"
