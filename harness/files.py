"""Frozen models and the files they live in: TOML, JSON, lines, hashes, atomic writes. No torch."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import secrets
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema, to_jsonable_python

from harness.errors import UserError

Line = TypeVar("Line")
Location = tuple[int | str, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)
_MAX_DEPTH = 20  # of the values in a data file; the deepest that ship have 6
# the command that takes a data file of each kind
_COMMANDS = {
    "suite": "reproduce",
    "latency": "latency",
    "sweep": "sweep",
    "ablation": "ablate",
    "recipe": "train",
    "gpu": "gpu",
    "gate": "gate",
}
# what recipes called themselves before 0.2.0, and what to write instead
_OLD_KINDS = {
    "joint": 'write kind = "recipe" and trains = "heads_and_backbone"',
    "heads": 'write kind = "recipe" and trains = "heads"',
}


class Frozen(BaseModel):
    """Base of every configuration and record model: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class DataPath(str):
    """A path that a data file names: relative to that file's folder, absolute, or of shipped data.

    What follows from the type: a record keeps an absolute one without its folders, which name a machine or a
    user, and a cluster's nodes get the file.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


class ModelFolder(DataPath):
    """The folder of a model: too much to send, so it has to lie at the same place on every node."""


class DataFile(Frozen):
    """What every data file that a command runs says of itself; its `kind` says which command that is.

    No number in it is infinite or NaN.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    schema_version: Literal[1]
    kind: str
    name: str = Field(pattern=r"^[a-z0-9_]+$")


def with_paths(spec: BaseModel, change: Callable[[DataPath], str]) -> dict[str, Any]:
    """Return a spec's data as JSON knows them, without absent values, each of its paths changed."""

    def walk(value: Any) -> Any:
        if isinstance(value, DataPath):
            return change(value)
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, list | tuple) else value

    data: dict[str, Any] = to_jsonable_python(walk(spec.model_dump(exclude_none=True)))
    return data


def read_toml(
    path: Path,
    model: type[ModelT],
    *,
    noun: str,
    kind: str | None = None,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    key_of: Callable[[dict[str, Any], Location], str] | None = None,
) -> ModelT:
    """Return a data file of the user's or of ours, validated.

    `noun` is what messages call it, with its article; `kind` is what the file has to say of itself; `prepare`
    changes the data before they are validated; `key_of` names the key at a location of them, for messages.
    Raises: UserError for a file that cannot be read, is no TOML, is of another kind, or has a key or value
    that its schema does not know; the first fault is named.
    """
    data = _toml(read_text(path, need=f"{noun} in TOML"), noun=noun, where=path.name)
    if kind is not None:
        _check_kind(data, kind, noun=noun, where=path.name)
    return _validated(
        data if prepare is None else prepare(data), model, noun=noun, where=path.name, key_of=key_of
    )


def parse_toml(text: str, model: type[ModelT], *, noun: str, where: str) -> ModelT:
    """Return the spec that a record keeps, validated; records of before 0.2.0 do not say its kind.

    Raises: UserError as `read_toml` does.
    """
    return _validated(_toml(text, noun=noun, where=where), model, noun=noun, where=where)


def _toml(text: str, *, noun: str, where: str) -> dict[str, Any]:
    try:
        data = tomllib.loads(text)
        _check_plain(data)
    except RecursionError as error:  # in the parser, which follows every bracket
        raise UserError(found="values nested too deeply", need=f"{noun} in TOML", where=where) from error
    except ValueError as error:  # which a TOMLDecodeError is, and a number of thousands of digits
        raise UserError(found=f"invalid TOML ({error})", need=f"{noun} in TOML", where=where) from error
    return data


def _check_plain(data: dict[str, Any]) -> None:
    """Refuse what TOML cannot hold and its parser lets through, or what no data file is nested like."""
    level: list[Any] = [data]
    for _ in range(_MAX_DEPTH):
        for value in level:
            if type(value) is int and not -(2**63) <= value < 2**63:
                raise ValueError("an integer beyond 64 bits")
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"values nested more than {_MAX_DEPTH} deep")


def _check_kind(data: dict[str, Any], kind: str, *, noun: str, where: str) -> None:
    if data.get("kind") == kind:
        return
    need = f'kind = "{kind}"'
    if "kind" not in data:
        add = f"add the line {need}, if it is {noun}"
        raise UserError(found="a file that does not say its kind", need=need, where=where, do=add)
    said = str(data["kind"])
    do = _OLD_KINDS.get(said)
    if do is None:
        known = f"the kinds are {', '.join(_COMMANDS)};"
        its_command = f"give it to medusa-repro {_COMMANDS[said]}, or" if said in _COMMANDS else known
        do = f"{its_command} name another file"
    raise UserError(found=f'kind = "{said}"', need=need, where=where, do=do)


def _validated(
    data: dict[str, Any],
    model: type[ModelT],
    *,
    noun: str,
    where: str,
    key_of: Callable[[dict[str, Any], Location], str] | None = None,
) -> ModelT:
    if isinstance(version := data.get("schema_version"), bool):  # which Python takes for 1
        need = "a whole number, such as 1"
        raise UserError(found=f"schema_version {str(version).lower()}", need=need, where=where)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        fault = first_fault(error) if key_of is None else f"{key_of(data, first['loc'])}: {first['msg']}"
        raise UserError(found=fault, need=f"keys and values that {noun} may have", where=where) from error


def first_fault(error: ValidationError) -> str:
    """Return the first fault of a failed validation: the key and what is wrong with it."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'file'}: {first['msg']}"


def read_text(path: Path, *, need: str = "a text file in UTF-8") -> str:
    """Return the text of a file: UTF-8, whatever the locale; a byte-order mark and carriage returns go.

    `need` is what messages say is needed instead of a file that cannot be read.
    Raises: UserError for a file that cannot be read or is not UTF-8.
    """
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        raise UserError(found="no regular file", need=need, where=path.name)
    try:
        return text_of(path.read_bytes())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else _no_text(error)
        raise UserError(found=f"no readable file ({why})", need=need, where=path.name) from error


def text_of(content: bytes) -> str:
    """Return bytes as text, without a byte-order mark and carriage returns. Raises: UnicodeDecodeError."""
    return content.decode("utf-8-sig").replace("\r\n", "\n")


def _no_text(error: ValueError) -> str:
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, which newlines alone end.

    `splitlines` also splits at form feeds, U+0085, U+2028 and U+2029, which may stand raw in a JSON string.
    """
    *lines, tail = text.split("\n")
    return [*lines, tail] if tail else lines


def write_text(path: Path, text: str) -> None:
    """Write a text atomically, as UTF-8 with bare newlines, whatever the locale."""
    write_bytes(path, text.encode("utf-8"))


def read_lines(
    path: Path, parse: Callable[[bytes], Line], *, holds: str, allow_torn_tail: bool = False
) -> tuple[Line, ...]:
    """Read a file of one record a line.

    With `allow_torn_tail` a last line without its newline (a run killed while writing) is left out instead of
    refused.
    Raises: UserError naming file and line.
    """
    try:
        # bytes: a kill may cut a character in two
        *lines, tail = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
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
    """Write bytes atomically, readable to whom the user's umask says; on any error nothing of it stays."""
    # A name of its own for each writer, and not from `tempfile`, whose files only their owner may read.
    temporary = path.with_name(f"{path.name}{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_sha256(value: Any) -> str:
    """Return the SHA-256 of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
