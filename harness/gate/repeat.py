"""The command line that measures a gate again, whole, from the root of the checkout."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from harness.paths import code_folder

_HOMES = ("home", "users", "root")  # folders whose members have the names of users
_SHIPPED, _RUNS = "gate", 3


@dataclass(frozen=True)
class GateOptions:
    """What a command line says of a gate, as it was given; `command` is how it was typed, without folders.

    `runs` is of a calibration, None where it is none.
    """

    command: str
    gate: str = _SHIPPED
    base: str | None = None
    baseline: Path | None = None
    runs: int | None = None
    minutes: float | None = None
    results: Path | None = None
    is_trusted: bool = False  # --trust-remote-code


@dataclass(frozen=True)
class Repeat:
    """A command, and the files that it names without their folders, since those would name a user."""

    command: str
    cut: tuple[str, ...] = ()


def repeat_of(options: GateOptions, *, base_commit: str) -> Repeat:
    """Return the command that measures the same again here: every option that was given.

    The base is named by its commit. Paths go from the root of the checkout, where nox runs; without a noxfile
    the command is that of the package, and they go from the working directory.
    """
    root = code_folder().parent
    has_nox = (root / "noxfile.py").is_file() and not options.is_trusted  # nox names no option before "gate"
    package = ["medusa-repro", *(["--trust-remote-code"] if options.is_trusted else []), "gate"]
    words, cut = (["nox", "-s", "gate", "--"] if has_nox else package), list[str]()

    def path(given: Path) -> str:
        text = Path(os.path.relpath(given.absolute(), root if has_nox else Path.cwd())).as_posix()
        above = [part.lower() for part in Path(text).parts[:-1]]
        if not any(home in above for home in _HOMES):
            return text
        cut.append(given.name)
        return given.name

    if options.gate != _SHIPPED:
        words.append(path(Path(options.gate)) if options.gate.endswith(".toml") else options.gate)
    if options.runs is not None:
        words += ["--calibrate", *(["--runs", str(options.runs)] if options.runs != _RUNS else [])]
    elif options.baseline is not None:
        words += ["--baseline", path(options.baseline)]
    else:
        words += ["--base", base_commit]
    if options.minutes is not None:
        words += ["--minutes", repr(options.minutes).removesuffix(".0")]
    if options.results is not None:
        words += ["--results", path(options.results)]
    return Repeat(shlex.join(words), tuple(cut))
