"""A latency record as Markdown, as a terminal table, and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.compose.curve import curve_of, step_cost_of
from harness.compose.roofline import Prediction, prediction_error
from harness.judge.judgement import CheckStatus
from harness.judge.latency import BatchPoint, ModeRow, batch_points, mode_rows, prediction_of, read_share
from harness.judge.latency_checks import latency_checks
from harness.records.latency import STOCK, LatencyPoint, LatencyRecord, break_even
from harness.records.sweep import PredictionError
from harness.report.formatting import (
    ABSENT,
    cell,
    count,
    heading,
    megabytes,
    milliseconds,
    page,
    pairs,
    paragraphs,
    percent,
    rate_interval,
    ratio,
    ratio_interval,
    section,
    significant,
    table,
)
from harness.report.limits import latency_validity, limits_note
from harness.report.noise import gpu_rows, processor_rows, render_latency_disturbance
from harness.report.provenance import (
    describe_commit,
    describe_device,
    describe_finish,
    describe_limits,
    how_to_repeat,
    record_link,
    relative_folder,
)
from harness.report.tables.latency import render_timing

_POINTS_NOTE = """\
Medians of repeats, synchronised. *step cost*: the backbone's pass over so many nodes against one node at the
same context and batch, without heads. *read limit*: the time to read the weights and the kept keys and values
once, at the bandwidth measured in this run, as a share of the backbone's time. *predicted*: the roofline with
this run's bandwidth and matrix throughput. *step*: a whole step of the decoding loop (heads, candidates,
backbone, acceptance, compaction); *overhead*: its time against the vanilla step's."""
_MODES_NOTE = """\
Vanilla decoding on the decode clock; every mode and Hugging Face `generate` take the same prompts in turn.
Brackets hold bootstrap intervals over prompts. *bandwidth*: the weights that a step must read, as a share of
what the device can read in that time. *N nodes*: step cost, the backbone's pass over N nodes against one, at
{context} context tokens, batch 1, without heads. *same text*: prompts whose tokens equal those of `generate`.
The mode that `auto` takes is marked *."""


def render_latency_report(record: LatencyRecord) -> str:
    """Return the whole report of a latency record."""
    environment, spec = record.environment, record.spec
    return page(
        heading(
            f"Step times: `{spec.name}`",
            spec.description,
            {
                "Model": _model(record),
                "Device": cell(describe_device(environment)),
                "Date": environment.started_utc[:10],
                "Commit": describe_commit(environment),
            },
        ),
        latency_validity(record),
        section("Table of modes", render_modes_table(record)),
        section("Speed against batch", render_batches(record)),
        *(
            section(f"Step times: {dtype}, {mode}", render_points(record, dtype=dtype, mode=mode))
            for dtype, mode in _curves(record)
        ),
        section("Skipped", _render_skipped(record)),
        section("Disturbance", render_latency_disturbance(record)),
        section("Provenance", _render_provenance(record)),
    )


def render_modes_table(record: LatencyRecord) -> str:
    """Return the table of modes with what its columns mean; empty where it was not measured."""
    rows, spec = mode_rows(record), record.spec.modes_table
    if not rows or spec is None:
        return ""
    headers = [
        "dtype",
        "mode",
        "tokens/s",
        "against `generate`",
        "bandwidth",
        *(count(size, "node") for size in spec.sizes),
        "same text",
    ]
    cells = [_mode_cells(row, sizes=spec.sizes) for row in rows]
    return paragraphs(
        table(headers, cells), _MODES_NOTE.format(context=spec.context_tokens), limits_note(record)
    )


def render_batches(record: LatencyRecord) -> str:
    """Return speed against batch and the break-even point; empty where it was not measured."""
    if record.batches is None:
        return ""
    points, tree = _batch_points(record), record.batches.tree
    rows = [
        (
            point.batch,
            significant(point.vanilla_tokens_per_s),
            significant(point.medusa_tokens_per_s),
            ratio_interval(point.speedup),
            ratio(point.tokens_per_step),
            point.speedup.num_prompts,
        )
        for point in points
    ]
    headers = ["batch", "vanilla, tokens/s", "Medusa, tokens/s", "speedup", "tokens/step a row", "groups"]
    where = (
        f"{record.batches.dtype}, {record.batches.mode}, a tree of {count(len(tree.paths), 'node')} "
        f"({cell(tree.origin)})"
    )
    note = (
        f"{where}. All batches decode the same texts greedily, so many at a time. Tokens/s are of all rows "
        "together, intervals over groups of texts. A row that has ended waits for the rest of its batch, and "
        "still counts in tokens/step. "
        f"Break-even: {_break_even(record)}."
    )
    return f"{table(headers, rows)}\n\n{note}"


def render_points(record: LatencyRecord, *, dtype: str, mode: str) -> str:
    """Return every measured point of a dtype and mode, and how far the roofline is off."""
    points = sorted(
        _measured(record, dtype=dtype, mode=mode),
        key=lambda point: (point.batch, point.context_tokens, point.num_nodes),
    )
    headers = [
        "batch",
        "context",
        "nodes",
        "heads",
        "backbone, ms",
        "step cost",
        "read limit",
        "predicted, ms",
        "measured / predicted",
    ]
    headers += ["heads, ms", "step, ms", "overhead"]
    lines = [table(headers, [_point_cells(record, point, among=points) for point in points]), _POINTS_NOTE]
    lines.append(render_timing(points))
    predictions = [made for point in points if (made := prediction_of(record, point)) is not None]
    if predictions:
        lines.append(_roofline_error(prediction_error(predictions)))
        limits = record.limits(dtype)
        if limits is not None and limits.are_under_measured:
            lines.append(_limits_too_low(predictions))
    correction = curve_of(record, dtype=dtype, mode=mode).largest_correction
    smoothing = "no value" if correction == 0 else f"no value by more than {percent(correction)}"
    lines.append(
        f"Composition makes these times monotone in the number of nodes, which moves {smoothing}; the "
        "record keeps them raw."
    )
    return paragraphs(*lines)


def render_readme_modes(record: LatencyRecord, *, base: Path) -> str:
    """Return what the README shows of a latency record; `base` is the README's folder."""
    environment = record.environment
    origin = (
        f"{_model(record)} on {cell(describe_device(environment))}, {environment.started_utc[:10]}, "
        f"commit {describe_commit(environment)}."
    )
    batches = (
        f"Break-even batch of Medusa over vanilla: {_break_even(record)}."
        if record.batches is not None
        else ""
    )
    link = record_link(record.folder, base=base, label="All step times")
    return paragraphs(origin, render_modes_table(record), batches, link)


def print_latency(console: Console, record: LatencyRecord) -> None:
    """Print one line a context and batch: a node's time, and what more of them cost."""
    shown = Table("dtype", "mode", "batch", "context", "1 node, ms", "step cost at so many nodes")
    for dtype, mode in _curves(record):
        points = _measured(record, dtype=dtype, mode=mode)
        for batch, context in sorted({(point.batch, point.context_tokens) for point in points}):
            here = [point for point in points if (point.batch, point.context_tokens) == (batch, context)]
            one_s = next((median(point.backbone_s) for point in here if point.num_nodes == 1), None)
            sizes = sorted({point.num_nodes for point in here} - {1})
            costs = [f"{size}: {ratio(step_cost_of(points, num_nodes=size, like=here[0]))}" for size in sizes]
            shown.add_row(dtype, mode, str(batch), str(context), milliseconds(one_s), "  ".join(costs))
    console.print(shown)
    for row in mode_rows(record):
        figures = (
            f"{rate_interval(row.tokens_per_s)} tokens/s, {ratio_interval(row.over_stock)} of "
            "Hugging Face generate"
        )
        console.print(
            f"{row.dtype} {row.mode}{' (auto)' if row.is_auto else ''}: {figures}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if record.batches is not None:
        console.print(f"break-even batch: {_break_even(record)}", highlight=False)


def latency_headline(record: LatencyRecord, *, base: Path | None = None) -> dict[str, Any]:
    """Return the one JSON object that ends a run's output; figures are rounded medians."""
    measured = [point for point in record.points if point.skipped is None]
    smallest = min(((point.batch, point.context_tokens) for point in measured), default=(0, 0))
    costs: dict[str, dict[str, float]] = {}
    for point in measured:
        if (point.batch, point.context_tokens) == smallest:
            cost = step_cost_of(measured, num_nodes=point.num_nodes, like=point)
            if cost is not None:
                costs.setdefault(f"{point.dtype} {point.mode}", {})[str(point.num_nodes)] = round(cost, 4)
    speedups = {point.batch: round(point.speedup.estimate, 4) for point in _batch_points(record)}
    return {
        "latency": record.spec.name,
        "model": record.facts.name,
        "num_points": len(measured),
        "num_skipped": len(record.points) - len(measured),
        "batch": smallest[0],
        "context_tokens": smallest[1],
        "step_cost": costs,
        "modes": [
            {
                "dtype": row.dtype,
                "mode": row.mode,
                "auto": row.is_auto,
                "tokens_per_s": round(row.tokens_per_s.estimate, 3),
                "over_generate": round(row.over_stock.estimate, 4),
                "bandwidth_share": None if row.bandwidth_share is None else round(row.bandwidth_share, 4),
            }
            for row in mode_rows(record)
        ],
        "speedup_by_batch": {str(batch): speedup for batch, speedup in speedups.items()},
        "break_even": break_even(speedups).words if speedups else None,
        "valid": all(one.status is not CheckStatus.FAILED for one in latency_checks(record)),
        "record": relative_folder(record.folder, base=base or Path.cwd()),
    }


def _curves(record: LatencyRecord) -> list[tuple[str, str]]:
    """Return dtypes and modes with something measured, in the order of the record."""
    return list(dict.fromkeys((point.dtype, point.mode) for point in record.points if point.backbone_s))


def _measured(record: LatencyRecord, *, dtype: str, mode: str) -> list[LatencyPoint]:
    return [
        point for point in record.points if (point.dtype, point.mode) == (dtype, mode) and point.backbone_s
    ]


def _point_cells(
    record: LatencyRecord, point: LatencyPoint, *, among: Sequence[LatencyPoint]
) -> tuple[object, ...]:
    vanilla = [
        s for other in among if other.group == point.group and other.num_nodes == 1 for s in other.step_s
    ]
    made = prediction_of(record, point)
    return (
        point.batch,
        point.context_tokens,
        point.num_nodes,
        point.num_heads,
        milliseconds(median(point.backbone_s)),
        ratio(step_cost_of(among, num_nodes=point.num_nodes, like=point)),
        percent(read_share(record, point)),
        milliseconds(made.predicted_s if made else None),
        ratio(made.ratio if made else None),
        milliseconds(median(point.heads_s)) if point.heads_s else ABSENT,
        milliseconds(median(point.step_s)) if point.step_s else ABSENT,
        ratio(median(point.step_s) / median(vanilla)) if point.step_s and vanilla else ABSENT,
    )


def _mode_cells(row: ModeRow, *, sizes: Sequence[int]) -> tuple[object, ...]:
    is_stock = row.mode == STOCK
    costs = [ratio(cost) for cost in row.step_costs] or [ABSENT] * len(sizes)
    return (
        row.dtype,
        "Hugging Face `generate`" if is_stock else f"`{row.mode}`{' *' if row.is_auto else ''}",
        rate_interval(row.tokens_per_s),
        "1" if is_stock else ratio_interval(row.over_stock),
        percent(row.bandwidth_share),
        *costs,
        f"{row.num_same_text} of {row.num_prompts}",
    )


def _roofline_error(error: PredictionError) -> str:
    return (
        f"The roofline's prediction is off by {percent(error.median_error)} in the median and "
        f"{percent(error.worst_error)} at worst over "
        f"{count(error.num_points, 'point')}; the device takes {ratio(error.median_ratio)} times as long "
        "as predicted."
    )


def _limits_too_low(predictions: Sequence[Prediction]) -> str:
    """Return that an older probe measured too low limits, where a step was faster than them; else nothing."""
    faster = [made.ratio for made in predictions if made.ratio < 1]
    if not faster:
        return ""
    return (
        f"**Limits under-measured**: {len(faster)} of {count(len(predictions), 'point')} took less time than "
        f"this run's own limits allow (at the least {ratio(min(faster))} of it). So the device can do more "
        "than was measured, and shares of these limits flatter."
    )


def _break_even(record: LatencyRecord) -> str:
    speedups = {point.batch: point.speedup for point in _batch_points(record)}
    found = break_even({batch: speedup.estimate for batch, speedup in speedups.items()})
    if found.largest_batch is None:
        return found.words
    return (
        f"{found.words} (speedup {ratio_interval(speedups[found.largest_batch])} at batch "
        f"{found.largest_batch})"
    )


def _batch_points(record: LatencyRecord) -> tuple[BatchPoint, ...]:
    return batch_points(record.batches, spec=record.spec.interval) if record.batches is not None else ()


def _render_skipped(record: LatencyRecord) -> str:
    rows = [
        (
            point.dtype,
            point.mode,
            point.batch,
            point.context_tokens,
            point.num_nodes,
            point.num_heads,
            point.skipped,
        )
        for point in record.points
        if point.skipped is not None
    ]
    return table(["dtype", "mode", "batch", "context", "nodes", "heads", "why"], rows) if rows else ""


def _render_provenance(record: LatencyRecord) -> str:
    environment, facts = record.environment, record.facts
    weights = ", ".join(f"{megabytes(facts.step_bytes(dtype))} MB in {dtype}" for dtype in record.spec.dtypes)
    rows: list[tuple[str, object]] = [
        ("command", f"`{environment.command}`"),
        ("commit", describe_commit(environment)),
        ("started", environment.started_utc),
        ("finished", describe_finish(environment, record.manifest)),
        ("device", describe_device(environment)),
        *((f"device: {name}", value) for name, value in sorted(environment.device.details.items())),
        *((f"device limits, {dtype}", _limits(record, dtype)) for dtype in record.spec.dtypes),
        *processor_rows([seen for point in record.points for seen in point.processor], noun="sitting"),
        *gpu_rows([point.gpu for point in record.points if point.backbone_s], noun="point"),
        ("weights that a step reads", weights),
        ("weights", f"SHA-256 {environment.backbone_sha256[:16]}"),
        (
            "draft heads",
            f"{facts.num_heads} of {count(facts.num_head_layers, 'layer')}, {facts.head_architecture} "
            "unembedding",
        ),
        (
            "draft heads: weights",
            f"SHA-256 {environment.heads_sha256[:16]}" if environment.heads_sha256 else "random",
        ),
        ("linear algebra", environment.blas),
        ("variables", pairs(environment.variables)),
        ("Python", environment.python),
        ("packages", pairs(environment.packages)),
        ("record", record.folder.name),
    ]
    repeat = how_to_repeat(environment, where=" on a device of the same kind")
    return paragraphs(table(["", ""], rows), repeat)


def _limits(record: LatencyRecord, dtype: str) -> str:
    limits = record.limits(dtype)
    return ABSENT if limits is None else describe_limits(limits)


def _model(record: LatencyRecord) -> str:
    weights = "random weights of that shape" if record.facts.random_weights else "its own weights"
    return f"{cell(record.facts.name)} with {weights}"
