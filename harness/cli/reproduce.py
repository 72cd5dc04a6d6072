"""`reproduce` runs a suite and judges it; `report` judges a record again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness.cli.find import find_record, find_suite
from harness.cli.finish import finish, finish_run
from harness.cli.options import HubOption, SuiteArgument, command_line, console
from harness.paths import default_results
from harness.specs.claims import load_claims


def reproduce(
    suite: SuiteArgument = "embedded",
    limit: Annotated[
        int | None, typer.Option(help="only the first N prompts, categories in turn", min=1)
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="minutes after which no further prompt begins", min=0.1)
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="prompts of your own: .jsonl or .txt")] = None,
    tree: Annotated[Path | None, typer.Option(help="a tree (JSON) instead of the searched ones")] = None,
    claims: Annotated[Path | None, typer.Option(help="a claims file of your own")] = None,
    resume: Annotated[Path | None, typer.Option(help="the folder of an unfinished run")] = None,
    results: Annotated[Path | None, typer.Option(help="where records go")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan and its minutes, run nothing")
    ] = False,
    readme: Annotated[Path | None, typer.Option(help="write the tables between this file's markers")] = None,
    hub: HubOption = False,
) -> None:
    """Run a suite, judge it against the paper's claims, write the report; resumes an unfinished run of the
    same kind.
    """
    from harness.measure.run import RunOptions, effective_suite, run_suite

    spec, file = find_suite(suite)
    registry = load_claims(claims)
    options = RunOptions(
        results=results or default_results(),
        limit=limit,
        time_budget_s=time_budget * 60 if time_budget is not None else None,
        prompts_file=prompts,
        tree_file=tree,
        resume=resume,
        allow_hub=hub,
        command=command_line(),
    )
    if dry_run:
        from harness.measure.plan import print_plan

        print_plan(
            effective_suite(spec, options), results=options.results, prompts_file=prompts, console=Console()
        )
        return
    folder = run_suite(spec, suite_file=file, options=options, console=console)
    finish_run(folder, claims=registry, readme=readme)


def report(
    record: Annotated[
        str,
        typer.Argument(
            help="a record's folder, a profile's file, or a name under results/ for its newest record: "
            "embedded, latency/embedded, sweep/embedded, .."
        ),
    ] = "embedded",
    claims: Annotated[Path | None, typer.Option(help="a claims file of your own")] = None,
    readme: Annotated[Path | None, typer.Option(help="write the tables between this file's markers")] = None,
) -> None:
    """Judge a record of any kind again and write its report; needs no device."""
    finish(find_record(record), claims=load_claims(claims), readme=readme)
