"""`reproduce` runs a suite and judges it; `report` judges a record again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.compare import AgainstOption, finish_against, promising_run
from harness.cli.find import find_record, find_suite
from harness.cli.finish import finish
from harness.cli.options import (
    AllOption,
    ClaimsOption,
    HubOption,
    ResultsOption,
    ResumeOption,
    SuiteArgument,
    UnsealedOption,
    command_line,
    console,
)
from harness.files import write_text
from harness.judge.claims.standing import (
    RecordVerdict,
    finished_records,
    standings_of,
    verdicts_by_claim,
)
from harness.paths import default_results
from harness.report.claims import CLAIMS_PAGE, GROUPS, render_claims_page
from harness.report.readme import answer_block, claims_block, update_readme
from harness.safe_text import SafeConsole
from harness.specs.claims import ClaimsFile, load_claims, load_registry


def reproduce(
    suite: SuiteArgument = "embedded",
    limit: Annotated[
        int | None, typer.Option(help="run only N prompts, drawn from the categories in turn", min=1)
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="minutes after which no further prompt is begun", min=0.1)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="file of your own prompts: .txt, a prompt a line; or .jsonl, an object a line with prompt "
            "(or turns, of which the first is decoded) and, as you like, key and category"
        ),
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option(help="file of a tree to use, in an arm of its name, instead of the searched ones"),
    ] = None,
    claims: ClaimsOption = None,
    resume: ResumeOption = None,
    results: ResultsOption = None,
    against: AgainstOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan and how many minutes it takes, and run nothing")
    ] = False,
    readme: Annotated[
        Path | None, typer.Option(help="file between whose markers the tables are written, such as README.md")
    ] = None,
    hub: HubOption = False,
    shows_all: AllOption = False,
) -> None:
    """Run a suite, judge it by the paper's claims, write a report; the same command resumes a cut-off run."""
    from harness.measure.run import RunOptions, effective_suite, run_suite

    (spec, file), registry = find_suite(suite), load_claims(claims)
    promising = promising_run(against)  # a wrong name ends here, not after the run
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
            effective_suite(spec, options),
            results=options.results,
            prompts_file=prompts,
            base_folder=file.parent,
            console=SafeConsole(),
        )
        return
    folder = run_suite(spec, suite_file=file, options=options, console=console)
    finish_against(folder, promising, claims=registry, readme=readme, shows_all=shows_all)


def claims_command(
    results: ResultsOption = None,
    claims: ClaimsOption = None,
    readme: Annotated[
        Path | None, typer.Option(help="file between whose markers the counts are written, such as README.md")
    ] = None,
) -> None:
    """Say where every claim stands over all records, and write the page claims.md into the results folder."""
    home = results or default_results()
    registry = load_registry(claims)
    found = standings_of(
        registry, make_claims_page(home, registry, pages=[readme] if readme is not None else [])
    )
    counts = {group: sum(one.group == group for one in found) for group in GROUPS}
    print(json.dumps({"entries": len(found), **counts}))


def make_claims_page(
    home: Path, registry: ClaimsFile, *, pages: Sequence[Path]
) -> dict[str, list[RecordVerdict]]:
    """Write the page of all claims into a results folder, and their blocks into pages.

    The result is what every record finds of each claim.
    """
    verdicts = verdicts_by_claim(registry, finished_records(home))
    found = standings_of(registry, verdicts)
    write_text(home / CLAIMS_PAGE, render_claims_page(registry, found))
    blocks = claims_block(found, results=home), answer_block(registry, found, results=home)
    for page in pages:
        update_readme(page, *blocks)
    return verdicts


def report(
    record: Annotated[
        str,
        typer.Argument(
            help="a record's folder, a profile's file, or a name under results/, which means its newest "
            "record: embedded, latency/embedded, sweep/embedded and so on"
        ),
    ] = "embedded",
    claims: ClaimsOption = None,
    readme: Annotated[
        Path | None, typer.Option(help="file between whose markers the tables are written, such as README.md")
    ] = None,
    unsealed: UnsealedOption = False,
    shows_all: AllOption = False,
) -> None:
    """Judge a record of any kind again and write its report. This needs no device.

    A record that is not as it was sealed is refused.
    """
    finish(
        find_record(record), claims=load_claims(claims), readme=readme, unsealed=unsealed, shows_all=shows_all
    )
