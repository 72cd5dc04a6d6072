"""`devices` says what a step costs by device: measured, and predicted by a model that is fitted on that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import ResultsOption
from harness.files import write_text
from harness.paths import default_results
from harness.report.readme import devices_block, update_readme


def devices(
    results: ResultsOption = None,
    readme: Annotated[
        Path | None, typer.Option(help="file between whose markers the tables are written, such as README.md")
    ] = None,
) -> None:
    """Fit the step model on all latency records, and write the page devices.md into the results folder.

    Measured devices come first, then predictions for the paper's models with the model's error. This needs
    no device.
    """
    from harness.compose.prices.fitted import step_models
    from harness.compose.prices.measured import older_curves, timed_curves
    from harness.compose.prices.table import measured_rows, predicted_rows
    from harness.report.devices import DEVICES_PAGE, devices_headline, render_devices_page

    home = results or default_results()
    curves = timed_curves(home)
    models = step_models(curves)
    measured = measured_rows(curves, older=older_curves(home))
    predicted = predicted_rows(models["cuda"], measured=curves) if "cuda" in models else []
    write_text(home / DEVICES_PAGE, render_devices_page(measured, predicted, models, curves))
    if readme is not None:
        update_readme(readme, devices_block(measured, predicted, results=home))
    print(json.dumps(devices_headline(measured, predicted, models), allow_nan=False))
