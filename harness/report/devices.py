"""The page of devices: measured step times, predictions for the paper's models, the model that makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.compose.prices.fitted import TimedCurve
from harness.compose.prices.table import (
    CONTEXT_TOKENS,
    PAPER_HEADS,
    PAPER_NODES,
    SIZES,
    Banded,
    MeasuredRow,
    PredictedRow,
)
from harness.compose.roofline import step_work
from harness.records.latency import DTYPE_BYTES
from harness.records.step_model import DeviceKind, EngineCosts, ErrorBand, StepModel
from harness.report.formatting import (
    ABSENT,
    WITHHELD,
    count,
    merged,
    milliseconds,
    page,
    paragraphs,
    percent,
    ratio,
    section,
    significant,
    table,
)

DEVICES_PAGE = "devices.md"
_DIGITS = 2  # of a predicted figure: its error is far larger than what a third digit says
_KINDS: Mapping[DeviceKind, str] = {"cuda": "GPU", "cpu": "CPU"}
_MEASURED_NOTE = f"""\
Batch 1, medians. *vanilla step*: a whole step of plain decoding after so many kept tokens (of the timed
lengths the one nearest to {CONTEXT_TOKENS:,}). *overhead*: a whole step with a tree of so many nodes and all
draft heads against it, so a tree pays where its tokens/step are above it. *engine before*: a newer record of
the same measurement on the same machine stands in the table as well. Machines that share no more than a name
have rows of their own: their times are not comparable."""
_PREDICTED_NOTE = f"""\
The step model on each device's data sheet: half precision, batch 1, {CONTEXT_TOKENS:,} kept tokens,
{PAPER_HEADS.num_heads} heads with an unembedding each, {PAPER_NODES} nodes. Brackets hold the model's error:
of each curve that it had not seen 90 % of the points lie within. *speedup*: the paper's own tokens/step
(Table 1, Medusa-2) over the predicted overhead, and tokens/s likewise: what its heads would be worth there.
*{WITHHELD}*: the bracket of the speedup holds 1, so neither speedup nor tokens/s is told. Rows that say the
same are one row. A device that does not hold a model has no row, nor has one that was measured with it."""
_MODEL_NOTE = """\
A step is a number of matrix products. Each takes a constant (its launch and the small kernels around it) and,
on top of it, the slower of moving its bytes and doing its arithmetic, at a share of the device's limits. A
step with a tree takes a constant more in each layer, for the mask, and one for candidates, acceptance and
compaction. The values are fitted on the measured curves of one kind of device together. Shares are at most 1
and no constant is negative, so no prediction is faster than the roofline."""
_ERROR_NOTE = """\
Each curve in turn is left out of the fit and then predicted; *measured / predicted* and, for the roofline
without any fitted value, *measured / roofline* are medians of a step's time. The brackets of the predictions
above are the widest of these ranges. What they do not hold: GPUs differ in more than their data sheets, and a
device that nobody measured was never left out; clocks that fall under load; other attention kernels. Shares
are of the data sheet where there is one, else of what was measured in the same run, whose noise is then in
them."""
_COSTS: tuple[tuple[str, str, str], ...] = (
    ("operator_s", "a product's launch and the small kernels around it", "us a product"),
    ("tree_layer_s", "a tree's mask", "us a layer"),
    ("product_share", "bandwidth that products with weights attain", "of the limit"),
    ("arithmetic_share", "throughput that products with weights attain", "of the limit"),
    ("attention_share", "limits that attention of one node attains", "of the limit"),
    ("tree_attention_share", "limits that attention under a tree's mask attains", "of the limit"),
    ("vanilla_own_s", "rest of a vanilla step", "us a step"),
    ("tree_own_s", "rest of a tree's step", "us a step"),
)


def render_devices_page(
    measured: Sequence[MeasuredRow],
    predicted: Sequence[PredictedRow],
    models: Mapping[DeviceKind, StepModel],
    curves: Sequence[TimedCurve],
) -> str:
    """Return the page, which lies in the results folder."""
    return page(
        "# What a step costs, by device",
        "`medusa-repro devices` makes this page from the latency records and runs next to it.",
        section("Measured", render_measured(measured), _MEASURED_NOTE if measured else ""),
        section(
            "Predicted for the paper's models",
            render_predicted(predicted),
            _PREDICTED_NOTE if predicted else "",
        ),
        section("The step model", _MODEL_NOTE, _render_costs(models), _render_operators(curves))
        if models
        else "",
        section("How far it is off", _render_errors(models), _ERROR_NOTE) if models else "",
    )


def render_readme_devices(
    measured: Sequence[MeasuredRow], predicted: Sequence[PredictedRow], *, results: Path, base: Path
) -> str:
    """Return what a README shows: measured rows, then predictions, and the link to the page."""
    link = (results / DEVICES_PAGE).resolve().relative_to(base.resolve()).as_posix()
    return paragraphs(
        render_measured(measured),
        _MEASURED_NOTE if measured else "",
        render_predicted(predicted),
        _PREDICTED_NOTE if predicted else "",
        f"The step model, its values and its error on every curve: [`{DEVICES_PAGE}`]({link}).",
    )


def render_measured(rows: Sequence[MeasuredRow]) -> str:
    """Return the table of what was measured; empty without rows."""
    if not rows:
        return ""
    headers = ["device", "model shape", "measured in", "context", "vanilla step, ms", "vanilla, tokens/s"]
    headers += [*(f"overhead, {size} nodes" for size in SIZES), "record"]
    cells = [
        (
            row.curve.machine_name,
            row.curve.shape,
            f"{row.curve.dtype}, {row.curve.mode}",
            f"{row.context_tokens:,}",
            milliseconds(row.vanilla_s),
            significant(1 / row.vanilla_s),
            *(ratio(row.overheads.get(size)) for size in SIZES),
            f"`{row.curve.source}`{' (engine before)' if row.is_older else ''}",
        )
        for row in rows
    ]
    return table(headers, cells)


def render_predicted(rows: Sequence[PredictedRow]) -> str:
    """Return the table of predictions, rows that say the same as one; empty without rows."""
    if not rows:
        return ""
    headers = ["model shape", "device", "vanilla step, ms", f"overhead, {PAPER_NODES} nodes"]
    headers += ["tokens/step of the paper", "speedup", "tokens/s"]
    return table(headers, merged([_predicted_cells(row) for row in rows], column=1))


def _predicted_cells(row: PredictedRow) -> tuple[str, ...]:
    return (
        row.shape,
        row.device,
        bracketed(row.vanilla_s, scale=1000),
        bracketed(row.overhead),
        ratio(row.tokens_per_step),
        bracketed(row.speedup) if row.is_shown else WITHHELD,
        bracketed(row.tokens_per_s) if row.is_shown else WITHHELD,
    )


def bracketed(figure: Banded, *, scale: float = 1.0) -> str:
    """Return `1.21 [1.02, 1.83]`, or that the error is not known."""
    value = significant(figure.value * scale, digits=_DIGITS)
    if figure.low is None or figure.high is None:
        return f"{value} (error unknown)"
    low, high = (significant(bound * scale, digits=_DIGITS) for bound in (figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def devices_headline(
    measured: Sequence[MeasuredRow],
    predicted: Sequence[PredictedRow],
    models: Mapping[DeviceKind, StepModel],
) -> dict[str, Any]:
    """Return the one JSON object that ends the command's output, with the fitted values."""
    return {
        "measured": len(measured),
        "predicted": len(predicted),
        "withheld": sum(not row.is_shown for row in predicted),
        "models": {kind: model.model_dump(mode="json") for kind, model in models.items()},
    }


def _render_costs(models: Mapping[DeviceKind, StepModel]) -> str:
    kinds = [kind for kind in _KINDS if kind in models]
    rows = [(what, unit, *(_cost(models[kind].costs, name) for kind in kinds)) for name, what, unit in _COSTS]
    fitted = [
        f"{_KINDS[kind]}: fitted on {count(len(models[kind].curves), 'curve')} "
        f"({'; '.join(models[kind].curves)})."
        for kind in kinds
    ]
    return paragraphs(table(["what", "unit", *(_KINDS[kind] for kind in kinds)], rows), *fitted)


def _cost(costs: EngineCosts, name: str) -> str:
    value = float(getattr(costs, name))
    return percent(value) if name.endswith("_share") else significant(1e6 * value)


def _render_operators(curves: Sequence[TimedCurve]) -> str:
    """Return how many products a step of each measured shape has; they are counted, not fitted."""
    counts = {}
    for curve in curves:
        work = step_work(
            curve.sizes, num_nodes=1, context_tokens=1, batch=1, dtype_bytes=DTYPE_BYTES[curve.dtype]
        )
        counts[curve.shape] = work.num_operators
    listed = ", ".join(f"{shape} {number:,}" for shape, number in counts.items())
    return f"Products in a pass of the backbone, counted: {listed}." if counts else ""


def _render_errors(models: Mapping[DeviceKind, StepModel]) -> str:
    headers = ["left out", "points", "measured / roofline", "measured / predicted", "step, 90 % within"]
    rows = [
        (
            one.curve,
            one.num_points,
            ratio(one.roofline_ratio),
            ratio(one.median_ratio),
            _range(one.seconds),
            _range(one.overhead),
        )
        for kind in _KINDS
        if kind in models
        for one in models[kind].left_out
    ]
    alone = [
        f"{_KINDS[kind]}: one curve alone, so its error is not known."
        for kind, model in models.items()
        if not model.left_out
    ]
    return paragraphs(table([*headers, "overhead, 90 % within"], rows) if rows else "", *alone)


def _range(band: ErrorBand | None) -> str:
    return ABSENT if band is None else f"{ratio(band.low)} to {ratio(band.high)}"
