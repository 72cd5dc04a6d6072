"""A record by its path, by a suite's name, or by its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli.find import find_record
from harness.errors import UserError
from harness.paths import default_results

NAME = "20261125T202908Z-e4ce6458"


def test_a_record_is_found_by_the_name_that_a_commands_last_line_gives() -> None:
    """A sweep's or an ablation's line gave a name that no command took."""
    folder = find_record(NAME)
    assert folder == default_results() / "embedded" / "cpu-amd-epyc-2c" / NAME
    assert find_record(str(folder)) == folder
    for unknown in ("20261125T202908Z-00000000", "nosuch"):
        with pytest.raises(UserError, match="found no record"):
            find_record(unknown)


def test_a_name_of_several_machines_tells_which_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest of any machine was taken in silence."""
    for machine, name in (("cpu-a", "20260101T000000Z-aaaaaaaa"), ("cpu-b", "20260102T000000Z-bbbbbbbb")):
        folder = tmp_path / "micro" / machine / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert find_record("micro", results=tmp_path).parent.name == "cpu-b"
    told = capsys.readouterr().err
    assert told == "micro: the newest record of 2 machines is 20260102T000000Z-bbbbbbbb, of cpu-b\n"
    assert find_record("micro/cpu-a", results=tmp_path).name == "20260101T000000Z-aaaaaaaa"
    assert capsys.readouterr().err == ""


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_record(NAME) == Path(NAME)
