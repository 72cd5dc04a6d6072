"""The command that repeats a gate, read by the command line's own parser."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import harness.gate.repeat
from harness.cli.app import app
from harness.gate.repeat import GateOptions, repeat_of

APPLICATION: Any = typer.main.get_command(app)
COMMIT = "a" * 40
DEFAULTS = {
    "name": "gate",
    "base": None,
    "baseline": None,
    "calibrate": False,
    "runs": 3,
    "minutes": None,
    "results": None,
}


def parsed(words: list[str]) -> dict[str, Any]:
    """Return what `medusa-repro gate` makes of words."""
    gate = APPLICATION.commands["gate"]
    found: dict[str, Any] = gate.make_context("gate", list(words)).params
    return found


def options_of(words: list[str]) -> GateOptions:
    """Return what the command makes of a command line, as `cli/gate.py` hands it on."""
    given = parsed(words)
    return GateOptions(
        command="",
        gate=given["name"],
        base=given["base"],
        baseline=given["baseline"],
        runs=given["runs"] if given["calibrate"] else None,
        minutes=given["minutes"],
        results=given["results"],
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the root of a checkout with a noxfile; the command is typed in a folder below it."""
    root = tmp_path / "checkout"
    (root / "harness").mkdir(parents=True)
    (root / "below").mkdir()
    (root / "noxfile.py").touch()
    monkeypatch.setattr(harness.gate.repeat, "code_folder", lambda: root / "harness")
    monkeypatch.chdir(root / "below")
    return root


@pytest.mark.parametrize(
    ("given", "again"),
    [
        ([], {"base": COMMIT}),
        (["smoke", "--base", "main"], {"name": "smoke", "base": COMMIT}),
        (["--minutes", "0.1234567"], {"base": COMMIT, "minutes": 0.1234567}),
        (["--minutes", "9"], {"base": COMMIT, "minutes": 9.0}),
        (["own/my gate.toml"], {"name": "below/own/my gate.toml", "base": COMMIT}),
        (
            ["--baseline", "../results/gate/gate/cpu/20261127T200000Z-abc", "--minutes", "2.5"],
            {"baseline": Path("results/gate/gate/cpu/20261127T200000Z-abc"), "minutes": 2.5},
        ),
        (["--results", "../../out side"], {"base": COMMIT, "results": Path("../out side")}),
        (["--calibrate"], {"calibrate": True}),
        (
            ["smoke", "--calibrate", "--runs", "5", "--minutes", "4", "--results", "x"],
            {"name": "smoke", "calibrate": True, "runs": 5, "minutes": 4.0, "results": Path("below/x")},
        ),
    ],
)
def test_the_command_repeats_every_option_from_the_root(
    root: Path, given: list[str], again: dict[str, Any]
) -> None:
    """A baseline was a bare folder name, and `--minutes` and `--results` were dropped."""
    told = repeat_of(options_of(given), base_commit=COMMIT)
    nox, dash, session, dashes, *words = shlex.split(told.command)
    assert [nox, dash, session, dashes] == ["nox", "-s", "gate", "--"] and told.cut == ()
    assert parsed(words) == {**DEFAULTS, **again}


def test_every_option_of_the_command_is_one_that_is_repeated() -> None:
    assert set(parsed([])) == set(DEFAULTS) and parsed([]) == DEFAULTS


def test_a_path_from_elsewhere_still_leads_there(root: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    told = repeat_of(options_of(["--baseline", str(tmp_path / "kept")]), base_commit=COMMIT)
    named = parsed(shlex.split(told.command)[4:])["baseline"]
    assert not named.is_absolute() and (root / named).resolve() == (tmp_path / "kept").resolve()


def test_a_users_folder_is_not_named_and_is_told_of(root: Path) -> None:
    told = repeat_of(options_of(["--results", "/home/somebody/out"]), base_commit=COMMIT)
    assert told.cut == ("out",) and "somebody" not in told.command
    assert parsed(shlex.split(told.command)[4:])["results"] == Path("out")


def test_without_a_noxfile_or_with_a_models_own_code_it_is_the_packages_command(root: Path) -> None:
    options = options_of(["smoke", "--baseline", "kept"])
    trusted = GateOptions(command="", gate="smoke", baseline=Path("kept"), is_trusted=True)
    told = repeat_of(trusted, base_commit=COMMIT).command
    assert told == "medusa-repro --trust-remote-code gate smoke --baseline kept"
    (root / "noxfile.py").unlink()
    assert repeat_of(options, base_commit=COMMIT).command == "medusa-repro gate smoke --baseline kept"
