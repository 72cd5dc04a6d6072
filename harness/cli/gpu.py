"""`gpu` is the acceptance of a GPU machine in a few minutes."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from harness.cli.find import find_data
from harness.cli.finish import finish
from harness.cli.options import ResultsOption, command_line, console
from harness.errors import UserError
from harness.paths import default_results
from harness.safe_text import SafeConsole


def gpu(
    plan: Annotated[
        str | None,
        typer.Argument(help="name of a shipped plan, or a TOML file; the device's own if not given"),
    ] = None,
    device: Annotated[
        Literal["cuda", "cpu"] | None,
        typer.Option(
            help="cuda, as without it, or cpu, which runs every part in small form, on tiny random models"
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="parts to run, with commas between them: tests, limits, latency, ..")
    ] = None,
    skip: Annotated[str | None, typer.Option(help="parts to leave out, with commas between them")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="time for all parts together instead of the plan's", min=0.01, max=1440),
    ] = None,
    results: ResultsOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the parts and how long each may take, and run nothing")
    ] = False,
) -> None:
    """Accept a GPU machine in under five minutes: tests, limits, step times, a suite, rates of training.

    Each part has its own time limit; one that runs over is stopped, and the next one runs. The same command
    goes on with a run that was killed.
    """
    from harness.measure.gpu.run import GpuOptions, print_gpu_plan, run_gpu
    from harness.specs.gpu import chosen_parts, load_gpu_spec

    file = find_data(plan or device or "cuda", kind="gpu")
    whole = load_gpu_spec(file)
    if device not in (None, whole.device):
        raise UserError(
            found=f"--device {device} with the plan {whole.name}",
            need=f"--device {whole.device}, for which that plan is",
            where="the command line",
            do="leave out the plan or the option",
        )
    spec = chosen_parts(whole, only=only, skip=skip, minutes=minutes)
    if dry_run:
        planned = print_gpu_plan(spec, console=SafeConsole())
        print(
            json.dumps({"gpu": spec.name, "device": spec.device, "minutes": spec.minutes, "seconds": planned})
        )
        return
    options = GpuOptions(results=results or default_results(), command=command_line())
    finish(run_gpu(spec, spec_file=file, options=options, console=console), claims=(), readme=None)
