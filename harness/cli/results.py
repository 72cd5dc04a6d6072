"""`results` makes again what is made from committed records, or says what is not as they give it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.devices import devices
from harness.cli.finish import finish
from harness.cli.options import ResultsOption, console
from harness.cli.reproduce import make_claims_page
from harness.errors import ExitCode, UserError
from harness.files import file_sha256, write_text
from harness.judge.history.provenance import origin_of
from harness.judge.validate.record import validate_record
from harness.paths import default_results
from harness.records.folder import MANIFEST_FILE, REPORT_FILE, RecordKind, kind_of
from harness.records.opened import open_record
from harness.records.provenance import Provenance
from harness.report.pages.index import INDEX_FILE, MEASURES_NOTHING, entries, render_index
from harness.report.pages.run import PAGE_FILE
from harness.report.profiles import committed_profiles
from harness.report.readme import (
    block_names,
    records_block,
    shown_record,
    training_block,
    update_readme,
)
from harness.specs.claims import ClaimSpec, load_claims, load_registry

README_FILE = "README.md"
_OVER_ALL_RECORDS = (
    "answer",
    "claims",
    "devices",
    "records",
    "training",
)  # blocks that link no record of their own
_PICTURES = (".png", ".svg")
# Kinds with a folder of their own under results/; runs and ablations lie there by their suite's name.
_FOLDER_OF: dict[RecordKind, tuple[str, ...]] = {
    "latency": ("latency",),
    "sweep": ("sweep",),
    "gpu": ("gpu",),
    "gate": ("gate",),
    "suite": (),
    "ablation": (),
}
_PLACE = re.compile(r"\w[\w.+-]*/\w[\w.+-]*/\d{8}T\d{6}Z-[\w-]+")  # spec, machine, time and commit


@dataclass(frozen=True)
class Taken:
    """What became of the records of another folder: places under results/, and why others were left out."""

    taken: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def results(
    check: Annotated[
        bool,
        typer.Option("--check", help="change nothing; fail where a page is not what the records give"),
    ] = False,
    take: Annotated[
        Path | None,
        typer.Option(
            help="folder with records of other machines: those that are sealed, sound, valid and of a clean "
            "commit are taken over first"
        ),
    ] = None,
    results: ResultsOption = None,
) -> None:
    """Make all reports, figures, pages and README tables again that come from the records.

    The README is the one next to the results folder. Each of its tables shows the record that it links. This
    needs no device.
    """
    home = (results or default_results()).absolute()
    if not home.is_dir():
        raise UserError(found="no such folder", need="a folder of records", where=home.name)
    if check and take is not None:
        raise UserError(
            found="--check with --take", need="one of them", where="the command line", do="leave one out"
        )
    claims = load_claims(None)
    if check:
        with tempfile.TemporaryDirectory() as folder:
            copy = _copy_without_pages(home, Path(folder))
            invalid = make_pages(copy, claims=claims)
            differing = _differences(_contents(home), _contents(copy))
        print(json.dumps({"differing": differing, "invalid": invalid}))
        if differing:
            raise UserError(
                found=f"{len(differing)} files that the records do not give: {', '.join(differing)}",
                need="each page as it is made from the committed records",
                where=home.name,
                do="run medusa-repro results and commit what it writes",
            )
        return
    before = _contents(home)
    moved = take_records(take, home, claims=claims) if take is not None else Taken()
    invalid = make_pages(home, claims=claims)
    print(
        json.dumps(
            {
                "changed": _differences(before, _contents(home)),
                "taken": moved.taken,
                "left_out": moved.left_out,
                "invalid": invalid,
            }
        )
    )


def make_pages(home: Path, *, claims: Sequence[ClaimSpec]) -> list[str]:
    """Write every page, figure and README table again; return the records whose measurement is invalid.

    Tables stand in the README next to the results folder and in the one within it.
    Raises: UserError for a record that is not as it was sealed, and for a README table of no one record.
    """
    pages = [page for page in (home.parent / README_FILE, home / README_FILE) if page.is_file()]
    names = {page: block_names(page) for page in pages}
    shown: dict[Path, dict[Path, str]] = {}  # by record: the pages that show it, and in which block
    for page in pages:
        for name in names[page]:
            if name not in _OVER_ALL_RECORDS:
                shown.setdefault(shown_record(page, name).resolve(), {})[page] = name
    records = _sealed(home)
    if missing := [name for folder, by in shown.items() if folder not in records for name in by.values()]:
        raise UserError(
            found=f"README tables of records that are not there: {', '.join(missing)}",
            need="each table's record under results/",
            where=README_FILE,
            do="restore the record, or name another: medusa-repro report RECORD --readme README.md",
        )
    invalid = []
    for folder in records:
        console.print(folder.relative_to(home.resolve()).as_posix(), highlight=False)
        if not _told(folder, claims, pages=tuple(shown.get(folder, ()))):
            invalid.append(folder.name)
    _make_overviews(home, names)
    return invalid


def _make_overviews(home: Path, names: Mapping[Path, Sequence[str]]) -> None:
    """Write the pages over all records, and blocks that show them; `names` are the blocks by page."""

    def showing(*wanted: str) -> list[Path]:
        return [page for page in names if set(wanted) & set(names[page])]

    registry = load_registry(None)
    verdicts = make_claims_page(home, registry, pages=showing("claims", "answer"))
    found = entries(home)
    write_text(home / INDEX_FILE, render_index(found, registry, verdicts))
    for page in showing("records"):
        update_readme(page, records_block(found))
    with contextlib.redirect_stdout(io.StringIO()):
        of_devices: list[Path | None] = [*showing("devices")]
        for place in of_devices or [None]:
            devices(results=home, readme=place)
    for page in showing("training"):
        update_readme(page, training_block(committed_profiles(home)))


def take_records(source: Path, home: Path, *, claims: Sequence[ClaimSpec]) -> Taken:
    """Copy the records below a folder to their places under results/: what each one's seal names, no more.

    Left out, with the reason: what is not sealed or sound, has no clean commit, measured nothing valid, or
    would lie where another record lies.
    Raises: UserError for a folder that is not there.
    """
    if not source.is_dir():
        raise UserError(found="no such folder", need="a folder with records below it", where=source.name)
    outcome = Taken()
    for folder in sorted(path.parent for path in source.rglob(MANIFEST_FILE)):
        name = "/".join(folder.absolute().parts[-3:])
        try:
            outcome.taken.append(_take(folder, name, home=home, claims=claims))
        except UserError as error:
            outcome.left_out[folder.relative_to(source).as_posix()] = str(error)
    return outcome


def _take(folder: Path, name: str, *, home: Path, claims: Sequence[ClaimSpec]) -> str:
    """Copy one record and return its place from the results folder.

    Raises: UserError with the reason not to.
    """
    if _PLACE.fullmatch(name) is None:
        raise UserError(found="a folder of another name", need="spec/machine/time-commit", where=name)
    if faults := validate_record(folder):
        raise UserError(found=faults[0], need="a sound record", where=name)
    record = open_record(folder)
    _check_commit(origin_of(record), where=name)
    place = Path(*_FOLDER_OF[kind_of(folder)], name)
    target = home / place
    if target.exists():
        raise UserError(found="a record that is there already", need="a new one", where=place.as_posix())
    if record.manifest is None:
        raise UserError(found="no seal", need="a sealed record", where=name)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, name)
        copy.mkdir(parents=True)
        for file in (*record.manifest.sha256, MANIFEST_FILE):
            shutil.copyfile(record.file(Path(file).name), copy / Path(file).name)
        if not _told(copy, claims, pages=()):
            raise UserError(found="an invalid measurement", need="one that passed its checks", where=name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(copy, target)
    return place.as_posix()


def _check_commit(origin: Provenance, *, where: str) -> None:
    if not origin.commit or origin.dirty is not False:
        raise UserError(
            found="no commit, or a checkout with changes", need="a record of a committed version", where=where
        )


def _told(folder: Path, claims: Sequence[ClaimSpec], *, pages: Sequence[Path]) -> bool:
    """Write a record's report as `report` does, without its output; return whether its figures are valid."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            has_page = (folder / PAGE_FILE).exists()  # a committed record has one where somebody kept it
            finish(folder, claims=claims, readme=None, also=pages, html=has_page)
    except typer.Exit as end:
        return end.exit_code == ExitCode.OK
    return True


def _sealed(home: Path) -> list[Path]:
    """Return the folders of all sealed records, in order."""
    found = (path.parent for path in home.resolve().rglob(MANIFEST_FILE))
    return sorted(one for one in found if MEASURES_NOTHING not in one.relative_to(home.resolve()).parts)


def _copy_without_pages(home: Path, folder: Path) -> Path:
    """Copy results and README without the pages and figures of sealed records; return the results."""
    copy = folder / home.name
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns(MEASURES_NOTHING))
    if (home.parent / README_FILE).is_file():
        shutil.copyfile(home.parent / README_FILE, folder / README_FILE)
    for record in _sealed(copy):
        for path in (record / REPORT_FILE, *_pictures(record)):
            path.unlink(missing_ok=True)
    return copy


def _pictures(record: Path) -> Iterator[Path]:
    return (path for path in record.rglob("*") if path.suffix in _PICTURES)


def _contents(home: Path) -> dict[str, str]:
    """Return the hash of every file of a results folder and of the README next to it, by its path."""
    files = [home.parent / README_FILE, *home.rglob("*")]
    return {
        path.relative_to(home.parent).as_posix(): file_sha256(path)
        for path in sorted(files)
        if path.is_file() and MEASURES_NOTHING not in path.relative_to(home.parent).parts
    }


def _differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
