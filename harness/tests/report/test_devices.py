"""The page of devices: measured rows first, like rows as one; the committed page is what the records give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli.app import app
from harness.compose.prices.fitted import step_models
from harness.compose.prices.measured import older_curves, timed_curves
from harness.compose.prices.table import Banded, PredictedRow, measured_rows, predicted_rows
from harness.report.devices import (
    DEVICES_PAGE,
    bracketed,
    devices_headline,
    render_devices_page,
    render_predicted,
)
from harness.report.formatting import WITHHELD, merged
from harness.report.readme import devices_block
from harness.tests.fake_latency import write_fake_latency
from harness.tests.readme_blocks import shows

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "results"


def row(device: str, *, speedup: Banded, seconds: float = 0.02) -> PredictedRow:
    return PredictedRow(
        device=device,
        shape="vicuna-7b-v1.5",
        vanilla_s=Banded(seconds, low=seconds / 2, high=2 * seconds),
        overhead=Banded(1.25, low=1.0, high=1.5),
        tokens_per_step=3.0,
        speedup=speedup,
    )


def test_a_wide_band_leaves_a_word_and_no_figure() -> None:
    told = render_predicted([row("one", speedup=Banded(2.4, low=2.0, high=3.0))])
    assert "| 2.4 [2.0, 3.0]" in told and "| 120 [60, 240]" in told and WITHHELD not in told
    hidden = render_predicted([row("one", speedup=Banded(2.4, low=0.9, high=3.0))])
    assert hidden.count(WITHHELD) == 2 and "2.4" not in hidden and "120" not in hidden
    assert "20 [10, 40]" in hidden  # the step keeps its time and its band


def test_rows_that_say_the_same_are_one() -> None:
    speedup = Banded(2.4, low=2.0, high=3.0)
    table = render_predicted(
        [
            row("one", speedup=speedup),
            row("other", speedup=speedup, seconds=0.03),
            row("two", speedup=speedup),
        ]
    )
    lines = [line for line in table.splitlines() if "vicuna" in line]
    assert len(lines) == 2 and "one, two" in lines[0] and "other" in lines[1]
    assert merged([("a", "x"), ("b", "y"), ("a", "x")], column=0) == [("a", "x"), ("b", "y")]
    assert render_predicted([]) == ""


def test_figures_have_as_many_digits_as_their_error_leaves() -> None:
    assert bracketed(Banded(0.0123456, low=0.01, high=0.02), scale=1000) == "12 [10, 20]"
    assert bracketed(Banded(1.2345)) == "1.2 (error unknown)"


def test_measured_devices_stand_before_predicted_ones() -> None:
    curves = timed_curves(RESULTS)
    models = step_models(curves)
    measured = measured_rows(curves, older=older_curves(RESULTS))
    predicted = predicted_rows(models["cuda"], measured=curves)
    page = render_devices_page(measured, predicted, models, curves)
    assert page.index("## Measured") < page.index("## Predicted") < page.index("## The step model")
    first = next(line for line in page.splitlines() if line.startswith("| h200-sxm"))
    assert "vicuna-7b-v1.5" in first and "engine before" not in first
    assert "(engine before)" in page
    # the committed page and the README show what the records give
    assert (RESULTS / DEVICES_PAGE).read_text(encoding="utf-8") == page
    assert shows(RESULTS / "README.md", devices_block(measured, predicted, results=RESULTS))
    said = devices_headline(measured, predicted, models)
    assert json.loads(json.dumps(said))["models"]["cuda"]["costs"] == models["cuda"].costs.model_dump()
    assert said["withheld"] == page.count(WITHHELD + " | " + WITHHELD)


def test_the_command_writes_page_and_readme(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_fake_latency(results / "latency" / "fake" / "m" / "20240112T120000Z-01234567")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- begin:devices -->\n<!-- end:devices -->\n")
    ran = CliRunner().invoke(app, ["devices", "--results", str(results), "--readme", str(readme)])
    assert ran.exit_code == 0, ran.output
    page = (results / DEVICES_PAGE).read_text(encoding="utf-8")
    assert "made-up CPU" in page and "one curve alone" in page and "## Predicted" not in page
    assert "made-up CPU" in readme.read_text(encoding="utf-8")
    said = json.loads(ran.output.splitlines()[-1])
    assert (said["measured"], said["predicted"]) == (1, 0) and set(said["models"]) == {"cpu"}


def test_without_records_the_page_is_empty(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["devices", "--results", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output.splitlines()[-1])["measured"] == 0


@pytest.mark.parametrize("word", ["23,440"])
def test_no_roofline_speed_is_left_where_people_read(word: str) -> None:
    """A sweep's report once told 23,440 tokens/s for an H200 whose error was larger than any effect."""
    pages = [
        ROOT / "README.md",
        RESULTS / "README.md",
        RESULTS / DEVICES_PAGE,
        *RESULTS.glob("sweep/*/*/*/report.md"),
    ]
    assert len(pages) > 2
    assert [page.name for page in pages if word in page.read_text(encoding="utf-8")] == []
