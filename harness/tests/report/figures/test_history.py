"""The picture of a history: a panel a figure, gaps where a record has none, groups that are not joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.judge.history.series import MachineHistory, machine_history
from harness.records.run import RunRecord
from harness.report.figures.history import draw_history, history_figure
from harness.tests.fake_record import STEP_S, FakeParts, write_fake_record


def write(folder: Path, day: int, *, bandwidth: float, **step_s: float) -> RunRecord:
    def spoil(parts: FakeParts) -> None:
        limits = parts.device_limits
        assert limits is not None
        parts.device_limits = limits.model_copy(update={"read_bandwidth_bytes_per_s": bandwidth})
        parts.environment = parts.environment.model_copy(
            update={
                "started_utc": f"2024-01-{day:02d}T10:00:00Z",
                "commit": None if day == 3 else f"{day:040x}",
            }
        )

    return write_fake_record(
        folder / f"day{day}", spoil=spoil, step_s=step_s, rounds=1, num_prompts=8, jitter=0.0
    )


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> MachineHistory:
    """Four days: the second belongs to another machine, the times of the third do not hold."""
    folder = tmp_path_factory.mktemp("history")
    slow_baseline = STEP_S["hf_greedy"] / 2
    return machine_history(
        "made-up",
        [
            write(folder, 1, bandwidth=34e9),
            write(folder, 2, bandwidth=77e9),
            write(folder, 3, bandwidth=34e9, hf_greedy=slow_baseline),
            write(folder, 4, bandwidth=34e9),
        ],
    )


def panel(figure: Any, title: str) -> Any:
    (found,) = [axes for axes in figure.axes if axes.get_title() == title]
    return found


def test_a_panel_shows_its_figure_with_gaps(history: MachineHistory) -> None:
    drawn = [one for one in history.series if one.subject in ("chain", "vanilla")]
    figure = history_figure(history, drawn)
    speedup = panel(figure, "speedup").lines
    places = [line.get_xdata().tolist() for line in speedup if len(line.get_xdata())]
    assert sorted(places) == [[0, 2, 3], [1]], "two groups, neither joined with the other"
    (first,) = [line for line in speedup if line.get_xdata().tolist() == [0, 2, 3]]
    assert np.isnan(first.get_ydata()).tolist() == [False, True, False]
    rates = [line for line in panel(figure, "tokens/step").lines if len(line.get_xdata())]
    assert all(line.get_xdata().tolist() == [0, 1, 2, 3] for line in rates) and len(rates) == 2
    labels = [label.get_text() for label in panel(figure, "speedup").get_xticklabels()]
    assert labels == ["00000000", "00000000", "?", "00000000"]


def test_one_record_makes_no_picture(history: MachineHistory, tmp_path: Path) -> None:
    alone = machine_history("made-up", [history.entries[0].record])
    assert not draw_history(alone, tmp_path / "history.svg") and not list(tmp_path.iterdir())
    assert draw_history(history, tmp_path / "history.svg")
    assert (tmp_path / "history.svg").read_bytes().startswith(b"<?xml")
