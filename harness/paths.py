"""Where shipped data, results and the code itself lie."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from harness.errors import UserError


def shipped(*parts: str) -> Path:
    """Return a file or folder of the data that ships with the project; without `parts` the folder of all of it."""
    return Path(str(resources.files("suites"))).joinpath(*parts)


def code_folder() -> Path:
    """Return the folder of this code, whose checkout, where it has one, is what a record names as its commit."""
    return Path(__file__).resolve().parent


def resolve_path(text: str, *, beside: Path | None) -> Path:
    """Return a data file named by a suite: as given, beside the suite file, or among the shipped suites.

    Raises: UserError where none of them exists.
    """
    for candidate in (Path(text), *((beside / text,) if beside is not None else ()), shipped(text)):
        if candidate.exists():
            return Path(candidate)
    raise UserError(found=f"no file {text!r}", need="a file that exists, beside the suite or under suites/", where="the suite")


def default_results() -> Path:
    """Return the results folder of the checkout, or of the working directory outside one."""
    beside = code_folder().parent / "results"
    return beside if beside.is_dir() else Path("results")
