"""A data file or a record, by path or by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from harness.errors import UserError
from harness.paths import default_results, shipped
from harness.specs.suite import SuiteSpec, load_suite

_NOT_SUITES = ("assets", "claims", "hardware", "quoted", "shapes")  # other data that lies beside the suites
LATENCY, SWEEP = "latency_", "sweep_"  # what the names of latency specs and of sweeps begin with
_ABLATION = "_training"  # what the names of ablations hold


def find_suite(text: str) -> tuple[SuiteSpec, Path]:
    """Return a suite and its file, by path or by the name of a shipped one."""
    path = find_data(text, folder=None)
    return load_suite(path), path


def find_record(text: str) -> Path:
    """Return a record folder: as given, or the newest sealed one of a suite in the results folder."""
    if Path(text).is_dir():
        return Path(text)
    sealed = sorted((default_results() / text).glob("*/*/manifest.json"), key=lambda path: path.parent.name)
    if not sealed:
        raise UserError(
            found=f"no record {text!r}",
            need="a record folder or a suite with a finished run",
            where="results",
        )
    return sealed[-1].parent


def find_data(
    text: str, *, folder: str | None, prefix: str = "", kind: Literal["suite", "ablation"] = "suite"
) -> Path:
    """Return a data file by path or by name; names in the suites' own folder leave out `prefix`, which tells
    kinds of data apart.

    Ablations are told by `_training` in their names.
    """
    if Path(text).suffix == ".toml":
        if Path(text).is_file():
            return Path(text)
        raise UserError(found=f"no file {text}", need="a TOML file", where="the command line")
    suites = shipped()
    home = suites / folder if folder else suites
    stems = [found.stem for found in home.glob("*.toml") if found.stem not in _NOT_SUITES]
    if folder is None:
        stems = [
            stem
            for stem in stems
            if next((other for other in (LATENCY, SWEEP) if stem.startswith(other)), "") == prefix
        ]
        stems = [stem for stem in stems if (_ABLATION in stem) == (kind == "ablation")]
    names = sorted(stem.removeprefix(prefix) for stem in stems)
    if text not in names:
        raise UserError(
            found=f"no {text!r}", need=f"one of {names} or a TOML file", where=f"the shipped {home.name}"
        )
    return home / f"{prefix}{text}.toml"
