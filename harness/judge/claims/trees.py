"""Transfer forms about trees: curves over the number of nodes, searches, and categories of prompts.

Tokens/step come from replay; speed is composed of them and measured step times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
from scipy.stats import rankdata

from harness.judge.claims.evidence import (
    EQUIVALENCE_LEVEL,
    Evidence,
    Floats,
    ratio_of_rates,
    replay_counts,
    replays,
    search_split,
)
from harness.judge.claims.findings import (
    Asked,
    Finding,
    NotTestable,
    above,
    combined,
    equivalence,
    holds,
    not_decidable,
    percent,
    shown,
)
from harness.judge.judgement import VerdictKind
from harness.specs.forms.claims import (
    CategoryAboveForm,
    CategoryOrderForm,
    LogGrowthForm,
    SearchDepthForm,
    SearchPromiseForm,
    SparseBeatsDenseForm,
    SpeedPeaksForm,
)
from harness.stats import Interval, bootstrap_groups, bootstrap_totals
from medusa_impl.tree_search import random_dense


def judge_log_growth(form: LogGrowthForm, evidence: Evidence) -> Finding:
    """Return whether tokens/step of the best trees rises with log n.

    Raises: NotTestable without a trace or where no tree of the largest size can be grown.
    """
    split = search_split(evidence)
    grown = split.grow(max(form.sizes), max_rank=form.max_rank)
    counts = [
        replay_counts(one) for one in replays(split.held_out, [grown.nested(size) for size in form.sizes])
    ]
    spec = evidence.record.suite.interval
    columns = [column for tokens, steps in counts for column in (tokens, steps)]

    def interval(statistic: Callable[[Sequence[Floats]], Floats]) -> Interval:
        return bootstrap_totals(
            lambda *totals: statistic(totals), *columns, spec=spec, rng=np.random.default_rng(spec.seed)
        )

    slope = interval(lambda totals: log_fit(totals, form.sizes)[1])
    slowing = interval(lambda totals: early_less_late_gain(totals, form.sizes))
    fit = interval(lambda totals: log_fit(totals, form.sizes)[2])
    rates = [float(tokens.sum() / steps.sum()) for tokens, steps in counts]
    ends = f"{rates[0]:.2f} tokens/step at {form.sizes[0]} nodes, {rates[-1]:.2f} at {form.sizes[-1]}"
    parts = [
        _part(Asked(slope, 0.0), f"slope {shown(slope)} a unit of ln n", name=f"tokens/step rise ({ends})"),
        _part(Asked(slowing, 0.0), "", name="ever more slowly"),
        _part(
            Asked(fit, form.min_r_squared),
            f"R^2 {shown(fit, digits=3)}",
            name=f"R^2 above {form.min_r_squared:g}",
        ),
    ]
    both = combined(parts)
    return replace(both, ours=f"{parts[0].ours}, {parts[2].ours}", reason=f"{both.reason} ({split.origin})")


def _part(asked: Asked, ours: str, *, name: str) -> Finding:
    reason = f"{name}: {holds(asked.kind)}"
    return Finding(kind=asked.kind, ours=ours, reason=reason, figure_kind="replayed", asked=(asked,))


def early_less_late_gain(totals: Sequence[Floats], sizes: Sequence[int]) -> Floats:
    """Return the gain a node over the first half of the sizes less that over the second.

    It is above 0 for a curve that bends down.
    Shapes: as in `log_fit`.
    """
    rates = [np.asarray(top / bottom) for top, bottom in zip(totals[::2], totals[1::2], strict=True)]
    middle, last = len(sizes) // 2, len(sizes) - 1
    early = (rates[middle] - rates[0]) / (sizes[middle] - sizes[0])
    return np.asarray(early - (rates[last] - rates[middle]) / (sizes[last] - sizes[middle]))


def log_fit(totals: Sequence[Floats], sizes: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """Return intercept, slope and R^2 of rates against ln n, by least squares.

    Shapes: `totals` are numerator and denominator for each size in turn, arrays of one shape; so are the
    three results.
    """
    rates = np.stack(
        [np.asarray(top / bottom) for top, bottom in zip(totals[::2], totals[1::2], strict=True)], axis=-1
    )
    logs = np.log(np.asarray(sizes, dtype=np.float64))
    centred = logs - logs.mean()
    mean = rates.mean(axis=-1)
    slope = (rates - mean[..., None]) @ centred / (centred @ centred)  # exactly 0 for a flat curve
    residuals = rates - mean[..., None] - slope[..., None] * centred
    spread = ((rates - mean[..., None]) ** 2).sum(axis=-1)
    # A flat curve leaves the line nothing to explain, and 0 / 0 must not pass for a perfect fit.
    fit = 1 - (residuals**2).sum(axis=-1) / np.where(spread > 0, spread, np.inf)
    fit = np.where(spread > 0, fit, 0.0)
    return np.asarray(mean - slope * logs.mean()), np.asarray(slope), np.asarray(fit)


def judge_speed_peaks(form: SpeedPeaksForm, evidence: Evidence) -> Finding:
    """Return whether speed peaks and then falls while tokens/step still rises.

    Speed is composed of replayed tokens/step and measured step times.
    Raises: NotTestable without speed, a trace, or step times at three of the sizes.
    """
    evidence.require_speed()
    split = search_split(evidence)
    cost_s = step_seconds(evidence)
    sizes = [size for size in form.sizes if size in cost_s]
    if len(sizes) < 3:
        raise NotTestable(
            f"step times at {len(sizes)} of the sizes {list(form.sizes)}, three are needed to see a peak"
        )
    grown = split.grow(max(sizes), max_rank=form.max_rank)
    trees = [grown.nested(size) for size in sizes]
    predicted = [
        one.tokens_per_step / cost_s[size]
        for one, size in zip(replays(split.growth, trees), sizes, strict=True)
    ]
    best, last = int(np.argmax(predicted)), len(sizes) - 1
    if best == last:
        return not_decidable(
            f"no peak up to {sizes[last]} nodes",
            f"speed still rises at {sizes[last]} nodes, the largest timed: the device has arithmetic to "
            f"spare there ({split.origin})",
        )
    peak, end = (replay_counts(one) for one in replays(split.held_out, [trees[best], trees[last]]))
    spec = evidence.record.suite.interval
    falls = ratio_of_rates(
        (peak[0], peak[1] * cost_s[sizes[best]]), over=(end[0], end[1] * cost_s[sizes[last]]), spec=spec
    )
    rises = ratio_of_rates(end, over=peak, spec=spec)
    parts = []
    for name, interval in (
        (f"speed at {sizes[best]} over {sizes[last]} nodes", falls),
        (f"tokens/step at {sizes[last]} over {sizes[best]} nodes", rises),
    ):
        kind = above(interval, form.bound)
        reason = f"{name}: {holds(kind)}"
        parts.append(
            Finding(
                kind=kind,
                ours=f"{name} {shown(interval, 'x')}",
                reason=reason,
                figure_kind="composed",
                asked=(Asked(interval, form.bound),),
            )
        )
    return combined(parts)


def step_seconds(evidence: Evidence) -> dict[int, float]:
    """Return the median separately timed step by nodes, heads included where they were timed."""
    costs = evidence.record.step_costs
    if costs is None:
        raise NotTestable("the record has no separately timed steps")
    return {
        cost.num_nodes: median(cost.step_s or cost.backbone_s) for cost in costs.costs if cost.arm is None
    }


def judge_sparse_beats_dense(form: SparseBeatsDenseForm, evidence: Evidence) -> Finding:
    """Return whether the arm's sparse tree yields more tokens/step than random dense ones.

    Raises: NotTestable without a trace, or with trees of other sizes than the form's.
    """
    sparse_tree = evidence.tree(form.tree)
    if sparse_tree.num_nodes > form.max_nodes:
        raise NotTestable(f"the sparse tree has {sparse_tree.num_nodes} nodes, allowed {form.max_nodes}")
    trace = evidence.trace()
    rng = np.random.default_rng(form.seed)
    dense_trees = [
        random_dense(form.dense_nodes, num_heads=trace.num_heads, rng=rng) for _ in range(form.num_dense)
    ]
    sparse, *dense = replays(trace, [sparse_tree, *dense_trees])
    tokens, steps = (np.sum(columns, axis=0) for columns in zip(*map(replay_counts, dense), strict=True))
    interval = ratio_of_rates(
        replay_counts(sparse), over=(tokens, steps), spec=evidence.record.suite.interval
    )
    kind = above(interval, form.bound)
    num_below = sum(one.tokens_per_step < sparse.tokens_per_step for one in dense)
    reason = (
        f"a sparse tree of {sparse_tree.num_nodes} nodes yields {sparse.tokens_per_step:.2f} tokens/step, "
        f"{len(dense)} random dense trees of about {form.dense_nodes} nodes yield "
        f"{float(tokens.sum() / steps.sum()):.2f} together ({num_below} of them less than the sparse one); "
        f"the order: {holds(kind)}"
    )
    return Finding(
        kind=kind,
        ours=shown(interval, "x"),
        reason=reason,
        figure_kind="replayed",
        asked=(Asked(interval, form.bound),),
    )


def judge_search_depth(form: SearchDepthForm, evidence: Evidence) -> Finding:
    """Return whether a search grows no deeper tree than the paper's.

    Raises: NotTestable without a trace, or with too few heads for a deeper one.
    """
    split = search_split(evidence)
    if (num_heads := split.growth.num_heads) <= form.max_depth:
        raise NotTestable(
            f"{num_heads} heads allow no tree deeper than {form.max_depth}, so the search had no choice"
        )
    tree = split.grow(form.num_nodes, max_rank=form.max_rank, values=form.values).tree
    kind = VerdictKind.REPRODUCED if tree.depth <= form.max_depth else VerdictKind.NOT_REPRODUCED
    levels = [tree.depths.count(depth) for depth in range(1, tree.depth + 1)]
    how = _SEARCHES[form.values]
    reason = (
        f"with {num_heads} heads the search by {how} went to depth {tree.depth}, the claim is at most "
        f"{form.max_depth}; nodes by level {levels}"
    )
    return Finding(
        kind=kind, ours=f"{tree.num_nodes} nodes, depth {tree.depth}", reason=reason, figure_kind="computed"
    )


def judge_search_promise(form: SearchPromiseForm, evidence: Evidence) -> Finding:
    """Return whether a search's tree yields on other text what its values promise.

    Raises: NotTestable without a trace, or where the trees did not grow on text of their own.
    """
    split = search_split(evidence)
    grown = split.grow(form.num_nodes, max_rank=form.max_rank, values=form.values)
    promised = grown.expected_acceptance_lengths[-1]
    (replay,) = replays(split.held_out, [grown.tree])
    tokens, steps = replay_counts(replay)
    spec = evidence.record.suite.interval.model_copy(update={"level": EQUIVALENCE_LEVEL})
    gap = bootstrap_totals(
        lambda kept, taken: kept / taken / promised - 1,
        tokens,
        steps,
        spec=spec,
        rng=np.random.default_rng(spec.seed),
    )
    kind = equivalence(gap, form.margin)
    reason = (
        f"the search by {_SEARCHES[form.values]} promises {promised:.3f} tokens/step with "
        f"{grown.tree.num_nodes} nodes, its tree yields {replay.tokens_per_step:.3f} ({split.origin}); the "
        f"90 % interval of the difference lies within +-{form.margin:.0%}: {holds(kind)}"
    )
    return Finding(
        kind=kind,
        ours=percent(gap),
        reason=reason,
        figure_kind="replayed",
        asked=(Asked(gap, form.margin, "within"),),
    )


def judge_category_order(form: CategoryOrderForm, evidence: Evidence) -> Finding:
    """Return whether categories of prompts stand in the paper's order, by tokens/step of one tree.

    Raises: NotTestable where a category has too few prompts.
    """
    groups = _by_category(form.tree, form.figures, evidence, min_prompts=form.min_prompts)
    stated = rankdata(list(form.figures.values()))

    def correlation(*rates: Floats) -> Floats:
        ranks = rankdata(np.stack(np.broadcast_arrays(*rates)), axis=0)
        return np.asarray(_correlation(ranks, stated))

    interval = bootstrap_groups(correlation, groups, spec=evidence.record.suite.interval)
    kind = above(interval, form.bound)
    rates = {
        name: float(tokens.sum() / steps.sum())
        for name, (tokens, steps) in zip(form.figures, groups, strict=True)
    }
    order = ", ".join(f"{name} {rate:.2f}" for name, rate in sorted(rates.items(), key=lambda one: one[1]))
    reason = (
        f"Spearman's rank correlation of {len(rates)} categories' tokens/step ({order}) with the stated "
        f"figures lies above {form.bound:g}: {holds(kind)}"
    )
    return Finding(
        kind=kind,
        ours=f"rank correlation {shown(interval)}",
        reason=reason,
        figure_kind="replayed",
        asked=(Asked(interval, form.bound),),
    )


def judge_category_above(form: CategoryAboveForm, evidence: Evidence) -> Finding:
    """Return whether one category of prompts yields more tokens/step than all others together.

    Raises: NotTestable where the category or the others have too few prompts.
    """
    names = {one.category for one in evidence.trace().prompts if one.category is not None}
    if form.category not in names:
        raise NotTestable(f"no prompt is of category {form.category}")
    ordered = [form.category, *sorted(names - {form.category})]
    own, *others = _by_category(form.tree, ordered, evidence, min_prompts=form.min_prompts)
    if not others:
        raise NotTestable(f"all prompts are of category {form.category}")
    rest = tuple(np.concatenate(columns) for columns in zip(*others, strict=True))
    interval = bootstrap_groups(
        lambda one, other: one / other, [own, (rest[0], rest[1])], spec=evidence.record.suite.interval
    )
    kind = above(interval, form.bound)
    reason = f"tokens/step on {form.category} over all other prompts above {form.bound:g}x: {holds(kind)}"
    return Finding(
        kind=kind,
        ours=f"tokens/step {shown(interval, 'x')}",
        reason=reason,
        figure_kind="replayed",
        asked=(Asked(interval, form.bound),),
    )


def _by_category(
    arm: str, names: Iterable[str], evidence: Evidence, *, min_prompts: int
) -> list[tuple[Floats, Floats]]:
    """Return decoded tokens and steps by prompt, category by category, of an arm's tree replayed."""
    trace = evidence.trace()
    (replay,) = replays(trace, [evidence.tree(arm)])
    tokens, steps = replay_counts(replay)
    categories = np.array([str(one.category) for one in trace.prompts])
    found = []
    for name in names:
        chosen = (categories == name) & (steps > 0)
        if (count := int(chosen.sum())) < min_prompts:
            raise NotTestable(f"category {name} has {count} prompts, {min_prompts} are needed to rank it")
        found.append((tokens[chosen], steps[chosen]))
    return found


def _correlation(ranks: Floats, stated: Floats) -> Floats:
    """Return Pearson's correlation of ranks with ranks; 0 where all are equal.

    Shapes: `ranks` [categories, ..], `stated` [categories]; result [..].
    """
    centred, other = ranks - ranks.mean(axis=0), stated - stated.mean()
    product = np.tensordot(other, centred, axes=1)
    norms = np.sqrt((centred**2).sum(axis=0) * (other**2).sum())
    return np.asarray(np.where(norms > 0, product / np.where(norms > 0, norms, 1.0), 0.0))


_SEARCHES = {"marginals": "products of the heads' accuracies", "joint": "joint hits"}
