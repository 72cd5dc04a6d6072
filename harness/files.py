"""Files of records: written whole or not at all, read line by line, hashed. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import UserError

Line = TypeVar("Line")


class Frozen(BaseModel):
    """Base of every configuration and record model: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class DataFile(Frozen):
    """What every data file of a suite, latency run, sweep or ablation says of itself."""

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9_]+$")


def first_fault(error: ValidationError) -> str:
    """Return the first fault of a failed validation: the key and what is wrong with it."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'file'}: {first['msg']}"


def read_lines(
    path: Path, parse: Callable[[bytes], Line], *, holds: str, allow_torn_tail: bool = False
) -> tuple[Line, ...]:
    """Read a file of one record a line.

    With `allow_torn_tail` a last line without its newline (a run killed while writing) is left out instead of
    refused.
    Raises: UserError naming file and line.
    """
    try:
        *lines, tail = path.read_bytes().split(b"\n")  # bytes: a kill may cut a character in two
    except OSError as error:
        raise UserError(
            found=f"no readable {path.name}", need="a record file", where=path.parent.name
        ) from error
    if tail and not allow_torn_tail:
        raise UserError(
            found="a truncated last line",
            need="whole lines",
            where=f"{path.name}:{len(lines) + 1}",
            do="resume the run",
        )
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(line))
        except ValidationError as error:
            raise UserError(
                found=first_fault(error), need=f"{holds} a line", where=f"{path.name}:{number}"
            ) from error
    return tuple(found)


def write_json(path: Path, record: BaseModel) -> None:
    """Write a record atomically: temporary file in the same folder, flushed to disk, renamed."""
    write_bytes(path, (record.model_dump_json(indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically; on any error nothing half-written stays."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_sha256(value: Any) -> str:
    """Return the SHA-256 of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
