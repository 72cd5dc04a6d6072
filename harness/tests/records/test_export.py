"""Flat tables of a record: every trial once, totals that agree with the judgement, files that read back the
same.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from harness.errors import UserError
from harness.judge.metrics import arm_metrics
from harness.records.export import (
    GENERATION_COLUMNS,
    STEP_COLUMNS,
    ExportTable,
    export,
    generations_frame,
    steps_frame,
)
from harness.records.run import RunRecord
from harness.records.trials import Failure
from harness.tests.fake_record import STEP_S, FakeParts, write_fake_record


def _fail_two_trials(parts: FakeParts) -> None:
    for index in (0, 5):
        parts.outcomes[index] = Failure(
            trial=parts.outcomes[index].trial, order=index, error_type="MemoryError", message="no room"
        )
    parts.outcomes.append(parts.outcomes[0].model_copy(update={"attempt": 1, "order": len(parts.outcomes)}))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return write_fake_record(
        tmp_path_factory.mktemp("export") / "run", spoil=_fail_two_trials, num_prompts=8, rounds=1, jitter=0.0
    )


def test_every_trial_is_one_row_and_a_failure_has_no_measurement(record: RunRecord) -> None:
    frame = generations_frame(record)
    assert list(frame.columns) == list(GENERATION_COLUMNS)
    assert len(frame) == len({outcome.trial for outcome in record.outcomes})
    assert not frame.duplicated(["arm", "prompt_key", "round", "seed"]).any()
    assert frame["order"].is_monotonic_increasing
    failed = frame[frame["status"] == "failure"]
    assert len(failed) == 2 and set(failed["error_type"]) == {"MemoryError"}
    assert failed[["num_tokens", "num_steps", "decode_s", "timing_valid", "ended_by"]].isna().all(axis=None)
    assert sorted(failed["attempt"]) == [0, 1], "the last failure of a trial that failed twice"


def test_totals_of_the_frame_give_the_acceleration_rate(record: RunRecord) -> None:
    frame = generations_frame(record).dropna(subset="num_tokens")
    for arm in arm_metrics(record):
        rows = frame[frame["arm"] == arm.arm]
        assert (rows["num_tokens"] - 1).sum() / rows["num_steps"].sum() == pytest.approx(
            arm.acceleration_rate.estimate
        )


def test_steps_add_up_to_their_generations(record: RunRecord) -> None:
    steps = steps_frame(record)
    assert list(steps.columns) == list(STEP_COLUMNS)
    for generation in record.generations[:12]:
        trial = generation.trial
        chosen = (
            (steps["arm"] == trial.arm)
            & (steps["prompt_key"] == trial.prompt_key)
            & (steps["round"] == trial.round)
        )
        own = steps[chosen & (steps["seed"].isna() if trial.seed is None else steps["seed"] == trial.seed)]
        assert len(own) == generation.num_steps and own["tokens"].sum() == generation.num_tokens - 1
        assert own["step_s"].unique() == pytest.approx([STEP_S[trial.arm]])
        assert own["context_tokens"].iloc[0] == generation.prompt_tokens + 1
        assert (
            own["context_tokens"].iloc[-1] + own["tokens"].iloc[-1]
            == generation.prompt_tokens + generation.num_tokens
        )


@pytest.mark.parametrize("table", ["generations", "steps"])
def test_files_read_back_the_same(record: RunRecord, tmp_path: Path, table: ExportTable) -> None:
    frame = generations_frame(record) if table == "generations" else steps_frame(record)
    export(record, tmp_path / "t.csv", table=table)
    export(record, tmp_path / "t.PARQUET", table=table)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.PARQUET"), frame)
    from_csv = pd.read_csv(tmp_path / "t.csv").astype(frame.dtypes.to_dict())
    pd.testing.assert_frame_equal(from_csv, frame)
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", "t.PARQUET"}


def test_unfinished_record_without_outcomes_gives_empty_tables(tmp_path: Path) -> None:
    empty = write_fake_record(
        tmp_path / "run", spoil=lambda parts: parts.outcomes.clear(), num_prompts=8, rounds=1
    )
    assert (len(generations_frame(empty)), len(steps_frame(empty))) == (0, 0)
    assert list(generations_frame(empty).columns) == list(GENERATION_COLUMNS)


def test_text_of_a_records_maker_steers_nothing_and_names_no_folder(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        device = parts.environment.device.model_copy(update={"name": "\x1b[31mEPYC\u202e at /home/jane/x"})
        parts.environment = parts.environment.model_copy(update={"device": device})

    export(write_fake_record(tmp_path / "run", spoil=spoil, num_prompts=2, rounds=1), tmp_path / "t.csv")
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    assert "EPYC" in text and not {"\x1b", "\u202e"} & set(text) and "/home" not in text


@pytest.mark.parametrize("name", ["t.xlsx", "t"])
def test_unknown_suffix_is_refused(record: RunRecord, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"need \.csv or \.parquet"):
        export(record, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_target_in_no_folder_is_refused(record: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"failed write .*in t\.csv"):
        export(record, tmp_path / "missing" / "t.csv")
