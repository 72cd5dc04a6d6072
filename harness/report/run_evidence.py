"""The sections that let a reader check a run's figures.

These are predictions, step times, draft heads, parity, likelihood, checks and failures.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

import numpy as np

from harness.judge.judgement import CheckStatus, Judgement, ParityRounding
from harness.judge.step_costs import SeparateCosts, separate_costs
from harness.records.probes import StepCost
from harness.records.run import RunRecord
from harness.report.formatting import (
    ABSENT,
    count,
    milliseconds,
    percent,
    ratio,
    ratio_interval,
    significant,
    table,
)
from harness.report.tables.run import comparisons_by_arm, is_greedy_medusa
from harness.specs.suite import BackboneName

_PREDICTIONS_NOTE = """\
*Expected* are the tree's tokens/step on calibration text, which shares no prompt with the suite. *Replayed*
is arithmetic on the ranks of this run's own vanilla text, without a model. *Decoded* is the run itself.
Replayed and decoded must agree in float32; expected may differ, since the texts do."""
_STEP_COSTS_NOTE = """\
Medians of repeats, timed separately from the generations. *step cost* is the backbone over so many nodes
against one node at the same context length: 1.00 throughout would make verification free. *overhead* is the
whole step against the baseline arm's."""
_LIKELIHOOD_NOTE = """\
Under the original backbone at temperature 1, each generation counted once. Higher is likelier, not better:
typical acceptance raises it by design."""


def render_predictions(record: RunRecord, judgement: Judgement) -> str:
    """Return tokens/step of each greedy arm as calibrated, replayed and decoded.

    Where speed is reported, the speedup as its factors give it follows.
    """
    greedy = [arm for arm in judgement.arms if is_greedy_medusa(record, arm.arm)]
    if not greedy:
        return ""
    rows = []
    for arm in greedy:
        tree = record.trees.get(arm.arm)
        expected, decoded = arm.calibrated_tokens_per_step, arm.acceleration_rate.estimate
        gap = percent(decoded / expected - 1, signed=True) if expected else ABSENT
        origin = (tree.origin, tree.tree().depth) if tree else (ABSENT, ABSENT)
        rows.append(
            (
                arm.arm,
                *origin,
                ratio(expected),
                ratio(arm.replayed_tokens_per_step),
                ratio_interval(arm.acceleration_rate),
                gap,
            )
        )
    headers = [
        "arm",
        "tree",
        "depth",
        "expected on calibration text",
        "replayed on this text",
        "decoded",
        "decoded over expected",
    ]
    return "\n\n".join(
        part for part in (table(headers, rows), _PREDICTIONS_NOTE, _factors(record, judgement)) if part
    )


def render_profile(record: RunRecord) -> str:
    """Return where the time of a decoding step goes, arm by arm.

    It is empty where nothing was profiled or no speed is reported.
    """
    if record.profile is None or not record.profile.rows or not record.reports_speed:
        return ""
    rows = []
    for row in record.profile.rows:
        parts = (row.backbone_s, row.heads_s, row.candidates_s, row.acceptance_s, row.cache_s)
        shares = [percent(part / row.step_s) for part in (*parts, row.step_s - sum(parts))]
        rows.append(
            (
                row.arm,
                row.num_steps,
                milliseconds(row.step_s / row.num_steps),
                *shares,
                percent(row.own_code_share),
            )
        )
    headers = [
        "arm",
        "steps",
        "step, ms",
        "backbone",
        "heads",
        "candidates",
        "acceptance",
        "cache",
        "rest",
        "own code",
    ]
    note = (
        "From a profiling run of its own, not from the timed ones. *Own code* is all but the calls of "
        "backbone and heads: what this implementation adds."
    )
    return f"{table(headers, rows)}\n\n{note}"


def render_step_costs(record: RunRecord) -> str:
    """Return the separately timed steps, by number of nodes and by arm.

    It is empty where none was timed or no speed is reported.
    """
    costs = record.step_costs.costs if record.step_costs and record.reports_speed else ()
    curve = sorted(
        (cost for cost in costs if cost.arm is None), key=lambda cost: (cost.context_tokens, cost.num_nodes)
    )
    own = [cost for cost in costs if cost.arm is not None]
    parts = []
    if curve:
        rows = [
            (
                cost.num_nodes,
                cost.context_tokens,
                _median_ms(cost.backbone_s),
                ratio(_cost_on_curve(cost, curve)),
            )
            for cost in curve
        ]
        parts.append(table(["nodes", "context tokens", "backbone, ms", "step cost"], rows))
    if own:
        headers = [
            "arm",
            "nodes",
            "heads",
            "contexts",
            "backbone, ms",
            "step cost",
            "whole step, ms",
            "overhead",
        ]
        parts.append(
            table(
                headers, [_own_cost_row(record, cost) for cost in {cost.arm: cost for cost in own}.values()]
            )
        )
    return "\n\n".join([*parts, _STEP_COSTS_NOTE]) if parts else ""


def render_heads(record: RunRecord) -> str:
    """Return each draft head's top-1 share against its controls, and its share and loss on this text.

    It is empty where neither is known.
    """
    parts = []
    for backbone in record.suite.backbones:
        found = _heads_of(record, backbone)
        parts.append(
            f"Heads of the {backbone} backbone:\n\n{found}" if found and backbone != "original" else found
        )
    return "\n\n".join(part for part in parts if part)


def _heads_of(record: RunRecord, backbone: BackboneName) -> str:
    control, trace = record.heads_control_of(backbone), record.trace_of(backbone)
    num_heads = max(len(control.trained_top1) if control else 0, trace.num_heads if trace else 0)
    if not num_heads:
        return ""
    rows: list[list[object]] = [[f"head {head + 1}"] for head in range(num_heads)]
    headers = ["draft head"]
    notes = ["Head k proposes the token k positions after the one that the backbone has just chosen."]
    if control:
        headers += ["held-out top-1: trained", "random weights", "identity start"]
        for shares in (control.trained_top1, control.random_top1, control.identity_top1):
            for row, share in zip(rows, _padded(shares, num_heads), strict=True):
                row.append(percent(share))
        held_out = count(control.num_positions, "held-out position")
        notes.append(
            f"The controls read {held_out} before any timing; *identity start* is an untrained copy of the "
            "backbone's own head."
        )
    if trace:
        headers += ["top-1 on this text", "loss on this text, nats", "positions"]
        known = [prompt.nll for prompt in trace.prompts if prompt.nll is not None]
        losses = np.concatenate(known) if known else None
        for head in range(trace.num_heads):
            ranks = trace.ranks[:, head]
            seen = int((ranks >= 0).sum())
            loss = significant(float(np.nanmean(losses[:, head]))) if seen and losses is not None else ABSENT
            rows[head] += [percent(int((ranks == 0).sum()) / seen) if seen else ABSENT, loss, f"{seen:,}"]
        notes.append("*This text* is what vanilla decoding wrote in this run.")
    return f"{table(headers, rows)}\n\n{' '.join(notes)}"


def render_parity(judgement: Judgement) -> str:
    """Return how many greedy generations equal their references, and every first divergence."""
    parity = judgement.parity
    if not parity.num_compared:
        return "No greedy generation had a reference to be compared with."
    text = (
        f"{count(parity.num_compared, 'greedy generation')} compared with the reference by token id, "
        f"{count(parity.num_tokens, 'token')}: "
        f"{parity.num_identical:,} identical, {count(len(parity.divergences), 'divergence')}."
    )
    if parity.rounding is not None:
        text += f"\n\n{_half_precision_note(parity.rounding)}"
    if not parity.divergences:
        return text
    headers = ["arm", "reference", "prompt", "token", "gap of the reference's top two logits", "class"]
    rows = [
        (
            item.arm,
            item.reference,
            item.prompt_key,
            item.position,
            ABSENT if item.gap is None else f"{item.gap:.2e}",
            item.kind,
        )
        for item in parity.divergences
    ]
    note = "*tie*: the two best logits lie within rounding, so either token is right; *bug*: they do not."
    return f"{text}\n\n{table(headers, rows)}\n\n{note}"


def _half_precision_note(rounding: ParityRounding) -> str:
    return (
        f"In {rounding.dtype} a text is equal only up to ties. Before the trials, on other text, rounding "
        f"moved the top-two gap by at most {significant(rounding.largest_shift)} between the shapes of this "
        f"run; a gap below {significant(rounding.tie_margin)} counts as a tie. "
        f"{percent(rounding.share_below)} of the traced positions have such a gap; a token further from the "
        "best is a bug there too. "
        f"{count(rounding.num_equal_tokens, 'token')} lie before the texts differ."
    )


def render_checks(judgement: Judgement) -> str:
    """Return every validity check with what was found and what is needed, failed ones first."""
    if not judgement.checks:
        return ""
    order = [CheckStatus.FAILED, CheckStatus.PASSED, CheckStatus.SKIPPED]
    checks = sorted(judgement.checks, key=lambda check: order.index(check.status))
    mark = {CheckStatus.FAILED: "**FAILED**", CheckStatus.PASSED: "passed", CheckStatus.SKIPPED: "skipped"}
    return table(
        ["check", "outcome", "found", "need"],
        [(check.name, mark[check.status], check.found, check.need) for check in checks],
    )


def render_likelihoods(record: RunRecord) -> str:
    """Return the mean log-likelihood of each sampled arm's text under the original backbone.

    It is empty where none was scored.
    """
    if record.likelihoods is None or not record.likelihoods.rows:
        return ""
    by_arm: dict[str, list[float]] = {}
    seeds: dict[str, set[int | None]] = {}
    for row in record.likelihoods.rows:
        by_arm.setdefault(row.trial.arm, []).append(row.mean_log_likelihood)
        seeds.setdefault(row.trial.arm, set()).add(row.trial.seed)
    rows = [
        (
            arm,
            len(values),
            len(seeds[arm]),
            significant(fmean(values)),
            f"{significant(min(values))} to {significant(max(values))}",
        )
        for arm, values in by_arm.items()
    ]
    headers = ["arm", "generations", "seeds", "mean, nats a token", "range of generations"]
    return f"{table(headers, rows)}\n\n{_LIKELIHOOD_NOTE}"


def render_failures(record: RunRecord) -> str:
    """Return every trial that raised and never succeeded."""
    if not record.failures:
        return "No trial failed."
    rows = [
        (
            failure.trial.arm,
            failure.trial.prompt_key,
            failure.trial.round,
            _known(failure.trial.seed),
            failure.error_type,
            failure.message,
        )
        for failure in record.failures
    ]
    return table(["arm", "prompt", "round", "seed", "error", "message"], rows)


def _factors(record: RunRecord, judgement: Judgement) -> str:
    if not record.reports_speed:
        return ""
    compared = comparisons_by_arm(judgement)
    rows = []
    for arm in judgement.arms:
        comparison = compared.get(arm.arm)
        if comparison is None or comparison.separate_overhead is None or arm.method != "medusa":
            continue
        rate, overhead = arm.acceleration_rate.estimate, comparison.separate_overhead
        product = rate / overhead
        gap = percent(comparison.speedup.estimate / product - 1, signed=True)
        rows.append(
            (arm.arm, ratio(rate), ratio(overhead), ratio(product), ratio_interval(comparison.speedup), gap)
        )
    if not rows:
        return ""
    headers = [
        "arm",
        "tokens/step",
        "overhead, timed separately",
        "their quotient",
        "speedup measured",
        "measured over quotient",
    ]
    return (
        "Speedup = tokens/step over overhead, with the overhead from steps that were timed separately at one "
        f"context length:\n\n{table(headers, rows)}"
    )


def _cost_on_curve(cost: StepCost, curve: Sequence[StepCost]) -> float | None:
    single = next(
        (other for other in curve if other.num_nodes == 1 and other.context_tokens == cost.context_tokens),
        None,
    )
    return (
        median(cost.backbone_s) / median(single.backbone_s)
        if single and single.backbone_s and cost.backbone_s
        else None
    )


def _own_cost_row(record: RunRecord, cost: StepCost) -> tuple[object, ...]:
    pooled = separate_costs(record, cost.arm) if cost.arm else SeparateCosts(step_cost=None, overhead=None)
    times = (
        milliseconds(pooled.backbone_s),
        ratio(pooled.step_cost),
        milliseconds(pooled.step_s),
        ratio(pooled.overhead),
    )
    return (cost.arm, cost.num_nodes, cost.num_heads, pooled.num_contexts, *times)


def _median_ms(seconds: Sequence[float]) -> str:
    return milliseconds(median(seconds) if seconds else None)


def _padded(shares: Sequence[float], length: int) -> list[float | None]:
    return [*shares, *[None] * (length - len(shares))]


def _known(value: int | None) -> str:
    return ABSENT if value is None else str(value)
