"""A sweep's composed cells: replayed steps priced by curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from harness.compose.composer import KnotPrices, figure_kind
from harness.compose.devices import PredictedCurve, StepTimes
from harness.compose.plan import SweepPlan
from harness.compose.schedule import schedule
from harness.errors import UserError
from harness.records.sweep_cells import AnyCell, ChosenTree, ComposedCell, Context, FailedCell, composed_key
from medusa_impl.tree import DraftTree

_DIGITS = 6  # of a figure in a record: far more than its interval leaves certain, and files stay small


def compose(plan: SweepPlan, *, done: frozenset[str] = frozenset()) -> Iterator[AnyCell]:
    """Yield every composed cell that is not done, then the predictions that cannot be made."""
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
    vanilla_seconds = composer.seconds(DraftTree.root_only(), prices)
    if vanilla_seconds is None:
        found = f"no vanilla step at batch {batch}, context {context}"
        raise UserError(
            found=found,
            need="one timed or predicted there",
            where=curve.label.words,
            do="measure it, or leave the size out",
        )
    vanilla_s = vanilla_seconds.total
    priced = ((index, composer.seconds(tree, prices)) for index, tree in enumerate(plan.drafts))
    figures = {index: one for index, one in priced if one is not None}
    resamples = composer.resamples(len(vanilla_seconds.by_unit))
    low, high = resamples.bounds(np.stack([vanilla_seconds.draws / one.draws for one in figures.values()]))
    provenance = composer.index.trace.provenance
    lengths = composer.trace_contexts(batch=batch)
    tokens = float(vanilla.tokens.sum())
    num_steps = [float(composer.steps(plan.drafts[index], batch=batch).steps.sum()) for index in figures]
    seconds = [one.total for one in figures.values()]
    model = curve.model if isinstance(curve, PredictedCurve) else None
    kind = figure_kind(curve, shape=plan.spec.shape, model_sha256=provenance.model_hash, context=context)
    return ComposedCell(
        curve=curve.label,
        context=context,
        batch=batch,
        kind=kind,
        beyond_share=_beyond(lengths, curve.contexts)
        if context == "trace"
        else _beyond(np.array([context]), curve.contexts),
        vanilla_step_s=_rounded(vanilla_s / float(vanilla.steps.sum())),
        vanilla_tokens_per_s=_rounded(tokens / vanilla_s),
        trees=tuple(figures),
        step_s=tuple(_rounded(total / count) for total, count in zip(seconds, num_steps, strict=True)),
        tokens_per_s=tuple(_rounded(tokens / total) for total in seconds),
        speedup=tuple(_rounded(vanilla_s / total) for total in seconds),
        speedup_low=tuple(map(_rounded, low.tolist())),
        speedup_high=tuple(map(_rounded, high.tolist())),
        num_uncovered=len(plan.trees) - len(figures),
        chosen=_chosen(plan, prices, lengths=lengths),
        schedule=schedule(plan, curve, context=context) if batch == 1 and kind == "composed" else (),
        timing_rounds=curve.num_rounds,
        seconds_band=model.seconds_band if model is not None else None,
        overhead_band=model.overhead_band if model is not None else None,
    )


def _chosen(plan: SweepPlan, prices: KnotPrices, *, lengths: NDArray[np.int64]) -> tuple[ChosenTree, ...]:
    """Return the trees that the searches chose for a cell, with what they are worth there."""
    composer, curve, batch = plan.composer, prices.curve, prices.batch
    found = []
    vanilla = composer.steps(DraftTree.root_only(), batch=batch)
    vanilla_seconds = composer.seconds(DraftTree.root_only(), prices)
    for choice in plan.choices.get(composed_key(curve.label, context=prices.context, batch=batch), ()):
        tree = choice.tree()
        steps, seconds = composer.steps(tree, batch=batch), composer.seconds(tree, prices)
        assert seconds is not None and vanilla_seconds is not None  # the search priced it
        resamples = composer.resamples(len(steps.tokens))
        tokens = resamples.totals(steps.tokens)
        total_s, vanilla_s = seconds.total, vanilla_seconds.total
        found.append(
            ChosenTree(
                method=choice.method,
                tree=plan.indices[tree],
                promised=choice.promised,
                step_cost=prices.backbone_cost(tree.num_nodes, context_tokens=int(median(lengths.tolist()))),
                overhead=(total_s / float(steps.steps.sum())) / (vanilla_s / float(vanilla.steps.sum())),
                tokens_per_s=resamples.interval(float(steps.tokens.sum()) / total_s, tokens / seconds.draws),
                speedup=resamples.interval(vanilla_s / total_s, vanilla_seconds.draws / seconds.draws),
                **(
                    _by_batch(plan, curve, tree, context=prices.context)
                    if batch == 1 and choice.method == "joint"
                    else {}
                ),
            )
        )
    return tuple(found)


def _by_batch(
    plan: SweepPlan, curve: StepTimes, tree: DraftTree, *, context: Context
) -> dict[str, dict[int, float]]:
    """Return a tree's speedup at every break-even batch that curve and trace cover, and its bounds."""
    composer = plan.composer
    found: dict[str, dict[int, float]] = {"speedups": {}, "speedups_low": {}, "speedups_high": {}}
    for batch in plan.spec.break_even_batches:
        if batch > len(composer.index.trace.prompts):
            continue
        prices = KnotPrices(curve, knots=composer.knots, context=context, batch=batch)
        ours, vanilla = (composer.seconds(one, prices) for one in (tree, DraftTree.root_only()))
        if ours is None or vanilla is None:
            continue
        found["speedups"][batch] = _rounded(vanilla.total / ours.total)
        resamples = composer.resamples(len(ours.by_unit))
        if resamples.num_units > 1:
            interval = resamples.interval(vanilla.total / ours.total, vanilla.draws / ours.draws)
            found["speedups_low"][batch] = _rounded(interval.low)
            found["speedups_high"][batch] = _rounded(interval.high)
    return found


def _beyond(lengths: NDArray[np.int64], covered: Sequence[int]) -> float:
    """Return which share of steps ran at a length outside of those that were timed."""
    return _rounded(float(np.mean((lengths < min(covered)) | (lengths > max(covered)))))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
