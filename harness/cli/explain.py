"""`explain` draws one real step of Medusa decoding, for readers who learn the method here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.find import find_suite
from harness.cli.options import HubOption, console
from harness.files import write_text
from harness.safe_text import SafeConsole


def explain(
    prompt: Annotated[str, typer.Argument(help="what the model is asked")],
    suite: Annotated[
        str, typer.Option(help="suite whose model, heads and calibration text are taken, by name or file")
    ] = "embedded",
    nodes: Annotated[int, typer.Option(help="nodes of the tree, its root included", min=2, max=64)] = 10,
    after: Annotated[
        int, typer.Option(help="tokens of the model's answer that come before the step", min=0)
    ] = 4,
    html: Annotated[Path | None, typer.Option(help="file for a page with the same, for a browser")] = None,
    hub: HubOption = False,
) -> None:
    """Draw one real step: the heads' guesses, the tree, its mask, and what was kept and why."""
    from harness.measure.profiles.drawn import explain_step
    from harness.report.anatomy.drawn import print_drawn_step
    from harness.report.pages.step import render_drawn_step

    spec, file = find_suite(suite)
    step = explain_step(
        spec, prompt, suite_file=file, num_nodes=nodes, after=after, allow_hub=hub, console=console
    )
    print_drawn_step(SafeConsole(), step)
    if html is not None:
        write_text(html, render_drawn_step(step))
    print(json.dumps({"explain": step.model, "tokens": step.num_tokens, "nodes": len(step.nodes)}))
