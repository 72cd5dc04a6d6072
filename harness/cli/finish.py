"""The end of every command that made or read a record: report, README, last JSON line, exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from harness.cli.marked import marked_lines
from harness.cli.options import console
from harness.errors import ExitCode, UserError
from harness.files import read_text, write_bytes
from harness.judge.judgement import CheckStatus, Judgement
from harness.judge.latency_checks import latency_checks
from harness.judge.run import judge
from harness.paths import default_results
from harness.records.ablation import AblationRecord, newest_ablations
from harness.records.folder import REPORT_FILE, UNSEALED_REPORT_FILE, RecordFolder
from harness.records.gate.folder import GateFolder
from harness.records.gpu.record import GpuRecord
from harness.records.latency import LatencyRecord
from harness.records.opened import AnyRecord, open_record
from harness.records.profiles.kernels import KernelRaces
from harness.records.profiles.step import StepProfile, read_step_profile
from harness.records.profiles.training import TrainingProfile, read_training_profile
from harness.records.run import RunRecord
from harness.records.sweep import SweepRecord
from harness.report.formatting import marked_page
from harness.report.pages.run import PAGE_FILE, render_page
from harness.report.provenance import relative_folder
from harness.report.readme import (
    Block,
    ablation_block,
    latency_block,
    run_block,
    sweep_block,
    training_block,
    trees_block,
    update_readme,
)
from harness.report.run import headline, render_report
from harness.report.tables.ending import print_ending
from harness.safe_text import SafeConsole, page_text
from harness.specs.claims import ClaimSpec


@dataclass(frozen=True)
class Told:
    """What is left to say of a record whose report is written: the JSON line, the blocks of pages."""

    headline: dict[str, Any]
    blocks: tuple[Block, ...] = ()
    is_valid: bool = True


def finish(
    record: Path,
    *,
    claims: Sequence[ClaimSpec],
    readme: Path | None,
    also: Sequence[Path] = (),
    unsealed: bool = False,
    shows_all: bool = False,
    html: bool = True,
) -> None:
    """Write the report of a record, print its figures, end with one JSON line and its exit code.

    `record` is the folder of a record of any kind, or the file of a profile; `also` are further pages with
    markers, besides the README. A run has a page for browsers as well, if `html` is. With `unsealed` an
    unfinished or altered record is told of too: every line, the JSON and the report say so, the exit code is
    2, and neither the report of the sealed record nor a README is touched.
    Raises: UserError for a folder or file that holds no record, or one that is not as it was sealed.
    """
    if unsealed and readme is not None:
        raise UserError(
            found="--unsealed with --readme", need="a whole seal for a README", where="the command line"
        )
    if record.is_file():
        finish_profile(record, readme=readme)
        return
    opened = open_record(record, unsealed=unsealed)
    with marked_lines(opened.unsealed):
        shows_block = readme is not None or bool(also)
        told = _tell(opened, claims, shows_block=shows_block, shows_all=shows_all, html=html)
    mark = {"unsealed": opened.unsealed} if opened.unsealed is not None else {}
    print(json.dumps({**mark, **told.headline}, allow_nan=False))
    if told.blocks:
        for page in (*also, readme):
            if page is not None:
                update_readme(page, *told.blocks)
    if opened.unsealed is not None or not told.is_valid:
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)


def _tell(
    record: AnyRecord, claims: Sequence[ClaimSpec], *, shows_block: bool, shows_all: bool, html: bool
) -> Told:
    if isinstance(record, LatencyRecord):
        return _tell_latency(record, shows_block=shows_block)
    if isinstance(record, SweepRecord):
        return _tell_sweep(record, claims, shows_block=shows_block)
    if isinstance(record, AblationRecord):
        return _tell_ablation(record, claims, shows_block=shows_block)
    if isinstance(record, GpuRecord):
        return _tell_gpu(record)
    if isinstance(record, GateFolder):
        return _tell_gate(record)
    return _tell_run(record, claims, shows_all=shows_all, html=html)


def _write_report(record: RecordFolder, text: str) -> None:
    """Write a report; that of an unsealed record has another name, and says first what is wrong."""
    name = REPORT_FILE if record.unsealed is None else UNSEALED_REPORT_FILE
    write_bytes(record.folder / name, marked_page(text, unsealed=record.unsealed).encode())


def _tell_run(record: RunRecord, claims: Sequence[ClaimSpec], *, shows_all: bool, html: bool) -> Told:
    judgement = judge(record, claims=claims)
    record = record.withholding(judgement.withheld)
    _write_report(record, render_report(record, judgement, figures=_drawn(record, judgement)))
    if html and record.unsealed is None:
        write_bytes(record.folder / PAGE_FILE, render_page(record, judgement).encode())
    where = relative_folder(record.folder / (PAGE_FILE if html else REPORT_FILE), base=Path.cwd())
    print_ending(SafeConsole(), record, judgement, report=where, shows_all=shows_all)
    is_valid = judgement.valid and not record.failures
    return Told(headline(judgement, record), (run_block(record, judgement),), is_valid)


def _drawn(record: RunRecord, judgement: Judgement) -> tuple[str, ...]:
    """Draw a run's figures next to its report and return their names; none without matplotlib."""
    if not record.reports_speed or record.unsealed is not None:
        return ()
    from harness.report.figures.run import draw_run

    try:
        return draw_run(record, judgement, record.folder / "figures")
    except UserError as error:
        _say_no("figures", error)
        return ()


def _tell_latency(record: LatencyRecord, *, shows_block: bool) -> Told:
    from harness.report.latency import latency_headline, print_latency, render_latency_report

    _write_report(record, render_latency_report(record))
    print_latency(SafeConsole(), record)
    failed = [one for one in latency_checks(record) if one.status is CheckStatus.FAILED]
    is_valid = not failed
    for outcome in failed:
        console.print(
            f"INVALID: {outcome.name}: found {outcome.found}; need {outcome.need}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    blocks = (latency_block(record),) if shows_block and is_valid else ()
    return Told(latency_headline(record), blocks, is_valid)


def write_latency_report(folder: Path) -> None:
    """Write the report of a sealed latency record."""
    from harness.report.latency import render_latency_report

    record = LatencyRecord.open(folder)
    _write_report(record, render_latency_report(record))


def _tell_ablation(record: AblationRecord, claims: Sequence[ClaimSpec], *, shows_block: bool) -> Told:
    """Write picture and report, print arms and verdicts."""
    from harness.judge.ablation import ablation_rows
    from harness.judge.claims.ablation import decided_elsewhere, training_verdicts
    from harness.report.ablation import ablation_headline, print_ablation, render_ablation
    from harness.report.figures.training import CURVES_FILE, draw_curves

    folder = record.folder
    rows, verdicts = ablation_rows(record), training_verdicts(claims, record)
    if record.unsealed is None:
        try:
            draw_curves(record, folder / CURVES_FILE)
        except UserError as error:
            _say_no("picture", error)
    has_curves = record.unsealed is None and (folder / CURVES_FILE).exists()
    _write_report(record, render_ablation(record, rows, verdicts, has_curves=has_curves))
    print_ablation(SafeConsole(), rows, verdicts)
    blocks: tuple[Block, ...] = ()
    if shows_block:
        above = folder.resolve().parents
        others = newest_ablations(above[2]) if len(above) > 2 else ()
        elsewhere = decided_elsewhere(claims, record, others)
        blocks = (ablation_block(record, rows, verdicts, elsewhere=elsewhere),)
    return Told(ablation_headline(record, rows, verdicts), blocks)


def _tell_gpu(record: GpuRecord) -> Told:
    """Write the report, print the parts; a part that did not end well makes it invalid."""
    from harness.report.tables.gpu import gpu_headline, is_accepted, print_gpu, render_gpu_report

    _write_report(record, render_gpu_report(record))
    print_gpu(SafeConsole(), record)
    return Told(gpu_headline(record), is_valid=is_accepted(record))


def _tell_gate(record: GateFolder) -> Told:
    """Write the report and print the summary; a regression is a valid measurement."""
    from harness.report.tables.gate import gate_headline, render_gate_report, render_gate_summary

    _write_report(record, render_gate_report(record))
    SafeConsole().print(render_gate_summary(record.gate), soft_wrap=True)
    is_valid = record.gate.exit_code != ExitCode.INVALID_MEASUREMENT
    return Told(gate_headline(record.gate, record.folder.name), is_valid=is_valid)


def write_gate_report(folder: Path) -> None:
    """Write the report of a sealed gate."""
    from harness.report.tables.gate import render_gate_report

    record = GateFolder.open(folder)
    _write_report(record, render_gate_report(record))


def _tell_sweep(record: SweepRecord, claims: Sequence[ClaimSpec], *, shows_block: bool) -> Told:
    """Write figures and report, print the devices; a run cell that failed makes it invalid."""
    from harness.report.figures.sweep import draw_figures
    from harness.report.sweep import print_sweep, render_sweep_report, sweep_headline

    names: list[str] = []
    if record.unsealed is None:
        figures = record.folder / "figures"
        try:
            draw_figures(record, figures)
        except UserError as error:
            _say_no("figures", error)
        names = [f"figures/{path.name}" for path in sorted(figures.glob("*.svg"))]
    _write_report(record, render_sweep_report(record, claims=claims, figures=names))
    print_sweep(SafeConsole(), record)
    return Told(
        sweep_headline(record, claims=claims),
        (sweep_block(record, figures=names), trees_block(record)) if shows_block else (),
        all(failed.key.startswith("curve ") for failed in record.failed),
    )


def _say_no(what: str, error: UserError) -> None:
    console.print(f"no {what}: {error}", highlight=False, markup=False, soft_wrap=True)


def finish_profile(file: Path, *, readme: Path | None) -> None:
    """Print a profile of decoding or training steps as its command did, and end with its JSON line."""
    if _is_training_profile(file):
        finish_training_profile(read_training_profile(file), readme=readme)
    else:
        finish_step_profile(read_step_profile(file))


def _is_training_profile(file: Path) -> bool:
    try:
        data = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        need = "a profile's file or a record's folder"
        raise UserError(found="a file that is no JSON", need=need, where=file.name) from error
    return isinstance(data, dict) and "stages" in data


def finish_step_profile(profile: StepProfile, *, only_json: bool = False) -> None:
    """Print where the time of decoding steps goes, and end with one JSON line."""
    from harness.report.profiles import profile_headline, render_step_profile

    if not only_json:
        print(page_text(render_step_profile(profile)))
    print(json.dumps(profile_headline(profile), allow_nan=False))


def finish_kernel_races(races: KernelRaces) -> None:
    """Print the races of kernels, and end with one JSON line."""
    from harness.report.kernels import kernels_headline, render_kernel_races

    print(page_text(render_kernel_races(races)))
    print(json.dumps(kernels_headline(races), allow_nan=False))


def finish_training_profile(profile: TrainingProfile, *, readme: Path | None) -> None:
    """Print where the time of training steps goes, write the README's table, end with one JSON line."""
    from harness.report.profiles import committed_profiles, print_training_profile, training_headline

    print_training_profile(SafeConsole(), profile)
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
        _say_no("picture", error)
        return None
    return picture
