"""What follows from a latency record: modes, batches, break-even, shares of the bandwidth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from harness.compose.curve import step_cost_of
from harness.compose.roofline import Prediction, measured_limits, predict
from harness.records.latency import (
    STOCK,
    BatchTrial,
    BatchTrials,
    LatencyPoint,
    LatencyRecord,
    ModeTrial,
)
from harness.specs.latency import PointKey
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, bootstrap_ratio, bootstrap_ratio_of_ratios


@dataclass(frozen=True)
class ModeRow:
    """One row of the table of modes: a mode, or Hugging Face `generate`, in one dtype.

    `over_stock` is tokens/s against `generate` in the same dtype on the same prompts; `bandwidth_share` the
    bytes of weights that a step must read against what the device could read meanwhile; `step_costs` follow
    the spec's sizes; `num_same_text` counts prompts whose tokens are those of `generate`.
    """

    dtype: str
    mode: str
    is_auto: bool
    tokens_per_s: Interval
    over_stock: Interval
    bandwidth_share: float | None
    step_costs: tuple[float | None, ...]
    num_same_text: int
    num_prompts: int


@dataclass(frozen=True)
class BatchPoint:
    """Vanilla and Medusa at one batch, from totals over the same texts.

    `speedup` is Medusa's tokens/s over vanilla's, groups resampled.
    """

    batch: int
    vanilla_tokens_per_s: float
    medusa_tokens_per_s: float
    tokens_per_step: float
    speedup: Interval


def mode_rows(record: LatencyRecord) -> tuple[ModeRow, ...]:
    """Return the table of modes: for each dtype first `generate`, then the modes in the spec's order.

    It is empty where no modes were measured.
    """
    if record.modes is None:
        return ()
    rows: dict[tuple[str, str], list[ModeTrial]] = {}
    for trial in sorted(
        record.modes.trials, key=lambda trial: (record.spec.dtypes.index(trial.dtype), trial.mode != STOCK)
    ):
        rows.setdefault((trial.dtype, trial.mode), []).append(trial)
    return tuple(_mode_row(record, trials, stock=rows[dtype, STOCK]) for (dtype, _), trials in rows.items())


def batch_points(batches: BatchTrials, *, spec: IntervalSpec) -> tuple[BatchPoint, ...]:
    """Return one point a batch, smallest first.

    Tokens/step are Medusa's, for each row that a step carries.
    """
    return tuple(
        _batch_point(batches.trials, batch, spec=spec)
        for batch in sorted({trial.batch for trial in batches.trials})
    )


def _batch_point(trials: Sequence[BatchTrial], batch: int, *, spec: IntervalSpec) -> BatchPoint:
    groups = dict.fromkeys(trial.prompt_keys for trial in trials if trial.batch == batch)

    def totals(name: str, method: str) -> list[float]:
        """Return each group's total over the rounds."""
        mine = [trial for trial in trials if (trial.batch, trial.method) == (batch, method)]
        return [
            math.fsum(getattr(trial, name) for trial in mine if trial.prompt_keys == group)
            for group in groups
        ]

    tokens, seconds, base_tokens, base_seconds = (
        totals(name, method) for method in ("medusa", "vanilla") for name in ("num_tokens", "decode_s")
    )
    rng = np.random.default_rng(spec.seed)
    return BatchPoint(
        batch=batch,
        vanilla_tokens_per_s=math.fsum(base_tokens) / math.fsum(base_seconds),
        medusa_tokens_per_s=math.fsum(tokens) / math.fsum(seconds),
        tokens_per_step=math.fsum(tokens) / (batch * math.fsum(totals("num_steps", "medusa"))),
        speedup=bootstrap_ratio_of_ratios(
            tokens, seconds, base_numerator=base_tokens, base_denominator=base_seconds, spec=spec, rng=rng
        ),
    )


def _mode_row(record: LatencyRecord, trials: Sequence[ModeTrial], *, stock: Sequence[ModeTrial]) -> ModeRow:
    first, by_prompt = trials[0], {trial.prompt_key: trial for trial in stock}
    paired = [by_prompt[trial.prompt_key] for trial in trials]
    tokens, seconds = _totals(trials)
    stock_tokens, stock_seconds = _totals(paired)
    spec = record.spec.interval
    rate = bootstrap_ratio(tokens, seconds, spec=spec, rng=np.random.default_rng(spec.seed))
    over = bootstrap_ratio_of_ratios(
        tokens,
        seconds,
        base_numerator=stock_tokens,
        base_denominator=stock_seconds,
        spec=spec,
        rng=np.random.default_rng(spec.seed),
    )
    limits, table = record.limits(first.dtype), record.spec.modes_table
    costs: list[float | None] = []
    if table is not None and first.mode != "hf_generate":  # the name itself, so that mypy knows the rest
        like = PointKey(
            dtype=first.dtype,
            mode=first.mode,
            num_nodes=1,
            num_heads=0,
            context_tokens=table.context_tokens,
            batch=1,
        )
        costs = [step_cost_of(record.points, num_nodes=size, like=like) for size in table.sizes]
    read_per_s = record.facts.step_bytes(first.dtype) * rate.estimate
    return ModeRow(
        dtype=first.dtype,
        mode=first.mode,
        is_auto=record.modes is not None and record.modes.auto.get(first.dtype) == first.mode,
        tokens_per_s=rate,
        over_stock=over,
        bandwidth_share=read_per_s / limits.read_bandwidth_bytes_per_s if limits is not None else None,
        step_costs=tuple(costs),
        num_same_text=sum(
            mine.token_ids == theirs.token_ids for mine, theirs in zip(trials, paired, strict=True)
        ),
        num_prompts=len(trials),
    )


def _totals(trials: Sequence[ModeTrial]) -> tuple[list[float], list[float]]:
    """Return tokens and seconds of each prompt on the decode clock."""
    return [float(sum(trial.step_tokens)) for trial in trials], [
        math.fsum(trial.step_times_s) for trial in trials
    ]


def prediction_of(record: LatencyRecord, point: LatencyPoint) -> Prediction | None:
    """Return a point's backbone time and what the roofline predicts with this run's limits.

    None where the run has none.
    """
    limits = measured_limits(record, point.dtype)
    return predict(record, point, limits) if limits is not None and point.backbone_s else None


def read_share(record: LatencyRecord, point: LatencyPoint) -> float | None:
    """Return the least time that a step's reading takes, as a share of the backbone's time.

    A step reads weights, keys and values.
    """
    limits = record.limits(point.dtype)
    if limits is None or not point.backbone_s:
        return None
    kept = record.facts.cache_bytes(point.batch * point.context_tokens, dtype=point.dtype)
    least_s = (record.facts.step_bytes(point.dtype) + kept) / limits.read_bandwidth_bytes_per_s
    return least_s / median(point.backbone_s)
