"""A runner's noise on disk, the margins that it refuses, and what a device and a gate are the same by."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import UserError
from harness.gate.calibrate import (
    calibration_of,
    check_margins,
    gate_sha256,
    keep_calibration,
    same_device,
)
from harness.paths import CACHE_VARIABLE
from harness.records.gate.record import Calibration, NoiseFloor
from harness.tests.fake_gate import DEVICE, spec_of

SPEC = spec_of((4, 8))


def calibration(floor: float) -> Calibration:
    noise = NoiseFloor(spread=0.01, between=0.0, floor=floor, sees=0.05)
    return Calibration(
        gate=SPEC.name,
        gate_sha256=gate_sha256(SPEC),
        device=DEVICE,
        commit=None,
        taken_utc="2026-11-27T20:00:00Z",
        num_runs=3,
        num_blocks=24,
        floors={"step_s/tree": noise, "step_s/vanilla": noise.model_copy(update={"floor": 0.01})},
    )


def test_a_margin_below_the_noise_floor_is_refused_by_name() -> None:
    check_margins(SPEC, calibration(0.025))
    with pytest.raises(UserError, match=r"found a margin of 0.025 for step_s/tree; need at least 0.0251"):
        check_margins(SPEC, calibration(0.0251))


def test_a_calibration_is_found_again_on_its_device_for_its_gate_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert calibration_of(SPEC, DEVICE) is None
    kept = calibration(0.01)
    file = keep_calibration(SPEC, kept)
    assert file.is_relative_to(tmp_path) and calibration_of(SPEC, DEVICE) == kept
    other = DEVICE.model_copy(update={"details": {"family": "25"}})
    assert not same_device(DEVICE, other) and calibration_of(SPEC, other) is None
    margins = tuple(one.model_copy(update={"margin": 0.04}) for one in SPEC.margins)
    assert calibration_of(SPEC.model_copy(update={"margins": margins}), DEVICE) == kept, (
        "no noise hangs on them"
    )
    assert calibration_of(SPEC.model_copy(update={"max_new_tokens": 24}), DEVICE) is None
