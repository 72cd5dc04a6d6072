"""What several commands share: the console, options, and the command as it was typed."""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.safe_text import SafeConsole

console = SafeConsole(stderr=True)

SuiteArgument = Annotated[str, typer.Argument(help="name of a shipped suite, or a TOML file")]
RecipeArgument = Annotated[str, typer.Argument(help="name of a shipped recipe, or a TOML file")]
ResultsOption = Annotated[Path | None, typer.Option(help="folder for records; without it results/")]
ResumeOption = Annotated[Path | None, typer.Option(help="folder of the unfinished run to go on with")]
ClaimsOption = Annotated[Path | None, typer.Option(help="TOML file of your own claims to judge instead")]
AllOption = Annotated[
    bool, typer.Option("--all", help="print every verdict, those by arithmetic on the paper's figures too")
]
HubOption = Annotated[
    bool, typer.Option("--hub", help="let missing models be fetched from the Hugging Face hub")
]

UnsealedOption = Annotated[
    bool,
    typer.Option("--unsealed", help="look at an unfinished or altered record; every line then says so"),
]


def print_any_text() -> None:
    """Let what a terminal's encoding lacks become a question mark, where it would be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def command_line(*, address: str | None = None) -> str:
    """Return the command as it would be typed, without folders and without a cluster's address."""
    words = sys.argv[1:]
    if address not in (None, "auto", "local"):
        words = [word.replace(address, "HOST:PORT") for word in words]
    return shlex.join(["medusa-repro", *map(_without_folders, words)])


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (Path(value).name if os.sep in value else value)
