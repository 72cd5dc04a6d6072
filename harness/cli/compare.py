"""`compare` holds one record against another; `reproduce --against` does so with the run that it made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.find import find_record
from harness.cli.finish import finish
from harness.cli.marked import marked_lines
from harness.cli.options import ClaimsOption, ResultsOption, UnsealedOption
from harness.errors import ExitCode, UserError
from harness.files import write_text
from harness.judge.history.compare import NOT_COMPARABLE, OUTSIDE, compare
from harness.records.opened import AnyRecord, open_record
from harness.records.run import RunRecord
from harness.report.tables.compare import comparison_headline, render_comparison
from harness.specs.claims import ClaimSpec, load_claims

_RECORD = (
    "a record's folder, its name, or a name under results/, which means its newest record: embedded, "
    "latency/embedded, embedded/MACHINE"
)
_MOST_OTHERS = 20  # records that are looked at for runs of one commit, the newest
AgainstOption = Annotated[
    str | None,
    typer.Option(help="record to hold this run against at its end, as compare does: a folder or a name"),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="end with code 1 where B lies outside the band, and with 3 where nothing can be compared; "
        "without it both are findings",
    ),
]


def compare_command(
    a: Annotated[str, typer.Argument(help=f"{_RECORD}; it promises the band")],
    b: Annotated[str, typer.Argument(help="the record that is held against it")],
    claims: ClaimsOption = None,
    out: Annotated[Path | None, typer.Option(help="file for the page; without it standard output")] = None,
    strict: StrictOption = False,
    results: ResultsOption = None,
    unsealed: UnsealedOption = False,
) -> None:
    """Say in what two records of one kind differ, and whether B lies in the band that A promises.

    This needs no device.
    """
    folders = find_record(a, results=results), find_record(b, results=results)
    if folders[0].resolve() == folders[1].resolve():
        raise UserError(
            found=f"one record twice, {folders[0].name}",
            need="two records",
            where="the command line",
            do="name another record, by its folder or by the folder's last part",
        )
    first, second = (open_record(folder, unsealed=unsealed) for folder in folders)
    tell_comparison(first, second, claims=load_claims(claims), out=out, strict=strict)


def promising_run(text: str | None) -> RunRecord | None:
    """Return the run that `--against` names, None where it names none.

    Raises: UserError where that is no run, or not as it was sealed.
    """
    if text is None:
        return None
    record = open_record(find_record(text))
    if not isinstance(record, RunRecord):
        raise UserError(
            found=record.noun, need="a run of a suite", where="--against", do="name another record"
        )
    return record


def finish_against(
    folder: Path,
    promising: RunRecord | None,
    *,
    claims: Sequence[ClaimSpec],
    readme: Path | None,
    shows_all: bool = False,
) -> None:
    """End a run as `finish` does, then hold it against the run that promises its band, where there is one.

    The comparison's JSON is the last line, the run's own comes before it; the exit code is 2 where one of
    them says so.
    """
    code = ExitCode.OK
    try:
        finish(folder, claims=claims, readme=readme, shows_all=shows_all)
    except typer.Exit as ended:
        code = ExitCode(ended.exit_code)
    if promising is not None:
        tell_comparison(promising, open_record(folder), claims=claims)
    if code != ExitCode.OK:
        raise typer.Exit(code)


def tell_comparison(
    a: AnyRecord, b: AnyRecord, *, claims: Sequence[ClaimSpec], out: Path | None = None, strict: bool = False
) -> None:
    """Print record B held against record A, or write it into a file; end with one JSON line.

    Raises: typer.Exit with 2 where a record's figures do not hold, and, if `strict`, with 1 where B lies
    outside the band. UserError for records of two kinds, and, if `strict`, where nothing can be compared.
    """
    compared = compare(a, b, claims=claims, others=_others_of(a))
    text = render_comparison(compared)
    with marked_lines(a.unsealed or b.unsealed):
        if out is not None:
            write_text(out, text)
        else:
            print(text)
    mark = {"unsealed": reason} if (reason := a.unsealed or b.unsealed) is not None else {}
    print(json.dumps({**mark, **comparison_headline(compared)}, allow_nan=False))
    if not compared.is_valid:
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)
    if strict and compared.outcome == OUTSIDE:
        raise typer.Exit(ExitCode.GATE_REGRESSION)
    if strict and compared.outcome == NOT_COMPARABLE:
        raise UserError(
            found="no figure that can be compared",
            need="one at least, since --strict asks for a decision",
            where=f"{a.folder.name} and {b.folder.name}",
            do="name two records of one suite and one machine",
        )


def _others_of(record: AnyRecord) -> Iterator[AnyRecord]:
    """Yield the sealed records that lie next to a record, the newest first."""
    neighbours = sorted(record.folder.resolve().parent.glob("*/manifest.json"), reverse=True)
    for manifest in neighbours[:_MOST_OTHERS]:
        if manifest.parent != record.folder.resolve():
            try:
                yield open_record(manifest.parent)
            except UserError:
                continue
