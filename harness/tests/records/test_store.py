"""A record under way: what it keeps of a spec."""

from __future__ import annotations

import json
from pathlib import Path

from harness.paths import holds_absolute_path
from harness.records.store import portable
from harness.specs.suite import SuiteSpec
from harness.specs.sweep import SweepSpec
from harness.tests.fake_sweep import sweep_data
from harness.tests.tiny_suite import micro_data


def test_a_record_keeps_no_folder_of_any_path(tmp_path: Path) -> None:
    """Regression: a list of keys said what is a path, and lacked `chat_template`: its folders stayed."""
    home = tmp_path / "someone"
    data = micro_data(home / "heads.safetensors") | {
        "model": {
            "path": str(home / "model"),
            "adapter": str(home / "adapter"),
            "chat_template": str(home / "chat.jinja"),
        },
        "calibration_trace": str(home / "calibration.npz"),
    }
    kept = portable(SuiteSpec.model_validate(data))
    assert kept["model"] == {
        "path": "model",
        "adapter": "adapter",
        "chat_template": "chat.jinja",
        "dtype": "float32",
        "trust_remote_code": False,
    }
    assert kept["heads"]["path"] == "heads.safetensors" and kept["calibration_trace"] == "calibration.npz"
    assert not holds_absolute_path(json.dumps(kept))


def test_relative_paths_stay_as_they_are(tmp_path: Path) -> None:
    sweep = SweepSpec.model_validate(
        sweep_data(
            trace=str(tmp_path / "traces" / "own.npz"), calibration_trace="../embedded/calibration.npz"
        )
    )
    kept = portable(sweep)
    assert (kept["trace"], kept["calibration_trace"]) == ("own.npz", "../embedded/calibration.npz")
