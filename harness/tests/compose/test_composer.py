"""The sweep's arithmetic on made-up traces and curves: every composed figure against a plain sum over
steps.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.compose.cells import compose, compose_cell
from harness.compose.composer import (
    Composer,
    KnotPrices,
    figure_kind,
    knot_shares,
    nearby,
    shared_knots,
    step_contexts,
)
from harness.compose.curve import MeasuredCurve
from harness.compose.devices import StepTimes
from harness.compose.families import resolve_families
from harness.compose.plan import SweepPlan, tree_rates
from harness.compose.replay import ReplayIndex
from harness.errors import UserError
from harness.judge.sweep import headline_cells, hypothetical_cells
from harness.records.latency import LatencyRecord
from harness.records.sweep import CARTESIAN, CELLS_FILE, CHOSEN, DENSE, JOINT, SweepRecord
from harness.records.sweep_cells import ComposedCell, FailedCell, read_cells
from harness.records.trace import PromptTrace, Trace
from harness.specs.suite import IntervalSpec
from harness.specs.sweep import SampledSetting, load_sweep
from harness.stats import Resamples, bootstrap_totals
from harness.tests.fake_latency import SHAPE, step_s
from harness.tests.fake_sweep import MODEL, is_sqrt, made_up_plan, made_up_spec, made_up_trace, write_sweep
from medusa_impl.tree import DraftTree

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "suites" / "sweeps" / "embedded.toml"
TREE = DraftTree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def plan(home: Path) -> SweepPlan:
    return made_up_plan(home)


@pytest.fixture(scope="module")
def measured(plan: SweepPlan) -> StepTimes:
    return next(curve for curve in plan.curves if curve.label.kind == "measured")


@pytest.fixture(scope="module")
def record(plan: SweepPlan, home: Path) -> SweepRecord:
    return write_sweep(home / "record", plan)


def true_seconds(num_nodes: int, num_heads: int, context: int, *, batch: int = 1) -> float:
    """fake_latency's step, linear from context 256 to 1024 and held below 256, which it does not time."""
    share = (max(context, 256) - 256) / 768
    return step_s(num_nodes, num_heads, batch=batch) + 0.002 * share


def plain_seconds(trace: Trace, tree: DraftTree) -> list[float]:
    """Each prompt's seconds by walking its steps one at a time."""
    seconds = []
    for prompt in trace.prompts:
        known, total = 1, 0.0
        while known < prompt.num_kept_tokens:
            total += true_seconds(tree.num_nodes, tree.depth, prompt.prompt_tokens + known - 1)
            row = tuple(prompt.ranks[known - 1].tolist())
            depth = max(
                (
                    length
                    for length in range(len(row) + 1)
                    if row[:length] in tree.index and -1 not in row[:length]
                ),
                default=0,
            )
            known = min(known + depth + 1, prompt.num_kept_tokens)
        seconds.append(total)
    return seconds


def test_pure_modules_need_no_torch() -> None:
    names = (
        "harness.compose.composer",
        "harness.records.sweep",
        "harness.judge.claims.sweep",
        "harness.report.sweep",
        "harness.report.figures.sweep",
        "harness.cli.trees",
    )
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    code += "print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "tree", [DraftTree.root_only(), DraftTree.chain(2), TREE], ids=["vanilla", "chain", "tree"]
)
def test_composed_seconds_are_the_sum_over_the_steps(
    plan: SweepPlan, measured: StepTimes, tree: DraftTree
) -> None:
    prices = KnotPrices(measured, knots=plan.composer.knots, context="trace", batch=1)
    values = prices.step(tree.num_nodes, tree.depth)
    assert values is not None
    composed = plan.composer.steps(tree).shares @ values
    assert composed == pytest.approx(plain_seconds(plan.composer.index.trace, tree), rel=1e-9)


def test_speedup_is_tokens_a_step_over_overhead(plan: SweepPlan, measured: StepTimes) -> None:
    cell = compose_cell(plan, measured, context="trace", batch=1)
    vanilla_s = sum(plain_seconds(plan.composer.index.trace, DraftTree.root_only()))
    for number, place in enumerate(cell.trees):
        tree = plan.drafts[place]
        seconds = sum(plain_seconds(plan.composer.index.trace, tree))
        rate = plan.composer.index.replay(tree).tokens_per_step
        assert cell.speedup[number] == pytest.approx(vanilla_s / seconds, rel=1e-5)
        assert cell.speedup[number] == pytest.approx(
            rate / (cell.step_s[number] / cell.vanilla_step_s), rel=1e-4
        )
        assert cell.speedup[number] == pytest.approx(
            cell.tokens_per_s[number] / cell.vanilla_tokens_per_s, rel=1e-4
        )
        assert cell.speedup_low[number] <= cell.speedup[number] <= cell.speedup_high[number]


def test_a_batch_takes_as_many_steps_as_its_slowest_row(plan: SweepPlan, measured: StepTimes) -> None:
    """Pairs of prompts on a tree that batch 2 was timed for; each step at the longer context of the two, an
    ended row with all its own.
    """
    tree, trace = DraftTree.chain(2), plan.composer.index.trace
    values = KnotPrices(measured, knots=plan.composer.knots, context="trace", batch=2).step(
        tree.num_nodes, tree.depth
    )
    assert values is not None
    reduced, alone = plan.composer.steps(tree, batch=2), plan.composer.index.replay(tree)
    contexts = []
    for first in range(0, len(trace.prompts), 2):
        pair = [trace.prompts[row] for row in (first, first + 1)]
        walks = [
            [prompt.prompt_tokens + known - 1 for known in alone.hops(first + row).tolist()]
            for row, prompt in enumerate(pair)
        ]
        count = max(map(len, walks))
        finals = [prompt.prompt_tokens + prompt.num_kept_tokens - 1 for prompt in pair]
        padded = [walk + [final] * (count - len(walk)) for walk, final in zip(walks, finals, strict=True)]
        contexts += [max(both) for both in zip(*padded, strict=True)]
        assert reduced.steps[first // 2] == count
    assert step_contexts(plan.composer.index.replay(tree, batch=2)).tolist() == contexts
    # batch 2 was timed at that length alone
    seconds = reduced.steps * true_seconds(tree.num_nodes, tree.depth, 256, batch=2)
    assert reduced.shares @ values == pytest.approx(seconds)
    rate = plan.composer.tokens_per_step(tree, batch=2)
    assert rate.num_prompts == 3
    assert rate.estimate == pytest.approx(reduced.tokens.sum() / (2 * reduced.steps.sum()))


@given(
    contexts=st.lists(st.integers(1, 900), min_size=1, max_size=30),
    knots=st.sets(st.integers(1, 800), min_size=1, max_size=6),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_shares_times_values_is_interpolation(
    contexts: list[int], knots: set[int], data: st.DataObject
) -> None:
    at = np.array(sorted(knots), dtype=np.float64)
    values = np.array(data.draw(st.lists(st.floats(0.1, 9), min_size=len(at), max_size=len(at))))
    units = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(contexts), max_size=len(contexts))))
    shares = knot_shares(np.array(contexts), units=units, num_units=3, knots=at)
    expected = [
        sum(
            np.interp(context, at, values)
            for context, unit in zip(contexts, units, strict=True)
            if unit == one
        )
        for one in range(3)
    ]
    assert shares @ values == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert shares.sum() == pytest.approx(len(contexts))


def test_resamples_agree_with_the_bootstrap() -> None:
    """Percentiles of 4,000 draws of a ratio, two independent sets of draws: their bounds differ by a small
    part of the width.
    """
    rng = np.random.default_rng(5)
    top, bottom = rng.lognormal(0, 0.3, 40) * 50, rng.lognormal(0, 0.1, 40) * 20
    spec = IntervalSpec(level=0.95, num_resamples=4000, seed=3)
    resamples = Resamples(40, spec=spec)
    draws = resamples.totals(np.stack([top, bottom], axis=1))
    ours = resamples.interval(top.sum() / bottom.sum(), draws[:, 0] / draws[:, 1])
    theirs = bootstrap_totals(lambda a, b: a / b, top, bottom, spec=spec, rng=np.random.default_rng(11))
    assert ours.estimate == pytest.approx(theirs.estimate)
    assert ours.low == pytest.approx(theirs.low, abs=0.1 * (theirs.high - theirs.low))
    assert ours.high == pytest.approx(theirs.high, abs=0.1 * (theirs.high - theirs.low))
    again, other = (Resamples(40, spec=spec.model_copy(update={"seed": seed})).totals(top) for seed in (3, 4))
    assert np.array_equal(again, resamples.totals(top)) and not np.array_equal(other, again)


def test_one_prompt_bounds_nothing() -> None:
    interval = Resamples(1, spec=IntervalSpec()).interval(2.0, np.full(4000, 2.0))
    assert (interval.low, interval.high) == (-math.inf, math.inf)


def test_prompts_that_end_at_their_first_token_are_left_out() -> None:
    trace = made_up_trace(1)
    short = PromptTrace(
        key="short",
        category=None,
        prompt_tokens=9,
        tokens=np.array([5]),
        ended_by="eos",
        ranks=np.full((1, 4), -1, dtype=np.int32),
    )
    composer = Composer(
        Trace(provenance=trace.provenance, prompts=(short, *trace.prompts)),
        knots=[256],
        interval=IntervalSpec(),
    )
    assert composer.tokens_per_step(TREE).estimate == pytest.approx(
        ReplayIndex(trace).replay(TREE).tokens_per_step
    )
    with pytest.raises(UserError, match="no decoding step"):
        Composer(Trace(provenance=trace.provenance, prompts=(short,)), knots=[256], interval=IntervalSpec())


def test_contexts_are_what_the_cache_holds(plan: SweepPlan) -> None:
    """The first step of a prompt of T tokens runs after T kept ones: its root is known, but not yet in the
    cache.
    """
    first = plan.composer.index.trace.prompts[0]
    assert step_contexts(plan.composer.index.replay(DraftTree.root_only()))[0] == first.prompt_tokens


def test_fixed_context_prices_every_step_there(plan: SweepPlan, measured: StepTimes) -> None:
    at = KnotPrices(measured, knots=plan.composer.knots, context=640, batch=1).step(8, 2)
    assert at is not None
    assert at.tolist() == pytest.approx([true_seconds(8, 2, 640)] * len(at))
    assert compose_cell(plan, measured, context=640, batch=1).kind == "hypothetical"


def test_kinds_of_figures(plan: SweepPlan) -> None:
    kinds = {
        (curve.label.kind, curve.label.shape): figure_kind(
            curve, shape=SHAPE, model_sha256=MODEL, context="trace"
        )
        for curve in plan.curves
    }
    assert kinds == {
        ("measured", SHAPE): "composed",
        ("predicted", SHAPE): "predicted",
        ("predicted", "vicuna-7b-v1.5"): "hypothetical",
        ("predicted", "vicuna-13b-v1.5"): "hypothetical",
    }
    measured = plan.curves[0]
    assert figure_kind(measured, shape=SHAPE, model_sha256="other weights", context="trace") == "hypothetical"
    assert figure_kind(measured, shape=SHAPE, model_sha256=MODEL, context=512) == "hypothetical"


def test_what_is_hypothetical_is_no_headline(record: SweepRecord) -> None:
    assert {cell.curve.shape for cell in headline_cells(record)} == {SHAPE}
    assert {cell.kind for cell in headline_cells(record)} == {"composed", "predicted"}
    assert {cell.curve.shape for cell in hypothetical_cells(record)} == {"vicuna-7b-v1.5", "vicuna-13b-v1.5"}


def test_sizes_that_were_not_timed_are_left_out_and_counted(plan: SweepPlan, measured: StepTimes) -> None:
    """The record times 64 nodes at most; trees of 96 are there."""
    cell = compose_cell(plan, measured, context="trace", batch=1)
    too_large = [place for place, tree in enumerate(plan.drafts) if tree.num_nodes > 64]
    assert too_large and not set(too_large) & set(cell.trees)
    assert cell.num_uncovered == len(too_large)
    assert 0 < cell.beyond_share < 1  # some steps lie below 256 tokens


def test_a_prediction_that_cannot_be_made_is_a_failed_cell(plan: SweepPlan) -> None:
    assert [(cell.words, "26 GB" in cell.message) for cell in plan.refused] == [
        ("t4, vicuna-13b-v1.5, float16 (predicted)", True)
    ]


def test_a_batch_that_was_not_timed_is_a_failed_cell(home: Path) -> None:
    cells = list(compose(made_up_plan(home, batches=[8], predicted=None)))
    assert len(cells) == 1 and isinstance(cells[0], FailedCell)
    assert "no vanilla step at batch 8" in cells[0].message


def test_chosen_trees_come_from_the_calibration_trace(plan: SweepPlan, measured: StepTimes) -> None:
    cell = compose_cell(plan, measured, context="trace", batch=1)
    best = cell.best
    tree = plan.drafts[best.tree]
    assert CHOSEN in plan.trees[best.tree].families
    assert best.promised == pytest.approx(plan.calibration.replay(tree).tokens_per_step)
    number = cell.trees.index(best.tree)
    assert best.speedup.estimate == pytest.approx(cell.speedup[number], rel=1e-5)
    assert best.speedup.estimate == pytest.approx(
        plan.composer.index.replay(tree).tokens_per_step / best.overhead, rel=1e-9
    )
    assert best.step_cost == pytest.approx((10 + tree.num_nodes / 8) / (10 + 1 / 8))


def test_break_even_takes_the_batches_that_are_covered(plan: SweepPlan, measured: StepTimes) -> None:
    best = compose_cell(plan, measured, context="trace", batch=1).best
    covered = plan.drafts[best.tree].num_nodes <= 16 and plan.drafts[best.tree].depth <= 2
    assert set(best.speedups) == ({1, 2} if covered else {1})
    assert best.speedups[1] == pytest.approx(best.speedup.estimate, rel=1e-5)
    predicted = next(curve for curve in plan.curves if curve.label.kind == "predicted")
    assert set(compose_cell(plan, predicted, context="trace", batch=1).best.speedups) == {1, 2, 4}


def test_cells_hold_the_error_of_the_step_times(plan: SweepPlan, measured: StepTimes, tmp_path: Path) -> None:
    """Rounds at other levels leave every figure where it was and widen its interval; a cell says so."""
    noisy = made_up_plan(tmp_path, levels=(0.8, 1.0, 1.2))
    curve = next(one for one in noisy.curves if one.label.kind == "measured")
    calm, wide = (
        compose_cell(of, on, context="trace", batch=1) for of, on in ((plan, measured), (noisy, curve))
    )
    assert (calm.timing_rounds, wide.timing_rounds) == (None, 3)
    assert wide.speedup == pytest.approx(calm.speedup)
    drafted = [number for number, place in enumerate(calm.trees) if noisy.drafts[place].num_nodes > 1]
    for number in drafted:
        widths = [cell.speedup_high[number] - cell.speedup_low[number] for cell in (calm, wide)]
        assert widths[1] > 1.5 * widths[0]
    for name in ("speedup", "tokens_per_s"):
        before, after = (getattr(cell.best, name) for cell in (calm, wide))
        assert after.estimate == pytest.approx(before.estimate)
        assert after.high - after.low > 1.5 * (before.high - before.low)
    predicted = next(one for one in noisy.curves if one.label.kind == "predicted")
    assert compose_cell(noisy, predicted, context="trace", batch=1).timing_rounds is None


def test_break_even_has_bounds(plan: SweepPlan, measured: StepTimes) -> None:
    """Each batch's bounds are those of an interval over batches of prompts; batch 1's are the tree's own."""
    cell = compose_cell(plan, measured, context="trace", batch=1)
    best = cell.best
    assert set(best.speedups_low) == set(best.speedups_high) == set(best.speedups)
    assert best.speedups_low[1] == pytest.approx(best.speedup.low, rel=1e-5)
    assert best.speedups_high[1] == pytest.approx(best.speedup.high, rel=1e-5)
    assert all(best.speedups_low[batch] <= best.speedups[batch] for batch in best.speedups)
    open_one = best.model_copy(update={"speedups_low": {1: 0.9, 2: 0.8}, "speedups_high": {1: 1.2, 2: 1.1}})
    assert open_one.break_even_range == (None, 2)
    assert best.model_copy(update={"speedups_low": {}}).break_even_range is None


def test_finished_cells_are_not_composed_again(plan: SweepPlan) -> None:
    cells = list(compose(plan))
    keys = [cell.key for cell in cells]
    assert len(set(keys)) == len(keys)
    assert [cell.key for cell in compose(plan, done=frozenset(keys[:3]))] == keys[3:]
    assert list(compose(plan, done=frozenset(keys))) == []


def test_cells_survive_their_file(record: SweepRecord, plan: SweepPlan) -> None:
    composed = [cell for cell in compose(plan) if isinstance(cell, ComposedCell)]
    assert list(record.composed) == composed
    assert record.num_points == sum(len(cell.trees) for cell in composed) > 0
    record.check_seal()


def test_half_a_line_is_refused_or_left_out(record: SweepRecord, tmp_path: Path) -> None:
    text = (record.folder / CELLS_FILE).read_text()
    path = tmp_path / CELLS_FILE
    path.write_text(text[:-20])
    with pytest.raises(UserError, match="a truncated last line"):
        read_cells(path)
    assert len(read_cells(path, allow_torn_tail=True)) == len(record.cells) - 1
    path.write_text(text.replace('"batch":1', '"batch":"one"', 1))
    with pytest.raises(UserError, match=r"cells.jsonl:1"):
        read_cells(path)


def test_an_altered_record_breaks_its_seal(plan: SweepPlan, tmp_path: Path) -> None:
    changed = write_sweep(tmp_path / "record", plan)
    (changed.folder / CELLS_FILE).write_text("")
    with pytest.raises(UserError, match=r"need .*; in cells.jsonl"):
        changed.check_seal()
    with pytest.raises(UserError, match="found no manifest"):
        write_sweep(tmp_path / "unsealed", plan, sealed=False).check_seal()


def test_rates_are_replays(record: SweepRecord, plan: SweepPlan) -> None:
    trees = tree_rates(plan)
    assert record.trees == trees
    for place in (0, len(plan.drafts) - 1):
        replayed = plan.composer.index.replay(plan.drafts[place]).tokens_per_step
        rate = trees.rate(place)
        assert rate.estimate == pytest.approx(replayed) and rate.low <= rate.estimate <= rate.high
        assert trees.calibrated[place] == pytest.approx(
            plan.calibration.replay(plan.drafts[place]).tokens_per_step
        )


def test_every_tree_stands_once_with_all_its_families() -> None:
    calibration = ReplayIndex(made_up_trace(2))
    trees = resolve_families(made_up_spec().trees, calibration=calibration, num_heads=[1, 2, 4])
    drafts = [one.tree() for one in trees]
    assert len(set(drafts)) == len(drafts)
    assert all(tree.depth <= one.num_heads for tree, one in zip(drafts, trees, strict=True))
    by_family = {
        family: [one for one in trees if family in one.families] for family in (CARTESIAN, DENSE, JOINT)
    }
    assert DraftTree.cartesian((2, 2)) in [one.tree() for one in by_family[CARTESIAN]]
    assert all(
        one.tree().children[0] == tuple(range(1, len(one.tree().children[0]) + 1)) for one in by_family[DENSE]
    )
    two = next(one for one in trees if one.tree() == DraftTree.chain(1))
    assert {"chain", JOINT} <= set(two.families)  # the best tree of two nodes is a chain of one


def test_dense_trees_follow_their_seed() -> None:
    calibration = ReplayIndex(made_up_trace(2))

    def drawn(seed: int) -> list[DraftTree]:
        family = [{"kind": "random_dense", "num_nodes": [64], "draws": 4, "seed": seed}]
        return [
            one.tree()
            for one in resolve_families(
                made_up_spec(trees=family).trees, calibration=calibration, num_heads=[4]
            )
        ]

    assert drawn(1) == drawn(1) != drawn(2)


def test_more_heads_than_were_traced() -> None:
    with pytest.raises(UserError, match="found num_heads 5; need at most 4"):
        resolve_families(made_up_spec().trees, calibration=ReplayIndex(made_up_trace(2)), num_heads=[5])


def test_calibration_of_other_heads(home: Path, tmp_path: Path) -> None:
    trace = made_up_trace(3)
    other = trace.provenance.model_copy(update={"heads_hash": "d" * 64})
    Trace(provenance=other, prompts=trace.prompts).save(tmp_path / "other.npz")
    with pytest.raises(UserError, match="of another model or other heads"):
        made_up_plan(home, calibration_trace=str(tmp_path / "other.npz"))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"measured": None, "predicted": None}, "give measured, predicted or both"),
        ({"break_even_batches": [2, 4]}, "must rise from 1"),
        ({"trees": [{"kind": "cartesian"}]}, "give widths, max_nodes or both"),
        ({"trees": [{"kind": "grown", "num_nodes": [512]}]}, "less than or equal to 256"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_wrong_specs(change: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=found):
        made_up_spec(**change)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"shape": "no-such-shape"}, "shape 'no-such-shape'"),
        ({"predicted": {"devices": ["abacus"], "shapes": [SHAPE]}}, "device 'abacus'"),
        ({"predicted": {"devices": ["t4"], "shapes": ["abacus"]}}, "shape 'abacus'"),
        ({"measured": {"records": ["nowhere"]}}, "no latency record 'nowhere'"),
        ({"trace": "nowhere.npz"}, "no file 'nowhere.npz'"),
    ],
)
def test_inputs_that_are_not_there(home: Path, plan: SweepPlan, change: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=found):
        made_up_plan(home, **change)


def test_settings() -> None:
    sampled = made_up_spec().sampled
    assert sampled is not None
    found = sampled.settings
    # epsilon 0.09, delta 0.3 is both the default and a square root
    assert len(set(found)) == len(found) == 1 + 1 + 4 + 5 + 3
    assert sum(is_sqrt(setting) for setting in found) == 6 - 1 + 3
    assert found[0] == SampledSetting(rule="greedy")


def test_a_setting_that_contradicts_itself() -> None:
    wrong: tuple[Callable[[], SampledSetting], ...] = (
        lambda: SampledSetting(rule="typical", temperature=0.7),
        lambda: SampledSetting(rule="rejection", temperature=0.7, epsilon=0.1, delta=0.3),
        lambda: SampledSetting(rule="greedy", temperature=0.7),
        lambda: SampledSetting(rule="vanilla"),
    )
    for make in wrong:
        with pytest.raises(ValueError, match=r"typical acceptance, and no other|greedy is at temperature 0"):
            make()


def test_the_shipped_sweep_loads() -> None:
    spec = load_sweep(SHIPPED)
    assert spec.decoded is not None and spec.decoded.num_points >= 12
    assert spec.sampled is not None
    wanted = [setting for setting in spec.sampled.settings if is_sqrt(setting) and setting.temperature == 0.7]
    epsilons = [setting.epsilon for setting in wanted if setting.epsilon is not None]
    assert (min(epsilons), max(epsilons)) == (0.01, 0.25)


def test_knots_and_what_lies_near(measured: StepTimes) -> None:
    assert shared_knots([measured], np.array([100, 300, 400])) == (100, 256, 400)
    assert nearby((256, 1024, 2048), low=300, high=400) == (256, 1024)
    assert nearby((256, 1024, 2048), low=100, high=200) == (256,)
    assert nearby((256, 1024), low=3000, high=3000) == (1024,)


def test_a_curve_of_one_mode(home: Path, plan: SweepPlan) -> None:
    """`auto` is packed in the made-up record, so that is what decoding takes."""
    (folder,) = (home / "results").glob("latency/*/*/*")
    assert plan.curves[0].label == MeasuredCurve(LatencyRecord(folder), dtype="float32", mode="packed").label
