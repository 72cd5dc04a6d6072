"""Verdicts and figures for other tools: documented columns, each format as its reader takes it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.errors import ExitCode
from harness.judge.judgement import Judgement, VerdictKind
from harness.records.run import RunRecord
from harness.report.anatomy.acceptance import vllm_counters
from harness.report.tables.logbook import COLUMNS, FORMATS, logbook, logbook_bytes
from harness.tests.fake_judgement import FAILED_CHECK, VERDICTS, judge, verdict
from harness.tests.fake_record import write_fake_record
from harness.tests.tiny_suite import command

FIXTURES = Path(__file__).resolve().parents[1] / "records" / "fixtures" / "v1"


@pytest.fixture
def told(tmp_path: Path) -> tuple[RunRecord, Judgement]:
    record = write_fake_record(tmp_path / "fake", rounds=1, num_prompts=4)
    return record, judge(record).model_copy(update={"verdicts": VERDICTS})


def test_every_verdict_and_figure_is_a_row_of_documented_columns(told: tuple[RunRecord, Judgement]) -> None:
    record, judgement = told
    frame = logbook(record, judgement)
    assert list(frame.columns) == list(COLUMNS) and all(COLUMNS.values())
    verdicts = frame[frame["kind"] == "verdict"]
    assert list(verdicts["name"]) == [one.claim_id for one in VERDICTS if one.decides]
    outcomes = dict(zip(verdicts["name"], verdicts["outcome"], strict=True))
    assert outcomes["T3-9"] == "verified at toy scale" and outcomes["BIG-1"] == "-"
    assert verdicts["value"].isna().all() and (frame["record"] == record.folder.name).all()
    figures = frame[frame["kind"] == "figure"].set_index(["arm", "name"])
    compared = {one.arm: one for one in judgement.comparisons}
    for arm, one in compared.items():
        row: Any = figures.loc[(arm, "speedup")]
        assert row["value"] == pytest.approx(one.speedup.estimate) and row["unit"] == "1"
        assert (row["low"], row["high"]) == pytest.approx((one.speedup.low, one.speedup.high))
    rates = {one.arm: one.acceleration_rate.estimate for one in judgement.arms}
    assert {arm for arm, name in figures.index if name == "tokens_per_step"} == set(rates)


def test_formats_read_back(told: tuple[RunRecord, Judgement]) -> None:
    record, judgement = told
    frame = logbook(record, judgement)
    made = {form: logbook_bytes(record, judgement, form=form) for form in FORMATS}  # type: ignore[arg-type]
    assert len(pd.read_csv(io.BytesIO(made["csv"]))) == len(frame)
    assert list(pd.read_parquet(io.BytesIO(made["parquet"])).columns) == list(COLUMNS)
    assert json.loads(made["vllm"]) == vllm_counters(record)
    bmf = json.loads(made["bmf"])
    speedup = next(one.speedup for one in judgement.comparisons if one.arm == "chain")
    assert bmf["fake/chain"]["speedup"]["value"] == pytest.approx(speedup.estimate)
    assert set(bmf["fake/chain"]["speedup"]) == {"value", "lower_value", "upper_value"}
    line = pd.read_csv(io.BytesIO(made["trackio"]))
    assert list(line["step"]) == [0] and line["timestamp"][0] == record.environment.started_utc
    assert line["chain/speedup"][0] == pytest.approx(speedup.estimate)


def test_nothing_that_may_not_be_cited_is_written(told: tuple[RunRecord, Judgement]) -> None:
    record, judgement = told
    withheld = logbook(record.withholding("a test"), judgement)
    assert set(withheld[withheld["kind"] == "figure"]["name"]) == {"tokens_per_step"}
    invalid = judgement.model_copy(update={"checks": (FAILED_CHECK,)})
    assert set(logbook(record, invalid)["kind"]) == {"verdict"}


def test_texts_of_others_and_paths_are_made_plain(told: tuple[RunRecord, Judgement]) -> None:
    record, judgement = told
    planted = verdict("X9", ours="\x1b[2J /home/somebody/model", kind=VerdictKind.NOT_REPRODUCED)
    frame = logbook(record, judgement.model_copy(update={"verdicts": (planted,)}))
    (ours,) = frame[frame["kind"] == "verdict"]["ours"]
    assert "\x1b" not in ours and "somebody" not in ours


def test_the_command_writes_each_format_and_refuses_others(tmp_path: Path) -> None:
    folder = write_fake_record(tmp_path / "fake", rounds=1, num_prompts=4).folder
    for form in FORMATS:
        target = tmp_path / f"{form}.out"
        assert command("export", folder, target, "--format", form).code == ExitCode.OK
        assert target.stat().st_size > 50
    for words, found in (
        ((folder, "x", "--format", "xml"), "found format 'xml'"),
        ((folder, "x", "--format", "csv", "--steps"), "found --format with --steps"),
        ((folder, "x", "--format", "schedule"), "need a sweep's record for --format schedule"),
        ((FIXTURES / "sweep", "x", "--format", "csv"), "need a run's record for --format csv"),
    ):
        ran = command("export", *words)
        assert ran.code == ExitCode.USER_ERROR and found in ran.error_line
    assert not math.isnan(json.loads((tmp_path / "bmf.out").read_text())["fake/chain"]["speedup"]["value"])
