"""`profile`, `profile-training` and `profile-kernels`: where the time of a step goes, and where it could."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.find import find_data, find_suite
from harness.cli.finish import finish_kernel_races, finish_step_profile, finish_training_profile
from harness.cli.options import HubOption, RecipeArgument, SuiteArgument, command_line, console
from harness.files import write_json
from harness.paths import default_results


def profile(
    suite: SuiteArgument = "embedded",
    nodes: Annotated[
        str, typer.Option(help="tree sizes to profile, root included, with commas between them")
    ] = "1,2,4,8,16,32,64,128",
    mode: Annotated[str | None, typer.Option(help="engine mode to use instead of the suite's")] = None,
    steps: Annotated[int, typer.Option(help="how many steps are timed for each tree size", min=1)] = 48,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the record to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print only the JSON line")] = False,
    hub: HubOption = False,
) -> None:
    """Say where the time of a decoding step goes, for vanilla and for trees of growing size."""
    from harness.measure.profiles.step import profile_suite
    from harness.records.profiles.step import parse_sizes

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
    finish_step_profile(profiled, only_json=as_json)


def profile_training_command(
    recipe: RecipeArgument = "embedded_medusa1",
    steps: Annotated[
        int,
        typer.Option(
            help="how many steps of each stage are timed whole; as many again are timed part by part", min=1
        ),
    ] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--output", help="JSON file to write the record to; without it, one in results/profile"
        ),
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(help="file between whose markers the table of all committed profiles is written"),
    ] = None,
    hub: HubOption = False,
) -> None:
    """Say what share of a device's matrix throughput training reaches, and where its other time goes."""
    from harness.measure.profiles.training import profile_training
    from harness.records.machines.identity import machine_slug
    from harness.specs.recipe import load_recipe

    spec = load_recipe(find_data(recipe, kind="recipe"))
    profiled = profile_training(spec, num_steps=steps, allow_hub=hub, command=command_line(), console=console)
    name = f"training-{spec.name}-{machine_slug(profiled.environment.device)}.json"
    target = out or default_results() / "profile" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, profiled)
    finish_training_profile(profiled, readme=readme)


def profile_kernels_command(
    dtype: Annotated[
        str, typer.Option(help="dtype of the tensors; by default bfloat16 on a GPU, float32 on a CPU")
    ] = "",
    small: Annotated[
        bool, typer.Option("--small", help="small sizes instead of those of a 7B model, as always on a CPU")
    ] = False,
    minutes: Annotated[
        float, typer.Option("--time-budget", help="minutes after which no further race is begun", min=0)
    ] = 3.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write the record to; without it, one in results/profile, and another for "
            "unfinished races"
        ),
    ] = None,
) -> None:
    """Race several ways to compute a part of a step, such as attention under a tree's mask."""
    from harness.measure.profiles.kernels import race_kernels
    from harness.records.machines.identity import machine_slug
    from harness.records.profiles.kernels import KernelRaces

    unfinished: Path | None = None

    def keep(races: KernelRaces) -> None:
        nonlocal unfinished
        name = f"kernels-{races.dtype}-{machine_slug(races.origin.device)}"
        whole = default_results() / "profile" / f"{name}.json"
        apart = whole.with_name(f"{name}-unfinished.json")
        target = out or (apart if races.num_left_out else whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, races)
        unfinished = target if target == apart else None
        if target == whole:
            apart.unlink(missing_ok=True)

    try:
        races = race_kernels(
            dtype=dtype,
            small=small,
            budget_s=60 * minutes,
            command=command_line(),
            console=console,
            keep=keep,
        )
    finally:
        if unfinished is not None:
            console.print(f"the races that were run are in {unfinished.name}; no whole file was replaced")
    finish_kernel_races(races)
