"""`sweep` composes trees, heads and devices from a trace and measured step times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.find import find_data
from harness.cli.finish import finish, write_latency_report
from harness.cli.options import ClaimsOption, HubOption, ResumeOption, command_line, console
from harness.errors import UserError
from harness.paths import cache_dir, default_results
from harness.specs.claims import load_claims


def sweep(
    suite: Annotated[str, typer.Argument(help="name of a shipped sweep, or a TOML file")] = "embedded",
    replay_only: Annotated[
        bool, typer.Option("--replay-only", help="compose from files alone; run nothing on the device")
    ] = False,
    resume: ResumeOption = None,
    results: Annotated[
        Path | None, typer.Option(help="folder to keep records in and to read latency records from")
    ] = None,
    claims: ClaimsOption = None,
    readme: Annotated[
        Path | None, typer.Option(help="file between whose markers the table of devices is written")
    ] = None,
    executor: Annotated[
        str, typer.Option(help="where points are run: local (this machine) or ray (a cluster)")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="address of the Ray cluster: auto (the default), local or HOST:PORT")
    ] = None,
    hub: HubOption = False,
) -> None:
    """Compose the speed of many trees on many devices from one trace and from step times.

    Sampled settings are run on the device, and some composed points are decoded to check them.
    """
    if executor not in ("local", "ray") or (executor == "local" and address is not None):
        found = f"--executor {executor}" + (f" --address {address}" if address is not None else "")
        raise UserError(
            found=found,
            need="--executor local, or --executor ray with or without --address",
            where="the command line",
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
    finish(folder, claims=registry, readme=readme)
