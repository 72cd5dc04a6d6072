"""The tables of verdicts and arms, each usable alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from harness.judge.judgement import (
    MAX_MEDIANS_APART,
    ArmMetrics,
    ClaimVerdict,
    Comparison,
    Judgement,
    VerdictKind,
    by_test,
)
from harness.judge.metrics import compare, original_baseline
from harness.records.run import RunRecord
from harness.report.formatting import (
    ABSENT,
    count,
    megabytes,
    milliseconds,
    percent,
    rate_interval,
    ratio,
    ratio_interval,
    table,
)
from harness.report.tables.words import WORDS_NOTE, shown
from harness.specs.suite import FastestTree, GreedyAcceptance

VERDICT_NOTE = """\
*Kind of figure*: `measured` in this run; `replayed` from its trace of ranks; `composed` of a replay and
measured step times; `predicted` by a model of the hardware; `computed` from the paper's own figures. In
brackets the form of the test: `literal` = the paper's own model and setting; `transfer` = the claim's shape,
which should hold on any model; `paper-only` = arithmetic that needs no run. *Cannot be decided here*: the
device fixes the outcome before the run. *power* = how often samples of this size and spread say that it
holds: at the size that the paper states, where there is no difference, or from which size on in 80 %; and at
the bound itself, where it is an error. Claims in one row are decided by one test and count once. *also* = a
further form of the claim above it: it decides nothing and is not counted.
"""
VERDICT_NOTE += WORDS_NOTE
_MOST_IDS = 4  # in a row of a short table

PAPER_STATES, WE_STATE = "what the paper states", "what we state of the paper"
_OWN_COLUMNS = ("claim", WE_STATE, "paper", "ours", "verdict", "why")
CONSISTENCY_NOTE = (
    "Statements of this project about figures that the paper prints, checked by arithmetic. They are no "
    "claims of the paper's, and are not counted above."
)

TOKENS_NOTE = (
    "*tokens/step*: tokens that one decoding step yields on average, the paper's acceleration "
    "rate; vanilla is 1 by definition."
)
ARMS_NOTE = (
    TOKENS_NOTE
    + """
*step cost*: the backbone's pass over all nodes of the tree against one node, timed separately. *overhead*:
mean step latency against the baseline arm's, draft heads and bookkeeping included. *speedup*: tokens/s
against the baseline arm on the decode clock, which starts at the first token. It equals tokens/step over
overhead, so more tokens a step help only where the step does not become as much more expensive."""
)


def is_greedy_medusa(record: RunRecord, arm: str) -> bool:
    """Return whether the arm decodes with draft heads and keeps exactly the backbone's greedy choice."""
    spec = record.suite.arm(arm)
    return spec.method == "medusa" and isinstance(spec.acceptance, GreedyAcceptance)


def comparisons_by_arm(judgement: Judgement) -> dict[str, Comparison]:
    """Return each compared arm's comparison with its baseline."""
    return {comparison.arm: comparison for comparison in judgement.comparisons}


def headline_arm(record: RunRecord, judgement: Judgement) -> ArmMetrics | None:
    """Return the arm that the run is told by, chosen before it ran; None where it has no figure.

    It is the one that the suite names, else the one whose tree is the fastest by its calibration text, else
    the first that drafts.
    """
    suite = record.suite
    fastest = [name for name in suite.greedy_arms if isinstance(suite.arm(name).tree, FastestTree)]
    name = next(iter([*filter(None, [suite.headline_arm]), *fastest, *suite.greedy_arms]), None)
    arm = next((arm for arm in judgement.arms if arm.arm == name), None)
    if arm is None or not isfinite(arm.acceleration_rate.estimate):
        return None
    return arm if not record.reports_speed or arm.arm in comparisons_by_arm(judgement) else None


def count_verdicts(judgement: Judgement) -> dict[str, int]:
    """Return how many of the paper's claims got each verdict, kinds without any included.

    Claims that one test decides together count once.
    """
    counted = by_test(verdict for verdict in judgement.verdicts if verdict.counts)
    return {kind.value: sum(group[0].kind is kind for group in counted) for kind in VerdictKind}


def verdicts_in_words(judgement: Judgement) -> str:
    """Return how many claims came out how, how many of the decided rest on arithmetic, and how many are left.

    Of what was not tested only claims count: definitions, settings and figures of others are none.
    """
    counts = count_verdicts(judgement)
    holds, fails, opens, nowhere = (
        counts[kind.value]
        for kind in (
            VerdictKind.REPRODUCED,
            VerdictKind.NOT_REPRODUCED,
            VerdictKind.INCONCLUSIVE,
            VerdictKind.NOT_DECIDABLE,
        )
    )
    tested = [group[0] for group in by_test(one for one in judgement.verdicts if one.counts)]
    alone = sum(one.form == "paper-only" and one.kind is not VerdictKind.NOT_TESTED for one in tested)
    parts = [
        f"{holds} hold",
        f"{fails} {'fails' if fails == 1 else 'fail'}",
        f"{opens} {'is' if opens == 1 else 'are'} open",
        f"{nowhere} cannot be decided here" if nowhere else "",
    ]
    text = ", ".join(filter(None, parts)) + "."
    if alone:
        rest = "rests" if alone == 1 else "rest"
        text += f" {alone} of them {rest} on arithmetic with the paper's figures, the others on this run."
    left = sum(one.kind is VerdictKind.NOT_TESTED and one.is_claim and one.counts for one in tested)
    return text + (f" Not tested by it: {count(left, 'further claim')}." if left else "")


def render_verdict_table(judgement: Judgement) -> str:
    """Return the paper's claims that were tested, with the evidence for each verdict.

    Those that rest on this run come first. A claim's further forms follow it.
    """
    tested = [verdict for verdict in _tested(judgement) if not verdict.is_ours]
    if not tested:
        return "No claim of the registry was tested by this run."
    return render_verdicts(tested)


def render_consistency_table(judgement: Judgement) -> str:
    """Return this project's own statements about the paper's figures; empty where none was tested."""
    ours = [verdict for verdict in _tested(judgement) if verdict.is_ours]
    return render_verdicts(ours, columns=_OWN_COLUMNS, stated=WE_STATE) if ours else ""


def verdicts_on_run(judgement: Judgement) -> tuple[ClaimVerdict, ...]:
    """Return the verdicts of the claims that this run tested, without those that rest on arithmetic alone."""
    tested = [verdict for verdict in _tested(judgement) if not verdict.is_ours]
    on_run = {verdict.claim_id for verdict in tested if verdict.decides and verdict.form != "paper-only"}
    return tuple(verdict for verdict in tested if verdict.claim_id in on_run)


def render_verdicts(
    verdicts: Sequence[ClaimVerdict], *, columns: Sequence[str] | None = None, stated: str = PAPER_STATES
) -> str:
    """Return one row a test, with all columns or, in short tables, those that `columns` names.

    Claims that one test decides together share a row; a short table names the first of many.
    `stated` is the header of what the verdict is about.
    """
    headers = ["claim", stated, "paper", "ours", "kind of figure", "verdict", "power", "why"]
    return table(
        headers,
        [_verdict_row(group, short=columns is not None) for group in by_test(verdicts)],
        columns=columns,
    )


def render_not_tested_table(judgement: Judgement) -> str:
    """Return the claims that this run cannot decide, grouped by what each would take.

    It is empty where there is none.
    """
    groups: dict[str, list[str]] = {}
    for verdict in judgement.verdicts:
        if verdict.kind is VerdictKind.NOT_TESTED:
            groups.setdefault(verdict.reason, []).append(verdict.claim_id)
    if not groups:
        return ""
    by_size = sorted(groups.items(), key=lambda group: -len(group[1]))
    return table(
        ["what it would take", "claims", "which"],
        [(needs, len(ids), ", ".join(ids)) for needs, ids in by_size],
    )


def render_arms_table(
    record: RunRecord, judgement: Judgement, *, columns: Sequence[str] | None = None
) -> str:
    """Return one row an arm: tokens/step, what a step costs, the speedup, and a diagnosis.

    Speed columns are left out where the suite reports no speed; `columns` names those to show of the others.
    """
    if not judgement.arms:
        return "No arm has a finished generation."
    compared = comparisons_by_arm(judgement)
    if not record.reports_speed:
        slow_rows = [
            (arm.arm, arm.num_nodes, arm.num_prompts, _tokens_per_step(arm), arm.diagnosis)
            for arm in judgement.arms
        ]
        return table(["arm", "nodes", "prompts", "tokens/step", "diagnosis"], slow_rows)
    headers = [
        "arm",
        "against",
        "nodes",
        "tokens/step",
        "step cost",
        "overhead",
        "speedup",
        "tokens/s",
        "diagnosis",
    ]
    return table(headers, [_arm_row(arm, compared.get(arm.arm)) for arm in judgement.arms], columns=columns)


def arms_note(record: RunRecord) -> str:
    """Return what the columns of the arms' table mean.

    Where there are arms on a tuned backbone, it says how they compare with the original.
    """
    note = ARMS_NOTE if record.reports_speed else TOKENS_NOTE
    tuned = [arm for arm in record.suite.arms if arm.backbone == "tuned"]
    if not tuned:
        return note
    names = ", ".join(f"`{arm.name}`" for arm in tuned)
    note += (
        f"\n{names}: on the *tuned* backbone (Medusa-2). Its Medusa arms are compared with its own vanilla "
        "arm, whose text greedy ones must repeat. Both backbones are loaded throughout, and peak memory "
        "counts both."
    )
    if not record.reports_speed:
        return note
    across = []
    for arm in tuned:
        baseline = original_baseline(record, arm)
        found = (
            compare(record, arm.name, baseline=baseline.name)
            if arm.method == "medusa" and baseline is not None
            else None
        )
        if found is not None and baseline is not None:
            across.append(f"`{arm.name}` {ratio_interval(found.speedup)} times `{baseline.name}`")
    return f"{note} In tokens/s against the original backbone: {'; '.join(across)}." if across else note


def estimates_note(judgement: Judgement) -> str:
    """Return the speedups by medians of steps beside those by totals; empty where no speed is shown."""
    if not judgement.comparisons:
        return ""
    by_medians = ", ".join(f"`{one.arm}` {ratio(one.speedup_by_medians)}" for one in judgement.comparisons)
    note = f"Speedups by each arm's median step in place of the totals: {by_medians}."
    apart = [f"`{one.arm}`" for one in judgement.comparisons if not one.estimates_agree]
    if not apart:
        return f"{note} All lie within {MAX_MEDIANS_APART:.0%} of those by totals."
    return f"{note} **More than {MAX_MEDIANS_APART:.0%} from those by totals**: {', '.join(apart)}."


def render_latency_table(record: RunRecord, judgement: Judgement) -> str:
    """Return one row an arm: bandwidth, latencies and memory.

    Bandwidth and latencies are left out where the suite reports no speed.
    """
    rows: Sequence[Sequence[object]]
    if not record.reports_speed:
        rows = [
            (arm.arm, megabytes(arm.peak_memory_bytes), megabytes(arm.cache_bytes)) for arm in judgement.arms
        ]
        return table(["arm", "peak memory, MB", "KV cache, MB"], rows)
    headers = [
        "arm",
        "share of memory bandwidth",
        "first token, ms",
        "step p50, ms",
        "step p95, ms",
        "peak memory, MB",
        "KV cache, MB",
    ]
    rows = [
        (
            arm.arm,
            percent(arm.bandwidth_share),
            milliseconds(arm.first_token_s),
            milliseconds(arm.step_p50_s),
            milliseconds(arm.step_p95_s),
            megabytes(arm.peak_memory_bytes),
            megabytes(arm.cache_bytes),
        )
        for arm in judgement.arms
    ]
    return table(headers, rows)


def render_category_tables(record: RunRecord, judgement: Judgement) -> str:
    """Return tokens/step by arm and prompt category, and speedup where it is reported.

    It is empty where prompts have no category.
    """
    sizes: dict[str, int] = {}
    for arm in judgement.arms:
        for row in arm.categories:
            sizes[row.category] = max(sizes.get(row.category, 0), row.num_prompts)
    if not sizes:
        return ""
    headers = ["arm", *(f"{category} ({prompts})" for category, prompts in sizes.items())]
    tokens, speedups = [], []
    for arm in (arm for arm in judgement.arms if arm.method != "vanilla"):
        by_category = {row.category: row for row in arm.categories}
        rows = [by_category.get(category) for category in sizes]
        tokens.append([arm.arm, *(ratio(row.acceleration_rate) if row else ABSENT for row in rows)])
        if any(row and row.speedup is not None for row in rows):
            speedups.append([arm.arm, *(ratio(row.speedup) if row else ABSENT for row in rows)])
    text = (
        "Tokens/step (number of prompts in brackets; few prompts a category, so read the order and "
        "not the decimals):\n\n"
    )
    text += table(headers, tokens)
    if record.reports_speed and speedups:
        text += "\n\nSpeedup over the arm's baseline:\n\n" + table(headers, speedups)
    return text


def _tested(judgement: Judgement) -> list[ClaimVerdict]:
    tested = [verdict for verdict in judgement.verdicts if verdict.kind is not VerdictKind.NOT_TESTED]
    alone = {verdict.claim_id for verdict in tested if verdict.decides and verdict.form == "paper-only"}
    return sorted(tested, key=lambda verdict: verdict.claim_id in alone)


def marked_verdict(verdict: ClaimVerdict) -> str:
    """Return a verdict for a table's cell, with what it turns to where our own settings have other values."""
    word = f"**{shown(verdict)}**" if verdict.decides else f"also: {shown(verdict)}"
    return f"{word} ({', '.join(verdict.turns)})" if verdict.turns else word


def named_claims(claims: Sequence[tuple[str, str]], *, short: bool = False) -> str:
    """Return ids with the places of what they state, such as A2, T3-4 (Abstract; Table 3)."""
    ids, places = (list(dict.fromkeys(column)) for column in zip(*claims, strict=True))
    if short and len(ids) > _MOST_IDS:
        ids = [f"{ids[0]} and {len(ids) - 1} like it"]
    where = "; ".join(filter(None, places))
    return f"{', '.join(ids)} ({where})" if where else ", ".join(ids)


def _verdict_row(group: Sequence[ClaimVerdict], *, short: bool) -> tuple[object, ...]:
    verdict = group[0]
    claim = named_claims([(one.claim_id, one.place) for one in group], short=short)
    stated = list(dict.fromkeys(one.paper_figure for one in group if one.paper_figure))
    if short and len(stated) > _MOST_IDS:
        stated = [*stated[:_MOST_IDS], ".."]
    form = "" if verdict.form == "none" else f" ({verdict.form})"
    kind = f"{verdict.figure_kind or ABSENT}{form}"
    marked = marked_verdict(verdict)
    return (
        claim,
        verdict.stated,
        ", ".join(stated) or ABSENT,
        verdict.ours or ABSENT,
        kind,
        marked,
        verdict.power or ABSENT,
        verdict.reason,
    )


def _tokens_per_step(arm: ArmMetrics) -> str:
    return (
        ratio(arm.acceleration_rate.estimate)
        if arm.method == "vanilla"
        else ratio_interval(arm.acceleration_rate)
    )


def _arm_row(arm: ArmMetrics, compared: Comparison | None) -> tuple[object, ...]:
    return (
        arm.arm,
        compared.baseline if compared else ABSENT,
        arm.num_nodes,
        _tokens_per_step(arm),
        ratio(arm.step_cost),
        ratio_interval(compared.overhead) if compared else ABSENT,
        ratio_interval(compared.speedup) if compared else ABSENT,
        rate_interval(arm.tokens_per_s),
        arm.diagnosis,
    )
