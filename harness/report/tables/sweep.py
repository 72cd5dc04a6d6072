"""A sweep's tables, each usable alone.

They show devices, what others published, what was decoded for real, sampled settings, tree sizes, heads, and
Appendix G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.compose.appendix_g import AppendixG
from harness.judge.claims.sweep import sampled_counts, sweep_verdicts
from harness.judge.judgement import ClaimVerdict
from harness.judge.sweep import (
    DecodedCheck,
    best_by_heads,
    decoded_checks,
    dense_points,
    sparse_points,
    told_speedup,
    told_tokens_per_s,
)
from harness.records.sweep import SweepRecord
from harness.records.sweep_cells import ChosenTree, ComposedCell, SampledCell
from harness.report.formatting import (
    ABSENT,
    WITHHELD,
    count,
    merged,
    paragraphs,
    percent,
    rate_interval,
    ratio,
    ratio_interval,
    significant,
    table,
)
from harness.report.tables.words import shown
from harness.specs.claims import ClaimSpec
from harness.specs.quoted import QuotedRow

_DEVICE_HEADERS = (
    "device",
    "model shape",
    "step times",
    "figure",
    "tree",
    "nodes",
    "depth",
    "tokens/step",
    "step cost",
    "overhead",
    "speedup",
)
_DEVICE_HEADERS_END = ("tokens/s", "break-even batch")
_SAMPLED_NOTE = """\
One tree for all settings. *likelihood*: mean log-likelihood of the texts' tokens under the original backbone
at temperature 1, nats a token. It stands in for quality, and a judge's score need not follow it. Intervals
and comparisons draw prompts whole."""
_DECODED_NOTE = """\
Trees drawn by seed, decoded for real with vanilla and Medusa in turn. *composed* is a replay priced by the
latency record's step times on the same prompts. *steps*: prompts on which decoding took another path than the
replay. *gap*: composed over measured, less 1."""


def render_devices(
    cells: Sequence[ComposedCell], record: SweepRecord, *, columns: Sequence[str] | None = None
) -> str:
    """Return the table of devices, the fastest tree of each, with all columns or those that `columns` names.

    Rows that say the same are one row. It is empty without cells.
    """
    if not cells:
        return ""
    has_batches = any(one.batch > 1 for one in cells)
    has_contexts = any(one.context != "trace" for one in cells)
    headers = [
        *_DEVICE_HEADERS,
        *(["batch"] if has_batches else []),
        *(["context"] if has_contexts else []),
        *_DEVICE_HEADERS_END,
    ]
    rows = []
    for one in cells:
        extra = [*([one.batch] if has_batches else []), *([one.context] if has_contexts else [])]
        start = _device_cells(one, record)
        rows.append(tuple(str(value) for value in (*start[:-2], *extra, *start[-2:])))
    return table(headers, merged(rows, column=0), columns=columns)


def _device_cells(one: ComposedCell, record: SweepRecord) -> list[object]:
    best, speedup = one.best, told_speedup(one, record)
    tree = record.trees.trees[best.tree].tree()
    mode = f", {one.curve.mode}" if one.curve.mode is not None else ""
    if speedup is None:
        of_curve = [one.curve.device, one.curve.shape, f"{one.curve.kind}, {one.curve.dtype}{mode}", one.kind]
        of_tree = [WITHHELD, *(ABSENT for _ in range(5))]
        return [*of_curve, *of_tree, WITHHELD, WITHHELD, ABSENT]
    return [
        one.curve.device,
        one.curve.shape,
        f"{one.curve.kind}, {one.curve.dtype}{mode}",
        one.kind,
        f"`{tree.fingerprint}`" if tree.depth else "none",
        tree.num_nodes,
        tree.depth,
        ratio_interval(record.trees.rate(best.tree, batch=one.batch)),
        ratio(best.step_cost),
        ratio(best.overhead),
        ratio_interval(speedup),
        rate_interval(told_tokens_per_s(one, record)),
        _break_even(best),
    ]


def _break_even(tree: ChosenTree) -> str:
    """Return up to which batch a tree pays, and up to which its bounds leave open that it does."""
    if tree.break_even is None:
        return ABSENT
    told = tree.break_even_range
    if told is None or told[0] == told[1]:
        return tree.break_even.words
    return f"{tree.break_even.words} [{', '.join('none' if one is None else str(one) for one in told)}]"


def render_quoted(rows: Sequence[QuotedRow]) -> str:
    """Return what others published, each with its source."""
    headers = [
        "who",
        "device",
        "model",
        "method",
        "on",
        "tokens/step",
        "overhead",
        "speedup",
        "tokens/s",
        "GB/s",
        "TFLOP/s",
        "read",
        "source",
    ]
    cells = [
        (
            row.by,
            row.device or "not stated",
            row.model,
            row.method,
            row.benchmark or ABSENT,
            *(
                significant(value)
                for value in (row.tokens_per_step, row.overhead, row.speedup, row.tokens_per_s)
            ),
            *(
                significant(value, digits=4)
                for value in (row.read_bandwidth_gb_per_s, row.dense_fp16_tflop_per_s)
            ),
            row.evidence,
            f"{row.source} ({', '.join(row.claims)})",
        )
        for row in rows
    ]
    return table(headers, cells)


def render_sweep_verdicts(record: SweepRecord, claims: Sequence[ClaimSpec]) -> str:
    """Return the claims that this sweep decides, and those of Appendix G after them."""
    headers = ["claim", "what the paper states", "ours", "verdict", "why"]
    return table(headers, [_verdict_cells(verdict) for verdict in sweep_verdicts(record, claims=claims)])


def _verdict_cells(verdict: ClaimVerdict) -> tuple[object, ...]:
    ours = f"{verdict.ours} ({verdict.figure_kind})" if verdict.figure_kind else ABSENT
    return (
        f"{verdict.claim_id} ({verdict.place})",
        verdict.stated,
        ours,
        f"**{shown(verdict)}**",
        verdict.reason,
    )


def render_decoded(record: SweepRecord, *, columns: Sequence[str] | None = None) -> str:
    """Return the points that were decoded for real, measured and composed; empty where none was.

    It has all columns and a summary, or those columns that `columns` names.
    """
    checks = decoded_checks(record)
    if not checks:
        return ""
    rows = []
    for check in checks:
        sweep_tree = record.trees.trees[check.tree]
        differences = (
            f"{check.num_bugs} differ, {check.num_ties} more at a tie"
            if check.num_bugs + check.num_ties
            else "all as replayed"
        )
        rows.append(
            (
                sweep_tree.family,
                len(sweep_tree.paths),
                ratio_interval(check.measured),
                ratio(check.composed),
                _gap(check),
                "yes" if check.is_within else "no",
                differences,
                check.device,
            )
        )
    headers = ["family", "nodes", "measured speedup", "composed", "gap", "within", "steps", "device"]
    if columns is not None:
        return table(headers, rows, columns=columns)
    within = sum(check.is_within for check in checks)
    worst = max(abs(check.gap) for check in checks)
    told = all(check.holds_timing for check in checks)
    whose = "the interval of their gap" if told else "the run's own interval"
    summary = (
        f"Of {count(len(checks), 'point')} {within} lie within {whose}; the largest gap is "
        f"{percent(worst)}. Beyond rounding ties, steps differ from the replay on "
        f"{count(sum(check.num_bugs for check in checks), 'prompt')}."
    )
    return f"{table(headers, rows)}\n\n{_DECODED_NOTE} {decoded_words(checks)}\n\n{summary}"


def _gap(check: DecodedCheck) -> str:
    """Return a gap with its interval in percent."""
    told, interval = percent(check.gap, signed=True), check.gap_interval
    if interval is None or not math.isfinite(interval.low):
        return told
    low, high = (percent(bound, signed=True).removesuffix(" %") for bound in (interval.low, interval.high))
    return f"{told} [{low}, {high}]"


def decoded_words(checks: Sequence[DecodedCheck]) -> str:
    """Return what the interval of a gap holds, and that the points are not independent."""
    shared = "All points of a device share one curve of step times, and so its error."
    if all(check.holds_timing for check in checks):
        return f"Its bracket draws the prompts and the rounds in which the curve was timed. {shared}"
    return f"Its bracket draws the prompts alone, not the error of the curve's step times. {shared}"


def interval_words(cells: Sequence[ComposedCell]) -> str:
    """Return what the brackets of cells on measured step times hold; nothing where there are none."""
    measured = [one for one in cells if one.curve.kind == "measured"]
    rounds = {one.timing_rounds for one in measured if one.timing_rounds is not None}
    if not measured:
        return ""
    if not rounds:
        return "The error of measured step times is not in them."
    either = " or ".join(map(str, sorted(rounds)))
    told = f"Those on measured step times draw the {either} rounds in which these were taken as well."
    left_out = [one for one in measured if one.timing_rounds is None]
    if not left_out:
        return told
    names = ", ".join(dict.fromkeys(one.curve.words for one in left_out))
    return f"{told} That error is not in those of {names}."


def render_decoded_gap(record: SweepRecord) -> str:
    """Return in a sentence how far composed speedups lie from decoded ones; empty where none was decoded."""
    gaps = [check.gap for check in decoded_checks(record)]
    if not gaps:
        return ""
    below = sum(gap < 0 for gap in gaps)
    low, high = (percent(gap, signed=True) for gap in (min(gaps), max(gaps)))
    return (
        f"Composed speedups against decoding: of {count(len(gaps), 'point')} decoded for real {below} came "
        f"out faster than composed; the composed figure is off by {low} to {high}."
    )


def render_sampled(record: SweepRecord) -> str:
    """Return every sampled setting; empty where none was run."""
    if not record.sampled:
        return ""
    rows, num_prompts = [], 0
    for one in record.sampled:
        prompts = tuple(dict.fromkeys(row.prompt_key for row in one.rows))
        num_prompts = max(num_prompts, len(prompts))
        tokens, steps, texts, likelihood = (column.sum() for column in sampled_counts(one, prompts=prompts))
        setting = one.setting
        rows.append(
            (
                setting.rule,
                significant(setting.temperature),
                significant(setting.epsilon),
                significant(setting.delta),
                ratio(float(tokens / steps)) if steps else ABSENT,
                significant(float(likelihood / texts)),
                significant(_mean_tokens(one)),
            )
        )
    headers = ["rule", "T", "epsilon", "delta", "tokens/step", "likelihood", "tokens a text"]
    return f"{table(headers, rows)}\n\n{_SAMPLED_NOTE} {count(num_prompts, 'prompt')}."


def render_nodes(record: SweepRecord) -> str:
    """Return tokens/step by size: the grown tree, and the dense ones of about that size (Fig. 4)."""
    sparse, dense = sparse_points(record), dense_points(record)
    if not sparse:
        return ""
    near: dict[int, list[float]] = {}
    for point in dense:
        nearest = min((one.num_nodes for one in sparse), key=lambda size: abs(size - point.num_nodes))
        near.setdefault(nearest, []).append(point.tokens_per_step.estimate)
    rows = [
        (
            point.num_nodes,
            point.depth,
            ratio_interval(point.tokens_per_step),
            ratio(math.fsum(near[point.num_nodes]) / len(near[point.num_nodes]))
            if point.num_nodes in near
            else ABSENT,
            len(near.get(point.num_nodes, ())) or ABSENT,
        )
        for point in sparse
    ]
    headers = ["nodes", "depth", "grown tree, tokens/step", "random dense of about that size, mean", "drawn"]
    return f"{table(headers, rows)}\n\nReplayed, with intervals over prompts."


def render_heads(record: SweepRecord) -> str:
    """Return tokens/step against the number of heads that a tree of a size may use."""
    sizes = [size for size in (8, 16, 32, 64) if best_by_heads(record, num_nodes=size)]
    if not sizes:
        return ""
    found = {size: best_by_heads(record, num_nodes=size) for size in sizes}
    rows = [
        (
            heads,
            *(
                ratio_interval(found[size][heads].tokens_per_step) if heads in found[size] else ABSENT
                for size in sizes
            ),
        )
        for heads in sorted(record.spec.num_heads)
    ]
    return table(["heads", *(f"{count(size, 'node')}, tokens/step" for size in sizes)], rows)


def render_appendix_g(simulated: AppendixG) -> str:
    """Return the three simulations of Appendix G.3."""
    first = table(
        ["candidates", "acceleration rate", "step cost", "simulated speedup"],
        [
            (row.num_nodes, ratio(row.acceleration_rate), ratio(row.step_cost), ratio(row.speedup))
            for row in simulated.by_candidates
        ],
    )
    headers = ["best candidates", "simulated speedup"]
    second = table(
        ["batch", *headers], [(row.batch, row.num_nodes, ratio(row.speedup)) for row in simulated.by_batch]
    )
    third = table(
        ["sequence", *headers],
        [(row.context_tokens, row.num_nodes, ratio(row.speedup)) for row in simulated.by_length],
    )
    at, lengths = simulated.by_candidates[0], simulated.by_length[0]
    about = (
        f"Predicted, on the figures of {simulated.device}, one block of Llama-7B, with the paper's fitted "
        "acceleration rate. That has no intercept: it is 0 at one candidate, so only ratios between settings "
        "mean much."
    )
    titles = (
        f"Batch {at.batch}, sequence {at.context_tokens}:",
        f"Sequence {simulated.by_batch[0].context_tokens}:",
        f"Batch {lengths.batch}:",
    )
    return paragraphs(about, titles[0], first, titles[1], second, titles[2], third)


def _mean_tokens(one: SampledCell) -> float:
    return sum(row.num_tokens for row in one.rows) / len(one.rows)
