"""Sweeps on a few cells whose figures can be worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from harness.judge.claims.findings import NotTestable
from harness.judge.claims.sweep import sampled_counts, shared_prompts, slope, sweep_verdicts, threshold_cells
from harness.judge.judgement import VerdictKind
from harness.judge.sweep import (
    DecodedCheck,
    best_by_heads,
    decoded_check,
    decoded_checks,
    drawn_cell,
    family_points,
    headline_cells,
    hypothetical_cells,
    searches_compared,
    sparse_points,
    told_speedup,
    told_tokens_per_s,
)
from harness.records.step_model import ErrorBand
from harness.records.sweep import JOINT, MARGINALS, PredictionError, RooflineError, SweepRecord
from harness.records.sweep_cells import ComposedCell, SampledCell
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.forms.claims import (
    TemperatureTrendForm,
    ThresholdTrendForm,
    TypicalBeatsRejectionForm,
)
from harness.specs.suite import IntervalSpec
from harness.specs.sweep import SampledSetting
from harness.stats import Interval
from harness.tests.fake_sweep import decoded_cell, made_up_plan, made_up_spec, sampled_cell, write_sweep

YES, NO, OPEN, UNTESTED = (
    VerdictKind.REPRODUCED,
    VerdictKind.NOT_REPRODUCED,
    VerdictKind.INCONCLUSIVE,
    VerdictKind.NOT_TESTED,
)
SPEC = IntervalSpec(num_resamples=200)
WHY = "made up for a test"


def interval(low: float, high: float) -> Interval:
    return Interval(estimate=(low + high) / 2, low=low, high=high, level=0.95, num_prompts=6)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    folder = tmp_path_factory.mktemp("sweep")
    return write_sweep(folder / "record", made_up_plan(folder, predicted=None))


@pytest.mark.parametrize(
    ("composed", "is_within"), [(1.0, True), (2.0, True), (1.5, True), (0.99, False), (2.01, False)]
)
def test_a_composition_is_within_the_measured_interval(composed: float, is_within: bool) -> None:
    check = DecodedCheck(0, interval(1.0, 2.0), composed, num_ties=0, num_bugs=0, device="d")
    assert check.is_within is is_within and check.gap == pytest.approx(composed / 1.5 - 1)


@pytest.mark.parametrize("bugs", [0, 2])
def test_a_decoded_check_is_sums_over_prompts(tmp_path: Path, bugs: int) -> None:
    plan = made_up_plan(tmp_path, predicted=None)
    cell = decoded_cell(plan, 3, gap=0.1, bugs=bugs)
    found = decoded_check(cell, spec=SPEC)
    assert found.measured.estimate == pytest.approx(
        sum(row.vanilla_s for row in cell.rows) / sum(row.medusa_s for row in cell.rows)
    )
    assert found.composed == pytest.approx(1.1 * found.measured.estimate)
    assert (found.tree, found.num_ties, found.num_bugs) == (3, 1, bugs)
    assert found.device == cell.curve.device


def test_families_are_the_trees_of_that_name(record: SweepRecord) -> None:
    assert [one.tree for one in decoded_checks(record)] == [1, 2]
    cell = headline_cells(record)[0]
    speeds = dict(zip(cell.trees, cell.tokens_per_s, strict=True))
    for family in (JOINT, MARGINALS, "chain", "cartesian"):
        for heads in (None, 1, 2, 4):
            wanted = [
                index
                for index, tree in enumerate(record.trees.trees)
                if family in tree.families and heads in (None, tree.num_heads)
            ]
            found = family_points(record, family, cell=cell, num_heads=heads)
            assert sorted(point.tree for point in found) == wanted
            sizes = [(point.num_nodes, point.depth) for point in found]
            assert sizes == sorted(sizes)
            for point in found:
                tree = record.trees.trees[point.tree]
                assert (point.num_nodes, point.depth) == (len(tree.paths), max(map(len, tree.paths)))
                assert point.tokens_per_s == speeds.get(point.tree)
                assert point.tokens_per_step == record.trees.rate(point.tree)
    assert all(point.tokens_per_s is None for point in family_points(record, JOINT))


def test_the_best_grown_trees_are_chosen_on_calibration(record: SweepRecord) -> None:
    calibrated = record.trees.calibrated
    grown = {
        index: tree
        for index, tree in enumerate(record.trees.trees)
        if {JOINT, MARGINALS} & set(tree.families)
    }
    for point in sparse_points(record):
        rivals = [index for index, tree in grown.items() if len(tree.paths) == point.num_nodes]
        assert calibrated[point.tree] == max(calibrated[index] for index in rivals)
    assert [point.num_nodes for point in sparse_points(record)] == sorted(
        {len(tree.paths) for tree in grown.values()}
    )
    for num_nodes in (2, 8, 16):
        for heads, point in best_by_heads(record, num_nodes=num_nodes).items():
            rivals = [
                index
                for index, tree in grown.items()
                if len(tree.paths) == num_nodes and max(map(len, tree.paths)) <= heads
            ]
            assert calibrated[point.tree] == max(calibrated[index] for index in rivals)
        fits = [
            heads
            for heads in record.spec.num_heads
            if any(
                len(tree.paths) == num_nodes and max(map(len, tree.paths)) <= heads for tree in grown.values()
            )
        ]
        assert list(best_by_heads(record, num_nodes=num_nodes)) == sorted(fits)


def cells_of(record: SweepRecord, *kinds: tuple[str, int]) -> SweepRecord:
    """A record whose composed cells are of these kinds and batches."""
    one = record.composed[0]
    cells = tuple(one.model_copy(update={"kind": kind, "batch": batch}) for kind, batch in kinds)
    return cast(SweepRecord, SimpleNamespace(composed=cells))


def test_cells_of_a_headline_are_not_hypothetical_and_of_batch_1(record: SweepRecord) -> None:
    some = cells_of(
        record, ("hypothetical", 1), ("composed", 1), ("composed", 2), ("predicted", 1), ("hypothetical", 4)
    )
    assert headline_cells(some) == [some.composed[1], some.composed[3]]
    assert hypothetical_cells(some) == [some.composed[0], some.composed[4]]
    assert drawn_cell(some) is some.composed[1]
    assert drawn_cell(cells_of(record, ("hypothetical", 1))) is None
    predicted = [
        one.model_copy(update={"curve": one.curve.model_copy(update={"kind": kind})})
        for one, kind in zip(some.composed[1:4:2], ("predicted", "measured"), strict=True)
    ]
    both = cast(SweepRecord, SimpleNamespace(composed=tuple(predicted), origin=record.origin))
    assert drawn_cell(both) is predicted[1]
    sure = predicted[0].model_copy(update={"overhead_band": ErrorBand(low=1.0, high=1.0)})
    assert drawn_cell(alone(sure)) is sure
    assert drawn_cell(alone(predicted[0])) is None


def alone(cell: ComposedCell, *, error: RooflineError | None = None) -> SweepRecord:
    """A record of one composed cell, whose roofline had this error."""
    made = SimpleNamespace(composed=(cell,), origin=SimpleNamespace(roofline_error=error, step_model=None))
    return cast(SweepRecord, made)


def roofline_error(worst: float | None) -> RooflineError:
    """An error of the roofline's step cost; None where it is not known."""
    seconds = PredictionError(num_points=3, median_error=0.5, worst_error=0.9, median_ratio=2.0)
    cost = None if worst is None else seconds.model_copy(update={"worst_error": worst})
    return RooflineError(devices=("d",), limits=("measured",), seconds=seconds, step_cost=cost)


def predicted_cell(
    record: SweepRecord,
    speedup: Interval,
    *,
    overhead: tuple[float, float] | None = None,
    seconds: tuple[float, float] | None = None,
) -> ComposedCell:
    """A predicted cell whose best tree has this speedup, and 100 to 200 tokens/s."""
    one = record.composed[0]
    best = one.best.model_copy(update={"speedup": speedup, "tokens_per_s": interval(100, 200)})
    bands = {
        name: None if band is None else ErrorBand(low=band[0], high=band[1])
        for name, band in (("overhead_band", overhead), ("seconds_band", seconds))
    }
    curve = one.curve.model_copy(update={"kind": "predicted"})
    return one.model_copy(update={"kind": "predicted", "curve": curve, "chosen": (best,), **bands})


@pytest.mark.parametrize(
    ("speedup", "band", "bounds"),
    [
        ((1.2, 1.4), (0.8, 1.1), (1.2 / 1.1, 1.4 / 0.8)),
        ((1.2, 1.4), (0.8, 1.2), None),
        ((1.2, 1.4), (0.8, 1.3), None),
        ((0.5, 0.6), (0.75, 1.25), (0.4, 0.8)),
        ((0.5, 0.6), (0.6, 1.25), None),
        ((1.2, 1.4), (0.0, 1.1), None),
        ((1.2, 1.4), None, None),
    ],
)
def test_a_speedup_whose_error_is_larger_than_it_is_not_told(
    record: SweepRecord,
    speedup: tuple[float, float],
    band: tuple[float, float] | None,
    bounds: tuple[float, float] | None,
) -> None:
    cell = predicted_cell(record, interval(*speedup), overhead=band, seconds=(0.5, 2.0))
    found, rate = told_speedup(cell, alone(cell)), told_tokens_per_s(cell, alone(cell))
    assert (found is None, rate is None) == (bounds is None, bounds is None)
    if found is not None and rate is not None and bounds is not None:
        assert (found.low, found.high) == pytest.approx(bounds)
        assert found.estimate == pytest.approx(sum(speedup) / 2)
        assert (rate.low, rate.high, rate.estimate) == pytest.approx((50, 400, 150))


@pytest.mark.parametrize(
    ("worst", "bounds"), [(0.1, (1.2 * 0.9, 1.4 * 1.1)), (0.2, None), (1.0, None), (1.9, None), (None, None)]
)
def test_the_rooflines_cells_have_its_worst_error(
    record: SweepRecord, worst: float | None, bounds: tuple[float, float] | None
) -> None:
    """A share of the measured figure: measured / predicted lies between 1 / (1 + it) and 1 / (1 - it)."""
    cell = predicted_cell(record, interval(1.2, 1.4))
    found = told_speedup(cell, alone(cell, error=roofline_error(worst)))
    assert (found is None) == (bounds is None)
    if found is not None and bounds is not None:
        assert (found.low, found.high) == pytest.approx(bounds)
    rate = told_tokens_per_s(cell, alone(cell, error=roofline_error(worst)))
    assert (rate is None) == (bounds is None)
    if rate is not None:  # the worst error of seconds is 0.9
        assert (rate.low, rate.high) == pytest.approx((100 * 0.1, 200 * 1.9))


def test_what_was_measured_is_told_as_it_is(record: SweepRecord) -> None:
    cell = record.composed[0]
    assert cell.curve.kind == "measured"
    assert told_speedup(cell, alone(cell)) == cell.best.speedup
    assert told_tokens_per_s(cell, alone(cell)) == cell.best.tokens_per_s


def test_a_rate_is_told_where_the_error_of_seconds_is_known(record: SweepRecord) -> None:
    for seconds, is_told in ((None, False), ((0.0, 2.0), False), ((0.5, 1.0), True)):
        cell = predicted_cell(record, interval(1.2, 1.4), overhead=(1.0, 1.0), seconds=seconds)
        assert (told_tokens_per_s(cell, alone(cell)) is not None) is is_told


def searched(record: SweepRecord, ratio: float | None) -> ComposedCell:
    cell = record.composed[0]
    joint = next(one for one in cell.chosen if one.method == "joint")
    rate = joint.tokens_per_s.model_copy(update={"estimate": 10.0 * (ratio or 1)})
    base = joint.tokens_per_s.model_copy(update={"estimate": 10.0})
    chosen = [joint.model_copy(update={"tokens_per_s": rate})]
    if ratio is not None:
        chosen.append(joint.model_copy(update={"method": "independent", "tokens_per_s": base}))
    return cell.model_copy(update={"chosen": tuple(chosen)})


def test_searches_are_compared_where_both_were_made(record: SweepRecord) -> None:
    cells = [searched(record, ratio) for ratio in (1.2, 1.0, 0.9, None, 1.1, 1.3, 1.0 + 1e-12, 1.001, 2.5)]
    *counts, middle = searches_compared(cells)
    assert counts == [5, 2] and middle == pytest.approx(1.0505)
    assert searches_compared([searched(record, 0.5)]) == (0, 0, 0.5)
    better, same, ratio = searches_compared([searched(record, None)])
    assert (better, same) == (0, 0) and math.isnan(ratio)


def setting(rule: str, temperature: float, epsilon: float | None = None) -> SampledSetting:
    delta = None if epsilon is None else math.sqrt(epsilon)
    return SampledSetting.model_validate(
        {"rule": rule, "temperature": temperature, "epsilon": epsilon, "delta": delta}
    )


class Sampled(SweepRecord):
    """A record of which the sampled cells alone are read."""

    def __init__(self, cells: list[SampledCell]) -> None:
        super().__init__(Path(__file__).parent)
        self.__dict__["cells"] = tuple(cells)
        self.__dict__["spec"] = made_up_spec()


def cell(
    rule: str,
    temperature: float,
    epsilon: float | None = None,
    *,
    tokens_per_step: float = 2.0,
    likelihood: float = -1.0,
) -> SampledCell:
    one = setting(rule, temperature, epsilon)
    return sampled_cell(one, tokens_per_step=tokens_per_step, likelihood=likelihood)


def found_by(form: Any, cells: list[SampledCell]) -> tuple[VerdictKind, str, str]:
    claim = next(one for one in load_claims() if one.sweep is not None)
    claims: list[ClaimSpec] = [claim.model_copy(update={"sweep": form, "paper_only": None})]
    (verdict,) = sweep_verdicts(Sampled(cells), claims=claims)
    return verdict.kind, verdict.ours, verdict.reason


def test_counts_of_a_cell_are_sums_over_its_seeds() -> None:
    one = cell("typical", 0.7, 0.09, tokens_per_step=2.5)
    prompts = shared_prompts([one])
    assert prompts == ("p0", "p1", "p2", "p3")
    for index, key in enumerate(prompts):
        rows = [row for row in one.rows if row.prompt_key == key]
        assert len(rows) == 2
        found = [float(column[index]) for column in sampled_counts(one, prompts=prompts)]
        assert found == pytest.approx(
            [
                sum(sum(row.step_tokens) for row in rows),
                sum(len(row.step_tokens) for row in rows),
                sum(row.num_tokens for row in rows),
                sum(row.log_likelihood for row in rows),
            ]
        )


def test_prompts_that_a_setting_ended_at_once_are_left_out() -> None:
    whole = cell("typical", 0.7, 0.09)
    rows = [
        row.model_copy(update={"step_tokens": (), "num_tokens": 1}) if row.prompt_key == "p1" else row
        for row in whole.rows
    ]
    short = whole.model_copy(update={"rows": tuple(rows)})
    assert shared_prompts([whole, short]) == shared_prompts([short]) == ("p0", "p2", "p3")
    none = whole.model_copy(update={"rows": ()})
    for cells in ([whole, none], []):
        with pytest.raises(NotTestable, match="share no prompt"):
            shared_prompts(cells)


def test_a_slope_is_that_of_least_squares() -> None:
    at, values = (0.0, 1.0, 4.0), [2.0, 3.0, 9.0]
    expected = np.polyfit(at, values, 1)[0]
    assert float(slope([np.array(value) for value in values], at)) == pytest.approx(expected)


def threshold_form(num: int = 3) -> ThresholdTrendForm:
    return ThresholdTrendForm(test="threshold_trend", temperature=0.7, min_epsilons=num, reason=WHY)


def thresholds(*rates: float) -> list[SampledCell]:
    epsilons = (0.04, 0.09, 0.16, 0.25)
    return [
        cell("typical", 0.7, epsilon, tokens_per_step=rate)
        for epsilon, rate in zip(epsilons, rates, strict=False)
    ]


def test_thresholds_need_so_many_values_and_a_falling_rate() -> None:
    falling, rising = thresholds(2.5, 2.0, 1.5), thresholds(1.5, 2.0, 2.5)
    assert found_by(threshold_form(), falling)[0] is YES
    assert found_by(threshold_form(), rising)[0] is NO
    kind, _, reason = found_by(threshold_form(4), falling)
    assert kind is UNTESTED and reason.startswith("3 thresholds with delta = sqrt(epsilon) at T 0.7, 4 are")
    others = [cell("typical", 1.0, 0.25), cell("rejection", 0.7)]
    assert threshold_cells(Sampled([*others, *falling[::-1]])) == [*falling, others[0]]
    assert found_by(threshold_form(4), [*falling, *others])[0] is UNTESTED


def beats_form(**changes: Any) -> TypicalBeatsRejectionForm:
    data = {"temperature": 0.7, "epsilon": 0.09, "delta": 0.3, "bound": 1.0, "margin": 0.1}
    return TypicalBeatsRejectionForm.model_validate(
        {"test": "typical_beats_rejection", "reason": WHY, **data, **changes}
    )


@pytest.mark.parametrize(
    ("rate", "likelihood", "kind"),
    [(2.5, -1.0, YES), (2.5, -1.05, YES), (2.5, -0.8, NO), (2.5, -1.2, NO), (1.8, -1.0, NO), (2.0, -1.0, NO)],
)
def test_typical_over_rejection(rate: float, likelihood: float, kind: VerdictKind) -> None:
    cells = [
        cell("typical", 0.7, 0.09, tokens_per_step=rate, likelihood=likelihood),
        cell("typical", 0.7, 0.25, tokens_per_step=9.0),
        cell("typical", 1.0, 0.09, tokens_per_step=9.0),
        cell("rejection", 0.3, tokens_per_step=9.0),
        cell("rejection", 0.7),
    ]
    found, ours, _ = found_by(beats_form(), cells[::-1])
    assert found is kind
    assert ours.startswith(f"tokens/step {rate / 2:.2f}x [")
    assert f"likelihood {likelihood + 1:.2f} [" in ours.replace("-0.00", "0.00")


def test_typical_over_rejection_needs_both() -> None:
    both = [cell("typical", 0.7, 0.09), cell("rejection", 0.7)]
    assert found_by(beats_form(), both[:1])[2] == "the sweep has no rejection at T 0.7"
    assert found_by(beats_form(), both[1:])[2] == "the sweep has no typical at T 0.7, epsilon 0.09, delta 0.3"


def trend_form(num: int) -> TemperatureTrendForm:
    return TemperatureTrendForm(
        test="temperature_trend", epsilon=0.09, delta=0.3, min_temperatures=num, reason=WHY
    )


def trends(typical: tuple[float, ...], rejection: tuple[float, ...]) -> list[SampledCell]:
    at = (0.25, 0.5, 1.0)
    return [
        one
        for rule, epsilon, rates in (("typical", 0.09, typical), ("rejection", None, rejection))
        for one in (
            cell(rule, temperature, epsilon, tokens_per_step=rate)
            for temperature, rate in zip(at, rates, strict=False)
        )
    ]


def test_rules_go_apart_with_the_temperature() -> None:
    up, down = (1.5, 2.0, 3.0), (3.0, 2.0, 1.5)
    assert found_by(trend_form(3), trends(up, down))[0] is YES
    for other in ((down, down), (up, up), (down, up)):
        assert found_by(trend_form(3), trends(*other))[0] is NO
    assert found_by(trend_form(3), trends(up, down)[::-1])[1] == found_by(trend_form(3), trends(up, down))[1]
    assert found_by(trend_form(4), trends(up, down))[2].startswith("3 temperatures of typical, 4 are needed")
