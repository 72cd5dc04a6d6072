"""A sweep's record as Markdown, as a terminal table and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.compose.appendix_g import simulate
from harness.judge.claims.sweep import sweep_verdicts
from harness.judge.judgement import VerdictKind
from harness.judge.sweep import (
    decoded_checks,
    headline_cells,
    hypothetical_cells,
    searches_compared,
    told_speedup,
    told_tokens_per_s,
)
from harness.records.sweep import RooflineError, SweepOrigin, SweepRecord
from harness.records.sweep_cells import ComposedCell
from harness.report.formatting import (
    ABSENT,
    WITHHELD,
    count,
    heading,
    page,
    pairs,
    paragraphs,
    percent,
    rate_interval,
    ratio,
    ratio_interval,
    section,
    table,
)
from harness.report.provenance import (
    describe_commit,
    describe_finish,
    describe_intervals,
    path_within,
    record_link,
    relative_folder,
)
from harness.report.tables.schedule import render_schedules
from harness.report.tables.sweep import (
    decoded_words,
    interval_words,
    render_appendix_g,
    render_decoded,
    render_decoded_gap,
    render_devices,
    render_heads,
    render_nodes,
    render_quoted,
    render_sampled,
    render_sweep_verdicts,
)
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.quoted import load_quoted

_DEVICE_NOTE = """\
*tree*: chosen for the device on the calibration trace, so never on the text it is judged on; tokens/step are
replayed on the trace. *step cost*: the backbone's pass over the tree against one node, without heads.
*overhead*: a whole step against vanilla's, so that speedup = tokens/step / overhead. *composed*: a replay
priced by measured step times of the same model. *predicted*: a replay priced by a model of the device's step.
*break-even*: up to which batch this tree is faster than vanilla; a batch takes as many steps as its slowest
row. *error > effect*: the error of the predicted steps leaves open whether the tree is faster or slower than
vanilla, so no tree and no speed is told. Rows that say the same are one row. Brackets hold bootstrap
intervals over prompts; those of predicted speedups and tokens/s are widened by the error of the predicted
steps."""
_README_COLUMNS = (
    "device",
    "step times",
    "nodes",
    "tokens/step",
    "overhead",
    "speedup",
    "tokens/s",
    "break-even batch",
)
_DECODED_NOTE = """\
*measured*: vanilla and a tree drawn by seed in turn on the same prompts. *gap*: composed over measured, less
1."""
_DECODED_COLUMNS = ("family", "nodes", "measured speedup", "composed", "gap")
_README_NOTE = """\
The fastest tree of each device, chosen on other text than it is judged on. *overhead*: a whole step against
vanilla's, so that speedup = tokens/step / overhead. *break-even*: up to which batch this tree is faster than
vanilla. Brackets hold bootstrap intervals over prompts."""
_HYPOTHETICAL_NOTE = """\
These rows join the trace with another model's steps, or with lengths that the text did not have: what its
tokens/step would be worth there. None of it is a result."""


def render_sweep_report(
    record: SweepRecord, *, claims: Sequence[ClaimSpec] | None = None, figures: Sequence[str] = ()
) -> str:
    """Return the whole report of a sweep; `figures` are names of image files in its folder."""
    registry = tuple(claims if claims is not None else load_claims())
    origin, spec = record.origin, record.spec
    trace, apart = origin.trace, hypothetical_cells(record)
    return page(
        heading(
            f"Sweep: `{spec.name}`",
            spec.description,
            {
                "Trace": f"{spec.shape}, {trace.num_heads} heads (SHA-256 {trace.heads_sha256[:12]}), "
                f"recorded in {trace.dtype}: {count(trace.num_prompts, 'prompt')}, "
                f"{trace.num_positions:,} tokens",
                "Trees": f"{len(record.trees.trees):,}, grown and chosen on "
                f"{count(origin.calibration.num_prompts, 'other prompt')}",
                "Points": f"{record.num_points:,} on "
                f"{count(len(record.composed), 'curve and batch', plural='curves and batches')}",
                "Date": origin.started_utc[:10],
                "Commit": describe_commit(origin),
            },
        ),
        section(
            "Which tree on which device",
            render_devices(headline_cells(record), record),
            f"{_DEVICE_NOTE} {interval_words(headline_cells(record))}",
            render_decoded_gap(record),
            _beyond(record),
        ),
        section("Which tree for which batch", render_schedules(record)),
        section("Verdicts", render_sweep_verdicts(record, registry)),
        section("Figures", *(f"![{name}]({name})" for name in figures)),
        section("Quoted", render_quoted(load_quoted())),
        section("Step times that are predicted", _prediction_error(origin)),
        section("Decoded for real", render_decoded(record)),
        section("Thresholds and temperatures", render_sampled(record)),
        section("Sparse and dense trees", render_nodes(record)),
        section("Heads", render_heads(record)),
        section("The two searches", _searches(record)),
        section("Appendix G simulated", render_appendix_g(simulate(registry))),
        section("Hypothetical", _HYPOTHETICAL_NOTE if apart else "", render_devices(apart, record)),
        section("Failed cells", _render_failed(record)),
        section("Provenance", _render_provenance(record)),
    )


def render_readme_sweep(record: SweepRecord, *, base: Path, figures: Sequence[str] = ()) -> str:
    """Return what a newcomer reads of a sweep: devices whose step times were measured, and two figures.

    The report has what is predicted or hypothetical, and the other columns.
    """
    origin = record.origin
    about = (
        f"Heads of {record.spec.shape}, {count(origin.trace.num_prompts, 'prompt')}, "
        f"{len(record.trees.trees):,} trees, "
        f"{record.num_points:,} points; {origin.started_utc[:10]}, commit "
        f"{describe_commit(origin)}."
    )
    home = path_within(record.folder, base=base)
    images = [f"![{Path(name).stem}]({home}/{name})" for name in figures] if home is not None else []
    label = "All trees, searches, thresholds and hypothetical rows"
    cells = headline_cells(record)
    measured = [one for one in cells if one.kind == "composed"]
    return paragraphs(
        about,
        render_devices(measured, record, columns=_README_COLUMNS),
        f"{_README_NOTE} {interval_words(measured)}",
        render_decoded_gap(record),
        _readme_decoded(record),
        _not_measured([one for one in cells if one.kind != "composed"], record),
        *images,
        record_link(record.folder, base=base, label=label),
    )


def render_readme_trees(record: SweepRecord, *, base: Path) -> str:
    """Return which tree pays on which measured device, and what it is worth there, in a short table."""
    measured = [one for one in headline_cells(record) if one.kind == "composed"]
    return paragraphs(
        render_devices(measured, record, columns=_README_COLUMNS),
        "The fastest tree of each measured device, chosen on other text than the "
        f"{count(record.origin.trace.num_prompts, 'prompt')} it is judged on; speedup = tokens/step / "
        "overhead, with intervals over prompts. *break-even*: up to which batch it is faster than vanilla.",
        record_link(record.folder, base=base, label="All trees, devices and predictions"),
    )


def _readme_decoded(record: SweepRecord) -> str:
    """Return the decoded points, measured and composed, with what their brackets hold; empty without any."""
    checks = decoded_checks(record)
    if not checks:
        return ""
    return paragraphs(
        render_decoded(record, columns=_DECODED_COLUMNS), f"{_DECODED_NOTE} {decoded_words(checks)}"
    )


def print_sweep(console: Console, record: SweepRecord) -> None:
    """Print one line a device: its tree, and what it is worth."""
    shown = Table("device", "shape", "figure", "nodes", "tokens/step", "overhead", "speedup", "tokens/s")
    cells = headline_cells(record)
    for one in cells:
        best, speedup = one.best, told_speedup(one, record)
        if speedup is not None:
            shown.add_row(
                one.curve.device,
                one.curve.shape,
                one.kind,
                str(len(record.trees.trees[best.tree].paths)),
                ratio(record.trees.rate(best.tree, batch=one.batch).estimate),
                ratio(best.overhead),
                ratio_interval(speedup),
                rate_interval(told_tokens_per_s(one, record)),
            )
    console.print(shown)
    if withheld := [one.curve.device for one in cells if told_speedup(one, record) is None]:
        console.print(f"{WITHHELD}, so no figure: {', '.join(withheld)}", highlight=False, markup=False)
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
    told = [one for one in headline_cells(record) if told_speedup(one, record) is not None]
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
            for one in told
        ],
        "num_withheld": len(headline_cells(record)) - len(told),
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


def _beyond(record: SweepRecord) -> str:
    rows = [
        f"{one.curve.words}: {percent(one.beyond_share)}"
        for one in headline_cells(record)
        if one.beyond_share > 0
    ]
    if not rows:
        return ""
    return (
        "Share of vanilla's steps at lengths outside of the timed ones, which are priced at the nearest one: "
        f"{'; '.join(rows)}."
    )


def _not_measured(predicted: Sequence[ComposedCell], record: SweepRecord) -> str:
    """Return what the report alone has of devices that were not measured, and how sure that is."""
    if not predicted:
        return ""
    withheld = sum(told_speedup(one, record) is None for one in predicted)
    return " ".join(
        filter(
            None,
            (
                f"{count(len(predicted), 'curve')} of devices that were not measured "
                f"{'stands' if len(predicted) == 1 else 'stand'} in the report alone.",
                _withheld(withheld, total=len(predicted)),
                _prediction_error(record.origin),
            ),
        )
    )


def _withheld(number: int, *, total: int) -> str:
    """Return of how many curves nothing is told, and why; nothing where all are told."""
    if not number:
        return ""
    if number == total > 1:
        told = "Of none of them is a tree or a speed told"
    else:
        told = f"Of {'it' if total == 1 else f'{number} of these'} no tree and no speed is told"
    return f"{told}, since the error of the step times is larger than what a tree would gain."


def _prediction_error(origin: SweepOrigin) -> str:
    """Return how far the model was off that a sweep's predictions were made with."""
    model = origin.step_model
    if model is None:
        return _roofline_error(origin.roofline_error)
    about = (
        f"Predictions are of the step model that was fitted on {count(len(model.curves), 'measured curve')}."
    )
    if not model.left_out:
        return f"{about} Without a second one their error is not known."
    ranges = [
        f"{one.curve}: step {ratio(one.seconds.low)} to {ratio(one.seconds.high)}"
        + (f", overhead {ratio(one.overhead.low)} to {ratio(one.overhead.high)}" if one.overhead else "")
        for one in model.left_out
    ]
    return (
        f"{about} Each was also left out of the fit and predicted; so many times the prediction are 90 % of "
        f"its measured points: {'; '.join(ranges)}. The bounds of predicted figures are the widest of these "
        "ranges; a device that nobody measured may be further off."
    )


def _roofline_error(error: RooflineError | None) -> str:
    if error is None:
        return "There is no latency record, so the error of the roofline's predictions is not known."
    where = "; ".join(
        f"{device} ({limits} limits)" for device, limits in zip(error.devices, error.limits, strict=True)
    )
    seconds = error.seconds
    told = (
        f"On measured devices ({where}) the roofline is off by {percent(seconds.median_error)} in the "
        "median and "
        f"{percent(seconds.worst_error)} at worst over {count(seconds.num_points, 'point')}: they take "
        f"{ratio(seconds.median_ratio)} times "
        "as long as predicted."
    )
    if error.step_cost is None:
        return told
    return (
        f"{told} Its step cost, on which a speedup rests, is off by "
        f"{percent(error.step_cost.median_error)} in the median and "
        f"{percent(error.step_cost.worst_error)} at worst. Rows that the roofline predicted are not "
        "corrected for either."
    )


def _searches(record: SweepRecord) -> str:
    better, same, middle = searches_compared(record.composed)
    total = sum(len(one.chosen) == 2 for one in record.composed)
    if not total:
        return ""
    return (
        "The tree chosen on joint hits decodes more tokens/s than the exact optimum under independence on "
        f"{better} of {total} curves and as many on {same}; the median ratio is {middle:.3f}. Both trees "
        "were chosen on the calibration trace and are compared on the other one."
    )


def _render_failed(record: SweepRecord) -> str:
    return (
        table(["cell", "why"], [(failed.words, failed.message) for failed in record.failed])
        if record.failed
        else ""
    )


def _render_provenance(record: SweepRecord) -> str:
    origin, interval = record.origin, record.spec.interval
    rows: list[tuple[str, object]] = [
        ("command", f"`{origin.command}`"),
        ("commit", describe_commit(origin)),
        ("started", origin.started_utc),
        ("finished", describe_finish(origin, record.manifest)),
        ("machine that composed", f"{origin.device.name} ({origin.device.kind})"),
        ("run cells ran on", ", ".join(record.run_devices) or ABSENT),
        ("weights", f"SHA-256 {origin.trace.model_sha256[:16]}"),
        ("draft heads", f"SHA-256 {origin.trace.heads_sha256[:16]}"),
        *((name, f"SHA-256 {digest[:16]}") for name, digest in sorted(origin.inputs.items())),
        ("intervals", f"{describe_intervals(interval)}, seed {interval.seed}"),
        ("Python", origin.python),
        ("packages", pairs(origin.packages)),
        ("record", record.folder.name),
    ]
    return table(["", ""], rows)
