"""`profile` and `profile-training`: where the time of a step goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness.cli.find import find_data, find_suite
from harness.cli.options import HubOption, SuiteArgument, command_line, console
from harness.files import write_json
from harness.paths import default_results


def profile(
    suite: SuiteArgument = "embedded",
    nodes: Annotated[str, typer.Option(help="tree sizes, root included")] = "1,2,4,8,16,32,64,128",
    mode: Annotated[str | None, typer.Option(help="an engine mode instead of the suite's")] = None,
    steps: Annotated[int, typer.Option(help="marked steps a size", min=1)] = 48,
    out: Annotated[Path | None, typer.Option(help="write the record (JSON)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the JSON line only")] = False,
    hub: HubOption = False,
) -> None:
    """Say where the time of a step goes, for vanilla and for trees of growing size."""
    from harness.measure.step_profile import profile_suite
    from harness.records.step_profile import parse_sizes
    from harness.report.profiles import profile_headline, render_step_profile

    sizes = parse_sizes(nodes)
    spec, file = find_suite(suite)
    profiled = profile_suite(
        spec,
        suite_file=file,
        sizes=sizes,
        mode=mode,
        num_steps=steps,
        allow_hub=hub,
        command=command_line(),
        console=console,
    )
    if out is not None:
        write_json(out, profiled)
    if not as_json:
        print(render_step_profile(profiled))
    print(json.dumps(profile_headline(profiled), allow_nan=False))


def profile_training_command(
    recipe: Annotated[
        str, typer.Argument(help="a shipped recipe's name or a TOML file")
    ] = "embedded_medusa1",
    steps: Annotated[int, typer.Option(help="untouched steps a stage; as many are taken apart", min=1)] = 8,
    output: Annotated[
        Path | None, typer.Option(help="write the record (JSON) here, not under results/profile")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="measure nothing: only write the table of all committed profiles")
    ] = False,
    readme: Annotated[
        Path | None,
        typer.Option(help="write the table of all committed profiles between this file's markers"),
    ] = None,
    hub: HubOption = False,
) -> None:
    """Say which share of the matrix throughput a recipe's training steps reach, and where the rest of their
    time goes.
    """
    if not report:
        _profile_training(recipe, steps=steps, output=output, hub=hub)
    if report or readme is not None:
        from harness.report.profiles import committed_profiles, render_readme_training
        from harness.report.readme import update_training

        paths = committed_profiles(default_results())
        if readme is not None:
            update_training(readme, paths)
        else:
            print(render_readme_training(paths, base=default_results().parent))


def _profile_training(recipe: str, *, steps: int, output: Path | None, hub: bool) -> None:
    from harness.measure.training_profile import profile_training
    from harness.records.provenance import machine_slug
    from harness.report.profiles import print_training_profile, training_headline
    from harness.specs.recipe import load_training_suite

    spec = load_training_suite(find_data(recipe, folder="recipes"))
    profiled = profile_training(spec, num_steps=steps, allow_hub=hub, command=command_line(), console=console)
    name = f"training-{spec.name}-{machine_slug(profiled.environment.device)}.json"
    target = output or default_results() / "profile" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, profiled)
    print_training_profile(Console(), profiled)
    print(json.dumps(training_headline(profiled), allow_nan=False))
