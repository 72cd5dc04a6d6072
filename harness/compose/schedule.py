"""The best tree for each batch on one device: what a server would decode with as its load grows.

Each tree is chosen on the calibration text, for steps at that batch's price, and judged on the other text,
where a step lasts until its slowest row is done. Where the choice is the root alone, plain decoding is best.
"""

from __future__ import annotations

import math

from harness.compose.composer import KnotPrices
from harness.compose.devices import StepTimes
from harness.compose.plan import SweepPlan
from harness.records.sweep_cells import Context, ScheduledTree, composed_key
from medusa_impl.tree import DraftTree


def schedule(plan: SweepPlan, curve: StepTimes, *, context: Context) -> tuple[ScheduledTree, ...]:
    """Return the tree of every batch that curve and trace cover, smallest batch first."""
    found = (
        _scheduled(plan, curve, context=context, batch=batch)
        for batch in plan.spec.break_even_batches
        if batch <= len(plan.composer.index.trace.prompts)
    )
    return tuple(one for one in found if one is not None)


def _scheduled(plan: SweepPlan, curve: StepTimes, *, context: Context, batch: int) -> ScheduledTree | None:
    composer = plan.composer
    choices = plan.choices.get(composed_key(curve.label, context=context, batch=batch), ())
    tree = next((one.tree() for one in choices if one.method == "joint"), None)
    prices = KnotPrices(curve, knots=composer.knots, context=context, batch=batch)
    vanilla = composer.seconds(DraftTree.root_only(), prices)
    ours = composer.seconds(tree, prices) if tree is not None else None
    if tree is None or vanilla is None or ours is None:
        return None
    tokens = float(composer.steps(tree, batch=batch).tokens.sum())
    resamples = composer.resamples(len(ours.by_unit))
    interval = resamples.interval(vanilla.total / ours.total, vanilla.draws / ours.draws)
    is_bounded = resamples.num_units > 1 and math.isfinite(interval.low)
    return ScheduledTree(
        batch=batch,
        tree=plan.indices[tree],
        tokens_per_s=tokens / ours.total,
        vanilla_tokens_per_s=tokens / vanilla.total,
        speedup=interval.estimate,
        speedup_low=interval.low if is_bounded else None,
        speedup_high=interval.high if is_bounded else None,
    )
