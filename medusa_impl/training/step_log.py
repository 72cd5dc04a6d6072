"""The log of a training that may be cut off and resumed: one JSON object a line, each with its step."""

from __future__ import annotations

import json
from pathlib import Path

from medusa_impl.checkpoints.tensors import write_by_rename
from medusa_impl.text_files import read_lines


def trim_log(path: Path, *, last_step: int) -> None:
    """Drop all lines after `last_step`, the step from which a training is resumed.

    The steps after it are taken again and logged again. A line that was cut off while it was written is
    dropped too. A log that does not exist is created, empty.
    """
    kept = []
    for line in read_lines(path) if path.exists() else []:
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    path.parent.mkdir(parents=True, exist_ok=True)
    write_by_rename(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))


def append_line(path: Path, line: str) -> None:
    """Append one line to a log."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
