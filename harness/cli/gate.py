"""`gate` says whether this checkout is worse than the code that it started from."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.find import find_data
from harness.cli.finish import finish, write_gate_report
from harness.cli.options import ResultsOption, command_line, console
from harness.device.loading.folder import TRUST_VARIABLE
from harness.errors import ExitCode, UserError
from harness.paths import default_results
from harness.safe_text import SafeConsole

if TYPE_CHECKING:
    from harness.gate.repeat import GateOptions
    from harness.specs.gate import GateSpec


def gate(
    name: Annotated[str, typer.Argument(help="name of a shipped gate, or a TOML file")] = "gate",
    base: Annotated[
        str | None, typer.Option(help="revision to compare with instead of the merge base with main")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="record of a gate on this device to compare ratios with, instead of a base"),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="measure this checkout against itself: the runner's own noise")
    ] = False,
    runs: Annotated[int, typer.Option(help="runs of a calibration", min=1, max=100)] = 3,
    minutes: Annotated[
        float | None, typer.Option(help="time budget instead of the gate's own", min=0.1, max=1440)
    ] = None,
    results: ResultsOption = None,
) -> None:
    """Say whether this checkout decodes worse than its base: slower, other texts, fewer tokens a step.

    Both are measured in turn, step by step, and judged at looks that are fixed before. Exit code 1 is a
    regression, 2 that times are withheld or too noisy.
    """
    from harness.gate.repeat import GateOptions
    from harness.gate.results import append_summary, write_gate
    from harness.gate.run import run_gate
    from harness.report.tables.gate import gate_headline, render_gate_summary
    from harness.specs.gate import load_gate_spec

    _check_options(base, baseline, calibrate=calibrate)
    file = find_data(name, kind="gate")
    spec, home = load_gate_spec(file), results or default_results()
    if minutes is not None:
        spec = spec.model_copy(update={"minutes": minutes})
    options = GateOptions(
        command=command_line(),
        gate=name,
        base=base,
        baseline=baseline,
        runs=runs if calibrate else None,
        minutes=minutes,
        results=results,
        is_trusted=os.environ.get(TRUST_VARIABLE) == "1",
    )
    if calibrate:
        _calibrate(spec, file, num_runs=runs, options=options, home=home)
        return
    record = run_gate(spec, spec_file=file, options=options, console=console)
    folder = write_gate(home, record, headline=partial(gate_headline, record))
    append_summary(render_gate_summary(record), os.environ)
    finish(folder, claims=(), readme=None)
    if record.exit_code != ExitCode.OK:
        raise typer.Exit(record.exit_code)


def _calibrate(spec: GateSpec, file: Path, *, num_runs: int, options: GateOptions, home: Path) -> None:
    """Keep this runner's noise in the cache, write the record of the last run, print both."""
    from harness.gate.calibrate import keep_calibration
    from harness.gate.results import write_gate
    from harness.gate.run import run_calibration
    from harness.report.tables.gate import calibration_headline, gate_headline, render_calibration

    calibration, records = run_calibration(
        spec, spec_file=file, num_runs=num_runs, options=options, console=console
    )
    kept = keep_calibration(spec, calibration)
    folder = write_gate(home, records[-1], headline=partial(gate_headline, records[-1]))
    write_gate_report(folder)
    console.print(f"kept as {kept.name}; the last run's record: {folder.name}")
    SafeConsole().print(render_calibration(calibration), soft_wrap=True)
    print(json.dumps(calibration_headline(calibration), allow_nan=False))


def _check_options(base: str | None, baseline: Path | None, *, calibrate: bool) -> None:
    given = [
        word
        for word, is_given in (("--base", base is not None), ("--baseline", baseline is not None))
        if is_given
    ]
    if len(given) > 1 or (calibrate and given):
        raise UserError(
            found=" and ".join([*given, *(["--calibrate"] if calibrate else [])]),
            need="one of --base, --baseline, --calibrate",
            where="the command line",
        )
