"""The table of devices: measured step times, and predictions for the paper's models with their error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.compose.devices import PredictedCurve
from harness.compose.prices.fitted import TimedCurve, TimedStep
from harness.errors import UserError
from harness.records.step_model import ErrorBand, StepModel
from harness.specs.hardware import load_hardware
from harness.specs.latency import HeadsForm
from harness.specs.quoted import QuotedRow, load_quoted
from harness.specs.shapes import load_shapes

PAPER_SHAPES = ("vicuna-7b-v1.5", "vicuna-13b-v1.5", "vicuna-33b-v1.3")  # of Table 1
PAPER_HEADS = HeadsForm(num_heads=5, num_layers=1, architecture="own")  # Section 2.2.3; Appendix B
PAPER_NODES = 64  # of the paper's sparse tree, Section 3.3.1
CONTEXT_TOKENS = 1024  # of a measured row the nearest timed length
SIZES = (16, PAPER_NODES)


@dataclass(frozen=True)
class Banded:
    """A predicted figure and the bounds that its model's error gives it; None where that is not known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MeasuredRow:
    """What one measured curve shows at batch 1.

    `overheads` are whole steps against the vanilla step, by nodes; `is_older` where a newer record of the
    same spec and machine follows.
    """

    curve: TimedCurve
    context_tokens: int
    vanilla_s: float
    overheads: dict[int, float]
    is_older: bool


@dataclass(frozen=True)
class PredictedRow:
    """What the step model says of one of the paper's models on one device, at batch 1.

    `speedup` is the paper's own tokens/step over the predicted overhead.
    """

    device: str
    shape: str
    vanilla_s: Banded
    overhead: Banded
    tokens_per_step: float
    speedup: Banded

    @property
    def is_shown(self) -> bool:
        """Return whether the speedup is on one side of 1 over its whole band."""
        return tells(self.speedup)

    @property
    def tokens_per_s(self) -> Banded:
        """Return the tokens a second with the paper's tree; seconds and overhead may be off both."""
        step_s = self.vanilla_s.value * self.overhead.value
        if self.vanilla_s.low is None or self.vanilla_s.high is None:
            return Banded(self.tokens_per_step / step_s)
        # A whole step's seconds have the same band as a vanilla step's: both are among the left-out points.
        return Banded(
            self.tokens_per_step / step_s,
            low=self.tokens_per_step / (step_s * self.vanilla_s.high / self.vanilla_s.value),
            high=self.tokens_per_step / (step_s * self.vanilla_s.low / self.vanilla_s.value),
        )


def tells(speedup: Banded) -> bool:
    """Return whether a predicted speedup may be shown: its error is smaller than the effect.

    The effect is the speedup's distance from 1, so the band must not hold 1; a band that is not known tells
    nothing.
    """
    return speedup.low is not None and speedup.high is not None and not speedup.low <= 1 <= speedup.high


def banded(value: float, band: ErrorBand | None) -> Banded:
    """Return a predicted figure with the bounds between which a measured one is expected."""
    return Banded(value) if band is None else Banded(value, low=value * band.low, high=value * band.high)


def at_least_one(overhead: Banded) -> Banded:
    """Return an overhead whose bounds are no less than 1: more nodes never make a step cheaper."""
    if overhead.low is None or overhead.high is None:
        return overhead
    return Banded(overhead.value, low=max(1.0, overhead.low), high=max(1.0, overhead.high))


def divided(numerator: float, denominator: Banded) -> Banded:
    """Return a known figure over a predicted one; a bound at 0 gives no upper bound."""
    low, high = denominator.low, denominator.high
    if low is None or high is None or low <= 0:
        return Banded(numerator / denominator.value)
    return Banded(numerator / denominator.value, low=numerator / high, high=numerator / low)


def measured_rows(curves: Iterable[TimedCurve], *, older: Iterable[TimedCurve] = ()) -> list[MeasuredRow]:
    """Return a row for every curve that timed a whole vanilla step at batch 1: GPUs first, newest first."""
    rows = [
        row
        for is_older, some in ((False, curves), (True, older))
        for curve in some
        if (row := _measured_row(curve, is_older=is_older)) is not None
    ]
    return sorted(rows, key=lambda row: (row.curve.kind != "cuda", row.curve.device, row.is_older))


def _measured_row(curve: TimedCurve, *, is_older: bool) -> MeasuredRow | None:
    whole = [step for step in curve.steps if step.batch == 1 and step.step_s]
    vanilla = [step for step in whole if step.num_nodes == 1]
    if not vanilla:
        return None
    best = min(vanilla, key=lambda step: abs(step.context_tokens - CONTEXT_TOKENS))
    here = [step for step in whole if step.context_tokens == best.context_tokens]
    vanilla_s = best.step_s or 0.0
    overheads = {size: _most_heads(here, size) for size in SIZES}
    return MeasuredRow(
        curve=curve,
        context_tokens=best.context_tokens,
        vanilla_s=vanilla_s,
        overheads={size: step.step_s / vanilla_s for size, step in overheads.items() if step and step.step_s},
        is_older=is_older,
    )


def _most_heads(steps: Sequence[TimedStep], size: int) -> TimedStep | None:
    """Return the step of a size that reads the most heads."""
    found = [step for step in steps if step.num_nodes == size]
    return max(found, key=lambda step: step.num_heads, default=None)


def predicted_rows(model: StepModel, *, measured: Iterable[TimedCurve] = ()) -> list[PredictedRow]:
    """Return a row for every model of the paper on every device that holds it.

    What was measured in half precision is not predicted as well.
    """
    known = {(curve.device, curve.shape) for curve in measured if curve.dtype != "float32"}
    shapes, rates = load_shapes(), _paper_rates(load_quoted())
    rows = []
    for shape in PAPER_SHAPES:
        for key, device in load_hardware().items():
            if (key, shape) in known:
                continue
            try:
                curve = PredictedCurve(
                    key, device, shapes[shape], dtype="float16", heads=PAPER_HEADS, model=model
                )
            except UserError:
                continue  # it does not fit into that device's memory
            row = _predicted_row(curve, model, tokens_per_step=rates[shape])
            rows += [row] if row is not None else []
    return rows


def _predicted_row(curve: PredictedCurve, model: StepModel, *, tokens_per_step: float) -> PredictedRow | None:
    at = {"context_tokens": CONTEXT_TOKENS, "batch": 1}
    vanilla_s = curve.body_seconds(num_nodes=1, **at)
    tree_s = curve.body_seconds(num_nodes=PAPER_NODES, **at)
    heads_s = curve.heads_seconds(num_heads=PAPER_HEADS.num_heads, batch=1)
    if vanilla_s is None or tree_s is None or heads_s is None:
        return None
    overhead = at_least_one(banded((tree_s + heads_s) / vanilla_s, model.overhead_band))
    return PredictedRow(
        device=curve.label.device,
        shape=curve.label.shape,
        vanilla_s=banded(vanilla_s, model.seconds_band),
        overhead=overhead,
        tokens_per_step=tokens_per_step,
        speedup=divided(tokens_per_step, overhead),
    )


def _paper_rates(rows: Sequence[QuotedRow]) -> dict[str, float]:
    """Return the paper's tokens/step by shape (Table 1)."""
    rates = {row.model: row.tokens_per_step for row in rows if row.by == "the paper" and row.tokens_per_step}
    return {shape: rate for shape in PAPER_SHAPES for model, rate in rates.items() if shape.startswith(model)}
