"""The processor time of a trial: kept on a CPU, and told apart from a pause however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch

from harness.device import arms
from harness.judge.checks import processor_busy
from harness.judge.judgement import CheckStatus
from harness.records.run import RunRecord
from harness.tests.tiny_suite import CHAIN, VANILLA, micro_data, run
from medusa_impl.decode import DecodingStep, decode_medusa

PAUSE_S = 0.02  # many times a step of the tiny model: Medusa's arm then waits for nearly all of its time


def test_a_pause_in_the_medusa_arms_of_a_run_is_no_processor_time(
    heads_file: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """The trial's own clock counts the pause, and the speed with it; the processor's clock does not."""
    decode = decode_medusa

    def pausing(*arguments: Any, **options: Any) -> Iterator[DecodingStep]:
        for step in decode(*arguments, **options):
            time.sleep(PAUSE_S)
            yield step

    monkeypatch.setattr(arms, "decode_medusa", pausing)
    record = RunRecord(run(micro_data(heads_file, arms=[VANILLA, CHAIN], reports_speed=True), tmp_path))
    assert len(record.generations) == 2 * 4
    for one in record.generations:
        assert one.processor_s is not None and one.processor_s > 0
        if one.trial.arm == "chain":
            assert one.wall_s - one.processor_s > 0.9 * PAUSE_S * one.num_steps
    assert processor_busy(record).status is CheckStatus.FAILED
