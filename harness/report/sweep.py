"""A sweep's record as Markdown, as a terminal table and as one JSON object: which tree on which device, and
how far to trust it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.compose.appendix_g import AppendixG, simulate
from harness.judge.claims.sweep import sampled_counts, sweep_verdicts
from harness.judge.judgement import ClaimVerdict, VerdictKind
from harness.judge.sweep import (
    best_by_heads,
    decoded_checks,
    dense_points,
    headline_cells,
    hypothetical_cells,
    searches_compared,
    sparse_points,
)
from harness.records.sweep import RooflineError, SweepRecord
from harness.records.sweep_cells import ComposedCell, SampledCell
from harness.report.formatting import (
    ABSENT,
    cell,
    count,
    finished_words,
    percent,
    rate_interval,
    ratio,
    ratio_interval,
    section,
    significant,
    table,
)
from harness.report.provenance import describe_commit_of
from harness.report.run import relative_folder
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.quoted import QuotedRow, load_quoted

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
_DEVICE_NOTE = """\
*tree*: chosen for the device on the calibration trace, so never on the text it is judged on; tokens/step \
are replayed on the trace.
*step cost*: the backbone's pass over the tree against one node, without heads. *overhead*: a whole step \
against vanilla's, so that
speedup = tokens/step / overhead. *composed*: replay x measured step times of the same model. *predicted*: \
replay x the roofline on the
data sheet, a lower bound of the time that leaves launches, softmax, candidates and acceptance out. \
Brackets hold bootstrap intervals
over prompts; they do not hold the error of the step times. *break-even*: speedups at growing batch with \
this tree; a batch takes as many
steps as its slowest row."""
_HYPOTHETICAL_NOTE = """\
This trace is of another model than these rows' shapes: what its tokens/step would be worth there. None of \
it is a result."""
_SAMPLED_NOTE = """\
One tree for all settings. *likelihood*: mean log-likelihood of the texts' tokens under the original \
backbone at temperature 1, nats a
token, which stands in for quality and need not follow a judge's score. Intervals and comparisons draw \
prompts whole."""
_DECODED_NOTE = """\
Trees drawn by seed, decoded for real with vanilla and Medusa in turn. *composed* is replay x the latency \
record's step times on the same
prompts; *gap* is composed over measured, less 1. *steps*: prompts on which decoding took another path than \
the replay."""


def render_sweep_report(
    record: SweepRecord, *, claims: Sequence[ClaimSpec] | None = None, figures: Sequence[str] = ()
) -> str:
    """Return the whole report of a sweep; `figures` are names of image files beside it."""
    registry = tuple(claims if claims is not None else load_claims())
    origin, spec = record.origin, record.spec
    trace = origin.trace
    heading = [
        f"# Sweep: `{spec.name}`",
        cell(spec.description),
        "\n".join(
            [
                f"- Trace: {spec.shape}, {trace.num_heads} heads (SHA-256 {trace.heads_sha256[:12]}), "
                f"recorded in {trace.dtype}: "
                f"{count(trace.num_prompts, 'prompt')}, {trace.num_positions:,} tokens",
                f"- Trees: {len(record.trees.trees):,}, grown and chosen on "
                f"{count(origin.calibration.num_prompts, 'other prompt')}",
                f"- Points: {record.num_points:,} on "
                f"{count(len(record.composed), 'curve and batch', plural='curves and batches')}",
                f"- Date: {origin.started_utc[:10]}",
                f"- Commit: {describe_commit_of(origin.commit, origin.dirty)}",
            ]
        ),
    ]
    apart = hypothetical_cells(record)
    parts = [
        *heading,
        section(
            "Which tree on which device",
            render_devices(headline_cells(record), record),
            _DEVICE_NOTE,
            _beyond_words(record),
        ),
        section("Verdicts", render_sweep_verdicts(record, registry)),
        section("Figures", "\n\n".join(f"![{name}]({name})" for name in figures)),
        section("Quoted", render_quoted(load_quoted())),
        section("Step times that are predicted", _error_words(origin.roofline_error)),
        section("Decoded for real", render_decoded(record)),
        section("Thresholds and temperatures", render_sampled(record)),
        section("Sparse and dense trees", render_nodes(record)),
        section("Heads", render_heads(record)),
        section("The two searches", _search_words(record)),
        section("Appendix G simulated", render_appendix_g(simulate(registry))),
        section("Hypothetical", _HYPOTHETICAL_NOTE if apart else "", render_devices(apart, record)),
        section("Failed cells", _render_failed(record)),
        section("Provenance", _render_provenance(record)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_devices(cells: Sequence[ComposedCell], record: SweepRecord) -> str:
    """Return the table of devices, the fastest tree of each; empty without cells."""
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
        rows.append([*start[:-2], *extra, *start[-2:]])
    return table(headers, rows)


def _device_cells(one: ComposedCell, record: SweepRecord) -> list[object]:
    best = one.best
    tree = record.trees.trees[best.tree].tree()
    mode = f", {one.curve.mode}" if one.curve.mode is not None else ""
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
        ratio_interval(best.speedup),
        rate_interval(best.tokens_per_s),
        best.break_even.words if best.break_even is not None else ABSENT,
    ]


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
    """Return the claims that this sweep decides, and those of Appendix G beside them."""
    headers = ["claim", "what the paper states", "ours", "verdict", "why"]
    return table(headers, [_verdict_cells(verdict) for verdict in sweep_verdicts(record, claims=claims)])


def _verdict_cells(verdict: ClaimVerdict) -> tuple[object, ...]:
    ours = f"{verdict.ours} ({verdict.figure_kind})" if verdict.figure_kind else ABSENT
    return (
        f"{verdict.claim_id} ({verdict.place})",
        verdict.stated,
        ours,
        f"**{verdict.kind.value}**",
        verdict.reason,
    )


def render_decoded(record: SweepRecord) -> str:
    """Return the points that were decoded for real beside their composition; empty where none was."""
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
                percent(check.gap, signed=True),
                "yes" if check.is_within else "no",
                differences,
                check.device,
            )
        )
    within = sum(check.is_within for check in checks)
    worst = max(abs(check.gap) for check in checks)
    words = (
        f"Of {count(len(checks), 'point')} {within} lie within the run's own interval; the largest gap is "
        f"{percent(worst)}. "
        f"Steps differ from the replay on {sum(check.num_bugs for check in checks)} prompts beyond "
        "rounding ties."
    )
    headers = ["family", "nodes", "measured speedup", "composed", "gap", "within", "steps", "device"]
    return f"{table(headers, rows)}\n\n{_DECODED_NOTE}\n\n{words}"


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
            ratio(fsum(near[point.num_nodes]) / len(near[point.num_nodes]))
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
    words = (
        f"Predicted, on the figures of {simulated.device}, one block of Llama-7B, with the paper's fitted "
        "acceleration rate, which has no "
        "intercept: it is 0 at one candidate, so only ratios between settings mean much."
    )
    titles = (
        f"Batch {at.batch}, sequence {at.context_tokens}:",
        f"Sequence {simulated.by_batch[0].context_tokens}:",
        f"Batch {lengths.batch}:",
    )
    return "\n\n".join([words, titles[0], first, titles[1], second, titles[2], third])


def render_readme_sweep(record: SweepRecord, *, base: Path, figures: Sequence[str] = ()) -> str:
    """Return what the README shows of a sweep: the table of devices, without what is hypothetical, and two
    figures.
    """
    origin = record.origin
    words = (
        f"Heads of {record.spec.shape}, {count(origin.trace.num_prompts, 'prompt')}, "
        f"{len(record.trees.trees):,} trees, "
        f"{record.num_points:,} points; {origin.started_utc[:10]}, commit "
        f"{describe_commit_of(origin.commit, origin.dirty)}."
    )
    absolute, link = record.folder.resolve(), f"From the record `{record.folder.resolve().name}`."
    images = ""
    if absolute.is_relative_to(base.resolve()):
        home = relative_folder(record.folder, base=base)
        link = (
            f"All trees, searches, thresholds and hypothetical rows: [`{absolute.name}`]({home}/report.md)."
        )
        images = "\n\n".join(f"![{Path(name).stem}]({home}/{name})" for name in figures)
    parts = [
        words,
        render_devices(headline_cells(record), record),
        _DEVICE_NOTE,
        _error_words(origin.roofline_error),
        images,
        link,
    ]
    return "\n\n".join(part for part in parts if part)


def print_sweep(console: Console, record: SweepRecord) -> None:
    """Print one line a device: its tree, and what it is worth."""
    shown = Table("device", "shape", "figure", "nodes", "tokens/step", "overhead", "speedup", "tokens/s")
    for one in headline_cells(record):
        best = one.best
        shown.add_row(
            one.curve.device,
            one.curve.shape,
            one.kind,
            str(len(record.trees.trees[best.tree].paths)),
            ratio(record.trees.rate(best.tree, batch=one.batch).estimate),
            ratio(best.overhead),
            ratio_interval(best.speedup),
            significant(best.tokens_per_s.estimate),
        )
    console.print(shown)
    for failed in record.failed:
        console.print(
            f"no figure for {failed.words}: {failed.message}", highlight=False, markup=False, soft_wrap=True
        )


def sweep_headline(
    record: SweepRecord, *, claims: Sequence[ClaimSpec] | None = None, base: Path | None = None
) -> dict[str, Any]:
    """Return the one JSON object that ends a sweep's output."""
    verdicts = sweep_verdicts(record, claims=tuple(claims if claims is not None else load_claims()))
    checks = decoded_checks(record)
    return {
        "sweep": record.spec.name,
        "num_trees": len(record.trees.trees),
        "num_points": record.num_points,
        "num_failed": len(record.failed),
        "num_hypothetical": len(hypothetical_cells(record)),
        "best": [
            {
                "device": one.curve.device,
                "shape": one.curve.shape,
                "dtype": one.curve.dtype,
                "kind": one.kind,
                "num_nodes": len(record.trees.trees[one.best.tree].paths),
                "speedup": round(one.best.speedup.estimate, 4),
                "tokens_per_s": round(one.best.tokens_per_s.estimate, 3),
            }
            for one in headline_cells(record)
        ],
        "decoded": {
            "points": len(checks),
            "within": sum(check.is_within for check in checks),
            "bugs": sum(c.num_bugs for c in checks),
        },
        "verdicts": {
            verdict.claim_id: verdict.kind.value
            for verdict in verdicts
            if verdict.kind is not VerdictKind.NOT_TESTED
        },
        "record": relative_folder(record.folder, base=base or Path.cwd()),
    }


def _mean_tokens(one: SampledCell) -> float:
    return sum(row.num_tokens for row in one.rows) / len(one.rows)


def _beyond_words(record: SweepRecord) -> str:
    rows = [
        f"{one.curve.words}: {percent(one.beyond_share)}"
        for one in headline_cells(record)
        if one.beyond_share > 0
    ]
    if not rows:
        return ""
    return (
        "Steps at lengths that were not timed, priced at the nearest one that was (share of "
        f"vanilla's): {'; '.join(rows)}."
    )


def _error_words(error: RooflineError | None) -> str:
    if error is None:
        return "No latency record is at hand, so the error of the roofline's predictions is not known."
    where = "; ".join(
        f"{device} ({limits} limits)" for device, limits in zip(error.devices, error.limits, strict=True)
    )
    seconds = error.seconds
    words = (
        f"On measured devices ({where}) the roofline is off by {percent(seconds.median_error)} in the "
        "median and "
        f"{percent(seconds.worst_error)} at worst over {count(seconds.num_points, 'point')}: they take "
        f"{ratio(seconds.median_ratio)} times "
        "as long as predicted."
    )
    if error.step_cost is None:
        return words
    return (
        f"{words} Its step cost, on which a speedup rests, is off by "
        f"{percent(error.step_cost.median_error)} in the median and "
        f"{percent(error.step_cost.worst_error)} at worst. Predicted rows are not corrected for either."
    )


def _search_words(record: SweepRecord) -> str:
    better, same, middle = searches_compared(record.composed)
    total = sum(len(one.chosen) == 2 for one in record.composed)
    if not total:
        return ""
    return (
        "The tree chosen on joint hits decodes more tokens/s than the exact optimum under independence on "
        f"{better} of {total} curves and "
        f"as many on {same}; the median ratio is {middle:.3f}. Both chose on the calibration trace and are "
        "compared on the other."
    )


def _render_failed(record: SweepRecord) -> str:
    return (
        table(["cell", "why"], [(failed.words, failed.message) for failed in record.failed])
        if record.failed
        else ""
    )


def _render_provenance(record: SweepRecord) -> str:
    origin, manifest = record.origin, record.manifest
    finished = "not finished: the record has no manifest and no seal"
    if manifest is not None:
        finished = finished_words(origin.started_utc, manifest.finished_utc, elapsed_s=manifest.elapsed_s)
    interval = record.spec.interval
    rows: list[tuple[str, object]] = [
        ("command", f"`{origin.command}`"),
        ("commit", describe_commit_of(origin.commit, origin.dirty)),
        ("started", origin.started_utc),
        ("finished", finished),
        ("machine that composed", f"{origin.device.name} ({origin.device.kind})"),
        ("run cells ran on", ", ".join(record.run_devices) or ABSENT),
        ("weights", f"SHA-256 {origin.trace.model_sha256[:16]}"),
        ("draft heads", f"SHA-256 {origin.trace.heads_sha256[:16]}"),
        *((name, f"SHA-256 {digest[:16]}") for name, digest in sorted(origin.inputs.items())),
        (
            "intervals",
            f"{100 * interval.level:g} % bootstrap over prompts, {interval.num_resamples:,} resamples, "
            f"seed {interval.seed}",
        ),
        ("Python", origin.python),
        ("packages", ", ".join(f"{name} {version}" for name, version in sorted(origin.packages.items()))),
        ("record", record.folder.name),
    ]
    return table(["", ""], rows)
