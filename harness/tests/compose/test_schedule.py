"""The best tree of each batch: chosen on the calibration text, judged on the other, and told as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.compose.cells import compose_cell
from harness.compose.composer import KnotPrices
from harness.compose.plan import SweepPlan
from harness.errors import ExitCode
from harness.records.sweep import SweepRecord
from harness.records.sweep_cells import composed_key
from harness.report.figures.canvas import new_figure, styled
from harness.report.figures.schedule import draw_schedule, schedule_title
from harness.report.sweep import render_sweep_report
from harness.report.tables.schedule import render_schedules, schedule_data, speedup_of
from harness.tests.fake_sweep import made_up_plan, write_sweep
from harness.tests.tiny_suite import command
from medusa_impl.tree import DraftTree


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SweepPlan:
    return made_up_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def record(plan: SweepPlan, tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    return write_sweep(tmp_path_factory.mktemp("records") / "some-sweep", plan)


def test_each_batch_has_its_own_tree_with_its_own_price(plan: SweepPlan) -> None:
    curve = next(one for one, _, batch in plan.cells if one.label.kind == "measured" and batch == 1)
    cell = compose_cell(plan, curve, context="trace", batch=1)
    assert cell.kind == "composed" and cell.schedule[0].batch == 1
    composer = plan.composer
    for one in cell.schedule:
        tree = plan.drafts[one.tree]
        (chosen,) = [
            choice
            for choice in plan.choices[composed_key(curve.label, context="trace", batch=one.batch)]
            if choice.method == "joint"
        ]
        assert chosen.tree() == tree
        prices = KnotPrices(curve, knots=composer.knots, context="trace", batch=one.batch)
        ours, vanilla = composer.seconds(tree, prices), composer.seconds(DraftTree.root_only(), prices)
        assert ours is not None and vanilla is not None
        tokens = float(composer.steps(tree, batch=one.batch).tokens.sum())
        assert one.tokens_per_s == pytest.approx(tokens / ours.total)
        assert one.vanilla_tokens_per_s == pytest.approx(tokens / vanilla.total)
        assert one.speedup == pytest.approx(vanilla.total / ours.total)
    best = next(one for one in cell.chosen if one.method == "joint")
    assert cell.schedule[0].tree == best.tree
    assert cell.schedule[0].speedup == pytest.approx(best.speedup.estimate)


def test_predicted_devices_have_no_schedule(record: SweepRecord) -> None:
    assert any(one.schedule for one in record.composed)
    assert all(not one.schedule for one in record.composed if one.curve.kind == "predicted")


def test_the_report_and_the_export_tell_it(record: SweepRecord, tmp_path: Path) -> None:
    text = render_schedules(record)
    (cell,) = [one for one in record.composed if one.schedule]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    told = [row for row in rows if row[0] == cell.curve.device]
    assert [int(row[2]) for row in told] == [one.batch for one in cell.schedule]
    assert [row[-1] for row in told] == [speedup_of(one) for one in cell.schedule]
    assert "## Which tree for which batch" in render_sweep_report(record)
    target = tmp_path / "schedule.json"
    assert command("export", record.folder, target, "--format", "schedule").code == ExitCode.OK
    data = json.loads(target.read_text())
    assert data == json.loads(json.dumps(schedule_data(record)))
    (one,) = data["schedules"]
    for entry, scheduled in zip(one["batches"], cell.schedule, strict=True):
        tree = record.trees.trees[scheduled.tree].tree()
        assert DraftTree.from_paths([(), *(tuple(path) for path in entry["paths"])]) == tree


def test_the_picture_shows_users_against_the_device(record: SweepRecord) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra plots")
    (cell,) = [one for one in record.composed if one.schedule]
    with styled({}):
        figure = new_figure(width=6, height=4)
        assert draw_schedule(figure, record)
    (axes,) = figure.axes
    drawn = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.get_lines()}
    users, device = drawn["the best tree of each batch"]
    assert list(device) == pytest.approx([one.tokens_per_s for one in cell.schedule])
    assert list(users) == pytest.approx([one.tokens_per_s / one.batch for one in cell.schedule])
    assert list(drawn["plain decoding"][1]) == pytest.approx(
        [one.vanilla_tokens_per_s for one in cell.schedule]
    )
    paying = [one for one in cell.schedule if one.speedup > 1]
    told = schedule_title(cell)
    assert told.startswith(
        f"A tree pays up to batch {paying[-1].batch}, by {paying[-1].speedup:.2f} times there"
        if paying
        else "No tree pays at any batch"
    )
