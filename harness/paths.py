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

_ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/~])(?:~[\w.-]*)?(?:/[\w.+@-]+){2,}/?|(?<![\w])[A-Za-z]:\\[^\s\"'|]+|(?<![\w.:/])/(?:root|home)\b"
)
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
    """Return the text with every absolute path cut to its last part, which names no user and no machine."""
    return _ABSOLUTE_PATH.sub(
        lambda match: ".../" + re.split(r"[/\\]", match.group().rstrip("/\\"))[-1], text
    )


def holds_absolute_path(text: str) -> bool:
    """Return whether the text holds a path that is absolute, and so true on one machine only."""
    return _ABSOLUTE_PATH.search(text) is not None


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the cache folder, which need not exist: MEDUSA_REPRO_CACHE or the platform's own."""
    override = (os.environ if environ is None else environ).get(CACHE_VARIABLE)
    return (
        Path(override).expanduser().absolute() if override else platformdirs.user_cache_path("medusa-repro")
    )
