"""The share of a step in which an arm could just have read its weights, on made-up sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from harness.judge.step_costs import bandwidth_share
from harness.records.run import RunRecord
from harness.tests.fake_record import HEADS_BYTES, STEP_S, WEIGHT_BYTES, write_fake_record

TUNED_BYTES, TUNED_HEADS_BYTES = 3 * WEIGHT_BYTES, 5 * HEADS_BYTES


@pytest.mark.parametrize("arm", ["vanilla", "chain", "hf_greedy"])
@pytest.mark.parametrize("backbone", ["original", "tuned"])
def test_an_arm_reads_the_weights_of_its_own_backbone(tmp_path: Path, arm: str, backbone: str) -> None:
    record = write_fake_record(tmp_path, rounds=1, num_prompts=4, jitter=0)
    limits = record.device_limits
    assert limits is not None
    suite = record.suite
    arms = [one.model_copy(update={"backbone": backbone}) if one.name == arm else one for one in suite.arms]
    tuned = SimpleNamespace(weight_bytes=TUNED_BYTES, heads_bytes=TUNED_HEADS_BYTES)
    stand_in = SimpleNamespace(
        suite=suite.model_copy(update={"arms": tuple(arms)}),
        reports_speed=True,
        is_timed=record.is_timed,
        generations=record.generations,
        device_limits=limits,
        environment=SimpleNamespace(weight_bytes=WEIGHT_BYTES, heads_bytes=HEADS_BYTES, tuned=tuned),
    )
    weights = TUNED_BYTES if backbone == "tuned" else WEIGHT_BYTES
    heads = TUNED_HEADS_BYTES if backbone == "tuned" else HEADS_BYTES
    read = weights + (heads if arm == "chain" else 0)
    share = read / limits.read_bandwidth_bytes_per_s / STEP_S[arm]
    assert bandwidth_share(cast(RunRecord, stand_in), arm) == pytest.approx(share)
    stand_in.device_limits = None
    assert bandwidth_share(cast(RunRecord, stand_in), arm) is None
