"""What is printed: brackets of a user's stay, and no terminal is too poor for it."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.table import Table

from harness.cli.options import console, print_any_text
from harness.tests.tiny_suite import command


def test_an_ascii_terminal_gets_question_marks_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
    for name in held:
        monkeypatch.setattr(sys, name, io.TextIOWrapper(held[name], encoding="ascii"))
    print_any_text()
    print("├── 0 – é")
    table = Table("speedup")
    table.add_row("1.2 ≤ 3")
    Console(markup=False).print(table)
    sys.stdout.flush()
    shown = held["stdout"].getvalue()
    assert shown.startswith(b"??? 0 ? ?\n") and b"1.2 ? 3" in shown


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: a folder named `data [old]` lost its end, and one named `[/x]` was a traceback."""
    console.print("data [old]/[/x]: loading", highlight=False)
    assert capsys.readouterr().err == "data [old]/[/x]: loading\n"


def test_help_keeps_the_names_of_tables() -> None:
    assert "[corpus]" in command("distill", "--help").out
