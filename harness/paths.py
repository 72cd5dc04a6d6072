"""Where the data files that suites name are looked for."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from harness.errors import UserError


def resolve_path(text: str, *, beside: Path | None) -> Path:
    """Return a data file named by a suite: as given, beside the suite file, or among the shipped suites.

    Raises: UserError where none of them exists.
    """
    shipped = Path(str(resources.files("suites")))
    for candidate in (Path(text), *((beside / text,) if beside is not None else ()), shipped / text):
        if candidate.exists():
            return Path(candidate)
    raise UserError(found=f"no file {text!r}", need="a file that exists, beside the suite or under suites/", where="the suite")


def default_results() -> Path:
    """Return the results folder of the checkout, or of the working directory outside one."""
    beside = Path(__file__).resolve().parent.parent / "results"
    return beside if beside.is_dir() else Path("results")
