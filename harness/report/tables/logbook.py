"""Verdicts and figures of a run as rows for logbooks and dashboards: one row each, documented columns."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import pandas as pd

from harness.judge.anatomy.oracle import oracles
from harness.judge.judgement import Judgement
from harness.paths import without_paths
from harness.records.run import RunRecord
from harness.report.anatomy.acceptance import vllm_counters
from harness.report.tables.run import comparisons_by_arm
from harness.report.tables.words import exported, shown
from harness.safe_text import terminal_text
from harness.stats import Interval

LogbookFormat = Literal["csv", "parquet", "bmf", "trackio", "vllm"]
FORMATS: tuple[str, ...] = get_args(LogbookFormat)
COLUMNS: Mapping[str, str] = {
    "record": "name of the record folder",
    "suite": "name of the suite",
    "device": "device under test",
    "commit": "commit of the code; empty outside a git checkout",
    "started_utc": "time at which the run began, ISO 8601, in UTC",
    "kind": "verdict, or figure",
    "name": "id of the claim, or name of the figure",
    "arm": "arm that a figure is of; empty for a verdict",
    "value": "the figure; empty for a verdict",
    "low": "lower bound of its interval; empty where it has none",
    "high": "upper bound of its interval, as the lower one",
    "unit": "unit of the figure; 1 for a ratio",
    "outcome": "verified, verified at toy scale, falsified, inconclusive or a dash; empty for a figure",
    "shown": "the verdict as the report words it",
    "form": "literal, transfer or paper-only: how the claim was judged",
    "stated": "what the paper states",
    "paper": "the figure that the paper states",
    "ours": "what was found, as the report words it",
}
_NUMBERS = ("value", "low", "high")


def logbook(record: RunRecord, judgement: Judgement) -> pd.DataFrame:
    """Return one row a verdict and a figure; invalid texts have no figures, withheld times no speeds."""
    rows = [*_verdict_rows(judgement), *(_figure_rows(record, judgement) if judgement.valid_texts else ())]
    environment = record.environment
    origin = {
        "record": record.folder.name,
        "suite": record.suite.name,
        "device": environment.device.name,
        "commit": environment.commit,
        "started_utc": environment.started_utc,
    }
    frame = pd.DataFrame([{**origin, **row} for row in rows], columns=list(COLUMNS))
    words = {name: "string" for name in COLUMNS if name not in _NUMBERS}
    frame = frame.astype({**words, **dict.fromkeys(_NUMBERS, "Float64")})
    for name in words:
        frame[name] = frame[name].map(_plain, na_action="ignore").astype("string")
    return frame


def _plain(value: object) -> object:
    return without_paths(terminal_text(value)) if isinstance(value, str) else value


def _verdict_rows(judgement: Judgement) -> Iterator[dict[str, Any]]:
    for one in judgement.verdicts:
        if one.decides:
            yield {
                "kind": "verdict",
                "name": one.claim_id,
                "outcome": exported(one),
                "shown": shown(one),
                "form": one.form,
                "stated": one.stated,
                "paper": one.paper_figure,
                "ours": one.ours,
            }


def _figure_rows(record: RunRecord, judgement: Judgement) -> Iterator[dict[str, Any]]:
    compared, best = comparisons_by_arm(judgement), {one.arm: one.speedup for one in oracles(record)}
    for arm in judgement.arms:
        yield _figure("tokens_per_step", arm.arm, arm.acceleration_rate)
        if not record.reports_speed:
            continue
        against = compared.get(arm.arm)
        if arm.tokens_per_s is not None:
            yield _figure("tokens_per_s", arm.arm, arm.tokens_per_s, unit="1/s")
        if against is not None:
            yield _figure("speedup", arm.arm, against.speedup)
            yield _figure("overhead", arm.arm, against.overhead)
        if arm.arm in best:
            yield _figure("oracle_speedup", arm.arm, best[arm.arm])


def _figure(name: str, arm: str, interval: Interval, *, unit: str = "1") -> dict[str, Any]:
    bounds = (interval.low, interval.high) if math.isfinite(interval.low) else (None, None)
    return {
        "kind": "figure",
        "name": name,
        "arm": arm,
        "value": interval.estimate,
        "low": bounds[0],
        "high": bounds[1],
        "unit": unit,
    }


def logbook_bytes(record: RunRecord, judgement: Judgement, *, form: LogbookFormat) -> bytes:
    """Return a run's verdicts and figures in one of the formats.

    `bmf` is Bencher's Metric Format, a benchmark an arm; `trackio` is a CSV file that trackio.import_csv
    reads, with one step; `vllm` holds the counters that vLLM keeps of speculative decoding, by arm.
    """
    if form == "vllm":
        return _json(vllm_counters(record))
    frame = logbook(record, judgement)
    if form == "csv":
        return frame.to_csv(index=False).encode()
    if form == "parquet":
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        return buffer.getvalue()
    found = frame[(frame["kind"] == "figure") & frame["value"].notna()]
    figures: list[dict[str, Any]] = found.to_dict("records")  # type: ignore[assignment]
    if form == "bmf":
        by_arm: dict[str, dict[str, dict[str, float]]] = {}
        for row in figures:
            measure = {"value": float(row["value"])}
            if not pd.isna(row["low"]):
                measure |= {"lower_value": float(row["low"]), "upper_value": float(row["high"])}
            by_arm.setdefault(f"{row['suite']}/{row['arm']}", {})[row["name"]] = measure
        return _json(by_arm)
    metrics = {f"{row['arm']}/{row['name']}": float(row["value"]) for row in figures}
    line = {"step": 0, "timestamp": record.environment.started_utc, **metrics}
    return pd.DataFrame([line]).to_csv(index=False).encode()


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()
