"""`history`: the page, its picture, the last line, what is left out and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.errors import ExitCode
from harness.records.folder import kind_of
from harness.tests.fake_latency import write_fake_latency
from harness.tests.fake_record import STEP_S, FakeParts, write_fake_record
from harness.tests.tiny_suite import command

ROOT = Path(__file__).resolve().parents[3]
SUITES = sorted(
    {
        path.parents[2].relative_to(ROOT / "results").as_posix()
        for path in (ROOT / "results").rglob("manifest.json")
        if kind_of(path.parent) in ("suite", "latency")
    }
)


def write(results: Path, day: int, *, factor: float = 1.0, **seconds: float) -> Path:
    def spoil(parts: FakeParts) -> None:
        parts.environment = parts.environment.model_copy(
            update={"commit": f"{day:040x}", "started_utc": f"2024-01-{day:02d}T10:00:00Z"}
        )

    step_s = {arm: time * (1 + 0.0025 * (day % 3)) for arm, time in STEP_S.items()}
    step_s["chain"] *= factor
    step_s |= seconds
    folder = results / "fake" / "machine" / f"202401{day:02d}T100000Z-{day:08x}"
    return write_fake_record(folder, spoil=spoil, step_s=step_s, rounds=1, num_prompts=8, jitter=0.0).folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for day in range(1, 8):
        write(tmp_path / "results", day, factor=1.3 if day > 4 else 1.0)
    return tmp_path / "results"


def last(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_history_is_a_page_a_picture_and_a_line(results: Path) -> None:
    ran = command("history", "fake", "--results", results)
    assert ran.code == ExitCode.OK
    page = (results / "fake" / "history.md").read_text()
    assert (
        ran.out.startswith(page)
        and "![history-cpu-made-up-cpu-2c.svg](history-cpu-made-up-cpu-2c.svg)" in page
    )
    told = last(ran.out)["machines"]["cpu-made-up-cpu-2c"]
    assert (told["records"], told["classes"]) == (7, 1)
    assert {step["figure"] for step in told["steps"]} == {
        f"chain: {name}" for name in ("speedup", "overhead", "tokens/s", "wall tokens/s", "bandwidth share")
    }
    assert {step["record"] for step in told["steps"]} == {"20240105T100000Z-00000005"}
    (row,) = [line for line in page.splitlines() if "1.075 to 1.397" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "chain",
        "overhead",
        "`20240105T100000Z-00000005`",
        "1.075 to 1.397",
        "+30.0 %",
        "`20240104T100000Z-00000004`",
        "commit",
    ]
    first = (results / "fake" / "history-cpu-made-up-cpu-2c.svg").read_bytes()
    assert command("history", "fake", "--results", results).code == ExitCode.OK
    assert (results / "fake" / "history-cpu-made-up-cpu-2c.svg").read_bytes() == first, (
        "the same, whenever it is drawn"
    )


def test_an_altered_record_is_left_out_and_named(results: Path) -> None:
    broken = write(results, 8)
    (broken / "trees.json").write_text("{}")
    ran = command("history", "fake", "--results", results)
    assert ran.code == ExitCode.OK and last(ran.out)["left_out"] == 1 and last(ran.out)["records"] == 7
    assert "Left out: `20240108T100000Z-00000008`, found SHA-256" in ran.out


def test_without_matplotlib_there_is_a_page(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = command("history", "fake", "--results", results)
    assert ran.code == ExitCode.OK and "no picture: found no matplotlib" in ran.err
    assert "![" not in (results / "fake" / "history.md").read_text()


def test_without_ruptures_a_line_says_what_to_install(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ruptures", None)
    ran = command("history", "fake", "--results", results)
    assert ran.code == ExitCode.USER_ERROR and "medusa-repro[history]" in ran.error_line


def test_what_has_no_history_is_refused(results: Path) -> None:
    ran = command("history", "nosuch", "--results", results)
    assert ran.code == ExitCode.USER_ERROR and "found no record of 'nosuch'" in ran.error_line
    ran = command("history", "sweep/embedded")
    assert ran.code == ExitCode.USER_ERROR and "a suite's runs or latency records" in ran.error_line


def test_latency_records_have_a_history(tmp_path: Path) -> None:
    write_fake_latency(tmp_path / "latency" / "fake" / "machine" / "20240101T100000Z-00000001")
    ran = command("history", "latency/fake", "--results", tmp_path)
    assert ran.code == ExitCode.OK and last(ran.out)["records"] == 1


@pytest.mark.parametrize("suite", SUITES)
def test_every_committed_suite_has_a_history(suite: str, tmp_path: Path) -> None:
    """Written elsewhere: the committed folder is not touched."""
    shutil.copytree(ROOT / "results" / suite, tmp_path / suite, ignore=shutil.ignore_patterns("report.md"))
    ran = command("history", suite, "--results", tmp_path)
    assert ran.code == ExitCode.OK and (tmp_path / suite / "history.md").exists()
    told = last(ran.out)
    assert told["left_out"] == 0 and told["records"] >= 1
    if suite == "embedded":
        assert told["machines"]["cpu-amd-epyc-2c"]["classes"] == 2, "34 and 77 GB/s"
        assert "stands for machines whose times cannot be compared" in ran.out


def test_a_number_of_failed_checks_has_no_percentage(tmp_path: Path) -> None:
    """From one to none was a change of -100 %."""
    results = tmp_path / "results"
    write(results, 1, hf_greedy=STEP_S["hf_greedy"] / 2)
    write(results, 2)
    assert command("history", "fake", "--results", results).code == ExitCode.OK
    page = (results / "fake" / "history.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    (row,) = [row for row in rows if row[1:2] == ["failed checks"] and " to " in row[3]]
    assert row[3:5] == ["1 to 0", "–"]
