"""`assets`, `doctor`, `validate`, `export` and `schemas`: about files and the machine; none measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Column, Table

from harness.assets.fetch import fetch_asset
from harness.assets.listing import asset_rows
from harness.cli.find import find_record
from harness.cli.marked import marked_lines
from harness.cli.options import HubOption, UnsealedOption, console
from harness.errors import ExitCode, UserError
from harness.judge.run import judge
from harness.judge.schemas import write_schemas
from harness.judge.validate.record import validate_record
from harness.paths import cache_dir
from harness.records.export import export, write_target
from harness.records.folder import kind_of
from harness.records.opened import open_record
from harness.records.run import RunRecord
from harness.records.sweep import SweepRecord
from harness.report.tables.logbook import FORMATS, LogbookFormat, logbook_bytes
from harness.report.tables.schedule import schedule_data
from harness.safe_text import SafeConsole
from harness.specs.assets import load_asset_specs


def assets(
    names: Annotated[
        list[str] | None, typer.Argument(help="assets to fetch and verify; without a name, all are listed")
    ] = None,
    hub: HubOption = False,
) -> None:
    """List the models and prompts that suites name, or fetch and verify some of them."""
    specs = load_asset_specs()
    for name in names or []:
        if name not in specs:
            raise UserError(
                found=f"no asset {name!r}", need=f"one of {sorted(specs)}", where="the command line"
            )
        fetched = fetch_asset(specs[name], cache_dir=cache_dir(), allow_hub=hub)
        console.print(f"{name}: {fetched.source}, {fetched.licence}, every hash right")
    if not names:
        table = Table(Column("asset", no_wrap=True), "kind", "licence", "cached", "MB", "source")
        for row in asset_rows(specs, cache_dir()):
            size = f"{row.size_bytes / 1e6:.1f}" if row.size_bytes is not None else "-"
            table.add_row(row.name, row.kind, row.licence, "yes" if row.is_cached else "no", size, row.source)
        SafeConsole().print(table)


def doctor() -> None:
    """Say whether this machine is fit to measure on."""
    from harness.device.doctor import examine

    table = Table("", "what", "found", "advice")
    for line in examine():
        table.add_row("ok" if line.fine else "!", line.name, line.found, "" if line.fine else line.advice)
    SafeConsole().print(table)


def validate(
    record: Annotated[
        str, typer.Argument(help="a record's folder, or a name under results/, which means its newest record")
    ],
) -> None:
    """Check every file of a record: its schema, its hash in the manifest, and its counts."""
    folder = find_record(record)
    faults = validate_record(folder)
    for fault in faults:
        console.print(fault, markup=False, highlight=False, soft_wrap=True)
    print(json.dumps({"record": folder.name, "valid": not faults, "num_faults": len(faults)}))
    if faults:
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)


def export_command(
    record: Annotated[
        str,
        typer.Argument(help="a run's folder, or a name under results/, which means its newest record"),
    ],
    target: Annotated[
        Path, typer.Argument(help="file to write: .csv or .parquet for trials and steps, any for a --format")
    ],
    steps: Annotated[
        bool, typer.Option("--steps", help="write one row for each decoding step, not for each trial")
    ] = False,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="write verdicts and figures instead, as csv, parquet, bmf (Bencher) or trackio (a CSV for "
            "trackio.import_csv); vllm: counters of accepted drafts under vLLM's names; schedule: of a "
            "sweep, the best tree of each batch",
        ),
    ] = None,
    unsealed: UnsealedOption = False,
) -> None:
    """Write a run's record as one flat table for pandas and the like, or its findings for other tools."""
    folder = find_record(record)
    if form is not None:
        _export_findings(folder, target, form=form, steps=steps, unsealed=unsealed)
        return
    if (kind := kind_of(folder)) != "suite":
        raise UserError(
            found=f"a record of kind {kind!r}", need="a run: only runs have a flat table", where=folder.name
        )
    opened = open_record(folder, unsealed=unsealed)
    assert isinstance(opened, RunRecord)  # its kind says so
    export(opened, target, table="steps" if steps else "generations")
    if opened.unsealed is not None:
        with marked_lines(opened.unsealed):
            print(f"{target.name}: every row says so in its column record")
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)


def _export_findings(folder: Path, target: Path, *, form: str, steps: bool, unsealed: bool) -> None:
    """Write what was found of a sealed record in a format of other tools.

    Raises: UserError for a format or record that do not go together, or a target that cannot be written.
    """
    if steps or unsealed:
        raise UserError(
            found="--format with --steps or --unsealed", need="one of them", where="the command line"
        )
    if form not in (*FORMATS, "schedule"):
        raise UserError(
            found=f"format {form!r}", need=f"one of {[*FORMATS, 'schedule']}", where="the command line"
        )
    opened = open_record(folder)
    if form == "schedule" and isinstance(opened, SweepRecord):
        content = (json.dumps(schedule_data(opened), indent=1, allow_nan=False) + "\n").encode()
    elif form != "schedule" and isinstance(opened, RunRecord):
        judgement = judge(opened)
        record = opened.withholding(judgement.withheld)
        content = logbook_bytes(record, judgement, form=cast(LogbookFormat, form))
    else:
        need = "a sweep" if form == "schedule" else "a run"
        raise UserError(found=opened.noun, need=f"{need}'s record for --format {form}", where=folder.name)
    write_target(target, content)


def schemas(folder: Annotated[Path, typer.Argument(help="folder to write the schemas to")]) -> None:
    """Write the JSON schemas of all record files: what each field holds, with its unit."""
    for path in write_schemas(folder):
        console.print(path.name)
