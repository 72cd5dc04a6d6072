"""What is said of a sweep: tables from the record alone, hypothetical rows apart, figures that are the same
whenever they are drawn.
"""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from harness.cli.trees import print_device_search
from harness.compose.appendix_g import CANDIDATES, simulate
from harness.compose.plan import SweepPlan, choose_trees, gather_curves, with_chosen
from harness.compose.replay import ReplayIndex
from harness.compose.roofline import llama_7b_block, step_cost
from harness.errors import UserError
from harness.judge.sweep import decoded_checks, headline_cells
from harness.judge.validate.record import validate_record
from harness.paths import holds_absolute_path
from harness.records.step_model import StepModel
from harness.records.sweep import SweepRecord
from harness.records.sweep_cells import ComposedCell
from harness.records.trace import Trace
from harness.report.figures.canvas import tree_layout
from harness.report.figures.sweep import FORMATS, draw_figures
from harness.report.formatting import WITHHELD, ratio_interval, significant
from harness.report.readme import shown_record, sweep_block, trees_block, update_readme
from harness.report.sweep import (
    _not_measured,
    print_sweep,
    render_readme_sweep,
    render_sweep_report,
    sweep_headline,
)
from harness.report.tables.sweep import decoded_words, interval_words, render_devices
from harness.specs.claims import load_claims
from harness.specs.hardware import load_hardware
from harness.tests.compose.prices.planted import known_error
from harness.tests.fake_latency import SHAPE
from harness.tests.fake_sweep import made_up_plan, write_sweep
from harness.tests.readme_blocks import shows
from medusa_impl.tree import DraftTree

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = sorted(path.parent for path in (ROOT / "results" / "sweep").glob("*/*/*/manifest.json"))
PAGE = "# Title\n\n<!-- begin:sweep -->\nstale\n<!-- end:sweep -->\n\nRest.\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def plan(home: Path) -> SweepPlan:
    return made_up_plan(home)


@pytest.fixture(scope="module")
def record(plan: SweepPlan, home: Path) -> SweepRecord:
    return write_sweep(home / "records" / "some-sweep", plan)


@pytest.fixture(scope="module")
def report(record: SweepRecord) -> str:
    return render_sweep_report(record, figures=["figures/fig4_nodes.svg"])


def part(report: str, title: str) -> str:
    """One second-level section of a report."""
    return report.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_table_of_devices_says_what_each_figure_is(record: SweepRecord, report: str) -> None:
    devices = part(report, "Which tree on which device")
    (measured,) = [line for line in devices.splitlines() if line.startswith("| made-up CPU")]
    best = headline_cells(record)[0].best
    assert "| measured, float32, packed" in measured and "| composed " in measured
    assert f"{best.speedup.estimate:.2f} [{best.speedup.low:.2f}, {best.speedup.high:.2f}]" in measured
    assert record.trees.trees[best.tree].tree().fingerprint in measured
    assert best.break_even is not None and best.break_even.words in measured
    assert (
        len(
            [
                line
                for line in devices.splitlines()
                if "| predicted, float16" in line and "| predicted " in line
            ]
        )
        == 2
    )
    assert "priced at the nearest one: made-up CPU" in devices  # the record times no length below 256


def test_hypothetical_rows_stand_apart(report: str, record: SweepRecord) -> None:
    assert "vicuna" not in part(report, "Which tree on which device")
    apart = part(report, "Hypothetical")
    assert "None of it is a result" in apart and apart.count("| hypothetical ") == 3
    assert {row["shape"] for row in sweep_headline(record)["best"]} == {SHAPE}


def test_quoted_figures_and_failures_are_shown(report: str) -> None:
    quoted = part(report, "Quoted")
    assert "RTX 3090" in quoted and "SB-3090-7B" in quoted and "not stated" in quoted
    assert "t4, vicuna-13b-v1.5, float16" in part(report, "Failed cells")


def test_the_rooflines_error_stands_beside_its_predictions(report: str, record: SweepRecord) -> None:
    words = part(report, "Step times that are predicted")
    error = record.origin.roofline_error
    assert (
        error is not None
        and f"{100 * error.seconds.median_error:.1f} %" in words
        and "not corrected" in words
    )


def test_decoded_points(report: str) -> None:
    words = part(report, "Decoded for real")
    assert "of 2 points decoded for real 0 came out faster than composed" in part(
        report, "Which tree on which device"
    )
    assert "+20.0 %" in words and "Of 2 points 1 lie within" in words and "1 more at a tie" in words


def test_sampled_settings_and_verdicts(report: str, record: SweepRecord) -> None:
    rows = part(report, "Thresholds and temperatures").splitlines()
    assert (
        sum(line.startswith("| typical") for line in rows) == 8
        and sum(line.startswith("| rejection") for line in rows) == 4
    )
    verdicts = part(report, "Verdicts")
    for claim_id in ("F5-1", "F5-3", "Q-temp", "RL-64", "RL-32", "RL-seq", "RL-44", "RL-acc"):
        assert f"| {claim_id} (" in verdicts
    assert verdicts.count("**direction holds**") + verdicts.count("**holds**") >= 3


def test_no_path_and_no_missing_section(report: str) -> None:
    assert not holds_absolute_path(report)
    for title in (
        "Sparse and dense trees",
        "Heads",
        "The two searches",
        "Appendix G simulated",
        "Provenance",
        "Figures",
    ):
        assert part(report, title).strip()


def test_a_sweep_without_run_cells_leaves_their_sections_out(plan: SweepPlan, tmp_path: Path) -> None:
    text = render_sweep_report(write_sweep(tmp_path / "record", plan, extra=()))
    assert "## Decoded for real" not in text and "## Thresholds" not in text and "**not tested**" in text


def test_a_batch_column_where_there_is_more_than_one(home: Path, tmp_path: Path) -> None:
    plan = made_up_plan(home, batches=[1, 2], contexts=["trace", 640], predicted=None, sampled=None)
    record = write_sweep(tmp_path / "record", plan, extra=())
    shown = render_devices(record.composed, record).splitlines()
    assert "| batch " in shown[0] and "| context " in shown[0] and len(shown) == 2 + 4
    assert "| batch " not in render_devices(headline_cells(record), record).splitlines()[0]


def test_the_headline_is_one_line_of_json(record: SweepRecord) -> None:
    headline = json.loads(json.dumps(sweep_headline(record), allow_nan=False))
    assert headline["num_points"] == record.num_points and headline["num_hypothetical"] == 3
    assert headline["decoded"] == {"points": 2, "within": 1, "bugs": 0}
    assert headline["verdicts"]["F5-1"] == "reproduced"


def test_the_terminal_shows_devices_and_failures(record: SweepRecord) -> None:
    out = StringIO()
    print_sweep(Console(file=out, width=200), record)
    assert "made-up CPU" in out.getvalue() and "no figure for t4, vicuna-13b-v1.5" in out.getvalue()
    assert "vicuna-7b" not in out.getvalue()


def test_the_readme_shows_the_table_once(record: SweepRecord, home: Path) -> None:
    readme = home / "README.md"
    readme.write_text(PAGE)
    figures = ["figures/devices.svg", "figures/fig4_nodes.svg", "figures/heads.svg"]
    assert not shows(readme, sweep_block(record, figures=figures))
    update_readme(readme, sweep_block(record, figures=figures))
    text = readme.read_text()
    assert (
        shows(readme, sweep_block(record, figures=figures))
        and text.endswith("Rest.\n")
        and "stale" not in text
    )
    assert "records/some-sweep/figures/fig4_nodes.svg" in text and "heads.svg" not in text
    assert "vicuna" not in text and "made-up CPU" in text
    assert "![" not in render_readme_sweep(record, base=home / "elsewhere", figures=figures)


def test_an_unsealed_sweep_is_not_for_the_readme(plan: SweepPlan, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(PAGE)
    with pytest.raises(UserError, match="found no manifest"):
        update_readme(
            tmp_path / "README.md", sweep_block(write_sweep(tmp_path / "record", plan, sealed=False))
        )
    assert (tmp_path / "README.md").read_text() == PAGE


def test_figures_are_drawn(record: SweepRecord, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    drawn = draw_figures(record, tmp_path, formats=("svg",))
    names = (
        "fig4_nodes",
        "fig5_thresholds",
        "heads",
        "fig6_tree",
        "roofline",
        "devices",
        "schedule",
        "decoded",
        "appendix_g",
    )
    assert tuple(path.stem for path in drawn) == names and sorted(tmp_path.iterdir()) == sorted(drawn)
    texts = {path.stem: path.read_text() for path in drawn}
    assert not any(map(holds_absolute_path, texts.values()))
    assert "tokens/step (replayed)" in texts["fig4_nodes"] and "composed: made-up CPU" in texts["fig4_nodes"]
    assert "hypothetical" in texts["devices"] and "predicted" in texts["appendix_g"]
    assert "log-likelihood under the backbone, nats/token" in texts["fig5_thresholds"]


def test_a_figure_is_the_same_whenever_it_is_drawn(record: SweepRecord, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    for name in ("one", "two"):
        draw_figures(record, tmp_path / name, names=["fig6_tree"])
    for suffix in FORMATS:
        one, two = ((tmp_path / name / f"fig6_tree.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two
    assert len(list((tmp_path / "one").iterdir())) == len(FORMATS)


def test_figures_without_data_are_not_drawn(plan: SweepPlan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    record = write_sweep(tmp_path / "record", plan, extra=())
    assert draw_figures(record, tmp_path / "figures", names=["fig5_thresholds", "decoded"]) == ()


def test_no_two_nodes_of_a_level_share_a_place() -> None:
    tree = DraftTree.from_paths([(0,), (1,), (4,), (0, 0), (0, 1), (4, 0), (0, 1, 0)])
    across = tree_layout(tree)
    places = list(zip(tree.depths, across, strict=True))
    assert len(set(places)) == tree.num_nodes
    for node, below in enumerate(tree.children):
        if below:
            assert across[node] == pytest.approx(sum(across[child] for child in below) / len(below))
    assert [across[child] for child in tree.children[0]] == sorted(
        across[child] for child in tree.children[0]
    )


def test_the_simulations_are_those_that_the_verdicts_rest_on() -> None:
    simulated = simulate()
    assert [row.num_nodes for row in simulated.by_candidates] == list(CANDIDATES)
    by_size = {row.num_nodes: row for row in simulated.by_candidates}
    limits = load_hardware()[simulated.device].limits
    assert by_size[64].step_cost == step_cost(llama_7b_block(), limits, num_nodes=64, context_tokens=1024)
    assert by_size[64].acceleration_rate == pytest.approx(0.477 * 6)  # slope x log2(64)
    assert by_size[1].speedup == 0.0
    best = {row.batch: row.speedup for row in simulated.by_batch}
    assert list(best) == [1, 2, 4, 8, 16, 32, 64] and best[32] > 1 > best[64]
    lengths = [row.context_tokens for row in simulated.by_length]
    assert lengths == [128, 256, 512, 1024, 2048, 4096, 8192]
    with pytest.raises(UserError, match="found no simulated forms"):
        simulate([claim for claim in load_claims() if claim.id != "RL-32"])


def test_search_for_a_device(home: Path, plan: SweepPlan, tmp_path: Path) -> None:
    out = StringIO()
    best = print_device_search(
        Trace.load(home / "calibration.npz"),
        device="made-up CPU",
        shape=SHAPE,
        dtype=None,
        max_nodes=24,
        check=Trace.load(home / "trace.npz"),
        results=home / "results",
        cache=tmp_path,
        console=Console(file=out, width=220),
    )
    text = out.getvalue()
    assert "made-up CPU" in text and "independent" in text and "joint" in text and "root  #0" in text
    assert f"{plan.composer.index.replay(best.choice.tree()).tokens_per_step:.3f}" in text
    assert best.curve.label.kind == "measured" and f"the fastest: {best.curve.label.words}" in text
    own = ReplayIndex(Trace.load(home / "calibration.npz"))
    assert f"{best.speedup(own):.2f}, its error left out" in text
    assert len(list(tmp_path.iterdir())) == 1


def test_a_promised_speedup_holds_the_error_of_the_step_times(tmp_path: Path) -> None:
    out = StringIO()
    made_up_plan(tmp_path, levels=(0.9, 1.0, 1.1))
    best = print_device_search(
        Trace.load(tmp_path / "calibration.npz"),
        device="made-up CPU",
        shape=SHAPE,
        dtype=None,
        max_nodes=24,
        check=None,
        results=tmp_path / "results",
        cache=None,
        console=Console(file=out, width=220),
    )
    promised = best.composed
    assert promised.low < promised.estimate < promised.high
    assert promised.estimate == pytest.approx(
        best.speedup(ReplayIndex(Trace.load(tmp_path / "calibration.npz"))), rel=0.05
    )
    assert ratio_interval(promised) in out.getvalue()


def with_model(plan: SweepPlan, model: StepModel) -> SweepPlan:
    """The same sweep, its predictions made with a fitted model."""
    curves, refused = gather_curves(plan.spec, (), model=model)
    choices = choose_trees(plan.spec, plan.composer, plan.calibration, curves, cache=None)
    trees = with_chosen(plan.trees, choices)
    return replace(plan, curves=curves, refused=refused, choices=choices, trees=trees, model=model)


def test_a_fitted_prediction_carries_its_band(plan: SweepPlan, tmp_path: Path) -> None:
    model = known_error(seconds=(0.8, 1.5), overhead=(0.99, 1.01))
    record = write_sweep(tmp_path / "record", with_model(plan, model), extra=())
    assert validate_record(record.folder) == ()
    assert record.origin.step_model == model
    assert {cell.overhead_band for cell in record.composed} == {model.overhead_band}
    assert {cell.seconds_band for cell in record.composed} == {model.seconds_band}
    assert "step model of 2 measured curves" in record.composed[0].curve.source
    one = headline_cells(record)[0]
    speedup, rate = one.best.speedup, one.best.tokens_per_s
    assert speedup.low > 1.05  # so that the narrow band tells it
    line = render_devices([one], record).splitlines()[-1]
    assert f"{speedup.estimate:.2f} [{speedup.low / 1.01:.2f}, {speedup.high / 0.99:.2f}]" in line
    assert f"[{significant(rate.low / 1.5)}, {significant(rate.high / 0.8)}]" in line
    words = part(render_sweep_report(record), "Step times that are predicted")
    assert "fitted on 2 measured curves" in words
    assert "another: step 0.80 to 1.50, overhead 0.99 to 1.01" in words


def test_a_fit_on_one_curve_tells_nothing(plan: SweepPlan, tmp_path: Path) -> None:
    alone = known_error(overhead=None).model_copy(update={"curves": ("a",), "left_out": ()})
    record = write_sweep(tmp_path / "record", with_model(plan, alone), extra=())
    assert "Without a second one" in part(render_sweep_report(record), "Step times that are predicted")
    assert sweep_headline(record)["num_withheld"] == 2


def test_a_wide_band_leaves_no_tree_and_no_speed(plan: SweepPlan, tmp_path: Path) -> None:
    record = write_sweep(tmp_path / "record", with_model(plan, known_error(overhead=(0.3, 4.0))), extra=())
    cells = headline_cells(record)
    assert [cell.curve.device for cell in cells] == ["a100-80gb-pcie", "t4"]
    (line,) = render_devices(cells, record).splitlines()[2:]
    assert line.count(WITHHELD) == 3 and "a100-80gb-pcie, t4" in line  # both say the same
    for cell in cells:
        assert record.trees.trees[cell.best.tree].tree().fingerprint not in line
        assert significant(cell.best.tokens_per_s.estimate) not in line
    headline = sweep_headline(record)
    assert headline["best"] == [] and headline["num_withheld"] == 2
    out = StringIO()
    print_sweep(Console(file=out, width=220), record)
    assert f"{WITHHELD}, so no figure: a100-80gb-pcie, t4" in out.getvalue()
    assert draw_figures(record, tmp_path / "figures", names=["devices"]) == ()
    (drawn,) = draw_figures(record, tmp_path / "figures", names=["fig4_nodes"])
    assert ">tokens/s<" not in drawn.read_text(encoding="utf-8")


def test_the_readme_says_of_how_many_devices_nothing_is_told(plan: SweepPlan, tmp_path: Path) -> None:
    """It once said "18 curves .. Of 18 of them no tree and no speed is told"."""

    def cells(name: str, overhead: tuple[float, float]) -> tuple[SweepRecord, tuple[ComposedCell, ...]]:
        record = write_sweep(
            tmp_path / name, with_model(plan, known_error(seconds=(0.8, 1.5), overhead=overhead)), extra=()
        )
        return record, tuple(headline_cells(record))

    record, wide = cells("wide", (0.3, 4.0))
    text = sweep_block(record).render(tmp_path)
    assert "2 curves of devices that were not measured stand in the report alone." in text
    assert "Of none of them is a tree or a speed told, since the error" in text
    assert "in the report alone. Of it no tree and no speed is told, since" in _not_measured(wide[:1], record)
    narrow_record, narrow = cells("narrow", (0.99, 1.01))
    told = _not_measured(narrow, narrow_record)
    assert "in the report alone. Predictions are of the step model" in told and "no speed" not in told
    assert "Of 1 of these no tree and no speed is told" in _not_measured([*wide[:1], *narrow], narrow_record)


def test_a_search_on_a_prediction_that_tells_nothing_is_refused(home: Path, tmp_path: Path) -> None:
    """Nothing was measured, so the error of the roofline's step times is not known."""
    out = StringIO()
    with pytest.raises(UserError, match="whose error is larger"):
        print_device_search(
            Trace.load(home / "calibration.npz"),
            device="a40",
            shape=SHAPE,
            dtype=None,
            max_nodes=24,
            check=None,
            results=tmp_path,
            cache=None,
            console=Console(file=out, width=220),
        )
    assert out.getvalue().count(WITHHELD) == 2 and "root  #0" not in out.getvalue()


def test_a_search_on_a_sure_prediction_gives_its_tree(home: Path) -> None:
    out = StringIO()
    best = print_device_search(
        Trace.load(home / "calibration.npz"),
        device="a40",
        shape=SHAPE,
        dtype=None,
        max_nodes=24,
        check=None,
        results=home / "nothing",
        cache=None,
        console=Console(file=out, width=220),
        model=known_error(overhead=(1.0, 1.0)),
    )
    assert best.curve.label.kind == "predicted" and WITHHELD not in out.getvalue()
    assert "step model" in best.curve.label.source


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_sweeps_are_sealed_and_sound(folder: Path) -> None:
    assert validate_record(folder) == ()


def test_pages_say_what_their_brackets_hold(record: SweepRecord) -> None:
    """Prompts alone in older records; the rounds of the curve's timing too in those that draw them."""
    measured = [one for one in headline_cells(record) if one.curve.kind == "measured"]
    assert interval_words([]) == ""
    assert interval_words(measured) == "The error of measured step times is not in them."
    timed = [one.model_copy(update={"timing_rounds": 6}) for one in measured]
    assert interval_words(timed) == (
        "Those on measured step times draw the 6 rounds in which these were taken as well."
    )
    both = interval_words([*timed, *measured])
    assert both.startswith(interval_words(timed)) and measured[0].curve.words in both
    predicted = [one for one in headline_cells(record) if one.curve.kind == "predicted"]
    assert interval_words(predicted) == ""
    checks = decoded_checks(record)
    assert "draws the prompts alone" in decoded_words(checks)
    held = [replace(one, holds_timing=True) for one in checks]
    assert "the rounds in which the curve was timed" in decoded_words(held)
    for page in (render_sweep_report(record), render_readme_sweep(record, base=record.folder)):
        assert interval_words(measured) in page and decoded_words(checks) in page


def test_a_gap_is_within_where_its_interval_holds_0(record: SweepRecord) -> None:
    check = decoded_checks(record)[1]
    assert check.gap_interval is not None
    for low, high, within in ((-0.1, 0.3, True), (0.0, 0.3, True), (0.1, 0.3, False), (-0.3, -0.1, False)):
        gap = check.gap_interval.model_copy(update={"low": low, "high": high})
        assert replace(check, gap_interval=gap, holds_timing=True).is_within is within


def test_break_even_tells_what_its_bounds_leave_open(record: SweepRecord) -> None:
    cell = next(one for one in headline_cells(record) if one.curve.kind == "measured")
    ranges = {}
    for high in (0.9, 1.3):
        best = cell.best.model_copy(
            update={
                "speedups": {1: 1.2, 2: 0.8},
                "speedups_low": {1: 1.1, 2: 0.7},
                "speedups_high": {1: 1.4, 2: high},
            }
        )
        changed = cell.model_copy(update={"chosen": (best,)})
        ranges[high] = render_devices([changed], record, columns=("device", "break-even batch"))
    assert "crossing 1 at about 1.4" in ranges[0.9] and "[" not in ranges[0.9]
    assert "crossing 1 at about 1.4 [1, 2]" in ranges[1.3]


@pytest.mark.skipif(not COMMITTED, reason="no sweep is committed yet")
def test_readme_shows_what_its_sweep_gives() -> None:
    page, readme = ROOT / "results" / "README.md", ROOT / "README.md"
    folder = shown_record(page, "sweep")
    figures = [f"figures/{path.name}" for path in sorted((folder / "figures").glob("*.svg"))]
    assert shows(page, sweep_block(SweepRecord(folder), figures=figures))
    assert shown_record(readme, "trees") == folder and shows(readme, trees_block(SweepRecord(folder)))
