"""Transfer forms about draft heads: what they lose the further ahead they look, what one more adds,
and what they add to a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from harness.judge.claims.evidence import Evidence, relative_gain, replay_counts, replays, search_split
from harness.judge.claims.findings import (
    Asked,
    Finding,
    NotTestable,
    above,
    below,
    combined,
    equivalence,
    holds,
    percent,
    shown,
    worst,
)
from harness.judge.step_costs import separate_s_by_prompt
from harness.specs.forms.claims import (
    AccuracyFallsForm,
    AddedStepForm,
    ExtraHeadForm,
    LossGrowsForm,
    MoreCandidatesForm,
)
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, bootstrap_ratio, bootstrap_totals


def rising_losses(
    texts: Sequence[NDArray[np.float64]], *, bound: float, spec: IntervalSpec, whose: str = ""
) -> Finding:
    """Return whether each head's mean loss lies above that of the head before it by more than `bound` nats.

    Shapes: one array a text, [positions, heads]; nan where a head has no target, since the text ends first.
    Raises: NotTestable where a head has no target in any text.
    """
    parts = []
    for head in range(1, texts[0].shape[1]):
        interval = _mean_difference(texts, head, head - 1, spec=spec)
        kind = above(interval, bound)
        reason = f"{head} to {head + 1}: {holds(kind)}"
        parts.append(
            Finding(
                kind=kind,
                ours=shown(interval),
                reason=reason,
                figure_kind="measured",
                asked=(Asked(interval, bound),),
            )
        )
    both = combined(parts)
    return replace(
        both,
        ours=f"rise in nats from head to head: {both.ours}",
        reason=f"the mean loss{whose} rises by more than {bound:g} nats from one head to the next "
        f"({both.reason})",
    )


def judge_loss_grows(form: LossGrowsForm, evidence: Evidence) -> Finding:
    """Return whether each head's loss lies above that of the head before it.

    Raises: NotTestable without a trace that has losses of two heads or more.
    """
    trace = evidence.trace()
    if trace.num_heads < 2 or trace.prompts[0].nll is None:
        raise NotTestable("the trace has no losses of two heads or more")
    losses = [prompt.nll.astype(np.float64) for prompt in trace.prompts if prompt.nll is not None]
    return rising_losses(losses, bound=form.bound, spec=evidence.record.suite.interval)


def judge_accuracy_falls(form: AccuracyFallsForm, evidence: Evidence) -> Finding:
    """Return whether each head's accuracy lies below that of the head before it, among its first n tokens.

    Raises: NotTestable without a trace of two heads or more.
    """
    trace, spec = evidence.trace(), evidence.record.suite.interval
    if trace.num_heads < 2:
        raise NotTestable("the trace has one head")
    parts = []
    for first in form.first:
        hits = [np.where(one.ranks >= 0, one.ranks < first, np.nan) for one in trace.prompts]
        falls = [_mean_difference(hits, head, head + 1, spec=spec) for head in range(trace.num_heads - 1)]
        kinds = [above(fall, form.bound) for fall in falls]
        share = np.nanmean(np.concatenate(hits), axis=0)
        reason = ", ".join(f"{head + 1} to {head + 2} {holds(kind)}" for head, kind in enumerate(kinds))
        parts.append(
            Finding(
                kind=worst(kinds),
                ours=f"top-{first} {', '.join(f'{value:.1%}'.replace('%', ' %') for value in share)}",
                reason=f"top-{first} falls by more than {form.bound:g} from head to head ({reason})",
                figure_kind="measured",
                asked=tuple(Asked(fall, form.bound) for fall in falls),
            )
        )
    return combined(parts)


def judge_more_candidates(form: MoreCandidatesForm, evidence: Evidence) -> Finding:
    """Return whether a head's first n tokens hold the right one much more often than its first token does.

    Raises: NotTestable without a trace, or without a target for that head.
    """
    trace, spec = evidence.trace(), evidence.record.suite.interval
    if trace.num_heads < form.head:
        raise NotTestable(f"the trace has {trace.num_heads} heads, the claim is about head {form.head}")
    ranks = [one.ranks[one.ranks[:, form.head - 1] >= 0, form.head - 1] for one in trace.prompts]
    among, on_top = (np.array([float((one < most).sum()) for one in ranks]) for most in (form.first, 1))
    num_positions = sum(map(len, ranks))
    if not on_top.sum():
        raise NotTestable(f"head {form.head} is never right in {num_positions} positions")
    ratio = bootstrap_ratio(among, on_top, spec=spec, rng=np.random.default_rng(spec.seed))
    kind = above(ratio, form.bound)
    shares = " and ".join(f"{100 * hits.sum() / num_positions:.0f} %" for hits in (on_top, among))
    reason = (
        f"head {form.head} is right with its first token and among its first {form.first} at {shares} of "
        f"{num_positions:,} positions; the quotient lies above {form.bound:.3g}: {holds(kind)}"
    )
    ours = f"top-1 and top-{form.first}: {shares}; {shown(ratio, 'x')}"
    return Finding(
        kind=kind, ours=ours, reason=reason, figure_kind="measured", asked=(Asked(ratio, form.bound),)
    )


def _mean_difference(
    values: Sequence[NDArray[np.float64]], one: int, other: int, *, spec: IntervalSpec
) -> Interval:
    """Return the mean of one column less another over the positions where both are numbers.

    Shapes: one array a text, [positions, heads]. Raises: NotTestable where there is no such position.
    """
    apart = [rows[:, one] - rows[:, other] for rows in values]
    counts = np.array([float(np.isfinite(rows).sum()) for rows in apart])
    if not counts.sum():
        raise NotTestable(f"no position has a target for head {max(one, other) + 1}")
    sums = np.array([float(np.nansum(rows)) for rows in apart])
    return bootstrap_ratio(sums, counts, spec=spec, rng=np.random.default_rng(spec.seed))


def judge_extra_head(form: ExtraHeadForm, evidence: Evidence) -> Finding:
    """Return whether one head more adds little to the tokens/step of the best trees.

    Raises: NotTestable without a trace of that many heads.
    """
    split = search_split(evidence)
    if split.held_out.num_heads < form.with_heads:
        raise NotTestable(
            f"the trace has {split.held_out.num_heads} heads, the claim is about {form.with_heads}"
        )
    trees = [
        split.grow(form.num_nodes, max_rank=form.max_rank, max_depth=heads).tree
        for heads in (form.with_heads, form.without_heads)
    ]
    more, fewer = replays(split.held_out, trees)
    spec = evidence.record.suite.interval
    gain = relative_gain(replay_counts(more), over=replay_counts(fewer), spec=spec)
    kind = equivalence(gain, form.margin)
    reason = (
        f"{more.tokens_per_step:.3f} tokens/step with {form.with_heads} heads, {fewer.tokens_per_step:.3f} "
        f"with {form.without_heads}, "
        f"{form.num_nodes} nodes each ({split.origin}); the 90 % interval of the gain lies within "
        f"+-{form.margin:.0%}: {holds(kind)}"
    )
    return Finding(
        kind=kind,
        ours=percent(gain),
        reason=reason,
        figure_kind="replayed",
        asked=(Asked(gain, form.margin, "within"),),
    )


def judge_added_step(form: AddedStepForm, evidence: Evidence) -> Finding:
    """Return whether a whole step takes little more than its backbone's part, or than a vanilla step.

    Raises: NotTestable without speed or without separately timed steps of both.
    """
    evidence.require_speed()
    evidence.generations(form.arm)
    record, baseline = evidence.record, evidence.record.suite.arm(form.arm).baseline
    whole = separate_s_by_prompt(record, form.arm)
    if form.against == "backbone":
        other, name = separate_s_by_prompt(record, form.arm, "backbone_s"), "their backbone's part"
    else:
        other = separate_s_by_prompt(record, baseline) if baseline is not None else None
        name = f"those of {baseline}"
    if whole is None or other is None or not (keys := sorted(whole.keys() & other.keys())):
        raise NotTestable(f"no separately timed steps of {form.arm}, or none to hold them against")
    interval = bootstrap_totals(
        lambda steps, others: steps / others,
        [whole[key] for key in keys],
        [other[key] for key in keys],
        spec=record.suite.interval,
        rng=np.random.default_rng(record.suite.interval.seed),
    )
    kind = below(interval, form.bound)
    nodes = evidence.tree(form.arm).num_nodes
    reason = (
        f"whole steps of {form.arm} ({nodes} nodes) over {name}, timed apart from decoding, below "
        f"{form.bound:g}x: {holds(kind)}"
    )
    return Finding(
        kind=kind,
        ours=shown(interval, "x"),
        reason=reason,
        figure_kind="measured",
        asked=(Asked(interval, form.bound, "below"),),
    )
