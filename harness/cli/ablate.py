"""`ablate` trains recipes side by side and measures what became of backbone and heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.find import find_data
from harness.cli.finish import finish
from harness.cli.options import ClaimsOption, HubOption, ResultsOption, ResumeOption, command_line, console
from harness.paths import default_results
from harness.safe_text import SafeConsole
from harness.specs.claims import load_claims


def ablate(
    suite: Annotated[
        str, typer.Argument(help="name of a shipped ablation, or a TOML file")
    ] = "embedded_training_quick",
    results: ResultsOption = None,
    work: Annotated[Path | None, typer.Option(help="folder for adapters, heads and training state")] = None,
    resume: ResumeOption = None,
    claims: ClaimsOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print the arms and how many minutes they take, and train nothing"),
    ] = False,
    readme: Annotated[
        Path | None, typer.Option(help="file between whose markers the table is written, such as README.md")
    ] = None,
    hub: HubOption = False,
) -> None:
    """Train several recipes on as many tokens each, measure their heads and backbones, and judge the claims.

    A run that was cut off is resumed by the same command.
    """
    registry = load_claims(claims)
    from harness.measure.ablation.run import AblateOptions, print_ablation_plan, run_ablation
    from harness.specs.ablation import load_ablation

    file = find_data(suite, kind="ablation")
    spec = load_ablation(file)
    place = results or default_results()
    if dry_run:
        minutes = print_ablation_plan(spec, results=place, console=SafeConsole())
        print(
            json.dumps({"ablation": spec.name, "trainings": len(spec.plan()) - 1, "minutes": round(minutes)})
        )
        return
    options = AblateOptions(results=place, work=work, resume=resume, allow_hub=hub, command=command_line())
    folder = run_ablation(spec, suite_file=file, options=options, console=console)
    finish(folder, claims=registry, readme=readme)
