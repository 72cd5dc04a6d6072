"""The application: its verbs, and errors turned into one line and an exit code.

Exit codes: 0 ok, 1 gate regression, 2 invalid measurement or a failed trial, 3 user error, 70 a defect of
ours, 130 Ctrl-C, 141 the reader of a pipe is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tomllib
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated

if "--hub" not in sys.argv:  # before huggingface_hub is imported, which reads it once
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no command hangs on a hub that is not there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.markup import escape

from harness.cli.ablate import ablate
from harness.cli.compare import compare_command
from harness.cli.data import assets, doctor, export_command, schemas, validate
from harness.cli.devices import devices
from harness.cli.explain import explain
from harness.cli.gate import gate
from harness.cli.gpu import gpu
from harness.cli.history import history
from harness.cli.latency import latency
from harness.cli.new_suite import new_suite
from harness.cli.options import console, print_any_text
from harness.cli.profile import profile, profile_kernels_command, profile_training_command
from harness.cli.reproduce import claims_command, report, reproduce
from harness.cli.results import results
from harness.cli.sweep import sweep
from harness.cli.train import calibrate, distill, train
from harness.cli.trees import search_tree, trace
from harness.device.loading.folder import TRUST_VARIABLE
from harness.device.progress import heartbeat
from harness.errors import ExitCode, InvalidMeasurement, UserError
from harness.files import read_text
from harness.paths import code_folder, without_paths

DISTRIBUTION = "medusa-repro"

# Each verb with the command that does it, and what its help ends with.
_VERBS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("assets", assets, "medusa-repro assets smollm2-135m-instruct mt-bench"),
    ("new-suite", new_suite, "medusa-repro new-suite --model ./my-model --out mine.toml"),
    ("reproduce", reproduce, "medusa-repro reproduce embedded --limit 4"),
    ("report", report, "medusa-repro report embedded --all"),
    ("claims", claims_command, "medusa-repro claims --readme README.md"),
    ("results", results, "medusa-repro results --check"),
    ("compare", compare_command, "medusa-repro compare embedded 20261125T202908Z-e4ce6458"),
    ("history", history, "medusa-repro history latency/embedded"),
    ("train", train, "medusa-repro train embedded_medusa1 --dry-run"),
    ("calibrate", calibrate, "medusa-repro calibrate embedded_medusa1 ./heads"),
    ("distill", distill, "medusa-repro distill mine.toml"),
    ("ablate", ablate, "medusa-repro ablate embedded_training_quick"),
    ("trace", trace, "medusa-repro trace embedded trace.npz"),
    ("profile", profile, "medusa-repro profile embedded"),
    ("profile-training", profile_training_command, "medusa-repro profile-training embedded_medusa1"),
    ("profile-kernels", profile_kernels_command, "medusa-repro profile-kernels"),
    ("latency", latency, "medusa-repro latency gpu --shape vicuna-7b-v1.5 --dry-run"),
    ("gpu", gpu, "medusa-repro gpu --dry-run"),
    ("gate", gate, "medusa-repro gate --base HEAD~1"),
    ("sweep", sweep, "medusa-repro sweep embedded --replay-only"),
    ("devices", devices, "medusa-repro devices"),
    ("search-tree", search_tree, "medusa-repro search-tree suites/embedded/calibration.npz"),
    ("doctor", doctor, "medusa-repro doctor"),
    ("validate", validate, "medusa-repro validate embedded"),
    ("explain", explain, 'medusa-repro explain "Why is the sky blue?" --nodes 12'),
    ("export", export_command, "medusa-repro export embedded figures.csv --format csv"),
    ("schemas", schemas, "medusa-repro schemas ./schemas"),
)

app = typer.Typer(no_args_is_help=True, add_completion=False)
for _name, _verb, _example in _VERBS:
    app.command(_name, epilog=f"Example: {_example}")(_verb)


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
    debug: Annotated[
        bool, typer.Option("--debug", help="print the traceback of an error; may stand anywhere in a command")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="run the code in a model's folder, where the suite asks for that as well",
        ),
    ] = False,
) -> None:
    """Test whether the Medusa paper's claims hold, on this model and this machine."""
    if trust_remote_code:
        os.environ[TRUST_VARIABLE] = "1"  # processes that a command starts know of it, too


def main() -> None:
    """Run the command line and exit with the project's codes."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]  # it changes no figure, so no record keeps it
    print_any_text()
    try:
        with heartbeat(console, next((word for word in sys.argv[1:] if not word.startswith("-")), "help")):
            code = app(standalone_mode=False)
        if sys.stdout is not None:  # None where it was closed from the start
            sys.stdout.flush()  # here, where a reader that is gone can still be told from a defect
    except BaseException as error:
        if debug:
            traceback.print_exception(error)
        code = _code_of(error)
        with contextlib.suppress(OSError):  # nobody reads standard error: the code still says it
            _tell(error)
    if code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into this code without a word
        resumes = "interrupted: what was measured is on disk; the same command resumes"
        if "gate" in sys.argv[1:2]:  # whose looks are those of one sitting
            resumes = "interrupted: a gate keeps nothing of what it measured; the same command starts it anew"
        with contextlib.suppress(OSError):
            console.print(resumes, soft_wrap=True)
    if code == ExitCode.PIPE_CLOSED:  # Python flushes once more at its end, and must not fail there
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(int(code or 0))


_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_DISK = "a folder that can be written, with room on its disk"


def _code_of(error: BaseException) -> ExitCode:
    """Return the exit code of an error, whatever it is."""
    if _reader_is_gone(error):
        return ExitCode.PIPE_CLOSED
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return ExitCode.INTERRUPTED
    if isinstance(error, InvalidMeasurement):
        return ExitCode.INVALID_MEASUREMENT
    is_known = isinstance(error, UserError) or hasattr(error, "show") or _about_the_machine(error) is not None
    return ExitCode.USER_ERROR if is_known else ExitCode.DEFECT


def _reader_is_gone(error: BaseException) -> bool:
    """Return whether the reader of a pipe is gone; typer and rich turn that into an exit of their own."""
    return isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError)


def _tell(error: BaseException) -> None:
    """Print one line about an error; none where the reader is gone, or where Ctrl-C has its own."""
    if _reader_is_gone(error) or isinstance(error, KeyboardInterrupt | typer.Abort):
        return
    show = getattr(error, "show", None)  # a usage error that typer raised
    if show is not None:
        show()
    elif isinstance(error, InvalidMeasurement):
        _print_error("invalid measurement", str(error))
    elif (message := str(error) if isinstance(error, UserError) else _about_the_machine(error)) is not None:
        _print_error("error", message)
    else:
        *_, frame = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        what = f"{type(error).__name__}: {without_paths(str(error))}"
        message = (
            f"found {what}; at {where}; need none: this is a mistake in medusa-repro; to mend it: run the "
            "command with --debug and report what it prints"
        )
        _print_error("defect", message)


def _print_error(kind: str, message: str) -> None:
    """Print one line; what a user typed may look like markup and is shown as it is."""
    console.print(
        f"[red]{kind}:[/red] {escape(' '.join(message.split()))}",
        markup=True,
        highlight=False,
        soft_wrap=True,
    )


def _about_the_machine(error: BaseException) -> str | None:
    """Return what to tell of an error that no code expects and that is yet no defect; None for any other."""
    if isinstance(error, OSError):
        name = Path(str(error.filename)).name if error.filename else "a file"
        need = _DISK if error.errno in _NO_WRITING else "a file or folder that this user can reach"
        return f"found {error.strerror or error} at {name}; need {need}; what was measured before is kept"
    if isinstance(error, RecursionError):
        return "found data nested too deeply; need a file whose lists and tables a person could follow"
    if isinstance(error, UnicodeError):
        return f"found text that cannot be read or written ({without_paths(str(error))}); need UTF-8"
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # PyTorch's, not imported
        return (
            "found too little memory; need more of it, or a smaller model, tree or batch; what was measured "
            "before is kept"
        )
    return None
