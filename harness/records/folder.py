"""A record's folder: told by its kind, read lazily, sealed, refused where it was altered."""

from __future__ import annotations

import contextlib
import json
import stat
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError

from harness.errors import UserError
from harness.files import file_sha256, first_fault, text_of
from harness.specs.suite import BackboneName
from harness.versions import ReadFrom, check_version

ModelT = TypeVar("ModelT", bound=BaseModel)

RecordKind = Literal["suite", "latency", "sweep", "ablation", "gpu", "gate"]

MANIFEST_FILE, REPORT_FILE, UNSEALED_REPORT_FILE = "manifest.json", "report.md", "report-unsealed.md"
# what was asked for, where the spec in the record is shorter: a time budget was used up
ASKED_FILE = "asked.toml"
_LOADING_S = 3600  # a record is begun after its model is loaded, and counts that
_SEALED_ENDINGS = (".json", ".jsonl", ".toml", ".npz")  # of a record's data; a note next to them is no fault

# Files that only a record of one kind holds, asked for in this order; a run comes last, since an ablation's
# spec is a suite.toml too.
_FILES_OF: Mapping[RecordKind, tuple[str, ...]] = {
    "latency": ("spec.toml", "points.jsonl"),
    "sweep": ("sweep.toml", "cells.jsonl"),
    "ablation": ("arms.jsonl", "tree.json"),
    "gpu": ("plan.toml", "parts.jsonl"),
    "gate": ("gate.json",),
    "suite": ("suite.toml", "generations.jsonl"),
}

_SPEC_OF: Mapping[RecordKind, str] = {
    "latency": "spec.toml",
    "sweep": "sweep.toml",
    "ablation": "suite.toml",
    "gpu": "plan.toml",
    "gate": "gate.json",
    "suite": "suite.toml",
}

# what every manifest says of itself
KIND = Field(description="kind of the record; null in records from before kinds were written")
FINISHED_UTC = Field(description="time at which the record was sealed, ISO 8601, in UTC")
ELAPSED_S = Field(description="seconds of the session that sealed the record; earlier sessions do not count")
FILE_HASHES = Field(description="SHA-256 of each sealed file in hexadecimal, by the file's name")


class SealedFiles(Protocol):
    """What every manifest holds: the hash of each file that it seals, and what it says of the end."""

    @property
    def sha256(self) -> dict[str, str]: ...
    @property
    def finished_utc(self) -> str: ...
    @property
    def elapsed_s(self) -> float: ...


class RecordFolder(ABC):
    """The folder of a record, read lazily and validated.

    `noun`, `finished` and `again` are how errors speak of it; `core` are the files that every record of its
    kind has, `origin_file` the one that says when it was begun. Whoever reads a record that is there takes
    `open`, which checks its seal; the plain constructor is for a record under way.
    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    noun, finished, again = "a record folder", "a finished run", "run the suite again"
    mend_unsealed = "resume it with the same command"
    core: ClassVar[tuple[str, ...]] = ()
    origin_file: ClassVar[str] = "environment.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unsealed: str | None = None
        if not folder.is_dir():
            raise UserError(found="no such folder", need=self.noun, where=folder.name)

    @classmethod
    def open(cls, folder: Path, *, unsealed: bool = False) -> Self:
        """Return a record whose seal is whole.

        With `unsealed` an unfinished or altered one is returned as well; its attribute `unsealed` then says
        what is wrong with the seal, and whoever prints anything of it has to say so.
        Raises: UserError as the class does, and for a record that is not as its manifest seals it.
        """
        record = cls(folder)
        try:
            record.check_seal()
        except UserError as error:
            if not unsealed:
                raise
            if error.where == MANIFEST_FILE and "manifest" not in vars(record):  # it cannot be read
                vars(record)["manifest"] = None
            record.unsealed = f"found {error.found} in {error.where}, need {error.need}"
        return record

    @property
    @abstractmethod
    def manifest(self) -> SealedFiles | None:
        """Return what seals the folder; None for an unfinished run."""

    def check_seal(self) -> None:
        """Refuse a record whose files differ from what its manifest says."""
        for fault in self.seal_faults():
            raise fault

    def seal_faults(self) -> Iterator[UserError]:
        """Yield everything in which the folder differs from what its manifest says."""
        if self.manifest is None:
            yield UserError(
                found="no manifest.json",
                need=f"{self.finished}: its seal is written last",
                where=self.folder.name,
                do=self.mend_unsealed,
            )
            return
        do, sealed = f"restore the file or {self.again}", self.manifest.sha256
        for name, digest in sealed.items():
            found = self._digest(name)
            if found != f"SHA-256 {digest}":
                yield UserError(found=found[:20], need=f"SHA-256 {digest[:12]} as sealed", where=name, do=do)
        held = [path.name for path in self.folder.iterdir() if path.suffix in _SEALED_ENDINGS]
        for name in sorted({*held, *self.core} - {*sealed, MANIFEST_FILE}):
            what = "a file that the manifest does not seal" if name in held else f"no {name} in the manifest"
            yield UserError(found=what, need="its SHA-256 there", where=name, do=do)
        yield from self._clock_faults(self.manifest)

    def _clock_faults(self, manifest: SealedFiles) -> Iterator[UserError]:
        """Yield that a record says to have taken longer than there was between its beginning and its end."""
        with contextlib.suppress(
            UserError, ValueError, TypeError, LookupError, RecursionError
        ):  # told of its file
            begun = datetime.fromisoformat(json.loads(self._text(self.origin_file))["started_utc"])
            between_s = (datetime.fromisoformat(manifest.finished_utc) - begun).total_seconds()
            if manifest.elapsed_s > between_s + _LOADING_S:
                yield UserError(
                    found=f"elapsed_s {manifest.elapsed_s:g}",
                    need=f"at most the {between_s:.0f} s from beginning to end, and {_LOADING_S} s more for "
                    "loading before it was begun",
                    where=MANIFEST_FILE,
                    do=f"restore the file or {self.again}",
                )

    def _digest(self, name: str) -> str:
        path = self.folder / name
        if not path.exists():
            return "no file"
        try:
            return f"SHA-256 {file_sha256(regular_file(path))}"
        except UserError as error:
            return error.found

    def file(self, name: str) -> Path:
        """Return the path of a file of the record, which need not exist, and is no device, pipe or link."""
        return regular_file(self.folder / name)

    def _text(self, name: str) -> str:
        try:
            return text_of(self.file(name).read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(found=f"no readable {name}", need=self.noun, where=self.folder.name) from error

    def _read(self, name: str, model: type[ModelT]) -> ModelT:
        try:
            return model.model_validate_json(self._text(name), context=ReadFrom(name))
        except ValidationError as error:
            raise UserError(
                found=first_fault(error), need=f"a {model.__name__} record", where=name
            ) from error

    def _optional(self, name: str, model: type[ModelT]) -> ModelT | None:
        return self._read(name, model) if (self.folder / name).exists() else None

    def _spec(self, name: str, model: type[ModelT], parse: Callable[..., ModelT]) -> ModelT:
        """Return what the record was asked for; a spec of a newer version is refused as other files are."""
        text = self._text(name)
        with contextlib.suppress(ValueError, RecursionError):  # which `parse` tells of
            check_version(tomllib.loads(text), model, where=name)
        return parse(text, where=name)


def regular_file(path: Path) -> Path:
    """Return a path that names a regular file, or nothing yet.

    Raises: UserError for anything else, such as a pipe or a device: to read one may never end.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return path  # not there, or not to be looked at: whoever opens it says so
    if stat.S_ISREG(mode):
        return path
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    found = kinds.get(stat.S_IFMT(mode), "no file")
    raise UserError(found=found, need="a regular file", where=path.name, do="restore the file")


def kind_of(folder: Path) -> RecordKind:
    """Return the kind of a record: what its manifest says, else its spec, else what files it holds.

    Raises: UserError for a folder that is none, that holds no record, whose kind this version does not know,
    or that says a kind whose files it does not hold.
    """
    if not folder.is_dir():
        raise UserError(found="no such folder", need="a record folder", where=folder.name)
    held = [kind for kind, names in _FILES_OF.items() if any((folder / name).exists() for name in names)]
    said, where = _said_kind(folder, specs=[_SPEC_OF[kind] for kind in held])
    if said is None and not held:
        first = ", ".join(names[0] for names in _FILES_OF.values())
        below = ("*/manifest.json", "*/*/manifest.json", "*/*/*/manifest.json")  # as deep as records lie
        inside = sorted(chain.from_iterable(map(folder.glob, below)), key=lambda path: path.parent.name)
        raise UserError(
            found="no record",
            need=f"a folder with one of {first}",
            where=folder.name,
            do=f"name a record in it, such as {inside[-1].parent}" if inside else None,
        )
    kind = next((kind for kind in _FILES_OF if kind == (held[0] if said is None else said)), None)
    if kind is None:
        raise UserError(
            found=f"a record of kind {said!r}",
            need=f"one of {', '.join(_FILES_OF)}",
            where=f"{folder.name}/{where}",
            do="update medusa-repro",
        )
    if said is not None and held and not (folder / _SPEC_OF[kind]).exists():
        raise UserError(
            found=f"kind {said!r} without {_SPEC_OF[kind]}",
            need="a folder that holds what it says",
            where=f"{folder.name}/{where}",
            do="restore the record's files",
        )
    return kind


def _said_kind(folder: Path, *, specs: Sequence[str]) -> tuple[object, str]:
    """Return the kind that the manifest gives, or the first spec that gives one, and the file; else None."""
    files: tuple[tuple[str, Callable[[str], Any]], ...] = (
        ("manifest.json", json.loads),
        *((name, tomllib.loads) for name in specs),
    )
    for name, parse in files:
        # missing, unreadable or too deep: no word of its kind
        with contextlib.suppress(OSError, ValueError, RecursionError):
            data = parse(text_of(regular_file(folder / name).read_bytes()))
            if isinstance(data, dict) and data.get("kind") is not None:
                return data["kind"], name
    return None, ""


def file_of(name: str, backbone: BackboneName) -> str:
    """Return the name that a file has for one backbone: trace.npz, and trace-tuned.npz."""
    stem, _, suffix = name.rpartition(".")
    return name if backbone == "original" else f"{stem}-{backbone}.{suffix}"
