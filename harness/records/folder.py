"""A record's folder: read lazily, sealed, refused where it was altered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from harness.errors import UserError
from harness.files import file_sha256, first_fault
from harness.specs.suite import BackboneName

ModelT = TypeVar("ModelT", bound=BaseModel)


class SealedFiles(Protocol):
    """What every manifest holds: the hash of each file that it seals."""

    @property
    def sha256(self) -> dict[str, str]: ...


class RecordFolder(ABC):
    """The folder of a record of any kind, read lazily and validated; `kind`, `finished` and `again` are its
    words in errors.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    kind, finished, again = "a record folder", "a finished run", "run the suite again"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(found="no such folder", need=self.kind, where=folder.name)

    @property
    @abstractmethod
    def manifest(self) -> SealedFiles | None:
        """What seals the folder; None for an unfinished run."""

    def check_seal(self) -> None:
        """Refuse a record whose files differ from what its manifest says."""
        if self.manifest is None:
            raise UserError(
                found="no manifest.json",
                need=self.finished,
                where=self.folder.name,
                do="resume it with the same command",
            )
        for name, digest in self.manifest.sha256.items():
            found = file_sha256(self.folder / name) if (self.folder / name).exists() else "no file"
            if found != digest:
                raise UserError(
                    found=f"SHA-256 {found[:12]}",
                    need=digest[:12],
                    where=name,
                    do=f"restore the file or {self.again}",
                )

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(found=f"no readable {name}", need=self.kind, where=self.folder.name) from error

    def _read(self, name: str, model: type[ModelT]) -> ModelT:
        try:
            return model.model_validate_json(self._text(name))
        except ValidationError as error:
            raise UserError(
                found=first_fault(error), need=f"a {model.__name__} record", where=name
            ) from error

    def _optional(self, name: str, model: type[ModelT]) -> ModelT | None:
        return self._read(name, model) if (self.folder / name).exists() else None


def file_of(name: str, backbone: BackboneName) -> str:
    """Return the name that a file has for one backbone: trace.npz, and trace-tuned.npz."""
    stem, _, suffix = name.rpartition(".")
    return name if backbone == "original" else f"{stem}-{backbone}.{suffix}"
