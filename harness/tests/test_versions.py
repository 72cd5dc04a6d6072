"""Versions of record files: old data is brought up to date step by step; what is newer or none is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from harness.errors import UserError
from harness.files import Frozen
from harness.records.folder import RecordFolder
from harness.versions import (
    VERSION,
    ReadFrom,
    Versioned,
    read_versioned_file,
    read_versioned_lines,
    version_of,
)


def _renamed(data: dict[str, Any]) -> dict[str, Any]:
    data["seconds"] = data.pop("time")
    return data


def _in_seconds(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "seconds": data["seconds"] / 1000}


class Timing(Versioned):
    """Version 1 had `time` in milliseconds, version 2 called it `seconds`, version 3 made it seconds.

    `note` came later and is no new version.
    """

    upgrades: ClassVar[Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {
        1: _renamed,
        2: _in_seconds,
    }

    schema_version: Annotated[Literal[3], VERSION] = 3
    kind: Literal["timing"] = "timing"
    seconds: float
    note: str | None = None


class Other(Versioned):
    """Another kind of line in the same file; its version is its own."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Literal["other"] = "other"


class Timings(Versioned):
    """A file of version 1 that holds parts with a version of their own."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    timings: tuple[Timing, ...]


class Unnumbered(Versioned):
    """A file that has said no version so far."""

    seconds: float


OLD = {
    1: {"schema_version": 1, "kind": "timing", "time": 2000.0},
    2: {"schema_version": 2, "kind": "timing", "seconds": 2000.0},
    3: {"schema_version": 3, "kind": "timing", "seconds": 2.0},
}


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def read(path: Path, data: object) -> Timing:
    return read_versioned_file(write(path / "timing.json", data), Timing, noun="a timing")


@pytest.mark.parametrize("version", OLD)
def test_every_version_is_read_as_the_newest(tmp_path: Path, version: int) -> None:
    assert read(tmp_path, OLD[version]) == Timing(seconds=2.0)


def test_a_file_without_a_version_is_of_the_first(tmp_path: Path) -> None:
    """It was taken for the newest, whose default filled the field."""
    assert read(tmp_path, {"time": 2000.0}) == Timing(seconds=2.0)


def test_a_field_that_came_later_is_absent_and_not_guessed(tmp_path: Path) -> None:
    assert read(tmp_path, OLD[1]).note is None
    assert read(tmp_path, {**OLD[3], "note": "warm"}).note == "warm"


def test_what_is_written_says_the_newest_version(tmp_path: Path) -> None:
    written = json.loads(read(tmp_path, OLD[1]).model_dump_json())
    assert written["schema_version"] == version_of(Timing) == 3
    assert read(tmp_path, written) == Timing(seconds=2.0)


def test_a_newer_version_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, {"schema_version": 4, "minutes": 1})
    assert str(caught.value) == (
        "found schema_version 4; need at most 3; in timing.json; to mend it: update medusa-repro"
    )


@pytest.mark.parametrize("version", [0, -1, 1.0, True, "1", None, [1]])
def test_what_is_no_version_is_refused(tmp_path: Path, version: object) -> None:
    with pytest.raises(UserError, match=r"schema_version .*whole number from 1 to 3; in timing\.json"):
        read(tmp_path, {**OLD[3], "schema_version": version})


def test_a_file_that_never_said_a_version_refuses_a_newer_one(tmp_path: Path) -> None:
    path = write(tmp_path / "old.json", {"seconds": 1.0})
    assert read_versioned_file(path, Unnumbered, noun="a file").seconds == 1.0
    write(path, {"schema_version": 2, "seconds": 1.0})
    with pytest.raises(UserError, match=r"schema_version 2; need at most 1; in old\.json"):
        read_versioned_file(path, Unnumbered, noun="a file")


def test_parts_of_a_file_are_brought_up_to_date_each_by_its_own_version(tmp_path: Path) -> None:
    path = write(tmp_path / "timings.json", {"schema_version": 1, "timings": [OLD[1], OLD[3], OLD[2]]})
    found = read_versioned_file(path, Timings, noun="timings")
    assert found.timings == (Timing(seconds=2.0),) * 3
    write(path, {"schema_version": 1, "timings": [{**OLD[3], "schema_version": 4}]})
    with pytest.raises(UserError, match=r"schema_version 4; need at most 3; in timings\.json"):
        read_versioned_file(path, Timings, noun="timings")


def test_lines_of_several_kinds_are_brought_up_to_date(tmp_path: Path) -> None:
    lines: TypeAdapter[Timing | Other] = TypeAdapter(Annotated[Timing | Other, Field(discriminator="kind")])
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (OLD[1], {"kind": "other"}, OLD[3])))
    found = read_versioned_lines(path, lines.validate_json, holds="one timing")
    assert found == (Timing(seconds=2.0), Other(), Timing(seconds=2.0))
    path.write_text(json.dumps({**OLD[3], "schema_version": 9}) + "\n")
    with pytest.raises(UserError, match=r"schema_version 9; need at most 3; in lines\.jsonl"):
        read_versioned_lines(path, lines.validate_json, holds="one timing")


def test_old_data_that_an_upgrade_cannot_read_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"schema_version": 1, "kind": "timing"}) + "\n")
    with pytest.raises(UserError, match=r"no data of version 1 \(KeyError\('time'\)\).*lines\.jsonl:1"):
        read_versioned_lines(path, Timing.model_validate_json, holds="one timing")


def test_a_folder_reads_its_files_by_version(tmp_path: Path) -> None:
    class Folder(RecordFolder):
        @property
        def manifest(self) -> None:
            return None

        @property
        def timing(self) -> Timing:
            return self._read("timing.json", Timing)

    write(tmp_path / "timing.json", OLD[1])
    assert Folder(tmp_path).timing == Timing(seconds=2.0)


def test_old_data_is_not_taken_from_code() -> None:
    """What is made in code is of this version: only files are brought up to date."""
    with pytest.raises(ValidationError):
        Timing.model_validate(OLD[1])
    assert Timing.model_validate(OLD[1], context=ReadFrom("timing.json")) == Timing(seconds=2.0)


def test_a_model_needs_an_upgrade_of_every_version_before_it() -> None:
    with pytest.raises(TypeError, match=r"versions \[\] in Late of version 2"):

        class Late(Versioned):
            schema_version: Literal[2] = 2

    with pytest.raises(TypeError, match=r"versions \[2\] in Skipping of version 3"):

        class Skipping(Versioned):
            upgrades: ClassVar[Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {2: _in_seconds}
            schema_version: Literal[3] = 3


def test_the_data_of_a_file_is_not_changed_by_an_upgrade() -> None:
    data = dict(OLD[1])
    Timing.model_validate(data, context=ReadFrom("timing.json"))
    assert data == OLD[1]


def test_a_model_without_versions_is_of_the_first() -> None:
    assert version_of(Frozen) == version_of(Unnumbered) == 1
