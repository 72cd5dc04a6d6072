"""Records of several rounds have no fault, and a round too many is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.judge.validate.record import validate_record
from harness.tests.fake_record import FakeParts, write_fake_record


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_every_round_that_was_asked_is_sound(tmp_path: Path, rounds: int) -> None:
    write_fake_record(tmp_path / "run", num_prompts=4, rounds=rounds)
    assert validate_record(tmp_path / "run") == ()


def test_the_round_after_the_last_is_a_fault(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        last = parts.outcomes[-1]
        parts.outcomes[-1] = last.model_copy(update={"trial": last.trial.model_copy(update={"round": 2})})

    record = write_fake_record(tmp_path / "run", num_prompts=4, rounds=2, spoil=spoil)
    line = len(record.outcomes)
    assert validate_record(record.folder) == (
        f"generations.jsonl:{line}: found round 2, need 0 to 1",
        "generations.jsonl: found no line of 1 planned trials, need one of each",
    )
