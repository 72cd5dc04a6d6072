"""The log of a resumed training holds every step once."""

from __future__ import annotations

from pathlib import Path

from medusa_impl.training.step_log import append_line, trim_log


def test_later_steps_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    log = tmp_path / "run" / "steps.jsonl"
    trim_log(log, last_step=0)
    assert log.read_text() == ""
    for step in (1, 2, 3):
        append_line(log, f'{{"step": {step}}}')
    with log.open("a") as file:
        file.write('{"step": 4, "lo')
    trim_log(log, last_step=2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [path.name for path in log.parent.iterdir()] == ["steps.jsonl"]
