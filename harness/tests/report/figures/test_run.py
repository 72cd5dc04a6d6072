"""A run's pictures: what is drawn is what the record's figures say, recomputed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.judge.anatomy.acceptance import acceptances
from harness.judge.anatomy.oracle import oracles
from harness.judge.judgement import Judgement
from harness.judge.run import judge
from harness.records.run import RunRecord
from harness.report.figures.canvas import styled
from harness.report.figures.run import (
    acceptance_figure,
    acceptance_title,
    draw_run,
    speed_figure,
    speed_title,
)
from harness.report.run import render_report
from harness.tests.fake_judgement import FAILED_CHECK

pytest.importorskip("matplotlib", reason="figures need the extra plots")

ROOT = Path(__file__).resolve().parents[4]
DEFAULT = ROOT / "results" / "embedded" / "cpu-amd-epyc-2c" / "20261125T202908Z-e4ce6458"
ARMS = ["chain", "cartesian", "optimised", "fastest"]
ALL = [*ARMS, "medusa2_optimised", "medusa2_fastest", "typical", "rejection"]


@pytest.fixture(scope="module")
def default() -> tuple[RunRecord, Judgement]:
    record = RunRecord.open(DEFAULT)
    return record, judge(record, claims=())


def series(axes: Any) -> dict[str, tuple[list[float], list[list[float]]]]:
    """Return the points of each series with bars, and the ends of the bars."""
    found = {}
    for one in axes.containers:
        line, _, (bars,) = one.lines
        ends = [[float(x) for x in segment[:, 0]] for segment in bars.get_segments()]
        found[one.get_label()] = ([float(x) for x in line.get_xdata()], ends)
    return found


def test_speeds_rates_and_oracles_are_those_of_the_record(default: tuple[RunRecord, Judgement]) -> None:
    record, judgement = default
    compared = [one for one in judgement.comparisons if one.arm in ALL]
    with styled({}):
        figure = speed_figure(record, judgement, compared)
    left, right = figure.axes
    order = [label.get_text() for label in left.get_yticklabels()]
    assert order == ALL[::-1], "the first arm on top"
    by_arm = {one.arm: one for one in compared}
    points, ends = series(left)["speedup"]
    assert points == pytest.approx([by_arm[arm].speedup.estimate for arm in order])
    bounds = [[by_arm[arm].speedup.low, by_arm[arm].speedup.high] for arm in order]
    assert ends == [pytest.approx(pair) for pair in bounds]
    (best,) = (line for line in left.get_lines() if line.get_label() == "its oracle")
    expected = {one.arm: one.speedup.estimate for one in oracles(record)}
    assert list(best.get_xdata()) == pytest.approx([expected[arm] for arm in order])
    rates = {arm.arm: arm.acceleration_rate.estimate for arm in judgement.arms}
    assert series(right)["tokens/step"][0] == pytest.approx([rates[arm] for arm in order])
    assert series(right)["overhead"][0] == pytest.approx([by_arm[arm].overhead.estimate for arm in order])


def test_titles_state_what_is_found(default: tuple[RunRecord, Judgement]) -> None:
    record, judgement = default
    assert speed_title(record, judgement) == (
        "fastest is 1.13 [1.07, 1.21] times as fast as vanilla:\n"
        "1.43 [1.37, 1.50] tokens/step at 1.26 [1.22, 1.32] times the step"
    )
    assert acceptance_title(acceptances(record)) == (
        "optimised accepts a first draft in 68 % of its steps,\nand after that a second in 27 %"
    )


def test_acceptance_by_depth_is_that_of_the_record(default: tuple[RunRecord, Judgement]) -> None:
    record, _ = default
    found = acceptances(record)
    with styled({}):
        (axes,) = acceptance_figure(record, found).axes
    drawn = {one.get_label(): one.lines[0].get_ydata() for one in axes.containers}
    assert list(drawn) == ALL
    for one in found:
        assert list(drawn[one.arm]) == pytest.approx(
            [rate.estimate for rate in one.conditional if rate is not None]
        )


def test_files_are_alike_small_and_shown_in_the_report(
    default: tuple[RunRecord, Judgement], tmp_path: Path
) -> None:
    record, judgement = default
    names = draw_run(record, judgement, tmp_path / "a")
    assert names == ("speed.svg", "acceptance.svg") == draw_run(record, judgement, tmp_path / "b")
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes() and len(content) < 40_000
    report = render_report(record, judgement, figures=names)
    assert "](figures/speed.svg)" in report and "](figures/acceptance.svg)" in report
    assert "figures/" not in render_report(record, judgement)


def test_what_may_not_be_cited_is_not_drawn(default: tuple[RunRecord, Judgement], tmp_path: Path) -> None:
    record, judgement = default
    invalid = judgement.model_copy(update={"checks": (*judgement.checks, FAILED_CHECK)})
    assert draw_run(record, invalid, tmp_path / "a") == () and not (tmp_path / "a").exists()
    assert draw_run(record.withholding("a test"), judgement, tmp_path / "b") == ()
