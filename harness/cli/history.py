"""`history` shows a suite's figures over its records, and marks their steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import ResultsOption, console
from harness.errors import UserError
from harness.files import write_text
from harness.judge.history.comparable import TimedRecord
from harness.judge.history.series import machine_history
from harness.paths import default_results
from harness.records.latency import LatencyRecord
from harness.records.machines.identity import plain_slug
from harness.records.opened import open_record
from harness.records.run import RunRecord
from harness.report.tables.history import HISTORY_PAGE, history_headline, history_name, render_history


def history(
    suite: Annotated[
        str,
        typer.Argument(help="name of a suite under results/, or latency/NAME: embedded, latency/embedded"),
    ] = "embedded",
    results: ResultsOption = None,
) -> None:
    """Show each figure of a suite over its records, machine by machine, with the steps that stand out.

    The page history.md and its pictures are written next to the machines' folders. This needs no device.
    """
    from harness.report.figures.history import draw_history

    home = (results or default_results()) / suite
    records, left_out = _records_below(home, suite=suite)
    machines = [machine_history(name, found) for name, found in sorted(records.items())]
    figures = []
    for one in machines:
        try:
            if draw_history(one, home / history_name(one.machine)):
                figures.append(history_name(one.machine))
        except UserError as error:
            console.print(f"no picture: {error}", highlight=False, markup=False, soft_wrap=True)
            break
    text = render_history(suite, machines, left_out=left_out, figures=figures)
    write_text(home / HISTORY_PAGE, text)
    print(text)
    print(json.dumps(history_headline(suite, machines, left_out=left_out), allow_nan=False))


def _records_below(home: Path, *, suite: str) -> tuple[dict[str, list[TimedRecord]], list[str]]:
    """Return a suite's sealed records by machine, and what was left out with the reason.

    Raises: UserError where there is none, or where the name is that of another kind of record.
    """
    records: dict[str, list[TimedRecord]] = {}
    left_out: list[str] = []
    for folder in sorted(path.parent for path in home.glob("*/*/manifest.json")):
        try:
            record = open_record(folder)
        except UserError as error:
            left_out.append(f"`{folder.name}`, {error}")
            continue
        if not isinstance(record, RunRecord | LatencyRecord):
            raise UserError(
                found=f"{record.noun} under {suite!r}",
                need="a suite's runs or latency records: the figures of other kinds are no series",
                where="results/",
                do="name a suite such as embedded or latency/embedded",
            )
        records.setdefault(plain_slug(record.environment.device), []).append(record)
    if not records:
        raise UserError(
            found=f"no record of {suite!r}"
            + (f", but {len(left_out)} that are not whole" if left_out else ""),
            need="a name under results/ that has finished records",
            where="results/",
            do="name a suite such as embedded or latency/embedded",
        )
    return records, left_out
