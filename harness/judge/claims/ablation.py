"""Transfer forms about training, judged on an ablation's record: pure functions of the record and the form's
bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from harness.judge.ablation import (
    Columns,
    TextKind,
    best_rate_columns,
    change_columns,
    kl_of,
    rate_columns,
    repetition_columns,
)
from harness.judge.claims.evidence import EQUIVALENCE_LEVEL
from harness.judge.claims.findings import (
    Finding,
    NotTestable,
    above,
    below,
    combined,
    equivalence,
    holds,
    percent,
    shown,
    tested,
)
from harness.judge.claims.verdicts import verdict
from harness.judge.judgement import ClaimVerdict, VerdictKind
from harness.records.ablation import AblationRecord, TextChange
from harness.specs.claim_forms import (
    HeadOrderForm,
    HurtsMoreForm,
    KeepsQualityForm,
    LittleMemoryForm,
    MoreTokensForm,
    SpareHeadForm,
    TrainingForm,
    UnchangedForm,
)
from harness.specs.claims import ClaimSpec
from harness.stats import bootstrap_ratio


def training_verdicts(claims: Sequence[ClaimSpec], record: AblationRecord) -> tuple[ClaimVerdict, ...]:
    """Return one verdict for each claim that has a form about training.

    A suite whose budget decides nothing leaves all of them untested; its table shows the signs.
    """
    return tuple(
        verdict(claim, "transfer", tested(partial(_decide, form, record)))
        for claim in claims
        if (form := claim.training) is not None
    )


def decided_elsewhere(
    claims: Sequence[ClaimSpec], record: AblationRecord, others: Sequence[AblationRecord]
) -> dict[str, str]:
    """Return, for each claim that a finished record of a larger budget tests too, the name of that record's
    suite: it decides the claim.

    Only records of the same model and the same heads at the start are looked at. A claim is decided once, by
    the largest budget.
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
    """Judge one claim, unless the record's budget or its missing arms leave everything open."""
    if not record.spec.decides_claims:
        raise NotTestable(
            f"{record.spec.name} shows signs and orders only: "
            f"{record.spec.answer_tokens:,} tokens an arm are too few"
        )
    if record.manifest is None:
        raise NotTestable("the record is unfinished: some arms or seeds are missing")
    return judge_training(form, record)


def judge_training(form: TrainingForm, record: AblationRecord) -> Finding:
    """Judge one claim.

    Raises: NotTestable where the record lacks what the form needs.
    """
    return _TESTS[type(form)](form, record)


def _more_tokens(form: MoreTokensForm, record: AblationRecord) -> Finding:
    _check_step_cost(record, form.arm, form.over)
    columns = rate_columns if form.trees == "fixed" else best_rate_columns
    where = (
        f"one tree of {len(record.tree.paths)} paths" if form.trees == "fixed" else "each one's own best tree"
    )
    both = combined(_gain_parts(record, form.arm, over=form.over, bound=form.bound, columns=columns))
    repeated = [
        repetition_columns(record, arm).interval(record.spec.interval).estimate
        for arm in (form.arm, form.over)
    ]
    prefix = (
        f"tokens/step of {form.arm} over {form.over} at {where} above {form.bound:g}, a step "
        "costing both the same"
    )
    repetition = f"4-grams repeated within an answer: {repeated[0]:.1%} against {repeated[1]:.1%}".replace(
        "%", " %"
    )
    return replace(both, reason=f"{prefix}: {both.reason}; {repetition}")


def _gain_parts(
    record: AblationRecord, arm: str, *, over: str, bound: float, columns: Callable[..., Columns]
) -> list[Finding]:
    """Judge an arm's gain in tokens/step on the text that each writes itself, and on the original's, which
    both read.
    """
    texts: tuple[tuple[TextKind, str], ...] = (
        ("own", "on the text of each"),
        ("original", "on the original's"),
    )
    parts = []
    for text, words in texts:
        ours, theirs = (columns(record, name, text=text) for name in (arm, over))
        gain, seeds = (
            ours.over(theirs, spec=record.spec.interval),
            _by_seed(ours, theirs, record, arm, over, lambda a, b: a / b),
        )
        kind = _agreed(above(gain, bound), [seed > bound for seed in seeds])
        reason = f"{words} {holds(kind)} ({_listed(seeds, 3)})"
        parts.append(
            Finding(
                kind=kind, ours=f"{words} {shown(gain, 'x', digits=3)}", reason=reason, figure_kind="replayed"
            )
        )
    return parts


def _by_seed(
    ours: Columns,
    theirs: Columns,
    record: AblationRecord,
    arm: str,
    over: str,
    relation: Callable[[float, float], float],
) -> list[float]:
    """Return what two arms are to each other in each seed's training; the start, which has no seed, stands
    for all.
    """
    seeds = [[result.seed for result in record.of(name)] for name in (arm, over)]
    if None not in seeds[1] and seeds[0] != seeds[1]:
        raise NotTestable(f"{arm} was trained on the seeds {seeds[0]}, {over} on {seeds[1]}")
    base = theirs.seeds * len(ours.seeds) if None in seeds[1] else theirs.seeds
    return [relation(one, other) for one, other in zip(ours.seeds, base, strict=True)]


def _agreed(kind: VerdictKind, seeds_hold: Sequence[bool]) -> VerdictKind:
    """The word of an interval over texts, unless a seed's training says the opposite: then the claim is
    open.
    """
    against = {VerdictKind.REPRODUCED: not all(seeds_hold), VerdictKind.NOT_REPRODUCED: any(seeds_hold)}
    return VerdictKind.INCONCLUSIVE if against.get(kind, False) else kind


def _listed(seeds: Sequence[float], digits: int) -> str:
    return f"by seed {', '.join(f'{seed:.{digits}f}' for seed in seeds)}"


def _check_step_cost(record: AblationRecord, arm: str, over: str) -> None:
    """Raise NotTestable unless a step of both arms costs the same."""
    recipes = [_recipe(record, name) for name in (arm, over)]
    for name in ("num_heads", "num_layers", "architecture"):
        if recipes[0].get(name) != recipes[1].get(name):
            raise NotTestable(
                f"the heads of {arm} and {over} differ in {name}: a step does not cost both the same"
            )
    for name, recipe in zip((arm, over), recipes, strict=True):
        adapted = recipe.get("backbone") == "lora" and recipe.get("lora", {}).get("lm_head")
        if adapted and recipe.get("architecture") == "shared" and recipe.get("heads_lm_head") == "original":
            raise NotTestable(
                f"a step of {name} reads two LM heads, the adapted and the original: it costs more"
            )


def _recipe(record: AblationRecord, arm: str) -> dict[str, Any]:
    results = record.of(arm)
    if not results:
        raise NotTestable(f"the record has no arm {arm}")
    return results[0].recipe or {}


def _keeps_quality(form: KeepsQualityForm, record: AblationRecord) -> Finding:
    parts = []
    for arm in form.arms:
        gains = _gain_parts(record, arm, over=form.over, bound=1.0, columns=rate_columns)
        named = [
            replace(
                gain,
                ours=f"{arm} {gain.ours}",
                reason=f"{arm}: more tokens/step than {form.over} {gain.reason}",
            )
            for gain in gains
        ]
        divergence = _divergence_part(arm, record, max_kl=form.max_kl)
        if form.gain == "judged":
            parts += [*named, divergence]
            continue
        gained = combined(named)
        if gained.kind is VerdictKind.NOT_REPRODUCED:
            raise NotTestable(
                f"{arm} yields no more tokens/step than {form.over} ({gained.ours}): its quality paid for "
                "nothing"
            )
        if gained.kind is VerdictKind.INCONCLUSIVE:
            open_reason = f"{divergence.reason}; counted only where tokens/step rose, and {gained.reason}"
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
    control = _gain_parts(record, form.control, over=form.over, bound=1.0, columns=rate_columns)
    control.append(_divergence_part(form.control, record, max_kl=form.max_kl))
    return replace(
        found,
        reason=f"{found.reason}; beside them, not judged, {form.control}: "
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
        f"the backbone of {form.arm} hashed before and behind its training, where it was trained: "
        f"one and the same {holds(kind)}"
    )
    return Finding(
        kind=kind,
        ours=f"{changed} of {len(pairs)} trainings changed a tensor",
        reason=reason,
        figure_kind="measured",
    )


def _divergence_part(arm: str, record: AblationRecord, *, max_kl: float) -> Finding:
    columns = change_columns(record, arm, kl_of)
    kl = columns.interval(record.spec.interval)
    kind = _agreed(
        VerdictKind.REPRODUCED if kl.high <= max_kl else below(kl, max_kl),
        [seed <= max_kl for seed in columns.seeds],
    )
    reason = (
        f"{arm}: at most {max_kl:g} nats a token from the original {holds(kind)} "
        f"({_listed(columns.seeds, 4)})"
    )
    return Finding(
        kind=kind, ours=f"{arm} {shown(kl, ' nats', digits=4)}", reason=reason, figure_kind="measured"
    )


def _hurts_more(form: HurtsMoreForm, record: AblationRecord) -> Finding:
    if form.differ is not None:
        ours, theirs = (_recipe(record, name) for name in (form.arm, form.over))
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
        _worse_part(
            form, record, kl_of, bound=form.bound, words="further from the original", references=False
        )
    ]
    if form.on_references:
        words = "less fit to predict texts of another hand"
        parts.append(
            _worse_part(
                form, record, lambda text: text.tuned_nll_sum, bound=0.0, words=words, references=True
            )
        )
    if form.max_kl is not None:
        parts.append(_divergence_part(form.over, record, max_kl=form.max_kl))
    return combined(parts)


def _worse_part(
    form: HurtsMoreForm,
    record: AblationRecord,
    total: Callable[[TextChange], float],
    *,
    bound: float,
    words: str,
    references: bool,
) -> Finding:
    ours, theirs = (
        change_columns(record, arm, total, references=references) for arm in (form.arm, form.over)
    )
    difference, seeds = (
        ours.less(theirs, spec=record.spec.interval),
        _by_seed(ours, theirs, record, form.arm, form.over, lambda a, b: a - b),
    )
    kind = _agreed(above(difference, bound), [seed > bound for seed in seeds])
    reason = (
        f"{form.arm} {words} than {form.over}, by more than {bound:g} nats a token, {holds(kind)} "
        f"({_listed(seeds, 4)})"
    )
    return Finding(
        kind=kind,
        ours=f"{words}: {shown(difference, ' nats', digits=4)} more",
        reason=reason,
        figure_kind="measured",
    )


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
        f"{form.arm} holds {mean[0] / 1e6:,.0f} MB at most, {form.over} {mean[1] / 1e6:,.0f} MB; up to "
        f"{form.margin:.0%} more "
        f"{holds(kind)} ({record.environment.device.kind}, mean over seeds)"
    )
    return Finding(
        kind=kind, ours=f"{share:+.1%} memory".replace("%", " %"), reason=reason, figure_kind="measured"
    )


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
        rises = [
            np.concatenate([loss[:, head] - loss[:, head - 1] for loss in rows]) for rows in losses.values()
        ]
        sums, counts = (
            np.array([float(f(rise)) for rise in rises])
            for f in (np.nansum, lambda rise: np.isfinite(rise).sum())
        )
        if not counts.sum():
            raise NotTestable(f"no position has a target for head {head + 1}")
        interval = bootstrap_ratio(sums, counts, spec=spec, rng=np.random.default_rng(spec.seed))
        kind = above(interval, form.bound)
        parts.append(
            Finding(
                kind=kind,
                ours=shown(interval),
                reason=f"head {head} to {head + 1} {holds(kind)}",
                figure_kind="measured",
            )
        )
    both = combined(parts)
    prefix = f"each rise in mean loss of {form.arm} against {form.bound:g} nats"
    return replace(both, ours=f"+nats a head: {both.ours}", reason=f"{prefix}: {both.reason}")


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
        "each, trees grown on other text; "
        f"the 90 % interval of the gain against +-{form.margin:.0%} {holds(kind)}"
    )
    return Finding(kind=kind, ours=percent(relative), reason=reason, figure_kind="replayed")


_TESTS: dict[type, Callable[..., Finding]] = {
    MoreTokensForm: _more_tokens,
    KeepsQualityForm: _keeps_quality,
    UnchangedForm: _unchanged,
    HurtsMoreForm: _hurts_more,
    LittleMemoryForm: _little_memory,
    HeadOrderForm: _head_order,
    SpareHeadForm: _spare_head,
}
