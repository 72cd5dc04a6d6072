"""`sweep` composes trees, heads and devices from a trace and measured step times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.find import find_data
from harness.cli.finish import finish_sweep, write_latency_report
from harness.cli.options import HubOption, command_line, console
from harness.errors import UserError
from harness.paths import cache_dir, default_results
from harness.specs.claims import load_claims


def sweep(
    suite: Annotated[str, typer.Argument(help="a shipped sweep's name or a TOML file")] = "embedded",
    replay_only: Annotated[
        bool, typer.Option("--replay-only", help="leave out all points that the device would have to run")
    ] = False,
    resume: Annotated[Path | None, typer.Option(help="the folder of an unfinished sweep")] = None,
    results: Annotated[
        Path | None, typer.Option(help="where records go, and latency records are found")
    ] = None,
    claims: Annotated[Path | None, typer.Option(help="a claims file of your own")] = None,
    readme: Annotated[
        Path | None, typer.Option(help="write the table of devices between this file's markers")
    ] = None,
    executor: Annotated[str, typer.Option(help="where points are run: local, or ray (a cluster)")] = "local",
    address: Annotated[
        str | None, typer.Option(help="the Ray cluster: auto (the default), local or HOST:PORT")
    ] = None,
    hub: HubOption = False,
) -> None:
    """Compose trees x heads x devices from a trace and step times; run sampled points and check some composed
    ones.
    """
    if executor not in ("local", "ray") or (executor == "local" and address is not None):
        found = f"--executor {executor}" + (f" --address {address}" if address is not None else "")
        raise UserError(
            found=found, need="local, or ray with or without an address", where="the command line"
        )
    registry = load_claims(claims)
    from harness.measure.sweep.run import SweepOptions, run_sweep
    from harness.specs.sweep import load_sweep

    file = find_data(suite, kind="sweep")
    options = SweepOptions(
        results=results or default_results(),
        resume=resume,
        replay_only=replay_only,
        cache=cache_dir() / "trees",
        allow_hub=hub,
        command=command_line(address=address),
    )
    spec = load_sweep(file)
    if executor == "local":
        folder = run_sweep(spec, spec_file=file, options=options, console=console)
    else:
        from harness.measure.sweep.cluster import RayExecutor

        with RayExecutor(address or "auto") as cluster:
            try:
                folder = run_sweep(spec, spec_file=file, options=options, console=console, executor=cluster)
            finally:
                for latency in cluster.brought:
                    write_latency_report(latency)
    finish_sweep(folder, claims=registry, readme=readme)
