"""How fast a sweep composes: 10,000 points of tree x heads x device within a minute, searches and replays
included.
"""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from harness.compose.cells import compose
from harness.compose.composer import Composer, KnotPrices, shared_knots, step_contexts
from harness.compose.devices import PredictedCurve, StepTimes
from harness.compose.families import resolve_families
from harness.compose.plan import SweepPlan, with_chosen
from harness.compose.replay import ReplayIndex
from harness.compose.search import SearchSpace
from harness.records.sweep_cells import ComposedCell
from harness.records.trace import Trace
from harness.specs.hardware import load_hardware
from harness.specs.latency import HeadsForm
from harness.specs.shapes import load_shapes
from harness.specs.suite import IntervalSpec
from harness.specs.sweep import SweepSpec
from harness.tests.fake_sweep import made_up_spec, made_up_trace
from medusa_impl.tree import DraftTree
from medusa_impl.tree_search import GrownTree, grow_by_joint_hits

SHAPES = ("smollm2-135m-instruct", "vicuna-7b-v1.5")
DENSE = {"kind": "random_dense", "num_nodes": [16, 32, 64], "draws": 4, "seed": 1}
SIZES = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


@cache
def _trace(num_prompts: int) -> Trace:
    return made_up_trace(1, num_prompts=num_prompts, tokens=126, first_context=40, num_heads=5)


@cache
def _curves() -> tuple[StepTimes, ...]:
    heads = HeadsForm(architecture="shared")
    fitting = [key for key, device in load_hardware().items() if device.memory_gb >= 24]
    return tuple(
        PredictedCurve(key, load_hardware()[key], load_shapes()[shape], dtype="float16", heads=heads)
        for shape in SHAPES
        for key in fitting
    )


def _spec() -> SweepSpec:
    return made_up_spec(
        num_heads=[1, 2, 3, 4, 5],
        trees=[{"kind": "grown", "num_nodes": SIZES}, DENSE],
        break_even_batches=[1],
    )


def _plan(num_prompts: int, curves: tuple[StepTimes, ...]) -> SweepPlan:
    trace, calibration = (
        _trace(num_prompts),
        ReplayIndex(made_up_trace(2, num_prompts=40, tokens=126, num_heads=5)),
    )
    lengths = step_contexts(ReplayIndex(trace).replay(DraftTree.root_only()))
    composer = Composer(trace, knots=shared_knots(curves, lengths), interval=IntervalSpec(num_resamples=1000))
    trees = resolve_families(_spec().trees, calibration=calibration, num_heads=_spec().num_heads)
    return SweepPlan(
        spec=_spec(),
        composer=composer,
        calibration=calibration,
        curves=curves,
        trees=with_chosen(trees, {}),
        choices={},
        refused=(),
        error=None,
    )


def test_ten_thousand_points_in_a_minute() -> None:
    """10,000 positions and all curves, replays included: as long as it takes, scaled to 10,000 points; a busy
    core may be several times slower.
    """
    started = time.perf_counter()
    plan = _plan(80, _curves())
    cells = [cell for cell in compose(plan) if isinstance(cell, ComposedCell)]
    points = sum(len(cell.trees) for cell in cells)
    assert len(cells) == len(_curves()) and points > 1500
    assert (time.perf_counter() - started) * 10_000 / points <= 60


def test_a_search_space_is_made_in_seconds() -> None:
    started = time.perf_counter()
    SearchSpace(ReplayIndex(_trace(80)), max_nodes=128)
    assert time.perf_counter() - started <= 20


@cache
def _grown() -> GrownTree:
    return grow_by_joint_hits(_trace(80).ranks, num_nodes=256, max_rank=16)


@pytest.mark.parametrize("num_nodes", [8, 256])
def test_bench_reduced_replay_by_tree_size(benchmark: BenchmarkFixture, num_nodes: int) -> None:
    """A tree of 256 nodes takes fewer steps than one of 8, and no longer."""
    tree = _grown().nested(num_nodes)
    composer = Composer(_trace(80), knots=(40, 256, 1000), interval=IntervalSpec())

    def reduce() -> float:
        composer._replayed.clear()
        return float(composer.steps(tree).steps.sum())

    steps = benchmark.pedantic(reduce, rounds=20, warmup_rounds=2)  # type: ignore[no-untyped-call]
    assert steps == composer.index.replay(tree).total_steps


@pytest.mark.parametrize("num_prompts", [20, 80])
def test_bench_reduced_replay_by_trace_length(benchmark: BenchmarkFixture, num_prompts: int) -> None:
    tree = _grown().nested(64)
    composer = Composer(_trace(num_prompts), knots=(40, 256, 1000), interval=IntervalSpec())

    def reduce() -> float:
        composer._replayed.clear()
        return float(composer.steps(tree).steps.sum())

    assert benchmark.pedantic(reduce, rounds=20, warmup_rounds=2) > num_prompts  # type: ignore[no-untyped-call]


def test_bench_prices_of_a_curve(benchmark: BenchmarkFixture) -> None:
    curve, knots = _curves()[0], np.array([40.0, 64.0, 128.0, 256.0, 400.0])

    def price() -> float:
        prices = KnotPrices(curve, knots=knots, context="trace", batch=1)
        values = [prices.step(size, 3) for size in SIZES]
        return float(sum(value.sum() for value in values if value is not None))

    assert benchmark.pedantic(price, rounds=20, warmup_rounds=1) > 0  # type: ignore[no-untyped-call]
