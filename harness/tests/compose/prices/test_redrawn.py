"""Step times drawn anew by rounds: what they are, that sizes are drawn together, and what they widen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from harness.compose.composer import Composer, KnotPrices
from harness.compose.curve import LatencyCurve, TimedPoints
from harness.compose.prices.redrawn import NUM_DRAWS, middle, num_rounds, redrawn, widened
from harness.errors import UserError
from harness.records.latency import LatencyPoint
from harness.records.sweep_cells import CurveLabel
from harness.specs.suite import IntervalSpec
from harness.tests.fake_sweep import made_up_trace
from medusa_impl.tree import DraftTree

LEVELS = (1.0, 1.3, 0.8, 1.1)  # of the machine, by round
CHAIN = DraftTree.chain(2)
LABEL = CurveLabel(
    device="d",
    shape="s",
    dtype="float32",
    mode="eager",
    kind="measured",
    source="made up for a test",
    fingerprint="0" * 16,
)


def point(
    num_nodes: int, seconds: float, *, levels: tuple[float, ...] = LEVELS, **changes: Any
) -> LatencyPoint:
    """A point of three times a round, each round at a level of its own."""
    times = tuple(seconds * level for level in levels for _ in range(3))
    sizes = {"num_heads": 0 if num_nodes == 1 else 2, "context_tokens": 256, "batch": 1}
    heads_s = {"heads_s": tuple(0.1 * time for time in times)} if num_nodes > 1 else {}
    return LatencyPoint(
        **{
            "dtype": "float32",
            "mode": "eager",
            "num_nodes": num_nodes,
            **sizes,
            "backbone_s": times,
            "step_s": times,
            **heads_s,
            **changes,
        }
    )


def points(**changes: Any) -> list[LatencyPoint]:
    return [point(1, 0.04, **changes), point(3, 0.05, **changes), point(64, 0.16, **changes)]


def test_older_points_have_rounds_of_three() -> None:
    older = point(1, 1.0).model_copy(update={"step_s": tuple(map(float, range(8)))})
    assert older.by_round("step_s") == ((0, 1, 2), (3, 4, 5), (6, 7))
    told = older.model_copy(update={"times_a_round": (6, 2)})
    assert told.by_round("step_s") == ((0, 1, 2, 3, 4, 5), (6, 7))
    assert older.by_round("heads_s") == ()


def test_a_point_that_tells_of_other_rounds_than_it_has_is_refused() -> None:
    with pytest.raises(ValidationError, match="times_a_round of 9"):
        point(1, 1.0, times_a_round=(3, 6))


def test_the_middle_of_a_point_is_of_rounds_where_it_tells_them() -> None:
    """The level of each round counts, a burst within a round does not; older points keep their median."""
    burst = point(1, 0.04).model_copy(update={"step_s": (0.04, 0.4, 0.04, *point(1, 0.04).step_s[3:])})
    assert middle(burst, "step_s") == pytest.approx([np.median(burst.step_s)])
    told = burst.model_copy(update={"times_a_round": (3,) * 4})
    assert middle(told, "step_s") == pytest.approx([0.04 * np.mean(LEVELS)])


@pytest.mark.parametrize("rounds", [(), (3,) * 4])
def test_the_sizes_of_a_round_are_drawn_together(rounds: tuple[int, ...]) -> None:
    """A level that lasts for a round meets all sizes of it: seconds scatter, their ratio does not."""
    one, many = (redrawn(some, "step_s") for some in points(times_a_round=rounds)[::2])
    assert one.shape == (NUM_DRAWS,)
    assert len(set(one.round(6))) > 5
    assert many / one == pytest.approx(4)
    other = redrawn(point(1, 0.04, times_a_round=rounds, context_tokens=512), "step_s")
    assert other == pytest.approx(one)  # so are other contexts: a round goes over all of them


def test_draws_are_widened_as_few_rounds_ask() -> None:
    """As an interval over three prompts is; what an interval over few prompts moves its tails by is not added
    again.
    """
    draws = np.exp(np.random.default_rng(0).normal(0, 0.01, size=(4000, 1)))

    def times(**how: Any) -> float:
        asked: dict[str, Any] = {"rounds": 3, "level": 0.95, "num_units": 10**9, **how}
        return float(np.std(np.log(widened(draws, about=np.array([1.0]), **asked))) / np.std(np.log(draws)))

    z, whole = stats.norm.ppf(0.975), math.sqrt(3 / 2)
    assert times() == pytest.approx(stats.t.ppf(0.975, 2) * whole / z)
    assert times(num_units=3) == pytest.approx(1)
    assert times(num_units=1) == pytest.approx(stats.t.ppf(0.975, 2) * whole)
    assert times(rounds=1000) == pytest.approx(1, rel=1e-2)
    lowest = widened(np.array([[-1.0], [2.0]]), about=np.array([1.0]), rounds=9, level=0.95, num_units=16)
    assert lowest.min() > 0


def test_one_round_shows_no_spread() -> None:
    alone = points(levels=(1.0,))
    assert num_rounds(alone[0]) == 1
    assert TimedPoints(alone, label=LABEL).num_rounds is None
    assert TimedPoints(points(), label=LABEL).num_rounds == len(LEVELS)
    with pytest.raises(UserError, match="two rounds or more"):
        LatencyCurve(alone).seconds_redrawn(num_nodes=1, num_heads=0, context_tokens=256)


def speedup_width(some: list[LatencyPoint]) -> tuple[float, float]:
    """The widths of a composed speedup's and of a composed rate's interval, as shares of them."""
    curve = TimedPoints(some, label=LABEL)
    composer = Composer(made_up_trace(1), knots=(256,), interval=IntervalSpec())
    prices = KnotPrices(curve, knots=composer.knots, context="trace", batch=1)
    vanilla, chain = (composer.seconds(tree, prices) for tree in (DraftTree.root_only(), CHAIN))
    assert vanilla is not None and chain is not None
    tokens = composer.steps(CHAIN).tokens
    resamples = composer.resamples(len(tokens))
    speedup = resamples.interval(vanilla.total / chain.total, vanilla.draws / chain.draws)
    rate = resamples.interval(tokens.sum() / chain.total, resamples.totals(tokens) / chain.draws)
    return tuple((one.high - one.low) / one.estimate for one in (speedup, rate))  # type: ignore[return-value]


def test_intervals_hold_the_error_of_the_step_times() -> None:
    """Levels that all sizes share widen tokens/s and leave the speedup; one that errs alone widens both."""
    calm, shared = (speedup_width(points(levels=levels)) for levels in ((1.0, 1.0, 1.0, 1.0), LEVELS))
    alone = speedup_width([point(1, 0.04, levels=(1.1, 1.0, 0.8, 1.3)), *points()[1:]])
    left_out = speedup_width(points(levels=(1.0,)))
    assert calm == pytest.approx(left_out)
    assert shared[0] == pytest.approx(calm[0], rel=0.01) and shared[1] > 2 * calm[1]
    assert alone[0] > 1.5 * calm[0] and alone[1] == pytest.approx(shared[1])


def test_a_gap_of_nothing_has_no_width_but_that_of_the_step_times() -> None:
    """Measured seconds that are the composed ones: prompts, drawn together, cancel."""
    composer = Composer(made_up_trace(1), knots=(256,), interval=IntervalSpec())
    widths = []
    for levels in ((1.0, 1.0, 1.0, 1.0), LEVELS):
        curve = TimedPoints([point(1, 0.04, levels=levels), *points(levels=levels[::-1])[1:]], label=LABEL)
        prices = KnotPrices(curve, knots=composer.knots, context="trace", batch=1)
        vanilla, chain = (composer.seconds(tree, prices) for tree in (DraftTree.root_only(), CHAIN))
        assert vanilla is not None and chain is not None
        gap = composer.gap(vanilla, chain, vanilla_s=vanilla.by_unit, tree_s=chain.by_unit)
        assert gap.estimate == pytest.approx(0) and gap.low <= 1e-9 and gap.high >= -1e-9
        widths.append(gap.high - gap.low)
    assert widths[0] == pytest.approx(0, abs=1e-9) and widths[1] > 0.1
