"""The end of every command that made or read a record: report, README, last JSON line, exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from harness.cli.options import console
from harness.errors import ExitCode, UserError
from harness.files import read_text, write_bytes
from harness.judge.run import judge
from harness.paths import default_results
from harness.records.folder import kind_of
from harness.records.latency import LatencyRecord
from harness.records.run import RunRecord
from harness.records.step_profile import StepProfile, read_step_profile
from harness.records.training_profile import TrainingProfile, read_training_profile
from harness.report.readme import (
    ablation_block,
    latency_block,
    run_block,
    sweep_block,
    training_block,
    update_readme,
)
from harness.report.run import headline, print_verdicts, render_report
from harness.specs.claims import ClaimSpec


def finish(record: Path, *, claims: Sequence[ClaimSpec], readme: Path | None) -> None:
    """Tell of a record of any kind: its folder, or the file of a profile.

    Raises: UserError for a folder or file that holds no record.
    """
    if record.is_file():
        finish_profile(record, readme=readme)
    elif (kind := kind_of(record)) == "latency":
        finish_latency(record, readme=readme)
    elif kind == "sweep":
        finish_sweep(record, claims=claims, readme=readme)
    elif kind == "ablation":
        finish_ablation(record, claims=claims, readme=readme)
    else:
        finish_run(record, claims=claims, readme=readme)


def finish_run(folder: Path, *, claims: Sequence[ClaimSpec], readme: Path | None) -> None:
    """Write report and README tables, print the verdicts, end with one JSON line and the run's exit code."""
    record = RunRecord(folder)
    judgement = judge(record, claims=claims)
    write_bytes(record.folder / "report.md", render_report(record, judgement).encode())
    print_verdicts(Console(markup=False), judgement)
    print(json.dumps(headline(judgement, record), allow_nan=False))
    if readme is not None:
        update_readme(readme, run_block(record, judgement))
    if not judgement.valid or record.failures:
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)


def finish_latency(folder: Path, *, readme: Path | None) -> None:
    """Write a latency record's report and README table, print its step costs, end with one JSON line."""
    from harness.report.latency import latency_headline, print_latency

    record = write_latency_report(folder)
    print_latency(Console(markup=False), record)
    if readme is not None:
        update_readme(readme, latency_block(record))
    print(json.dumps(latency_headline(record), allow_nan=False))


def write_latency_report(folder: Path) -> LatencyRecord:
    """Write the report of a latency record and return the record."""
    from harness.report.latency import render_latency_report

    record = LatencyRecord(folder)
    write_bytes(folder / "report.md", render_latency_report(record).encode())
    return record


def finish_profile(file: Path, *, readme: Path | None) -> None:
    """Print a profile of decoding or training steps as its command did, and end with its JSON line."""
    if _is_training_profile(file):
        finish_training_profile(read_training_profile(file), readme=readme)
    else:
        finish_step_profile(read_step_profile(file))


def _is_training_profile(file: Path) -> bool:
    try:
        return "stages" in json.loads(read_text(file))
    except ValueError as error:
        need = "a profile's file or a record's folder"
        raise UserError(found="a file that is no JSON", need=need, where=file.name) from error


def finish_step_profile(profile: StepProfile, *, only_json: bool = False) -> None:
    """Print where the time of decoding steps goes, and end with one JSON line."""
    from harness.report.profiles import profile_headline, render_step_profile

    if not only_json:
        print(render_step_profile(profile))
    print(json.dumps(profile_headline(profile), allow_nan=False))


def finish_training_profile(profile: TrainingProfile, *, readme: Path | None) -> None:
    """Print where the time of training steps goes, write the README's table, end with one JSON line."""
    from harness.report.profiles import committed_profiles, print_training_profile, training_headline

    print_training_profile(Console(markup=False), profile)
    if readme is not None:
        update_readme(readme, training_block(committed_profiles(default_results())))
    print(json.dumps(training_headline(profile), allow_nan=False))


def draw_steps(log: Path) -> Path | None:
    """Draw a joint training's log into a picture next to it; where that cannot be, say so."""
    from harness.report.figures.training import CURVES_FILE, draw_step_log

    picture = log.with_name(CURVES_FILE)
    try:
        draw_step_log(log, picture)
    except UserError as error:
        console.print(f"no picture: {error}", highlight=False, markup=False, soft_wrap=True)
        return None
    return picture


def finish_ablation(folder: Path, *, claims: Sequence[ClaimSpec], readme: Path | None) -> None:
    """Write an ablation's picture, report and README table, print arms and verdicts, end with a JSON line."""
    from harness.judge.ablation import ablation_rows
    from harness.judge.claims.ablation import decided_elsewhere, training_verdicts
    from harness.records.ablation import AblationRecord, newest_ablations
    from harness.report.ablation import ablation_headline, print_ablation, render_ablation
    from harness.report.figures.training import CURVES_FILE, draw_curves

    record = AblationRecord(folder)
    rows, verdicts = ablation_rows(record), training_verdicts(claims, record)
    try:
        draw_curves(record, folder / CURVES_FILE)
    except UserError as error:
        console.print(f"no picture: {error}", highlight=False, markup=False, soft_wrap=True)
    text = render_ablation(record, rows, verdicts, has_curves=(folder / CURVES_FILE).exists())
    write_bytes(folder / "report.md", text.encode())
    print_ablation(Console(markup=False), rows, verdicts)
    if readme is not None:
        elsewhere = decided_elsewhere(claims, record, newest_ablations(folder.resolve().parents[2]))
        update_readme(readme, ablation_block(record, rows, verdicts, elsewhere=elsewhere))
    print(json.dumps(ablation_headline(record, rows, verdicts), allow_nan=False))


def finish_sweep(folder: Path, *, claims: Sequence[ClaimSpec], readme: Path | None) -> None:
    """Write a sweep's figures, report and README table, print its devices, end with one JSON line.

    A run cell that failed is exit code 2.
    """
    from harness.records.sweep import SweepRecord
    from harness.report.figures.sweep import draw_figures
    from harness.report.sweep import print_sweep, render_sweep_report, sweep_headline

    record = SweepRecord(folder)
    try:
        draw_figures(record, folder / "figures")
    except UserError as error:
        console.print(f"no figures: {error}", highlight=False, markup=False, soft_wrap=True)
    names = [f"figures/{path.name}" for path in sorted((folder / "figures").glob("*.svg"))]
    write_bytes(folder / "report.md", render_sweep_report(record, claims=claims, figures=names).encode())
    print_sweep(Console(markup=False), record)
    if readme is not None:
        update_readme(readme, sweep_block(record, figures=names))
    print(json.dumps(sweep_headline(record, claims=claims), allow_nan=False))
    if any(not failed.key.startswith("curve ") for failed in record.failed):
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)
