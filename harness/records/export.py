"""A record as flat tables for pandas, CSV and Parquet.

They hold raw counts and seconds, so that a reader forms ratios from totals.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from harness.errors import UserError
from harness.files import write_bytes
from harness.paths import without_paths
from harness.records.run import RunRecord
from harness.records.trials import Failure, Generation
from harness.safe_text import terminal_text

ExportTable = Literal["generations", "steps"]

TRIAL_COLUMNS: Mapping[str, str] = {
    "record": "name of the record folder, with the word unsealed after it where its seal is not whole",
    "suite": "name of the suite",
    "device": "device under test",
    "commit": "commit of the code; empty outside a git checkout",
    "arm": "name of the arm",
    "method": "vanilla, medusa, hf_greedy or hf_prompt_lookup",
    "backbone": "original, or tuned: the model with an adapter (Medusa-2)",
    "prompt_key": "prompt; pairs the arms",
    "round": "which pass over all arms and prompts, from 0",
    "seed": "seed of the random numbers; empty where none is drawn",
}
GENERATION_COLUMNS: Mapping[str, str] = {
    **TRIAL_COLUMNS,
    "status": "generation, or failure (then every measurement is empty)",
    "order": "index in the order of the run, from 0",
    "attempt": "0 for the first try, one more for each repeat",
    "category": "category of the prompt; empty where it has none",
    "prompt_tokens": "tokens of the prompt",
    "num_tokens": "kept tokens, the prefill's token included",
    "num_steps": "decoding steps after the prefill; tokens/step of many rows is sum(num_tokens - 1) / "
    "sum(num_steps)",
    "ended_by": "eos (end of sequence) or budget",
    "prefill_s": "seconds until the first token",
    "decode_s": "seconds on the decode clock, which starts at the first token",
    "wall_s": "prefill_s + decode_s",
    "timing_valid": "false where a kill cut the block or other work disturbed it: its times may not be used",
    "peak_memory_bytes": "peak memory during the trial",
    "cache_bytes": "size of the key-value cache",
    "load_average": "one-minute load average of the machine when the trial ended",
    "error_type": "type of the exception of a failure",
    "message": "message of the exception of a failure",
}
STEP_COLUMNS: Mapping[str, str] = {
    **TRIAL_COLUMNS,
    "step": "decoding step, from 0",
    "tokens": "tokens kept from this step, root included",
    "step_s": "seconds of this step",
    "context_tokens": "tokens known when the step began, prompt included",
    "timing_valid": "as in the table of generations",
}
_WHOLE_NUMBERS = (
    "round",
    "seed",
    "order",
    "attempt",
    "prompt_tokens",
    "num_tokens",
    "num_steps",
    "peak_memory_bytes",
    "cache_bytes",
)
_WORDS = ("commit", "category", "ended_by", "error_type", "message")


def generations_frame(record: RunRecord) -> pd.DataFrame:
    """Return one row a trial, in the order of the run, failures included.

    The columns are those of `GENERATION_COLUMNS`.
    """
    outcomes: list[Generation | Failure] = [*record.generations, *_last_failures(record)]
    outcomes.sort(key=lambda outcome: outcome.order)
    rows = [{**_origin(record, outcome), **_measurements(record, outcome)} for outcome in outcomes]
    frame = pd.DataFrame(rows, columns=list(GENERATION_COLUMNS))
    kinds = {name: "Int64" for name in _WHOLE_NUMBERS} | {name: "string" for name in _WORDS}
    kinds |= {name: "Float64" for name in ("prefill_s", "decode_s", "wall_s", "load_average")}
    return frame.astype({**kinds, "timing_valid": "boolean"})


def steps_frame(record: RunRecord) -> pd.DataFrame:
    """Return one row a decoding step of every finished trial; the columns are those of `STEP_COLUMNS`."""
    rows: list[dict[str, Any]] = []
    for generation in record.generations:
        if len(generation.step_times_s) != generation.num_steps:
            raise UserError(
                found=f"{len(generation.step_times_s)} times of {generation.num_steps} steps",
                need="one a step",
                where=f"prompt {generation.trial.prompt_key!r}, arm {generation.trial.arm!r}",
            )
        origin, known = _origin(record, generation), generation.prompt_tokens + 1
        for step, (tokens, seconds) in enumerate(
            zip(generation.step_tokens, generation.step_times_s, strict=True)
        ):
            measured = {
                "step": step,
                "tokens": tokens,
                "step_s": seconds,
                "context_tokens": known,
                "timing_valid": record.is_timed(generation),
            }
            rows.append({**origin, **measured})
            known += tokens
    frame = pd.DataFrame(rows, columns=list(STEP_COLUMNS))
    whole = {name: "Int64" for name in ("round", "seed", "step", "tokens", "context_tokens")}
    return frame.astype({**whole, "commit": "string", "step_s": "Float64", "timing_valid": "boolean"})


def _plain(value: object) -> object:
    return without_paths(terminal_text(value)) if isinstance(value, str) else value


def export(record: RunRecord, target: Path, *, table: ExportTable = "generations") -> None:
    """Write one of the two tables as CSV or Parquet, as the target's suffix says.

    Raises: UserError for another suffix, or a target that cannot be written.
    """
    suffix = target.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise UserError(found=f"suffix {target.suffix!r}", need=".csv or .parquet", where=target.name)
    frame = generations_frame(record) if table == "generations" else steps_frame(record)
    for name in frame.select_dtypes(include=["object", "string"]):  # text of others, which steers nothing
        frame[name] = frame[name].map(_plain, na_action="ignore").astype(frame[name].dtype)
    if suffix == ".csv":
        content = frame.to_csv(index=False).encode()
    else:
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        content = buffer.getvalue()
    write_target(target, content)


def write_target(target: Path, content: bytes) -> None:
    """Write a file that the command line names. Raises: UserError where it cannot be written."""
    try:
        write_bytes(target, content)
    except OSError as error:
        raise UserError(
            found=f"a failed write ({error.strerror})", need="room and permission", where=target.name
        ) from error


def _last_failures(record: RunRecord) -> tuple[Failure, ...]:
    return tuple({failure.trial: failure for failure in record.failures}.values())


def _origin(record: RunRecord, outcome: Generation | Failure) -> dict[str, Any]:
    trial = outcome.trial
    return {
        "record": record.folder.name + (" (unsealed)" if record.unsealed is not None else ""),
        "suite": record.suite.name,
        "device": record.environment.device.name,
        "commit": record.environment.commit,
        "arm": trial.arm,
        "method": record.suite.arm(trial.arm).method,
        "backbone": record.suite.arm(trial.arm).backbone,
        "prompt_key": trial.prompt_key,
        "round": trial.round,
        "seed": trial.seed,
    }


def _measurements(record: RunRecord, outcome: Generation | Failure) -> dict[str, Any]:
    shared = {"status": outcome.kind, "order": outcome.order, "attempt": outcome.attempt}
    if isinstance(outcome, Failure):
        return {**shared, "error_type": outcome.error_type, "message": outcome.message}
    names = (
        "category",
        "prompt_tokens",
        "num_tokens",
        "num_steps",
        "ended_by",
        "prefill_s",
        "decode_s",
        "wall_s",
    )
    more = ("peak_memory_bytes", "cache_bytes", "load_average")
    measured = {name: getattr(outcome, name) for name in (*names, *more)}
    return {**shared, **measured, "timing_valid": record.is_timed(outcome)}
