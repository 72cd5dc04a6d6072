"""Transfer forms on a run: a claim's shape (an order, a trend, an identity) tested on one record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from harness.judge.claims.evidence import (
    EQUIVALENCE_LEVEL,
    Evidence,
    paired_counts,
    ratio_of_rates,
    relative_gain,
    replays,
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
    varied,
)
from harness.judge.claims.heads import (
    judge_accuracy_falls,
    judge_added_step,
    judge_extra_head,
    judge_loss_grows,
    judge_more_candidates,
)
from harness.judge.claims.trees import (
    judge_category_above,
    judge_category_order,
    judge_log_growth,
    judge_search_depth,
    judge_search_promise,
    judge_sparse_beats_dense,
    judge_speed_peaks,
    step_seconds,
)
from harness.judge.judgement import Comparison, Divergence, VerdictKind
from harness.judge.parity import rejection_pairs
from harness.judge.step_costs import separate_s_by_prompt
from harness.judge.totals import column, prompt_totals, ratio_of_sums
from harness.records.trials import Generation
from harness.specs.forms.claims import (
    AccuracyFallsForm,
    AddedStepForm,
    CategoryAboveForm,
    CategoryOrderForm,
    ExtraHeadForm,
    FasterForm,
    LadderStepForm,
    LogGrowthForm,
    LossGrowsForm,
    LosslessForm,
    MoreCandidatesForm,
    RateOverForm,
    RejectionExactForm,
    SearchDepthForm,
    SearchPromiseForm,
    SparseBeatsDenseForm,
    SpeedIdentityForm,
    SpeedPeaksForm,
    TransferForm,
)
from harness.stats import Floats, bootstrap_totals


def judge_transfer(form: TransferForm, *, evidence: Evidence) -> Finding:
    """Return what a run's record finds on one claim.

    Raises: NotTestable if the record lacks what the form needs.
    """
    return varied(form, lambda one: _TESTS[type(one)](one, evidence))


def _lossless(form: LosslessForm, evidence: Evidence) -> Finding:
    _require_known_rounding(evidence)
    # The claim is about a frozen backbone; a tuned one writes another text.
    medusa = [
        arm for arm in evidence.record.suite.arms if arm.method == "medusa" and arm.backbone == "original"
    ]
    greedy = {arm.name for arm in medusa if not arm.stochastic}
    decoded = [generation for generation in evidence.record.generations if generation.trial.arm in greedy]
    if not decoded or not evidence.parity.num_compared:
        raise NotTestable("the record compares no greedy Medusa generation with vanilla")
    divergences = [divergence for divergence in evidence.parity.divergences if divergence.arm in greedy]
    bugs = [divergence for divergence in divergences if divergence.kind == "bug"]
    num_ties = len(divergences) - len(bugs)
    num_tokens = sum(generation.num_tokens for generation in decoded)
    allowed = max(1, math.floor(form.max_tie_rate * num_tokens))
    if bugs:
        first = bugs[0]
        gap = "no known gap" if first.gap is None else f"a gap of {first.gap:.2g}"
        kind, reason = (
            VerdictKind.NOT_REPRODUCED,
            f"{first.arm} differs from vanilla at token {first.position} of {first.prompt_key}, with {gap}",
        )
    elif evidence.parity.rounding is not None:
        kind, reason = VerdictKind.REPRODUCED, _up_to_ties(evidence, decoded, divergences)
    elif num_ties > allowed:
        kind, reason = (
            VerdictKind.INCONCLUSIVE,
            f"{num_ties} ties in {num_tokens:,} tokens, and rounding explains {allowed}",
        )
    else:
        kind, reason = (
            VerdictKind.REPRODUCED,
            f"all match vanilla but for {num_ties} shown ties; {allowed} allowed in {num_tokens:,} tokens",
        )
    ours = f"{len(decoded)} generations of {len(greedy)} arms, {num_ties} ties, {len(bugs)} other divergences"
    return Finding(kind=kind, ours=ours, reason=reason, figure_kind="measured")


def _require_known_rounding(evidence: Evidence) -> None:
    """Refuse half precision whose rounding was not measured: no divergence can be told from a bug there."""
    if (dtype := evidence.record.environment.dtype) != "float32" and evidence.parity.rounding is None:
        raise NotTestable(
            f"parity is exact in float32 only, and this run is in {dtype}, whose rounding was not measured"
        )


def _up_to_ties(evidence: Evidence, decoded: Sequence[Generation], divergences: Sequence[Divergence]) -> str:
    """Return how far texts of half precision are equal.

    A tie ends what can be compared of a text, so tokens are counted up to there.
    """
    assert evidence.parity.rounding is not None
    parted = {(row.arm, row.prompt_key): row.position for row in divergences}
    equal = sum(parted.get((one.trial.arm, one.trial.prompt_key), one.num_tokens) for one in decoded)
    margin, dtype = evidence.parity.rounding.tie_margin, evidence.parity.rounding.dtype
    return (
        f"equal to vanilla up to {len(divergences)} ties in {equal} tokens; a tie is a gap below "
        f"{margin:.2g}, by measured {dtype} rounding"
    )


def _faster(form: FasterForm, evidence: Evidence) -> Finding:
    comparison = evidence.comparison(form.arm)
    _require_known_rounding(evidence)
    speedup = comparison.wall_speedup if form.clock == "wall" else comparison.speedup
    kind = above(speedup, form.bound)
    clock = ", prefill included," if form.clock == "wall" else ""
    reason = f"tokens/s of {form.arm} over {comparison.baseline}{clock} above {form.bound:g}x: {holds(kind)}"
    speed = Finding(
        kind=kind,
        ours=shown(speedup, "x"),
        reason=reason,
        figure_kind="measured",
        asked=(Asked(speedup, form.bound),),
    )
    divergences = [divergence for divergence in evidence.parity.divergences if divergence.arm == form.arm]
    bugs = [divergence for divergence in divergences if divergence.kind == "bug"]
    if not evidence.parity.num_compared:
        raise NotTestable(f"no output of {form.arm} was compared with vanilla, so its quality is open")
    lossless, reason = "lossless", f"{len(bugs) or 'no'} outputs differ from vanilla's other than at a tie"
    if evidence.parity.rounding is not None and not bugs:
        lossless, reason = (
            "lossless up to ties",
            _up_to_ties(evidence, evidence.generations(form.arm), divergences),
        )
    quality = Finding(
        kind=VerdictKind.NOT_REPRODUCED if bugs else VerdictKind.REPRODUCED,
        ours="not lossless" if bugs else lossless,
        reason=reason,
        figure_kind="measured",
    )
    return combined([speed, quality])


def _ladder_step(form: LadderStepForm, evidence: Evidence) -> Finding:
    sizes = {
        name: evidence.tree(name).num_nodes for name in (form.arm, form.over) if name in evidence.record.trees
    }
    if form.arm not in sizes:
        raise NotTestable(f"the record has no tree of arm {form.arm}")
    if form.max_nodes is not None and max(sizes.values()) > form.max_nodes:
        raise NotTestable(
            f"a tree has {max(sizes.values())} nodes, and this rung of the ladder allows {form.max_nodes}"
        )
    if (fixed := _fixed_by_the_device(form, evidence)) is not None:
        return fixed
    spec = evidence.record.suite.interval
    counts = paired_counts(evidence, form.arm, over=form.over, timed=False)
    rate = ratio_of_rates(
        (counts.tokens[0], counts.steps[0]), over=(counts.tokens[1], counts.steps[1]), spec=spec
    )
    if not evidence.record.reports_speed:
        raise NotTestable(
            f"{evidence.record.why_no_speed}; tokens/step alone, {shown(rate, 'x')}, "
            "does not decide this rung of the ladder"
        )
    timed = paired_counts(evidence, form.arm, over=form.over, timed=True)
    speed = ratio_of_rates(
        (timed.tokens[0], timed.seconds[0]), over=(timed.tokens[1], timed.seconds[1]), spec=spec
    )
    nodes = " to ".join(str(sizes.get(name, 1)) for name in (form.over, form.arm))
    parts = []
    for name, interval in (("tokens/step", rate), ("speed", speed)):
        kind = above(interval, form.bound)
        reason = f"{name} of {form.arm} over {form.over}: {holds(kind)}"
        parts.append(
            Finding(
                kind=kind,
                ours=f"{name} {shown(interval, 'x')}",
                reason=reason,
                figure_kind="measured",
                asked=(Asked(interval, form.bound),),
            )
        )
    both = combined(parts)
    return replace(both, reason=f"{both.reason} (bound {form.bound:g}; {nodes} nodes)")


def _fixed_by_the_device(form: LadderStepForm, evidence: Evidence) -> Finding | None:
    """Return that this device cannot climb the rung, where that is clear before the run; else None.

    It is where the step costs of the two sizes, timed before the trials, outweigh what calibration text
    promises by `slack` times over.
    """
    trees = evidence.record.trees
    if form.slack is None or evidence.calibration is None or not {form.arm, form.over} <= set(trees):
        return None
    try:
        cost_s = step_seconds(evidence)
    except NotTestable:
        return None
    sizes = sorted(cost_s)
    own, over = (trees[name].tree() for name in (form.arm, form.over))
    own_s, over_s = (
        float(np.interp(tree.num_nodes, sizes, [cost_s[size] for size in sizes])) for tree in (own, over)
    )
    promised = [one.tokens_per_step for one in replays(evidence.calibration, [own, over])]
    gain, cost = promised[0] / promised[1], own_s / over_s
    if gain * form.slack > cost * form.bound:
        return None
    return not_decidable(
        f"expected speed {gain / cost:.2f}x",
        f"a step of {own.num_nodes} nodes costs {cost:.2f} times one of {over.num_nodes} on this device, "
        f"where calibration text promises {gain:.2f} times the tokens/step: the speed is fixed before the "
        f"run, by more than {form.slack:g} times",
    )


def _rate_over(form: RateOverForm, evidence: Evidence) -> Finding:
    evidence.require_speed()
    if evidence.tree(form.arm) != evidence.tree(form.over):
        raise NotTestable(f"{form.arm} and {form.over} decode with other trees")
    spec, parts = evidence.record.suite.interval, []
    for name, timed in (("tokens/step", False), ("speed", True)):
        counts = paired_counts(evidence, form.arm, over=form.over, timed=timed)
        spent = counts.seconds if timed else counts.steps
        rate, other = (counts.tokens[0], spent[0]), (counts.tokens[1], spent[1])
        ratio = ratio_of_rates(rate, over=other, spec=spec)
        if form.gain is None or form.margin is None:
            question, words = Asked(ratio, form.bound), f"above {form.bound:g}x"
        else:
            apart = relative_gain(rate, over=other, spec=spec, scale=1 / (1 + form.gain))
            question = Asked(apart, form.margin, "within")
            words = f"{1 + form.gain:g}x to within {form.margin:.0%} of it, by the 90 % interval"
        reason = f"{name} of {form.arm} over {form.over} at one tree, {words}: {holds(question.kind)}"
        parts.append(
            Finding(
                kind=question.kind,
                ours=f"{name} {shown(ratio, 'x')}",
                reason=reason,
                figure_kind="measured",
                asked=(question,),
            )
        )
    return combined(parts)


def _speed_identity(form: SpeedIdentityForm, evidence: Evidence) -> Finding:
    evidence.require_speed()
    known = {comparison.arm: comparison for comparison in evidence.comparisons}
    arms = [arm for arm in dict.fromkeys(form.arms) if arm in known]
    if not arms:
        raise NotTestable(f"the record compares none of {', '.join(form.arms)} with a baseline")
    both = combined([_identity_of(known[arm], form, evidence) for arm in arms])
    prefix = f"the measured speedup is rate over overhead, 90 % interval within +-{form.margin:.0%}"
    return replace(both, reason=f"{prefix}; {both.reason}")


def identity_gap(
    own_s: Floats, base_s: Floats, steps: Floats, seconds: Floats, base_steps: Floats, base_seconds: Floats
) -> Floats:
    """Return the overhead of separately timed steps over that of the decoded ones, less 1.

    The first two are sums of separately timed steps, an arm's and its baseline's; the others count both
    arms' decoding steps and their seconds. Each is summed over prompts.
    """
    return (own_s / base_s) * (steps / seconds) / (base_steps / base_seconds) - 1


def _identity_of(compared: Comparison, form: SpeedIdentityForm, evidence: Evidence) -> Finding:
    arm, separate = compared.arm, compared.separate_overhead
    if separate is None:
        raise NotTestable(f"no separately timed steps of {arm} or its baseline")
    record, spec = evidence.record, evidence.record.suite.interval
    apart = [separate_s_by_prompt(record, name) for name in (arm, compared.baseline)]
    own, base = (prompt_totals(record, name, timed=True) for name in (arm, compared.baseline))
    keys = [key for key in own if key in base and own[key].steps and base[key].steps]
    if apart[0] is not None and apart[1] is not None:
        keys = [key for key in keys if key in apart[0] and key in apart[1]]
        apart_s = [np.array([one[key] for key in keys]) for one in apart if one is not None]
        note = ""
    else:
        apart_s = [np.full(len(keys), separate), np.ones(len(keys))]
        note = "; the error of the separate steps is left out: the record does not say whose they are"
    if not keys:
        raise NotTestable(f"no prompt has separately timed steps and a timed generation of {arm}")
    totals = [[side[key] for key in keys] for side in (own, base)]
    gap = bootstrap_totals(
        identity_gap,
        *apart_s,
        *(column(side, name) for side in totals for name in ("steps", "decode_s")),
        spec=spec.model_copy(update={"level": EQUIVALENCE_LEVEL}),
        rng=np.random.default_rng(spec.seed),
    )
    kind = equivalence(gap, form.margin)
    overhead = float(apart_s[0].sum() / apart_s[1].sum())
    rate = ratio_of_sums(column(totals[0], "decode_tokens"), column(totals[0], "steps"))
    assert rate is not None
    reason = (
        f"{arm}: {holds(kind)} (rate over overhead {rate / overhead:.2f}x, separate overhead {overhead:.3f}"
        f"{note})"
    )
    return Finding(
        kind=kind,
        ours=f"{arm} {percent(gap)}",
        reason=reason,
        figure_kind="measured",
        asked=(Asked(gap, form.margin, "within"),),
    )


def _rejection_exact(form: RejectionExactForm, evidence: Evidence) -> Finding:
    pairs = rejection_pairs(evidence.record, arm=form.arm)
    if isinstance(pairs, str):
        raise NotTestable(pairs)
    allowed = pairs.num_tokens // form.tokens_a_tie
    kind = VerdictKind.REPRODUCED if len(pairs.parted) <= allowed else VerdictKind.NOT_REPRODUCED
    if len(pairs.parted) == 1 > allowed:  # one tie is possible in any number of tokens
        kind = VerdictKind.INCONCLUSIVE
    reason = (
        f"{pairs.num_texts - len(pairs.parted)} of {pairs.num_texts} texts are those of sampled vanilla with "
        f"the same seed, token for token; rounding explains {allowed}: {holds(kind)}"
    )
    ours = f"{pairs.num_texts - len(pairs.parted)} of {pairs.num_texts} texts the same"
    return Finding(kind=kind, ours=ours, reason=reason, figure_kind="measured")


_TESTS: dict[type, Callable[..., Finding]] = {
    LosslessForm: _lossless,
    FasterForm: _faster,
    LadderStepForm: _ladder_step,
    RateOverForm: _rate_over,
    SparseBeatsDenseForm: judge_sparse_beats_dense,
    SearchDepthForm: judge_search_depth,
    LossGrowsForm: judge_loss_grows,
    ExtraHeadForm: judge_extra_head,
    SpeedIdentityForm: _speed_identity,
    LogGrowthForm: judge_log_growth,
    SpeedPeaksForm: judge_speed_peaks,
    CategoryOrderForm: judge_category_order,
    CategoryAboveForm: judge_category_above,
    AccuracyFallsForm: judge_accuracy_falls,
    MoreCandidatesForm: judge_more_candidates,
    SearchPromiseForm: judge_search_promise,
    AddedStepForm: judge_added_step,
    RejectionExactForm: _rejection_exact,
}
