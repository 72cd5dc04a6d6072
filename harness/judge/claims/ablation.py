"""Transfer forms about training, judged on an ablation's record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from harness.judge.ablation import (
    Floats,
    best_rate_columns,
    kl_of,
    rate_columns,
    repetition_columns,
)
from harness.judge.claims.ablation_parts import (
    check_step_cost,
    divergence_part,
    gain_parts,
    recipe_of,
    worse_part,
)
from harness.judge.claims.evidence import EQUIVALENCE_LEVEL
from harness.judge.claims.findings import (
    Asked,
    Finding,
    NotTestable,
    combined,
    equivalence,
    holds,
    percent,
    tested,
)
from harness.judge.claims.heads import rising_losses
from harness.judge.claims.verdicts import verdict
from harness.judge.judgement import ClaimVerdict, VerdictKind
from harness.records.ablation import AblationRecord
from harness.specs.claims import ClaimSpec
from harness.specs.forms.training import (
    HeadOrderForm,
    HurtsMoreForm,
    KeepsQualityForm,
    LittleMemoryForm,
    MoreTokensForm,
    SpareHeadForm,
    TrainingForm,
    UnchangedForm,
)


def training_verdicts(claims: Sequence[ClaimSpec], record: AblationRecord) -> tuple[ClaimVerdict, ...]:
    """Return one verdict for each claim that has a form about training.

    A suite whose budget decides nothing leaves all of them untested; its table shows the signs.
    """
    return tuple(
        verdict(claim, "transfer", tested(partial(_decide, form, record)), by=form)
        for claim in claims
        if (form := claim.training) is not None
    )


def decided_elsewhere(
    claims: Sequence[ClaimSpec], record: AblationRecord, others: Sequence[AblationRecord]
) -> dict[str, str]:
    """Return the suite of a larger budget that decides a claim, for each claim that one tests.

    Only finished records of the same model and the same heads at the start are looked at. A claim is decided
    once, by the largest budget.
    """
    ours = record.environment
    larger = [
        other
        for other in others
        if other.spec.answer_tokens > record.spec.answer_tokens
        and (other.environment.backbone_sha256, other.environment.heads_sha256)
        == (ours.backbone_sha256, ours.heads_sha256)
    ]
    found: dict[str, str] = {}
    for other in sorted(larger, key=lambda one: one.spec.answer_tokens):
        tested = [
            verdict
            for verdict in training_verdicts(claims, other)
            if verdict.kind is not VerdictKind.NOT_TESTED
        ]
        found |= {verdict.claim_id: other.spec.name for verdict in tested}
    return found


def _decide(form: TrainingForm, record: AblationRecord) -> Finding:
    """Return a claim's finding, unless the budget or missing arms leave everything open."""
    if not record.spec.decides_claims:
        raise NotTestable(
            f"{record.spec.name} shows signs and orders only: "
            f"{record.spec.answer_tokens:,} tokens an arm are too few"
        )
    if record.manifest is None:
        raise NotTestable("the record is unfinished: some arms or seeds are missing")
    return judge_training(form, record)


def judge_training(form: TrainingForm, record: AblationRecord) -> Finding:
    """Return what an ablation's record finds on one claim.

    Raises: NotTestable where the record lacks what the form needs.
    """
    return _TESTS[type(form)](form, record)


def _more_tokens(form: MoreTokensForm, record: AblationRecord) -> Finding:
    check_step_cost(record, form.arm, over=form.over)
    columns = rate_columns if form.trees == "fixed" else best_rate_columns
    where = (
        f"one tree of {len(record.tree.paths)} paths" if form.trees == "fixed" else "each one's own best tree"
    )
    both = combined(gain_parts(record, form.arm, over=form.over, bound=form.bound, columns=columns))
    repeated = [
        repetition_columns(record, arm).interval(record.spec.interval).estimate
        for arm in (form.arm, form.over)
    ]
    prefix = (
        f"tokens/step of {form.arm} over {form.over} at {where} above {form.bound:g}, where a step costs "
        "both the same"
    )
    repetition = f"4-grams repeated within an answer: {repeated[0]:.1%} against {repeated[1]:.1%}".replace(
        "%", " %"
    )
    return replace(both, reason=f"{prefix}: {both.reason}; {repetition}")


def _keeps_quality(form: KeepsQualityForm, record: AblationRecord) -> Finding:
    parts = []
    for arm in form.arms:
        gains = gain_parts(record, arm, over=form.over, bound=1.0, columns=rate_columns)
        named = [
            replace(
                gain,
                ours=f"{arm} {gain.ours}",
                reason=f"{arm} yields more tokens/step than {form.over}: {gain.reason}",
            )
            for gain in gains
        ]
        divergence = divergence_part(arm, record, max_kl=form.max_kl)
        if form.gain == "judged":
            parts += [*named, divergence]
            continue
        gained = combined(named)
        if gained.kind is VerdictKind.NOT_REPRODUCED:
            raise NotTestable(
                f"{arm} yields no more tokens/step than {form.over} ({gained.ours}): there is no gain whose "
                "price in quality could be judged"
            )
        if gained.kind is VerdictKind.INCONCLUSIVE:
            open_reason = f"{divergence.reason}; this counts only where tokens/step rose: {gained.reason}"
            divergence = replace(
                divergence,
                kind=VerdictKind.INCONCLUSIVE,
                ours=f"{divergence.ours}; {gained.ours}",
                reason=open_reason,
            )
        parts.append(divergence)
    found = combined(parts)
    if form.control is None or not record.of(form.control):
        return found
    control = gain_parts(record, form.control, over=form.over, bound=1.0, columns=rate_columns)
    control.append(divergence_part(form.control, record, max_kl=form.max_kl))
    return replace(
        found,
        reason=f"{found.reason}; for comparison, not judged, {form.control}: "
        f"{'; '.join(part.ours for part in control)}",
    )


def _unchanged(form: UnchangedForm, record: AblationRecord) -> Finding:
    results = record.of(form.arm)
    pairs = [result.backbone_sha256s for result in results if result.backbone_sha256s is not None]
    if not pairs or len(pairs) < len(results):
        raise NotTestable(f"the record does not say what training {form.arm} did to the backbone's tensors")
    changed = sum(before != after for before, after in pairs)
    kind = VerdictKind.NOT_REPRODUCED if changed else VerdictKind.REPRODUCED
    reason = (
        f"the backbone has the same hash before and after the training of {form.arm}, on the machine that "
        f"trained it: {holds(kind)}"
    )
    return Finding(
        kind=kind,
        ours=f"{changed} of {len(pairs)} trainings changed a tensor",
        reason=reason,
        figure_kind="measured",
    )


def _hurts_more(form: HurtsMoreForm, record: AblationRecord) -> Finding:
    if form.differ is not None:
        ours, theirs = (recipe_of(record, name) for name in (form.arm, form.over))
        if unlike := sorted(
            name
            for name in ours.keys() | theirs.keys()
            if ours.get(name) != theirs.get(name) and name not in form.differ
        ):
            raise NotTestable(
                f"{form.arm} and {form.over} differ in {', '.join(unlike)}, the claim is about "
                f"{', '.join(form.differ)}"
            )
    parts = [
        worse_part(
            form,
            record,
            kl_of,
            bound=form.bound,
            description="further from the original",
            references=False,
        )
    ]
    if form.on_references:
        parts.append(
            worse_part(
                form,
                record,
                lambda text: text.tuned_nll_sum,
                bound=0.0,
                description="worse at predicting texts by others",
                references=True,
            )
        )
    if form.max_kl is not None:
        parts.append(divergence_part(form.over, record, max_kl=form.max_kl))
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
        f"{form.arm} takes {mean[0] / 1e6:,.0f} MB at most, {form.over} {mean[1] / 1e6:,.0f} MB "
        f"({record.environment.device.kind}, mean over seeds); up to {form.margin:.0%} more: {holds(kind)}"
    )
    return Finding(
        kind=kind, ours=f"{share:+.1%} memory".replace("%", " %"), reason=reason, figure_kind="measured"
    )


def _head_order(form: HeadOrderForm, record: AblationRecord) -> Finding:
    results = record.of(form.arm)
    if not results:
        raise NotTestable(f"the record has no arm {form.arm}")
    losses: dict[str, list[Floats]] = {}
    for result in results:
        for prompt in record.trace(result).prompts:
            if prompt.nll is None or prompt.num_heads < 2:
                raise NotTestable("the trace has no losses of two heads or more")
            losses.setdefault(prompt.key, []).append(prompt.nll.astype(np.float64))
    texts = [np.concatenate(seeds) for seeds in losses.values()]
    return rising_losses(texts, bound=form.bound, spec=record.spec.interval, whose=f" of {form.arm}")


def _spare_head(form: SpareHeadForm, record: AblationRecord) -> Finding:
    if (
        traced := min((record.trace(result).num_heads for result in record.of(form.arm)), default=0)
    ) < form.with_heads:
        raise NotTestable(
            f"the traces of {form.arm} have {traced} heads, the claim is about {form.with_heads}"
        )
    more, fewer = (
        best_rate_columns(record, form.arm, num_nodes=form.num_nodes, max_depth=heads)
        for heads in (form.with_heads, form.without_heads)
    )
    spec = record.spec.interval.model_copy(update={"level": EQUIVALENCE_LEVEL})
    gain = more.over(fewer, spec=spec)
    relative = gain.model_copy(
        update={"estimate": gain.estimate - 1, "low": gain.low - 1, "high": gain.high - 1}
    )
    kind = equivalence(relative, form.margin)
    reason = (
        f"{form.arm} with {form.with_heads} heads against {form.without_heads}, {form.num_nodes} nodes "
        "each, trees grown on other text; the 90 % interval of the gain lies within "
        f"+-{form.margin:.0%}: {holds(kind)}"
    )
    return Finding(
        kind=kind,
        ours=percent(relative),
        reason=reason,
        figure_kind="replayed",
        asked=(Asked(relative, form.margin, "within"),),
    )


_TESTS: dict[type, Callable[..., Finding]] = {
    MoreTokensForm: _more_tokens,
    KeepsQualityForm: _keeps_quality,
    UnchangedForm: _unchanged,
    HurtsMoreForm: _hurts_more,
    LittleMemoryForm: _little_memory,
    HeadOrderForm: _head_order,
    SpareHeadForm: _spare_head,
}
