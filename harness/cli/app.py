"""The application: its verbs, and errors turned into one line and an exit code.

Exit codes: 0 ok, 1 gate regression, 2 invalid measurement or a failed trial, 3 user error, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Annotated

if "--hub" not in sys.argv:  # before huggingface_hub is imported, which reads it once
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no command hangs on a hub that is not there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.markup import escape

from harness.cli.ablate import ablate
from harness.cli.data import assets, doctor, export_command, schemas, validate
from harness.cli.latency import latency
from harness.cli.new_suite import new_suite
from harness.cli.options import console, print_any_text
from harness.cli.profile import profile, profile_training_command
from harness.cli.reproduce import report, reproduce
from harness.cli.sweep import sweep
from harness.cli.train import calibrate, distill, train
from harness.cli.trees import search_tree, trace
from harness.errors import ExitCode, InvalidMeasurement, UserError
from harness.files import read_text
from harness.paths import code_folder

DISTRIBUTION = "medusa-repro"

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(assets)
app.command("new-suite")(new_suite)
app.command()(reproduce)
app.command()(report)
app.command()(train)
app.command()(calibrate)
app.command()(distill)
app.command()(ablate)
app.command()(trace)
app.command()(profile)
app.command("profile-training")(profile_training_command)
app.command()(latency)
app.command()(sweep)
app.command("search-tree")(search_tree)
app.command()(doctor)
app.command()(validate)
app.command("export")(export_command)
app.command()(schemas)


def code_version(code: Path) -> str:
    """Return the version of the code in a folder: its checkout's, or the installed one outside a checkout.

    The checkout goes first, since the environment may hold another version of the same project.
    """
    try:
        project = tomllib.loads(read_text(code.parent / "pyproject.toml"))["project"]
        if project["name"] == DISTRIBUTION:
            return str(project["version"])
    except (UserError, KeyError, tomllib.TOMLDecodeError):
        pass  # not a checkout of this project
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # the packages were copied without either
        return "of unknown version"


def print_version(asked: bool) -> None:
    """Print the version and end, where that was asked for."""
    if asked:
        print(f"{DISTRIBUTION} {code_version(code_folder())}")
        raise typer.Exit


@app.callback()
def shared_options(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version and exit", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    """Test whether the Medusa paper's claims hold, on this model and this machine."""


def main() -> None:
    """Run the command line and exit with the project's codes."""
    print_any_text()
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _print_error("error", str(error))
        code = ExitCode.USER_ERROR
    except InvalidMeasurement as error:
        _print_error("invalid measurement", str(error))
        code = ExitCode.INVALID_MEASUREMENT
    except OSError as error:
        _print_error("error", _disk_message(error))
        code = ExitCode.USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = ExitCode.INTERRUPTED
    except Exception as error:
        code = _usage_code(error)
    if code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into this code without a word
        console.print("interrupted: what was measured is on disk; the same command resumes", soft_wrap=True)
    sys.exit(int(code or 0))


def _print_error(kind: str, message: str) -> None:
    """Print one line; what a user typed may look like markup and is shown as it is."""
    console.print(
        f"[red]{kind}:[/red] {escape(' '.join(message.split()))}",
        markup=True,
        highlight=False,
        soft_wrap=True,
    )


def _disk_message(error: OSError) -> str:
    name = Path(str(error.filename)).name if error.filename else "a file"
    return (
        f"found {error.strerror or error} at {name}; need a folder that can be written, with room on its "
        "disk; what was measured before is kept"
    )


def _usage_code(error: Exception) -> int:
    """Return the exit code of a usage error that typer raised.

    Anything else is a defect, and goes on with its traceback.
    """
    show, exit_code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is None or exit_code is None:
        raise error
    show()
    return ExitCode.USER_ERROR
