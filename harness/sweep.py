"""The sweep's arithmetic: trees replayed on a trace, steps priced with a device's curve, figures that say what they are. No torch.

A tree's steps are reduced once to what any curve needs. A step at context c costs b(c) + h, linear in c between the lengths that were
timed; so each step is shared out between the two nearest of these lengths, the *knots*, and the sum over a prompt's steps of curve.seconds
becomes the product of a row of shares with the curve's values at the knots. A thousand trees on a hundred curves are then matrix products.

    context    256 ---------- 512        one step at 320 counts 0.75 at 256 and 0.25 at 512,
                     ^320                the same seconds as interpolation gives
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from harness.config import IntervalSpec
from harness.cost_search import METHODS, CostChoice, Price, SearchSpace, cached_choices
from harness.device_curves import (
    PredictedCurve,
    RooflineError,
    StepTimes,
    find_latency_records,
    measured_curves,
    roofline_error,
)
from harness.errors import UserError
from harness.hardware import HARDWARE_FILE, load_hardware
from harness.latency import LatencyRecord
from harness.paths import resolve_path
from harness.shapes import SHAPES_FILE, load_shapes
from harness.stats import FigureKind, Interval, Resamples
from harness.sweep_record import AnyCell, ChosenTree, ComposedCell, Context, FailedCell, SweepTrees, TreeRate, composed_key
from harness.sweep_specs import SweepSpec
from harness.sweep_trees import CHOSEN, JOINT, SweepTree, resolve_families
from harness.trace import Replay, ReplayIndex, Trace
from harness.trees import grow
from medusa_impl.tree import DraftTree

Floats = NDArray[np.float64]
_DIGITS = 6  # of a figure in a record: far more than its interval allows


@dataclass(frozen=True, eq=False)
class ReplayedSteps:
    """The replay of one tree at one batch, reduced to what composition needs.

    Units are what is resampled: prompts at batch 1, else whole batches of prompts. Shapes: `tokens`, `steps`, `row_steps` [U], the kept
    tokens behind each row's first, the steps, and steps times rows; `shares` [U, knots], the steps shared out between the knots.
    """

    num_nodes: int
    num_heads: int
    tokens: Floats
    steps: Floats
    row_steps: Floats
    shares: Floats


class Composer:
    """One trace, prepared to be composed with any curve: replays, shares of steps and bootstrap draws, each made once.

    `knots` are the context lengths between which all curves are linear.
    """

    def __init__(self, trace: Trace, *, knots: Sequence[int], interval: IntervalSpec) -> None:
        decoded = tuple(prompt for prompt in trace.prompts if prompt.num_kept_tokens > 1)  # the others take no step
        if not decoded:
            raise UserError(found="no decoding step: every prompt ends at its first token", need="a prompt of two kept tokens or more")
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
        """Return the tokens that a step yields for each row that it carries, with the interval over prompts or batches of prompts."""
        steps = self.steps(tree, batch=batch)
        draws = self.resamples(len(steps.tokens)).totals(np.stack([steps.tokens, steps.row_steps], axis=1))
        rate = float(steps.tokens.sum() / steps.row_steps.sum())
        return self.resamples(len(steps.tokens)).interval(rate, draws[:, 0] / draws[:, 1])

    def trace_contexts(self, *, batch: int = 1) -> NDArray[np.int64]:
        """Return the kept tokens behind which each vanilla step runs."""
        replay = self.index.replay(DraftTree.root_only(), batch=batch)
        return step_contexts(replay)


def step_contexts(replay: Replay) -> NDArray[np.int64]:
    """Return for every step, of a batch where rows decode together, how many tokens the cache held: all known ones but the root."""
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


def knot_shares(contexts: NDArray[np.int64], *, units: NDArray[np.int64], num_units: int, knots: Floats) -> Floats:
    """Return each unit's steps shared out between the knots, so that a product with values at the knots is their interpolated sum.

    Beyond the first and the last knot a step counts there whole. Shapes: `contexts`, `units` [S], `knots` [k]; result [U, k].
    """
    count = len(knots)
    if count == 1:
        return np.bincount(units, minlength=num_units).astype(np.float64)[:, None]
    within = np.clip(contexts, knots[0], knots[-1])
    left = np.clip(np.searchsorted(knots, within, side="right") - 1, 0, count - 2)
    share = (within - knots[left]) / (knots[left + 1] - knots[left])
    flat = units * count + left
    size = num_units * count
    table = np.bincount(flat, weights=1 - share, minlength=size) + np.bincount(flat + 1, weights=share, minlength=size)
    return np.asarray(table[:size].reshape(num_units, count))


class KnotPrices:
    """A curve's step times at the knots, for one batch: each size asked for once.

    `context` "trace" prices steps where they ran; a number prices every step at that length.
    """

    def __init__(self, curve: StepTimes, *, knots: Floats, context: Context, batch: int) -> None:
        self.curve, self.knots, self.context, self.batch = curve, knots, context, batch
        self._bodies: dict[int, Floats | None] = {}
        self._heads: dict[int, float | None] = {}

    def step(self, num_nodes: int, num_heads: int) -> Floats | None:
        """Return the seconds of a whole step at every knot; None where the curve does not reach. Shapes: result [knots]."""
        if num_nodes not in self._bodies:
            self._bodies[num_nodes] = self._body(num_nodes)
        if num_heads not in self._heads:
            self._heads[num_heads] = self.curve.heads_seconds(num_heads=num_heads, batch=self.batch)
        body, heads = self._bodies[num_nodes], self._heads[num_heads]
        return None if body is None or heads is None else body + heads

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
        timed = ((at, self.curve.body_seconds(num_nodes=num_nodes, context_tokens=at, batch=self.batch)) for at in asked)
        known = [(at, seconds) for at, seconds in timed if seconds is not None]
        if not known:
            return None
        lengths, seconds = zip(*known, strict=True)
        wanted = self.knots if self.context == "trace" else np.full(len(self.knots), float(self.context))
        return np.asarray(np.interp(wanted, lengths, seconds))

    def _near(self) -> tuple[int, ...]:
        low, high = (int(self.knots[0]), int(self.knots[-1])) if self.context == "trace" else (self.context, self.context)
        return nearby(self.curve.contexts, low=low, high=high)


def nearby(contexts: Sequence[int], *, low: int, high: int) -> tuple[int, ...]:
    """Return the lengths from `low` to `high` and the nearest on either side: all that interpolation between the two can touch."""
    below, above = (max((c for c in contexts if c <= low), default=low), min((c for c in contexts if c >= high), default=high))
    return tuple(context for context in contexts if below <= context <= above)


def shared_knots(curves: Sequence[StepTimes], contexts: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the lengths between which every curve is linear, within those of a trace's steps."""
    low, high = int(contexts.min()), int(contexts.max())
    inner = {context for curve in curves for context in curve.contexts if low < context < high}
    return tuple(sorted({low, high, *inner}))


def figure_kind(curve: StepTimes, *, shape: str, model_sha256: str, context: Context) -> FigureKind:
    """Return what a speedup from a trace and a curve is: composed, predicted, or hypothetical.

    Hypothetical is what joins one model's trace with another's steps, or prices steps at lengths that the text did not have. A measured
    curve of random weights of the trace's own shape counts as the model's: a dense step costs what its shape costs.
    """
    label = curve.label
    if label.shape != shape or context != "trace":
        return "hypothetical"
    if label.kind == "predicted":
        return "predicted"
    return "composed" if label.weights_sha256 in (None, model_sha256) else "hypothetical"


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """A sweep made ready: trees, curves and, for each composed cell, the trees that the searches chose for it."""

    spec: SweepSpec
    composer: Composer
    calibration: ReplayIndex
    curves: tuple[StepTimes, ...]
    trees: tuple[SweepTree, ...]
    choices: Mapping[str, tuple[CostChoice, ...]]
    refused: tuple[FailedCell, ...]
    error: RooflineError | None
    run_tree: DraftTree | None = None
    inputs: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def drafts(self) -> tuple[DraftTree, ...]:
        """The trees themselves, in the order of `trees`."""
        return tuple(sweep_tree.tree() for sweep_tree in self.trees)

    @cached_property
    def places(self) -> Mapping[DraftTree, int]:
        """Where each tree stands in `trees`."""
        return {tree: place for place, tree in enumerate(self.drafts)}

    @property
    def cells(self) -> tuple[tuple[StepTimes, Context, int], ...]:
        """The composed cells: curves, contexts, batches."""
        return tuple((curve, context, batch) for curve in self.curves for context in self.spec.contexts for batch in self.spec.batches)


def plan_sweep(spec: SweepSpec, *, beside: Path | None, results: Path, cache: Path | None = None) -> SweepPlan:
    """Load traces and curves, resolve every tree, and let the searches choose each cell's own; `cache` keeps what searches found.

    Raises: UserError for what is missing or does not belong together.
    """
    trace_file, calibration_file = (resolve_path(name, beside=beside) for name in (spec.trace, spec.calibration_trace))
    trace, calibration = Trace.load(trace_file), ReplayIndex(Trace.load(calibration_file))
    check_same_heads(trace, calibration.trace)
    records = find_latency_records(results, names=spec.measured.records) if spec.measured is not None else ()
    curves, refused = gather_curves(spec, records)
    if not curves:
        raise UserError(found="no curve", need="a latency record, or devices to predict", where="the sweep", do="run medusa-repro latency")
    known = sorted({*load_shapes(), *(curve.label.shape for curve in curves)})
    if spec.shape not in known:
        raise UserError(found=f"shape {spec.shape!r}", need=f"one of {known}, published or measured", where="the sweep")
    lengths = step_contexts(ReplayIndex(trace).replay(DraftTree.root_only()))
    composer = Composer(trace, knots=shared_knots(curves, lengths), interval=spec.interval)
    trees = resolve_families(spec.trees, calibration=calibration, num_heads=spec.num_heads)
    run_tree = sampled_tree(spec, calibration)
    choices = choose_trees(spec, composer, calibration, curves, cache=cache)
    return SweepPlan(
        spec=spec,
        composer=composer,
        calibration=calibration,
        curves=curves,
        trees=with_chosen(trees, choices, also=run_tree),
        run_tree=run_tree,
        choices=choices,
        refused=refused,
        error=roofline_error(records),
        inputs={
            "trace": trace_file,
            "calibration_trace": calibration_file,
            "hardware.toml": HARDWARE_FILE,
            "shapes.toml": SHAPES_FILE,
            **{f"latency record {record.folder.name}": record.folder / "manifest.json" for record in records},
        },
    )


def check_same_heads(trace: Trace, calibration: Trace) -> None:
    """Refuse a calibration trace of another model or other heads than the trace's."""
    ours, theirs = trace.provenance, calibration.provenance
    if (ours.model_hash, ours.heads_hash) != (theirs.model_hash, theirs.heads_hash):
        raise UserError(
            found="a calibration trace of another model or other heads",
            need=f"one of backbone {ours.model_hash[:12]} and heads {ours.heads_hash[:12]}",
            where="calibration_trace",
            do="record it again with medusa-repro trace",
        )


def gather_curves(spec: SweepSpec, records: Sequence[LatencyRecord]) -> tuple[tuple[StepTimes, ...], tuple[FailedCell, ...]]:
    """Return every curve of a sweep, measured ones first, and a failed cell for each prediction that cannot be made."""
    curves: list[StepTimes] = []
    refused: list[FailedCell] = []
    for record in records:
        curves += measured_curves(record, dtypes=spec.measured.dtypes if spec.measured is not None else ())
    wanted, devices, shapes = spec.predicted, load_hardware(), load_shapes()
    if wanted is None:
        return tuple(curves), ()
    keys = tuple(devices) if wanted.devices == "all" else wanted.devices
    for kind, names, known in (("device", keys, devices), ("shape", wanted.shapes, shapes)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(found=f"{kind} {unknown[0]!r}", need=f"one of {sorted(known)}", where="predicted")
    for key, name, dtype in ((key, name, dtype) for name in wanted.shapes for key in keys for dtype in wanted.dtypes):
        try:
            curves.append(PredictedCurve(key, devices[key], shapes[name], dtype=dtype, heads=wanted.heads))
        except UserError as error:
            words = f"{key}, {name}, {dtype} (predicted)"
            refused.append(FailedCell(key=f"curve {words}", words=words, error_type="UserError", message=str(error)))
    return tuple(curves), tuple(refused)


def choose_trees(
    spec: SweepSpec, composer: Composer, calibration: ReplayIndex, curves: Sequence[StepTimes], *, cache: Path | None
) -> dict[str, tuple[CostChoice, ...]]:
    """Return what both searches choose for every composed cell, priced at the mean context of the calibration text's vanilla steps."""
    space = SearchSpace(calibration, max_nodes=spec.search.max_nodes, num_heads=max(spec.num_heads))
    usual = float(np.mean(step_contexts(calibration.replay(DraftTree.root_only()))))
    choices: dict[str, tuple[CostChoice, ...]] = {}
    for curve in curves:
        for context in spec.contexts:
            for batch in spec.batches:
                price = KnotPrices(curve, knots=composer.knots, context=context, batch=batch).price_at(usual)
                if price(1, 0) is None:
                    continue  # the cell itself says that its curve does not reach
                choices[composed_key(curve.label, context=context, batch=batch)] = cached_choices(
                    space.key,
                    curve_fingerprint=f"{curve.label.fingerprint} {context} {batch} {usual:.3f} {composer.knots.tolist()}",
                    folder=cache,
                    search=partial(search_both, space, price),
                )
    return choices


def search_both(space: SearchSpace, price: Price) -> list[CostChoice]:
    """Return what both searches choose at a price, the one on joint hits first."""
    return [space.choose(method, price) for method in METHODS]


def sampled_tree(spec: SweepSpec, calibration: ReplayIndex) -> DraftTree | None:
    """Return the tree that the run settings share, grown on joint hits; None where nothing is sampled."""
    if spec.sampled is None:
        return None
    return grow(calibration.trace, num_nodes=spec.sampled.tree_nodes, values="joint", num_heads=max(spec.num_heads)).tree


def with_chosen(
    trees: Sequence[SweepTree], choices: Mapping[str, Sequence[CostChoice]], *, also: DraftTree | None = None
) -> tuple[SweepTree, ...]:
    """Return the trees with those that searches chose behind them, each tree once; the root alone is always there, and `also`."""
    found = {sweep_tree.tree(): sweep_tree for sweep_tree in trees}
    if also is not None and also not in found:
        found[also] = SweepTree(paths=also.paths, num_heads=also.depth, families=(JOINT,))
    chosen = [choice.tree() for cell in choices.values() for choice in cell]
    for tree in (DraftTree.root_only(), *chosen):
        before = found.get(tree)
        if before is None:
            found[tree] = SweepTree(paths=tree.paths, num_heads=tree.depth, families=(CHOSEN,))
        elif CHOSEN not in before.families:
            found[tree] = before.model_copy(update={"families": (*before.families, CHOSEN)})
    return tuple(found.values())


def tree_rates(plan: SweepPlan) -> SweepTrees:
    """Return the plan's trees with their tokens/step, on the calibration trace and, with intervals, on the trace itself."""
    rates = [
        TreeRate(batch=batch, tree=place, tokens_per_step=plan.composer.tokens_per_step(tree, batch=batch))
        for batch in sorted({1, *plan.spec.batches})
        for place, tree in enumerate(plan.drafts)
    ]
    calibrated = tuple(plan.calibration.replay(tree).tokens_per_step for tree in plan.drafts)
    return SweepTrees(trees=plan.trees, calibrated=calibrated, rates=tuple(rates))


def compose(plan: SweepPlan, *, done: frozenset[str] = frozenset()) -> Iterator[AnyCell]:
    """Yield every composed cell that is not done, one after another, then the predictions that cannot be made."""
    for curve, context, batch in plan.cells:
        key = composed_key(curve.label, context=context, batch=batch)
        if key in done:
            continue
        try:
            yield compose_cell(plan, curve, context=context, batch=batch)
        except UserError as error:
            words = f"{curve.label.words}, batch {batch}, context {context}"
            yield FailedCell(key=key, words=words, error_type="UserError", message=str(error))
    yield from (cell for cell in plan.refused if cell.key not in done)


def compose_cell(plan: SweepPlan, curve: StepTimes, *, context: Context, batch: int) -> ComposedCell:
    """Return all trees on one curve at one batch.

    Raises: UserError where the curve does not cover vanilla steps at that batch.
    """
    composer = plan.composer
    prices = KnotPrices(curve, knots=composer.knots, context=context, batch=batch)
    vanilla = composer.steps(DraftTree.root_only(), batch=batch)
    vanilla_prices = prices.step(1, 0)
    if vanilla_prices is None:
        found = f"no vanilla step at batch {batch}, context {context}"
        raise UserError(found=found, need="one timed or predicted there", where=curve.label.words, do="measure it, or leave the size out")
    vanilla_s = float((vanilla.shares @ vanilla_prices).sum())
    figures = {}
    for place, tree in enumerate(plan.drafts):
        steps = composer.steps(tree, batch=batch)
        values = prices.step(steps.num_nodes, steps.num_heads)
        if values is not None:
            figures[place] = steps.shares @ values
    columns = np.stack([vanilla.shares @ vanilla_prices, *figures.values()], axis=1)
    speedups, low, high = _speedups(composer, columns)
    provenance = composer.index.trace.provenance
    lengths = composer.trace_contexts(batch=batch)
    tokens = float(vanilla.tokens.sum())
    num_steps = [float(composer.steps(plan.drafts[place], batch=batch).steps.sum()) for place in figures]
    seconds = columns.sum(axis=0)[1:]
    return ComposedCell(
        curve=curve.label,
        context=context,
        batch=batch,
        kind=figure_kind(curve, shape=plan.spec.shape, model_sha256=provenance.model_hash, context=context),
        beyond_share=_beyond(lengths, curve.contexts) if context == "trace" else _beyond(np.array([context]), curve.contexts),
        vanilla_step_s=_rounded(vanilla_s / float(vanilla.steps.sum())),
        vanilla_tokens_per_s=_rounded(tokens / vanilla_s),
        trees=tuple(figures),
        step_s=tuple(_rounded(total / count) for total, count in zip(seconds.tolist(), num_steps, strict=True)),
        tokens_per_s=tuple(_rounded(tokens / total) for total in seconds.tolist()),
        speedup=tuple(map(_rounded, speedups.tolist())),
        speedup_low=tuple(map(_rounded, low.tolist())),
        speedup_high=tuple(map(_rounded, high.tolist())),
        num_uncovered=len(plan.trees) - len(figures),
        chosen=_chosen(plan, prices, lengths=lengths),
    )


def _speedups(composer: Composer, columns: Floats) -> tuple[Floats, Floats, Floats]:
    """Return speedups and their bounds. Shapes: `columns` [U, 1 + T], vanilla's seconds first; results [T]."""
    resamples, totals = composer.resamples(len(columns)), columns.sum(axis=0)
    draws = resamples.totals(columns)
    low, high = resamples.bounds((draws[:, :1] / draws[:, 1:]).T)
    return np.asarray(totals[0] / totals[1:]), low, high


def _chosen(plan: SweepPlan, prices: KnotPrices, *, lengths: NDArray[np.int64]) -> tuple[ChosenTree, ...]:
    composer, curve, batch = plan.composer, prices.curve, prices.batch
    found = []
    vanilla = composer.steps(DraftTree.root_only(), batch=batch)
    vanilla_prices = prices.step(1, 0)
    for choice in plan.choices.get(composed_key(curve.label, context=prices.context, batch=batch), ()):
        tree = choice.tree()
        steps = composer.steps(tree, batch=batch)
        values = prices.step(steps.num_nodes, steps.num_heads)
        assert values is not None and vanilla_prices is not None  # the search priced it
        seconds, vanilla_seconds = steps.shares @ values, vanilla.shares @ vanilla_prices
        resamples = composer.resamples(len(seconds))
        draws = resamples.totals(np.stack([steps.tokens, seconds, vanilla_seconds], axis=1))
        total_s, vanilla_s = float(seconds.sum()), float(vanilla_seconds.sum())
        found.append(
            ChosenTree(
                method=choice.method,
                tree=plan.places[tree],
                promised=choice.promised,
                step_cost=prices.backbone_cost(tree.num_nodes, context_tokens=int(median(lengths.tolist()))),
                overhead=(total_s / float(steps.steps.sum())) / (vanilla_s / float(vanilla.steps.sum())),
                tokens_per_s=resamples.interval(float(steps.tokens.sum()) / total_s, draws[:, 0] / draws[:, 1]),
                speedup=resamples.interval(vanilla_s / total_s, draws[:, 2] / draws[:, 1]),
                speedups=_by_batch(plan, curve, tree, context=prices.context) if batch == 1 and choice.method == "joint" else {},
            )
        )
    return tuple(found)


def _by_batch(plan: SweepPlan, curve: StepTimes, tree: DraftTree, *, context: Context) -> dict[int, float]:
    """Return a tree's speedup at every break-even batch that the curve covers and the trace can fill."""
    composer, speedups = plan.composer, dict[int, float]()
    for batch in plan.spec.break_even_batches:
        if batch > len(composer.index.trace.prompts):
            continue
        prices = KnotPrices(curve, knots=composer.knots, context=context, batch=batch)
        ours, vanilla = composer.steps(tree, batch=batch), composer.steps(DraftTree.root_only(), batch=batch)
        ours_at, vanilla_at = prices.step(ours.num_nodes, ours.num_heads), prices.step(1, 0)
        if ours_at is not None and vanilla_at is not None:
            speedups[batch] = _rounded(float((vanilla.shares @ vanilla_at).sum() / (ours.shares @ ours_at).sum()))
    return speedups


def _beyond(lengths: NDArray[np.int64], covered: Sequence[int]) -> float:
    return _rounded(float(np.mean((lengths < min(covered)) | (lengths > max(covered)))))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
