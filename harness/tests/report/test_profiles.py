"""The README's table of training throughput follows from the committed profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import ExitCode, UserError
from harness.records.profiles.training import read_training_profile
from harness.report.profiles import committed_profiles, render_readme_training
from harness.report.readme import training_block, update_readme
from harness.tests.readme_blocks import shows
from harness.tests.tiny_suite import command

ROOT = Path(__file__).resolve().parents[3]


def test_the_readme_shows_the_committed_profiles() -> None:
    assert shows(ROOT / "results" / "README.md", training_block(committed_profiles(ROOT / "results")))


def test_every_stage_has_a_row_and_its_parts() -> None:
    paths = committed_profiles(ROOT / "results")
    text = render_readme_training(paths, base=ROOT)
    for path in paths:
        for stage in read_training_profile(path).stages:
            assert f"| {stage.name}, " in text and all(
                part.name in text for part in stage.parts if any(part.seconds)
            )
        assert path.relative_to(ROOT).as_posix() in text


def test_the_command_writes_it_between_markers_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# T\n\n<!-- begin:training -->\nold\n<!-- end:training -->\n\nRest.\n")
    record = committed_profiles(ROOT / "results")[0]
    assert command("report", record, "--readme", readme).code == ExitCode.OK
    assert (
        "old" not in readme.read_text()
        and readme.read_text().endswith("Rest.\n")
        and "embedded_medusa1" in readme.read_text()
    )
    readme.write_text("no markers")
    with pytest.raises(UserError, match="0 times the marker"):
        update_readme(readme, training_block(committed_profiles(ROOT / "results")))
    with pytest.raises(UserError, match="no training profile"):
        committed_profiles(tmp_path)
