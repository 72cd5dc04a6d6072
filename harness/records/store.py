"""A record under way: open or resume, append, seal; what differs between kinds is a `StoreKind`."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import tomli_w
from pydantic import BaseModel

from harness.errors import UserError
from harness.files import DataFile, file_sha256, with_paths, write_bytes, write_json
from harness.records.folder import ASKED_FILE, MANIFEST_FILE, REPORT_FILE, UNSEALED_REPORT_FILE, RecordKind
from harness.records.machines.identity import device_differences, machine_slug
from harness.records.provenance import DeviceInfo, Provenance

UNSEALED = (MANIFEST_FILE, REPORT_FILE, UNSEALED_REPORT_FILE)
NO_REPORT = "found {} measured and sealed, and without a report: only that is left to be written"

LineT = TypeVar("LineT", bound=BaseModel)
ReadT = TypeVar("ReadT", bound=BaseModel, covariant=True)
ManifestT = TypeVar("ManifestT", bound=BaseModel)


class ReadsLines(Protocol[ReadT]):
    """Reads the file of a record that grows by whole lines."""

    def __call__(self, path: Path, *, allow_torn_tail: bool = False) -> tuple[ReadT, ...]: ...


@dataclass(frozen=True)
class LineFile(Generic[LineT]):
    """A file of a record that grows by whole lines.

    Each is flushed to disk, so that a kill leaves at most half a last one.
    """

    name: str
    read: ReadsLines[LineT]
    leaves_out_absent: bool = False

    def done(self, folder: Path) -> tuple[LineT, ...]:
        """Return the lines that are there.

        Half a last line is dropped from the file, so that the next is not appended to it.
        """
        if not (folder / self.name).exists():
            return ()
        found = self.read(folder / self.name, allow_torn_tail=True)
        self.rewrite(folder, found)
        return found

    def rewrite(self, folder: Path, lines: Iterable[LineT]) -> None:
        """Write all lines anew, at once or not at all."""
        write_bytes(folder / self.name, self._text(lines).encode())

    def append(self, folder: Path, *lines: LineT) -> None:
        """Append lines and flush them to disk."""
        with (folder / self.name).open("a", encoding="utf-8") as file:
            file.write(self._text(lines))
            file.flush()
            os.fsync(file.fileno())

    def _text(self, lines: Iterable[LineT]) -> str:
        return "".join(line.model_dump_json(exclude_none=self.leaves_out_absent) + "\n" for line in lines)


@dataclass(frozen=True)
class StoreKind(Generic[LineT]):
    """How a record of one kind lies on disk while it is under way, and what makes a folder another run's.

    `record_kind` goes into the manifest, the nouns into errors. `home` are the folders under the results
    before the spec's name; `begun` reads what a folder was begun with; `identity` names the fields of its
    provenance that a resume must find again; `unsealed` are files that can be made from the others again.
    """

    record_kind: RecordKind
    noun: str
    spec_noun: str
    spec_file: str
    provenance_file: str
    lines: LineFile[LineT]
    begun: Callable[[Path], tuple[DataFile, Provenance]]
    identity: tuple[str, ...]
    home: tuple[str, ...] = ()
    unsealed: tuple[str, ...] = UNSEALED


class Store(Generic[LineT]):
    """One record's folder: what is done is on disk, line by line, and survives a kill at any byte."""

    def __init__(self, folder: Path, *, kind: StoreKind[LineT]) -> None:
        self.folder, self.kind = folder, kind

    @staticmethod
    def open(
        results: Path,
        *,
        kind: StoreKind[LineT],
        spec: DataFile,
        provenance: Provenance,
        resume: Path | None = None,
    ) -> Store[LineT]:
        """Return the store to write to.

        It is `resume`, else the newest unfinished run of the same spec and identity, else a new folder. A
        run that was sealed and has no report yet is unfinished, too: only its report is left to be written,
        which `is_sealed` tells.
        Raises: UserError where `resume` names a run that is finished or that was begun with something else.
        """
        home = results.joinpath(*kind.home, spec.name, machine_slug(provenance.device))
        folder = _unfinished(home, kind=kind, spec=spec, provenance=provenance, resume=resume)
        if folder is None:
            stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{(provenance.commit or 'nocommit')[:8]}"

            def begin(draft: Path) -> None:
                Store(draft, kind=kind).write_spec(spec)
                write_json(draft / kind.provenance_file, provenance)

            return Store(begun_folder(home, stem, begin), kind=kind)
        store = Store(folder, kind=kind)
        store._drop_left_overs()
        return store

    def write_spec(self, spec: DataFile) -> None:
        """Write the spec as it is run, command-line changes included."""
        write_bytes(self.folder / self.kind.spec_file, tomli_w.dumps(portable(spec)).encode())

    @property
    def is_sealed(self) -> bool:
        """Return whether all is measured and sealed, so that only the report is left to be written."""
        return (self.folder / MANIFEST_FILE).exists()

    def shorten_spec(self, spec: DataFile) -> None:
        """Write the spec as far as it was run; what was asked for is kept next to it.

        The second is on disk before the first changes: a kill in between leaves a run that can be resumed.
        """
        write_bytes(self.folder / ASKED_FILE, (self.folder / self.kind.spec_file).read_bytes())
        self.write_spec(spec)

    def restore_spec(self) -> None:
        """Undo `shorten_spec` in a run that goes on after all."""
        asked = self.folder / ASKED_FILE
        if asked.exists():
            write_bytes(self.folder / self.kind.spec_file, asked.read_bytes())
            asked.unlink()

    def lines(self) -> tuple[LineT, ...]:
        """Return the lines that are done.

        What a kill left, half a last line and temporary files, is dropped first.
        """
        self._drop_left_overs()
        return self.kind.lines.done(self.folder)

    def _drop_left_overs(self) -> None:
        for left_over in self.folder.glob("*.tmp"):
            left_over.unlink()

    def rewrite(self, lines: Iterable[LineT]) -> None:
        """Write all lines anew, at once or not at all."""
        self.kind.lines.rewrite(self.folder, lines)

    def append(self, *lines: LineT) -> None:
        """Append lines and flush them to disk."""
        self.kind.lines.append(self.folder, *lines)

    def seal(self, manifest: type[ManifestT], **counts: Any) -> ManifestT:
        """Write the manifest, last of all, and return it; `counts` are what the store cannot know."""
        sealed = manifest(
            kind=self.kind.record_kind,
            finished_utc=utc_now(),
            sha256=hashes(self.folder, unsealed=self.kind.unsealed),
            **counts,
        )
        write_json(self.folder / MANIFEST_FILE, sealed)
        return sealed


def new_folder(home: Path, stem: str) -> Path:
    """Make a folder of that name and return it; a number follows where another run has the name already."""
    home.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = home / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("unreachable: the numbers do not end")


def begun_folder(home: Path, stem: str, begin: Callable[[Path], None]) -> Path:
    """Make a folder as `new_folder` does, which from its first moment on holds what `begin` writes.

    So a kill leaves no folder that says nothing of its run. Drafts of processes that are gone are removed.
    """
    home.mkdir(parents=True, exist_ok=True)
    for left_over in home.glob(".*.tmp"):
        if not _is_alive(left_over.name.split("-")[-2]):
            shutil.rmtree(left_over, ignore_errors=True)
    draft = home / f".{stem}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    draft.mkdir()
    begin(draft)
    for number in itertools.count(1):
        folder = home / (stem if number == 1 else f"{stem}-{number}")
        try:
            return draft.rename(folder)
        except OSError as error:  # a folder that holds something is not replaced
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise AssertionError("unreachable: the numbers do not end")


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's process
    return True


def _runs(home: Path) -> list[Path]:
    """Return the folders of runs, the newest first; drafts are none."""
    return sorted((one for one in home.glob("*") if not one.name.startswith(".")), reverse=True)


def portable(spec: BaseModel) -> dict[str, Any]:
    """Return a spec as a record keeps it: absolute paths cut to their last part, so none names a user."""
    return with_paths(spec, lambda path: Path(path).name if Path(path).is_absolute() else str(path))


def hashes(folder: Path, *, unsealed: Sequence[str] = UNSEALED) -> dict[str, str]:
    """Return the SHA-256 of every file that a manifest seals, by name.

    It seals all but itself and what can be made from the others again.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in unsealed)
    return {name: file_sha256(folder / name) for name in names if not name.endswith(".tmp")}


def utc_now() -> str:
    """Return the time as records write it."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def begun_with(
    results: Path, *, kind: StoreKind[LineT], spec: DataFile, device: DeviceInfo, resume: Path | None
) -> Iterator[Provenance]:
    """Yield where the runs of a spec on a device come from that are to go on, the newest first.

    What a run needs of them is what it may not take anew, such as the date; one that lacks its report alone
    is among them. With `resume` it is that run alone.
    """
    home = results.joinpath(*kind.home, spec.name, machine_slug(device))
    ours = type(spec).model_validate(portable(spec))
    for folder in _runs(home) if resume is None else (resume,):
        if (folder / MANIFEST_FILE).exists() and (folder / REPORT_FILE).exists():
            continue
        with contextlib.suppress(UserError):  # what cannot be read is no run to go on with
            begun, then = kind.begun(folder)
            if begun == ours:
                yield then


def _unfinished(
    home: Path, *, kind: StoreKind[LineT], spec: DataFile, provenance: Provenance, resume: Path | None
) -> Path | None:
    """Return the folder to go on in; None where there is none.

    It is the one to `resume`, or the newest unfinished one of the same run. Of sealed ones only the newest
    folder of all may lack its report: an older one was left so on purpose.
    """
    if resume is not None:
        if (resume / MANIFEST_FILE).exists() and (resume / REPORT_FILE).exists():
            raise UserError(found=f"a finished {kind.noun}", need="an unfinished one", where=resume.name)
        if other := _difference(resume, kind=kind, spec=spec, provenance=provenance):
            need = f"the one that began the {kind.noun}"
            raise UserError(
                found=f"another {other}", need=need, where=resume.name, do=f"start a new {kind.noun}"
            )
        return resume
    for index, folder in enumerate(_runs(home)):
        if (folder / MANIFEST_FILE).exists() and (index > 0 or (folder / REPORT_FILE).exists()):
            continue
        # what another version or a damaged disk left must not stop a new run
        with contextlib.suppress(UserError):
            if _difference(folder, kind=kind, spec=spec, provenance=provenance) is None:
                return folder
    return None


def _difference(
    folder: Path, *, kind: StoreKind[LineT], spec: DataFile, provenance: Provenance
) -> str | None:
    """Return the first thing in which what a folder was begun with differs from this run, or None.

    Of a device it says in words what differs.
    """
    begun, then = kind.begun(folder)
    if begun != type(spec).model_validate(portable(spec)):
        return kind.spec_noun
    other = next((name for name in kind.identity if getattr(then, name) != getattr(provenance, name)), None)
    if other != "device":
        return other
    differing = "; ".join(device_differences(then.device, provenance.device))
    return f"device (then against here: {differing})"
