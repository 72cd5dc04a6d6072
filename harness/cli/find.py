"""A data file or a record, by path or by name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Literal

from harness.cli.options import console
from harness.errors import UserError
from harness.files import read_text
from harness.paths import default_results, shipped
from harness.specs.suite import SuiteSpec, load_suite

Kind = Literal["suite", "latency", "sweep", "ablation", "recipe", "gpu", "gate"]
# A kind is a folder of suites/; suites themselves lie at its top, together with the registries.
_FOLDERS: dict[Kind, str] = {
    "suite": "",
    "latency": "latency",
    "sweep": "sweeps",
    "ablation": "ablations",
    "recipe": "recipes",
    "gpu": "gpu",
    "gate": "gate",
}
_RECORD_NAME = re.compile(r"\d{8}T\d{6}Z-[\w-]+")  # the time and the commit of its beginning
_OLD_PREFIXES = {"latency_": "latency", "sweep_": "sweeps"}  # of file names in suites/ before 0.2.0


def find_suite(text: str) -> tuple[SuiteSpec, Path]:
    """Return a suite and its file, by its path or by the name of a shipped one."""
    path = find_data(text, kind="suite")
    return load_suite(path), path


def find_record(text: str, *, results: Path | None = None) -> Path:
    """Return a record: the path as given, or the newest sealed one of a name in the results folder.

    `embedded` names runs of that suite, `latency/embedded` and `sweep/embedded` the other kinds of records,
    `embedded/MACHINE` those of one machine's folder; where several machines have some, the choice is told.
    The last part of a record's folder, which a command's last line gives, names that record.
    """
    if Path(text).exists():
        return Path(text)
    home = results or default_results()
    if _RECORD_NAME.fullmatch(text):
        found = sorted(path for path in home.rglob(text) if path.is_dir())
        if found:
            return found[0]
    of_machine, of_all = ((home / text).glob(form) for form in ("*/manifest.json", "*/*/manifest.json"))
    sealed = sorted((*of_machine, *of_all), key=lambda path: path.parent.name)
    if not sealed:
        raise UserError(
            found=f"no record {text!r}",
            need="a record's folder, or a name under results/ that has a finished record",
            where=f"{home.name}/",
            do="name a folder, or a name such as embedded, latency/embedded or sweep/embedded",
        )
    newest = sealed[-1].parent
    machines = {path.parent.parent for path in sealed}
    if len(machines) > 1:
        told = (
            f"{text}: the newest record of {len(machines)} machines is {newest.name}, of {newest.parent.name}"
        )
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    return newest


def find_data(text: str, *, kind: Kind) -> Path:
    """Return a data file by path, or by the name of a shipped one of that kind."""
    home = shipped(_FOLDERS[kind])
    if Path(text).suffix == ".toml":
        if Path(text).is_file():
            return Path(text)
        moved = _moved(Path(text))
        do = f"name {moved}, where it lies now" if moved is not None else "correct the path"
        raise UserError(
            found=f"no file {text}", need="a TOML file that exists", where="the command line", do=do
        )
    names = sorted(path.stem for path in home.glob("*.toml") if _says(path, kind))
    if text not in names:
        bare = _without_old_prefix(text)
        raise UserError(
            found=f"no {kind} {text!r}",
            need=f"one of {names} or a TOML file",
            where=f"suites/{_FOLDERS[kind]}",
            do=f"name {bare}, which it is called now" if bare in names else None,
        )
    return home / f"{text}.toml"


def _says(path: Path, kind: Kind) -> bool:
    return tomllib.loads(read_text(path)).get("kind") == kind


def _without_old_prefix(name: str) -> str:
    """Return a name as it would be now if it is one of before 0.2.0: embedded for latency_embedded."""
    prefix = next((prefix for prefix in _OLD_PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _moved(path: Path) -> Path | None:
    """Return where a file that lay in suites/ before 0.2.0 lies now; None for any other."""
    folder = next((folder for prefix, folder in _OLD_PREFIXES.items() if path.stem.startswith(prefix)), None)
    candidate = Path(folder or "ablations", _without_old_prefix(path.name))
    return path.parent / candidate if shipped(candidate.as_posix()).is_file() else None
