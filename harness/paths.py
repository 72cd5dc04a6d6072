"""Where shipped data, results and the code itself lie."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import platformdirs

from harness.errors import UserError

# An address on the network is no path of this machine; file: is one.
_ADDRESS = r"(?P<address>(?<![\w+.-])(?!file:|[\w.-]*\+file:)[A-Za-z][\w+.-]*://[^\s\"'<>|]*)"
# One folder's or file's name: with an apostrophe only inside of it, and with blanks only before a separator.
_NAME = r"(?:[^\s/\\\"'`<>|:;,()\[\]{}=]|'(?=\w))+"
_SPACED = rf"{_NAME}(?: {{1,2}}{_NAME}){{0,3}}"
_FILE_SCHEME = r"(?:(?:[\w.-]+\+)?file:(?://[\w.-]*)?)"
_POSIX = rf"(?:~[\w.-]*)?(?:/{_SPACED}(?=/))*(?:/{_NAME})"
_DRIVE = rf"(?<!\w)(?:[A-Za-z]:[/\\]|\\\\(?=\w))(?:{_SPACED}[/\\])*(?:{_NAME})?"
_ABSOLUTE_PATH = re.compile(
    rf"{_ADDRESS}"
    rf"|(?P<path>{_FILE_SCHEME}{_POSIX}/?|{_DRIVE}"
    rf"|(?<![\w./~])(?:(?:~[\w.-]*)?/{_SPACED}(?=/)(?:/{_SPACED}(?=/))*/{_NAME}|~[\w.-]*/{_NAME}|/(?:root|home)\b)/?)"
)
_HOMES = ("home", "users", "root")  # folders whose members have the names of users
CACHE_VARIABLE = "MEDUSA_REPRO_CACHE"


def shipped(*parts: str) -> Path:
    """Return a file or folder of the data that ships with the project, or the folder of all of it."""
    return Path(str(resources.files("suites"))).joinpath(*parts)


def code_folder() -> Path:
    """Return the folder of this code; a record names the commit of its checkout, where it has one."""
    return Path(__file__).resolve().parent


def resolve_path(text: str, *, base_folder: Path | None) -> Path:
    """Return the file that a data file names: absolute, from the base folder, or among the shipped data.

    The base folder is that of the file which names the path; None where no file does. The working directory
    counts for no path in a file, so that a file means the same from everywhere.
    Raises: UserError where none of them exists.
    """
    named = Path(text)
    candidates = [named] if named.is_absolute() else [*_below(base_folder, named), shipped(text)]
    for candidate in candidates:
        with contextlib.suppress(ValueError):  # a NUL character
            if candidate.exists():
                return candidate
    raise UserError(
        found=f"no file {text!r}",
        need="a path that exists: absolute, from the folder of the data file, or from suites/",
        where="the data file that names it",
        do="correct the path there",
    )


def model_folder(path: str, *, base_folder: Path | None) -> Path:
    """Return the folder of a model that a data file names. Raises: UserError where there is none."""
    folder = None
    with contextlib.suppress(UserError):
        folder = resolve_path(path, base_folder=base_folder)
    if folder is None or not folder.is_dir():
        raise UserError(
            found=f"no folder {Path(path).name!r}",
            need="a folder with a model in Hugging Face format",
            where="model.path, which goes from the folder of the data file unless it is absolute",
            do="correct the path there",
        )
    return folder.absolute()


def _below(folder: Path | None, path: Path) -> tuple[Path, ...]:
    return () if folder is None else (folder / path,)


def default_results() -> Path:
    """Return the results folder of the checkout, or of the working directory outside one."""
    of_checkout = code_folder().parent / "results"
    return of_checkout if of_checkout.is_dir() else Path("results")


def without_paths(text: str) -> str:
    """Return the text with every absolute path cut to its last part, which names no user and no machine.

    Nothing is left of a path that ends in a user's own folder. A blank may be part of a folder's name: words
    between two parts of a path go with it.
    """
    return _ABSOLUTE_PATH.sub(_cut, text)


def _cut(match: re.Match[str]) -> str:
    if match["path"] is None:
        return match.group()
    parts = [part for part in re.split(r"[/\\]", match["path"]) if part]
    is_user = len(parts) > 1 and parts[-2].lower() in _HOMES
    return "..." if is_user or not parts else f".../{parts[-1]}"


def holds_absolute_path(text: str) -> bool:
    """Return whether the text holds a path that is absolute, and so true on one machine only."""
    return any(match["path"] is not None for match in _ABSOLUTE_PATH.finditer(text))


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the cache folder, which need not exist: MEDUSA_REPRO_CACHE or the platform's own.

    Raises: UserError for a user without a home folder.
    """
    override = (os.environ if environ is None else environ).get(CACHE_VARIABLE)
    try:
        if override:
            return Path(override).expanduser().absolute()
        return platformdirs.user_cache_path("medusa-repro")
    except RuntimeError as error:  # no HOME, and no such user
        raise UserError(
            found="no home folder of this user, which a container may lack",
            need=f"HOME or {CACHE_VARIABLE} to name a folder",
            where="the environment",
        ) from error
