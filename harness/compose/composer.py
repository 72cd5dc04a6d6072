"""The sweep's arithmetic: trees replayed on a trace, steps priced by a device's curve.

A tree's steps are reduced once to what any curve needs. A step at context c costs b(c) + h, linear in c
between the lengths that were timed. So each step is shared out between the two nearest of these lengths, the
*knots*, and the sum over a prompt's steps of curve.seconds becomes the product of a row of shares with the
curve's values at the knots. A thousand trees on a hundred curves are then matrix products.

    context    256 ---------- 512        one step at 320 counts 0.75 at 256 and 0.25 at 512,
                     ^320                the same seconds as interpolation gives
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.compose.devices import StepTimes
from harness.compose.prices.redrawn import widened
from harness.compose.replay import Replay, ReplayIndex
from harness.compose.search import Price
from harness.errors import UserError
from harness.records.sweep_cells import Context
from harness.records.trace import Trace
from harness.specs.suite import IntervalSpec
from harness.stats import FigureKind, Interval, Resamples
from medusa_impl.tree import DraftTree

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ReplayedSteps:
    """The replay of one tree at one batch, reduced to what composition needs.

    Units are what is resampled: prompts at batch 1, else whole batches of prompts.
    Shapes: `tokens`, `steps`, `row_steps` [U], the kept tokens after each row's first, the steps, and steps
    times rows; `shares` [U, knots], the steps shared out between the knots.
    """

    num_nodes: int
    num_heads: int
    tokens: Floats
    steps: Floats
    row_steps: Floats
    shares: Floats


@dataclass(frozen=True, eq=False)
class Seconds:
    """The composed seconds of a tree's steps, and their totals in every draw.

    A draw takes units with replacement, and where a curve's timing shows its own error also the curve of
    other rounds of timing. Draw d of all trees has the same units and the same curve, so that figures may be
    divided draw by draw.
    Shapes: `by_unit` [U], `draws` [draws].
    """

    by_unit: Floats
    draws: Floats

    @property
    def total(self) -> float:
        """Return the seconds of all units."""
        return float(self.by_unit.sum())


class Composer:
    """One trace, prepared to be composed with any curve.

    Replays, shares of steps and bootstrap draws are each made once. `knots` are the context lengths between
    which all curves are linear.
    """

    def __init__(self, trace: Trace, *, knots: Sequence[int], interval: IntervalSpec) -> None:
        # A prompt that ends at its first token takes no step, and a unit without steps has no rate.
        decoded = tuple(prompt for prompt in trace.prompts if prompt.num_kept_tokens > 1)
        if not decoded:
            raise UserError(
                found="no decoding step: every prompt ends at its first token",
                need="a prompt of two kept tokens or more",
            )
        self.index, self.interval = ReplayIndex(Trace(provenance=trace.provenance, prompts=decoded)), interval
        self.knots = np.array(sorted(set(knots)), dtype=np.float64)
        self._replayed: dict[tuple[DraftTree, int], ReplayedSteps] = {}
        self._resamples: dict[int, Resamples] = {}

    def steps(self, tree: DraftTree, *, batch: int = 1) -> ReplayedSteps:
        """Return a tree's reduced replay."""
        if (tree, batch) not in self._replayed:
            self._replayed[tree, batch] = reduced(self.index.replay(tree, batch=batch), knots=self.knots)
        return self._replayed[tree, batch]

    def resamples(self, num_units: int) -> Resamples:
        """Return the draws of so many units, the same for every tree and curve."""
        if num_units not in self._resamples:
            self._resamples[num_units] = Resamples(num_units, spec=self.interval)
        return self._resamples[num_units]

    def tokens_per_step(self, tree: DraftTree, *, batch: int = 1) -> Interval:
        """Return the tokens that a step yields for each row that it carries.

        The interval is over prompts, or over batches of prompts.
        """
        steps = self.steps(tree, batch=batch)
        draws = self.resamples(len(steps.tokens)).totals(np.stack([steps.tokens, steps.row_steps], axis=1))
        rate = float(steps.tokens.sum() / steps.row_steps.sum())
        return self.resamples(len(steps.tokens)).interval(rate, draws[:, 0] / draws[:, 1])

    def seconds(self, tree: DraftTree, prices: KnotPrices) -> Seconds | None:
        """Return a tree's seconds at a curve's prices; None where the curve does not reach."""
        steps = self.steps(tree, batch=prices.batch)
        values = prices.step(steps.num_nodes, steps.num_heads)
        if values is None:
            return None
        by_unit = steps.shares @ values
        resamples, redrawn = (
            self.resamples(len(by_unit)),
            prices.step_redrawn(steps.num_nodes, steps.num_heads),
        )
        if redrawn is None:
            return Seconds(by_unit, draws=resamples.totals(by_unit))
        drawn = resamples.totals(steps.shares)
        assert prices.curve.num_rounds is not None  # else nothing would be redrawn
        redrawn = widened(
            redrawn,
            about=values,
            rounds=prices.curve.num_rounds,
            level=resamples.level,
            num_units=resamples.num_units,
        )
        return Seconds(by_unit, draws=(drawn * np.resize(redrawn, drawn.shape)).sum(axis=1))

    def gap(self, vanilla: Seconds, tree: Seconds, *, vanilla_s: Floats, tree_s: Floats) -> Interval:
        """Return the composed speedup over the measured one of the same prompts, less 1.

        Its interval draws the prompts of both together, and what the composed seconds draw besides.
        Shapes: `vanilla_s`, `tree_s` [U], measured seconds.
        """
        resamples = self.resamples(len(vanilla_s))
        composed, measured = (
            vanilla.draws / tree.draws,
            resamples.totals(vanilla_s) / resamples.totals(tree_s),
        )
        estimate = (vanilla.total / tree.total) / float(vanilla_s.sum() / tree_s.sum()) - 1
        return resamples.interval(estimate, composed / measured - 1)

    def trace_contexts(self, *, batch: int = 1) -> NDArray[np.int64]:
        """Return after how many kept tokens each vanilla step runs."""
        replay = self.index.replay(DraftTree.root_only(), batch=batch)
        return step_contexts(replay)


def step_contexts(replay: Replay) -> NDArray[np.int64]:
    """Return for every step how many tokens the cache held: all known ones but the root.

    Where rows decode together it is the longest row's number.
    """
    known = replay.context_tokens if replay.batch == 1 else replay.batch_context_tokens
    return np.asarray(known - 1)


def reduced(replay: Replay, *, knots: Floats) -> ReplayedSteps:
    """Return a replay reduced to tokens, steps and shares of the knots, unit by unit."""
    kept = (replay.num_kept_tokens - 1).astype(np.float64)
    starts = np.arange(0, len(kept), replay.batch)
    steps = replay.batch_steps
    rows = np.diff(np.append(starts, len(kept)))
    units = np.repeat(np.arange(len(starts)), steps)
    return ReplayedSteps(
        num_nodes=replay.tree.num_nodes,
        num_heads=replay.tree.depth,
        tokens=np.add.reduceat(kept, starts),
        steps=steps.astype(np.float64),
        row_steps=(steps * rows).astype(np.float64),
        shares=knot_shares(step_contexts(replay), units=units, num_units=len(starts), knots=knots),
    )


def knot_shares(
    contexts: NDArray[np.int64], *, units: NDArray[np.int64], num_units: int, knots: Floats
) -> Floats:
    """Return each unit's steps shared out between the knots.

    A product with values at the knots is then the sum of the interpolated values. Beyond the first and the
    last knot a step counts there whole.
    Shapes: `contexts`, `units` [S], `knots` [k]; result [U, k].
    """
    count = len(knots)
    if count == 1:
        return np.bincount(units, minlength=num_units).astype(np.float64)[:, None]
    within = np.clip(contexts, knots[0], knots[-1])
    left = np.clip(np.searchsorted(knots, within, side="right") - 1, 0, count - 2)
    share = (within - knots[left]) / (knots[left + 1] - knots[left])
    flat = units * count + left  # units and knots in one index, so that one count fills the whole table
    size = num_units * count
    table = np.bincount(flat, weights=1 - share, minlength=size) + np.bincount(
        flat + 1, weights=share, minlength=size
    )
    return np.asarray(table[:size].reshape(num_units, count))


class KnotPrices:
    """A curve's step times at the knots, for one batch: each size asked for once.

    `context` "trace" prices steps where they ran; a number prices every step at that length.
    """

    def __init__(self, curve: StepTimes, *, knots: Floats, context: Context, batch: int) -> None:
        self.curve, self.knots, self.context, self.batch = curve, knots, context, batch
        self._bodies: dict[int, Floats | None] = {}
        self._heads: dict[int, float | None] = {}
        self._redrawn: dict[tuple[int, int], Floats | None] = {}

    def step(self, num_nodes: int, num_heads: int) -> Floats | None:
        """Return the seconds of a whole step at every knot; None where the curve does not reach.

        Shapes: result [knots].
        """
        if num_nodes not in self._bodies:
            self._bodies[num_nodes] = self._body(num_nodes)
        if num_heads not in self._heads:
            self._heads[num_heads] = self.curve.heads_seconds(num_heads=num_heads, batch=self.batch)
        body, heads = self._bodies[num_nodes], self._heads[num_heads]
        return None if body is None or heads is None else body + heads

    def step_redrawn(self, num_nodes: int, num_heads: int) -> Floats | None:
        """Return the seconds of a whole step at every knot that other rounds of timing would have given.

        None where no timing shows its own error. Draw d of every size belongs to one curve.
        Shapes: result [draws, knots].
        """
        key = (num_nodes, num_heads)
        if key not in self._redrawn:
            self._redrawn[key] = self._step_redrawn(num_nodes, num_heads)
        return self._redrawn[key]

    def _step_redrawn(self, num_nodes: int, num_heads: int) -> Floats | None:
        if self.curve.num_rounds is None:
            return None
        asked = {"num_nodes": num_nodes, "num_heads": num_heads, "batch": self.batch}
        drawn = [(at, self.curve.step_redrawn(context_tokens=at, **asked)) for at in self._near()]
        known = [(at, seconds) for at, seconds in drawn if seconds is not None]
        if not known:
            return None
        lengths, seconds = zip(*known, strict=True)
        # Interpolation is linear: what each length counts at each knot, times its draws.
        counts = np.stack(
            [np.interp(self._wanted, lengths, one) for one in np.eye(len(lengths))], axis=1
        )  # [knots, lengths]
        return np.asarray((counts @ np.stack(seconds)).T)

    @property
    def _wanted(self) -> Floats:
        """Return at which lengths the knots are priced."""
        return self.knots if self.context == "trace" else np.full(len(self.knots), float(self.context))

    def price_at(self, context_tokens: float) -> Price:
        """Return a search's price of a size: the step's seconds at one context length."""

        def price(num_nodes: int, num_heads: int) -> float | None:
            values = self.step(num_nodes, num_heads)
            return None if values is None else float(np.interp(context_tokens, self.knots, values))

        return price

    def backbone_cost(self, num_nodes: int, *, context_tokens: int) -> float | None:
        """Return the step cost at the covered length that is nearest; None where the curve does not reach."""
        for context in sorted(self._near(), key=lambda length: abs(length - context_tokens)):
            asked = {"context_tokens": context, "batch": self.batch}
            one_s, many_s = (self.curve.backbone_seconds(num_nodes=size, **asked) for size in (1, num_nodes))
            if one_s is not None and many_s is not None:
                return many_s / one_s
        return None

    def _body(self, num_nodes: int) -> Floats | None:
        asked = self._near()
        timed = (
            (at, self.curve.body_seconds(num_nodes=num_nodes, context_tokens=at, batch=self.batch))
            for at in asked
        )
        known = [(at, seconds) for at, seconds in timed if seconds is not None]
        if not known:
            return None
        lengths, seconds = zip(*known, strict=True)
        return np.asarray(np.interp(self._wanted, lengths, seconds))

    def _near(self) -> tuple[int, ...]:
        low, high = (
            (int(self.knots[0]), int(self.knots[-1]))
            if self.context == "trace"
            else (self.context, self.context)
        )
        return nearby(self.curve.contexts, low=low, high=high)


def nearby(contexts: Sequence[int], *, low: int, high: int) -> tuple[int, ...]:
    """Return the lengths that interpolation from `low` to `high` can touch.

    These are the lengths between the two, and the nearest on either side.
    """
    below, above = (
        max((c for c in contexts if c <= low), default=low),
        min((c for c in contexts if c >= high), default=high),
    )
    return tuple(context for context in contexts if below <= context <= above)


def shared_knots(curves: Sequence[StepTimes], contexts: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the lengths between which every curve is linear, within those of a trace's steps."""
    low, high = int(contexts.min()), int(contexts.max())
    inner = {context for curve in curves for context in curve.contexts if low < context < high}
    return tuple(sorted({low, high, *inner}))


def figure_kind(curve: StepTimes, *, shape: str, model_sha256: str, context: Context) -> FigureKind:
    """Return what a speedup from a trace and a curve is: composed, predicted, or hypothetical.

    Hypothetical is what joins one model's trace with another's steps, or prices steps at lengths that the
    text did not have. A measured curve of random weights of the trace's own shape counts as the model's: a
    dense step costs what its shape costs.
    """
    label = curve.label
    if label.shape != shape or context != "trace":
        return "hypothetical"
    if label.kind == "predicted":
        return "predicted"
    return "composed" if label.weights_sha256 in (None, model_sha256) else "hypothetical"
