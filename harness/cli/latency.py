"""`latency` times the steps of one model on one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.find import find_data
from harness.cli.finish import finish
from harness.cli.options import HubOption, ResultsOption, ResumeOption, command_line, console
from harness.paths import default_results
from harness.safe_text import SafeConsole
from harness.specs.latency import load_latency_spec, overridden


def latency(
    spec: Annotated[str, typer.Argument(help="name of a shipped latency run, or a TOML file")] = "embedded",
    shape: Annotated[
        str | None,
        typer.Option(help="a published model's shape, filled with random weights, or a model's folder"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="dtypes to time, with commas between them")] = None,
    modes: Annotated[
        str | None,
        typer.Option(help="eager, packed, compiled, cuda_graph, fused_graph; auto: all but compiling"),
    ] = None,
    nodes: Annotated[
        str | None, typer.Option(help="tree nodes for every grid, root included, with commas between them")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="numbers of draft heads for every grid, with commas between them")
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(help="context lengths in tokens for every grid, with commas between them")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="batch sizes for every grid, with commas between them")
    ] = None,
    time_budget: Annotated[
        float | None,
        typer.Option(help="minutes after which no further size is begun; what is left is skipped", min=0.1),
    ] = None,
    resume: ResumeOption = None,
    results: ResultsOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the points and the memory they take, and run nothing")
    ] = False,
    readme: Annotated[
        Path | None, typer.Option(help="file between whose markers the table of modes is written")
    ] = None,
    hub: HubOption = False,
) -> None:
    """Time a decoding step for numbers of nodes, heads, context tokens and rows of a batch.

    The engine's modes are compared, and speed is shown against the batch size.
    """
    from harness.measure.latency.room import print_latency_plan
    from harness.measure.latency.run import LatencyOptions, run_latency

    file = find_data(spec, kind="latency")
    changes = {"num_nodes": nodes, "num_heads": heads, "context_tokens": contexts, "batch": batches}
    wanted = overridden(load_latency_spec(file), shape=shape, dtypes=dtype, modes=modes, **changes)
    if dry_run:
        counts = print_latency_plan(wanted, console=SafeConsole(), base_folder=file.parent)
        print(json.dumps({"latency": wanted.name, **counts}))
        return
    options = LatencyOptions(
        results=results or default_results(),
        resume=resume,
        time_budget_s=time_budget * 60 if time_budget is not None else None,
        allow_hub=hub,
        command=command_line(),
    )
    folder = run_latency(wanted, spec_file=file, options=options, console=console)
    finish(folder, claims=(), readme=readme)
