"""Transfer forms about training, judged on an ablation's record: pure functions of the record and the form's bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from harness.ablation import AblationRecord
from harness.ablation_figures import Columns, TextKind, best_rate_columns, change_columns, kl_of, rate_columns, repetition_columns
from harness.claim_evidence import EQUIVALENCE_LEVEL
from harness.claim_forms import (
    HeadOrderForm,
    HurtsMoreForm,
    KeepsQualityForm,
    LittleMemoryForm,
    MoreTokensForm,
    SpareHeadForm,
    TrainingForm,
)
from harness.claim_outcomes import Finding, NotTestable, combined, holds, percent, shown
from harness.claim_specs import ClaimSpec
from harness.intervals import above, below, bootstrap_ratio, equivalence
from harness.judgement import ClaimVerdict, Interval, VerdictKind


def training_verdicts(claims: Sequence[ClaimSpec], record: AblationRecord) -> tuple[ClaimVerdict, ...]:
    """Return one verdict for each claim that has a form about training.

    A suite whose budget decides nothing leaves all of them untested; its table shows the signs.
    """
    return tuple(_verdict(claim, record) for claim in claims if claim.training is not None)


def judge_training(form: TrainingForm, record: AblationRecord) -> Finding:
    """Judge one claim.

    Raises: NotTestable where the record lacks what the form needs.
    """
    return _TESTS[type(form)](form, record)


def _verdict(claim: ClaimSpec, record: AblationRecord) -> ClaimVerdict:
    assert claim.training is not None
    finding: Finding | None = None
    try:
        if not record.spec.decides_claims:
            raise NotTestable(f"{record.spec.name} shows signs and orders only: {record.spec.answer_tokens:,} tokens an arm are too few")
        finding = judge_training(claim.training, record)
    except NotTestable as gap:
        missing = str(gap)
    return ClaimVerdict(
        claim_id=claim.id,
        stated=claim.stated,
        place=claim.place,
        paper_figure=claim.figure,
        form="transfer",
        kind=finding.kind if finding is not None else VerdictKind.NOT_TESTED,
        ours=finding.ours if finding is not None else "",
        figure_kind=finding.figure_kind if finding is not None else None,
        reason=finding.reason if finding is not None else missing,
    )


def _more_tokens(form: MoreTokensForm, record: AblationRecord) -> Finding:
    columns = rate_columns if form.trees == "fixed" else best_rate_columns
    where = f"one tree of {len(record.tree.paths)} paths" if form.trees == "fixed" else "each one's own best tree"
    parts = []
    for words, gain, ours in _gains(record, form.arm, over=form.over, columns=columns):
        kind = above(gain, form.bound)
        reason = f"{words} {holds(kind)} (its seeds: {', '.join(f'{rate:.3f}' for rate in ours.seeds)})"
        parts.append(Finding(kind=kind, ours=f"{words} {shown(gain, 'x', digits=3)}", reason=reason, figure_kind="replayed"))
    repeated = [repetition_columns(record, arm).interval(record.spec.interval).estimate for arm in (form.arm, form.over)]
    both = combined(parts)
    prefix = f"tokens/step of {form.arm} over {form.over} at {where} above {form.bound:g}, a step costing both the same"
    repetition = f"4-grams repeated within an answer: {repeated[0]:.1%} against {repeated[1]:.1%}".replace("%", " %")
    return replace(both, reason=f"{prefix}: {both.reason}; {repetition}")


def _gains(record: AblationRecord, arm: str, *, over: str, columns: Callable[..., Columns]) -> list[tuple[str, Interval, Columns]]:
    """Return an arm's gain in tokens/step on the text that each writes itself and on the original's: words, gain, the arm's own columns."""
    texts: tuple[tuple[TextKind, str], ...] = (("own", "on the text of each"), ("original", "on the original's"))
    found = []
    for text, words in texts:
        ours, theirs = (columns(record, name, text=text) for name in (arm, over))
        found.append((words, ours.over(theirs, spec=record.spec.interval), ours))
    return found


def _keeps_quality(form: KeepsQualityForm, record: AblationRecord) -> Finding:
    parts = []
    for arm in form.arms:
        if form.over is not None:
            gains = _gains(record, arm, over=form.over, columns=rate_columns)
            if any(above(gain, 1.0) is not VerdictKind.REPRODUCED for _, gain, _ in gains):
                found = ", ".join(f"{words} {shown(gain, 'x', digits=3)}" for words, gain, _ in gains)
                raise NotTestable(f"{arm} does not yield more tokens/step than {form.over} on both texts ({found}): it paid for nothing")
        parts.append(_divergence_part(arm, record, max_kl=form.max_kl))
    return combined(parts)


def _divergence_part(arm: str, record: AblationRecord, *, max_kl: float) -> Finding:
    kl = change_columns(record, arm, kl_of).interval(record.spec.interval)
    kind = VerdictKind.REPRODUCED if kl.high <= max_kl else below(kl, max_kl)
    reason = f"{arm}: at most {max_kl:g} nats a token from the original {holds(kind)}"
    return Finding(kind=kind, ours=f"{arm} {shown(kl, ' nats', digits=4)}", reason=reason, figure_kind="measured")


def _hurts_more(form: HurtsMoreForm, record: AblationRecord) -> Finding:
    difference = change_columns(record, form.arm, kl_of).less(change_columns(record, form.over, kl_of), spec=record.spec.interval)
    kind = above(difference, form.bound)
    reason = f"{form.arm} further from the original than {form.over}, by more than {form.bound:g} nats a token, {holds(kind)}"
    parts = [Finding(kind=kind, ours=f"{shown(difference, ' nats', digits=4)} more", reason=reason, figure_kind="measured")]
    if form.max_kl is not None:
        parts.append(_divergence_part(form.over, record, max_kl=form.max_kl))
    return combined(parts)


def _little_memory(form: LittleMemoryForm, record: AblationRecord) -> Finding:
    peaks = []
    for arm in (form.arm, form.over):
        found = [result.memory_bytes for result in record.of(arm) if result.memory_bytes is not None]
        if not found:
            raise NotTestable(f"the record has no memory of arm {arm}")
        peaks.append(found)
    mean = [sum(found) / len(found) for found in peaks]
    share = mean[0] / mean[1] - 1
    kind = VerdictKind.REPRODUCED if share <= form.margin else VerdictKind.NOT_REPRODUCED
    reason = (
        f"{form.arm} holds {mean[0] / 1e6:,.0f} MB at most, {form.over} {mean[1] / 1e6:,.0f} MB; up to {form.margin:.0%} more "
        f"{holds(kind)} ({record.environment.device.kind}, mean over seeds)"
    )
    return Finding(kind=kind, ours=f"{share:+.1%} memory".replace("%", " %"), reason=reason, figure_kind="measured")


def _head_order(form: HeadOrderForm, record: AblationRecord) -> Finding:
    results = record.of(form.arm)
    if not results:
        raise NotTestable(f"the record has no arm {form.arm}")
    spec, parts = record.spec.interval, []
    losses: dict[str, list[np.ndarray]] = {}
    for result in results:
        for prompt in record.trace(result).prompts:
            if prompt.nll is None or prompt.num_heads < 2:
                raise NotTestable("the trace has no losses of two heads or more")
            losses.setdefault(prompt.key, []).append(prompt.nll.astype(np.float64))
    num_heads = next(iter(losses.values()))[0].shape[1]
    for head in range(1, num_heads):
        rises = [np.concatenate([loss[:, head] - loss[:, head - 1] for loss in rows]) for rows in losses.values()]
        sums, counts = (np.array([float(f(rise)) for rise in rises]) for f in (np.nansum, lambda rise: np.isfinite(rise).sum()))
        if not counts.sum():
            raise NotTestable(f"no position has a target for head {head + 1}")
        interval = bootstrap_ratio(sums, counts, spec=spec, rng=np.random.default_rng(spec.seed))
        kind = above(interval, form.bound)
        parts.append(Finding(kind=kind, ours=shown(interval), reason=f"head {head} to {head + 1} {holds(kind)}", figure_kind="measured"))
    both = combined(parts)
    prefix = f"each rise in mean loss of {form.arm} against {form.bound:g} nats"
    return replace(both, ours=f"+nats a head: {both.ours}", reason=f"{prefix}: {both.reason}")


def _spare_head(form: SpareHeadForm, record: AblationRecord) -> Finding:
    if (traced := min((record.trace(result).num_heads for result in record.of(form.arm)), default=0)) < form.with_heads:
        raise NotTestable(f"the traces of {form.arm} have {traced} heads, the claim is about {form.with_heads}")
    more, fewer = (
        best_rate_columns(record, form.arm, num_nodes=form.num_nodes, max_depth=heads) for heads in (form.with_heads, form.without_heads)
    )
    spec = record.spec.interval.model_copy(update={"level": EQUIVALENCE_LEVEL})
    gain = more.over(fewer, spec=spec)
    relative = gain.model_copy(update={"estimate": gain.estimate - 1, "low": gain.low - 1, "high": gain.high - 1})
    kind = equivalence(relative, form.margin)
    reason = (
        f"{form.arm} with {form.with_heads} heads against {form.without_heads}, {form.num_nodes} nodes each, trees grown on other text; "
        f"the 90 % interval of the gain against +-{form.margin:.0%} {holds(kind)}"
    )
    return Finding(kind=kind, ours=percent(relative), reason=reason, figure_kind="replayed")


_TESTS: dict[type, Callable[..., Finding]] = {
    MoreTokensForm: _more_tokens,
    KeepsQualityForm: _keeps_quality,
    HurtsMoreForm: _hurts_more,
    LittleMemoryForm: _little_memory,
    HeadOrderForm: _head_order,
    SpareHeadForm: _spare_head,
}
