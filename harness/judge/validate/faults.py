"""Faults that records of every kind can have: files that do not load, a broken seal, words of one machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

from pydantic import BaseModel

from harness.errors import UserError
from harness.paths import holds_absolute_path
from harness.records.folder import RecordFolder
from harness.records.provenance import VARIABLES, Environment, Provenance


def unreadable(loaders: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """Return what is wrong with each file that does not load, by the file's name."""
    return {name: fault for name, load in loaders.items() if (fault := fault_of(load)) is not None}


def load_faults(loaders: Mapping[str, Callable[[], object]]) -> tuple[str, ...]:
    """Return one fault for each file that does not load."""
    return tuple(f"{name}: {fault}" for name, fault in unreadable(loaders).items())


def fault_of(load: Callable[[], object]) -> str | None:
    """Return what keeps something from being loaded, in words; None where nothing does."""
    try:
        load()
    except UserError as error:
        return _in_words(error)
    except (UnicodeDecodeError, OSError) as error:
        return f"found an unreadable file ({type(error).__name__}), need a whole one"
    return None


def seal_faults(record: RecordFolder) -> Iterator[str]:
    """Yield everything in which a folder differs from its seal."""
    for error in record.seal_faults():
        where = "manifest.json" if record.manifest is None else error.where
        yield f"{where}: {_in_words(error)}"


def _in_words(error: UserError) -> str:
    mend = f" (to mend it: {error.do})" if error.do else ""
    return f"found {error.found}, need {error.need}{mend}"


def repeated(things: Iterable[Hashable], *, file: str, noun: str) -> Iterator[str]:
    """Yield one fault for each thing of a file that is there more than once."""
    for thing, count in Counter(things).items():
        if count > 1:
            yield f"{file}: found {noun} {_short(thing)} {count} times, need it once"


def _short(thing: object) -> str:
    return " ".join(str(thing).split())[:80]


def place_faults(origin: Provenance, *, file: str) -> Iterator[str]:
    """Yield what a provenance tells of one machine or user: absolute paths, variables that are not asked."""
    yield from path_faults(origin, file=file)
    for name in sorted(set(origin.variables) - set(VARIABLES)) if isinstance(origin, Environment) else ():
        yield f"{file}: found the variable {name!r}, need one of {', '.join(VARIABLES)}"


def path_faults(data: BaseModel, *, file: str) -> Iterator[str]:
    """Yield the fields of a file in which an absolute path stands."""
    for name, value in data.model_dump(mode="json").items():
        if any(holds_absolute_path(text) for text in _texts(value)):
            yield (
                f"{file}: found an absolute path in {name!r}, need none: it tells a machine or a user apart"
            )


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (str(key), *_texts(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
