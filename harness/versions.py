"""Versions of record files: older ones are brought up to date as they are read, newer ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, model_validator

from harness.errors import UserError
from harness.files import Frozen, first_fault, read_lines, text_of

Data = dict[str, Any]
ModelT = TypeVar("ModelT", bound=BaseModel)
ReadT = TypeVar("ReadT", bound=BaseModel, covariant=True)

VERSION = Field(description="version of the schema that the file follows")


@dataclass(frozen=True)
class ReadFrom:
    """The file that data comes from: the validation context under which a model looks at its version."""

    where: str


class Versioned(Frozen):
    """Base of the models that record files hold.

    A model's version is that of its `schema_version`, and 1 where it has none; a file without one is of
    version 1. A field that is added later is optional: absent in older files, and never guessed. A changed
    meaning is a new version: `schema_version` goes up by one, and `upgrades` gets, under the old number, the
    function from a file's data of that version to data of the next.
    """

    upgrades: ClassVar[Mapping[int, Callable[[Data], Data]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if sorted(cls.upgrades) != list(range(1, version_of(cls))):
            raise TypeError(
                f"found upgrades of versions {sorted(cls.upgrades)} in {cls.__name__} of version "
                f"{version_of(cls)}, need one of each version before it"
            )

    @model_validator(mode="before")
    @classmethod
    def _brought_up_to_date(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(info.context, ReadFrom) or not isinstance(data, dict):
            return data  # made in code, or no object: nothing that has a version
        found, newest = check_version(data, cls, where=info.context.where), version_of(cls)
        for version in range(found, newest):
            try:
                data = {**cls.upgrades[version](dict(data)), "schema_version": version + 1}
            except (LookupError, TypeError, AttributeError) as error:  # which a validator may not raise
                raise ValueError(f"no data of version {version} ({error!r})") from error
        return data


def version_of(model: type[BaseModel]) -> int:
    """Return the version of a model of a data file: the one that its `schema_version` may have, else 1."""
    field = model.model_fields.get("schema_version")
    return 1 if field is None else int(get_args(field.annotation)[0])


def check_version(data: Mapping[str, Any], model: type[BaseModel], *, where: str) -> int:
    """Return the version of a file's data, 1 where it says none.

    Raises: UserError for a version that is newer than the model's, or none at all.
    """
    found, newest = data.get("schema_version", 1), version_of(model)
    if type(found) is not int or found < 1:
        raise UserError(
            found=f"schema_version {found!r}", need=f"a whole number from 1 to {newest}", where=where
        )
    if found > newest:
        raise UserError(
            found=f"schema_version {found}", need=f"at most {newest}", where=where, do="update medusa-repro"
        )
    return found


class Validates(Protocol[ReadT]):
    """Validates JSON as some model, such as `model_validate_json` of that model does."""

    def __call__(self, data: bytes, /, *, context: Any) -> ReadT: ...


def read_versioned_lines(
    path: Path, validate: Validates[ReadT], *, holds: str, allow_torn_tail: bool = False
) -> tuple[ReadT, ...]:
    """Return the lines of a record file, each brought up to date, as `files.read_lines` reads them.

    Raises: UserError naming file and line, or the file of another version.
    """
    context = ReadFrom(path.name)
    return read_lines(
        path, lambda line: validate(line, context=context), holds=holds, allow_torn_tail=allow_torn_tail
    )


def read_versioned_file(path: Path, model: type[ModelT], *, noun: str) -> ModelT:
    """Return the record that is one file, brought up to date; `noun` is what it is called in errors.

    Raises: UserError for a missing or unreadable file, or one of another schema.
    """
    try:
        return model.model_validate_json(text_of(path.read_bytes()), context=ReadFrom(path.name))
    except ValidationError as error:
        raise UserError(
            found=first_fault(error), need=f"a {model.__name__} record", where=path.name
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(found=f"no readable {path.name}", need=noun, where="the command line") from error
