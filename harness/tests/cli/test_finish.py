"""What is said of a record that is not as it was sealed: nothing, or marked on every line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harness.cli.marked import MARK, marked_lines
from harness.errors import ExitCode
from harness.files import file_sha256, write_json
from harness.records.probes import DeviceLimits
from harness.tests.fake_latency import write_fake_latency
from harness.tests.tiny_suite import command

FIXTURES = Path(__file__).resolve().parents[1] / "records" / "fixtures" / "v1"
DATA = {"suite": "trees.json", "latency": "model.json", "sweep": "trees.json", "ablation": "tree.json"}


@pytest.fixture(params=DATA)
def altered(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / str(request.param)
    shutil.copytree(FIXTURES / folder.name, folder)
    path = folder / DATA[folder.name]
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    return folder


def test_a_report_of_an_altered_record_is_refused_in_one_line(altered: Path) -> None:
    """Latency runs, sweeps and ablations were once reported as if whole, with exit code 0."""
    ran = command("report", altered)
    assert ran.code == ExitCode.USER_ERROR and ran.out == ""
    assert "--unsealed" in ran.error_line and "as sealed" in ran.error_line
    assert not (altered / "report-unsealed.md").exists()


def test_an_altered_record_is_looked_at_with_a_mark_on_every_line(altered: Path) -> None:
    before = sorted(path.name for path in altered.iterdir())
    ran = command("report", altered, "--unsealed")
    assert ran.code == ExitCode.INVALID_MEASUREMENT
    *lines, last = ran.out.splitlines()
    assert all(line.startswith(MARK) for line in [*lines, *ran.err.splitlines()])
    assert json.loads(last)["unsealed"].startswith("found ")
    report = (altered / "report-unsealed.md").read_text()
    assert report.startswith("**UNSEALED: found ")
    after = sorted(path.name for path in altered.iterdir())
    assert after == sorted([*before, "report-unsealed.md"]), "the sealed record's own report is not touched"


def test_no_readme_shows_an_unsealed_record(altered: Path, tmp_path: Path) -> None:
    ran = command("report", altered, "--unsealed", "--readme", tmp_path / "README.md")
    assert ran.code == ExitCode.USER_ERROR and "found --unsealed with --readme" in ran.error_line


def test_an_unfinished_run_is_looked_at_up_to_its_last_whole_line(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    shutil.copytree(FIXTURES / "suite", folder)
    (folder / "manifest.json").unlink()
    with (folder / "generations.jsonl").open("a") as file:
        file.write('{"torn')
    assert command("report", folder).code == ExitCode.USER_ERROR
    ran = command("report", folder, "--unsealed")
    assert ran.code == ExitCode.INVALID_MEASUREMENT and "no manifest.json" in ran.out.splitlines()[-1]


def test_an_altered_run_is_exported_only_marked(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "suite", tmp_path / "suite")
    (tmp_path / "suite" / "trees.json").write_text(
        json.dumps(json.loads((tmp_path / "suite" / "trees.json").read_text()))
    )
    table = tmp_path / "table.csv"
    assert command("export", tmp_path / "suite", table).code == ExitCode.USER_ERROR and not table.exists()
    assert command("export", tmp_path / "suite", table, "--unsealed").code == ExitCode.INVALID_MEASUREMENT
    assert all("(unsealed)" in line for line in table.read_text().splitlines()[1:])


def test_a_tree_is_grown_on_an_altered_record_only_marked(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "suite", tmp_path / "suite")
    trace, out = tmp_path / "suite" / "trace.npz", tmp_path / "tree.json"
    words = ("search-tree", trace, "--num-nodes", "4", "--out", out)
    assert command(*words).code == ExitCode.OK
    (tmp_path / "suite" / "generations.jsonl").write_text("")
    assert command(*words).code == ExitCode.USER_ERROR
    ran = command(*words, "--unsealed")
    assert ran.code == ExitCode.INVALID_MEASUREMENT and "unsealed" in out.read_text()
    assert all(line.startswith(MARK) for line in ran.err.splitlines())


def test_faults_are_not_wrapped_in_a_pipe(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    shutil.copytree(FIXTURES / "suite", folder)
    (folder / "environment.json").write_text("{}")
    ran = command("validate", folder)
    assert ran.code == ExitCode.INVALID_MEASUREMENT
    assert len(ran.err.splitlines()) == json.loads(ran.out.splitlines()[-1])["num_faults"]
    assert all(line.split(": ")[1].startswith("found ") for line in ran.err.splitlines())


def test_the_reason_of_an_unsealed_record_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It names files and figures of the record, which anybody may have made."""
    with marked_lines("found \x1b[31mx\nin a file"):
        print("shown")
    out, err = capsys.readouterr()
    assert "\x1b" not in err and err.count("\n") == 1 and err.startswith(MARK) and out == f"{MARK}shown\n"


def test_a_latency_record_that_beat_its_limits_is_invalid_and_shown_in_no_readme(tmp_path: Path) -> None:
    """A step of 33.7 ms once stood next to a bound of 78.5 ms from its limits, valid all the same."""

    def write(folder: Path, *, flop_per_s: float) -> Path:
        record = write_fake_latency(folder)
        limits = DeviceLimits(
            read_bandwidth_bytes_per_s=1e12,
            matmul_flop_per_s=flop_per_s,
            row_product_bytes_per_s=1e12,
            method="made up",
        )
        write_json(folder / "device_limits.json", limits)
        manifest = record.manifest
        assert manifest is not None
        sha256 = {**manifest.sha256, "device_limits.json": file_sha256(folder / "device_limits.json")}
        write_json(folder / "manifest.json", manifest.model_copy(update={"sha256": sha256}))
        return folder

    readme = tmp_path / "README.md"
    readme.write_text("<!-- begin:modes -->\n<!-- end:modes -->\n")
    ran = command("report", write(tmp_path / "slow", flop_per_s=1e10), "--readme", readme)
    assert ran.code == ExitCode.INVALID_MEASUREMENT and "INVALID: within_limits: found products" in ran.err
    assert json.loads(ran.out.splitlines()[-1])["valid"] is False
    assert "**INVALID.** The device's limits" in (tmp_path / "slow" / "report.md").read_text()
    assert readme.read_text() == "<!-- begin:modes -->\n<!-- end:modes -->\n"
    ran = command("report", write(tmp_path / "fine", flop_per_s=1e14), "--readme", readme)
    assert ran.code == ExitCode.OK and json.loads(ran.out.splitlines()[-1])["valid"] is True
    page = (tmp_path / "fine" / "report.md").read_text()
    assert "**Valid**: reading in products of one row" in page and "under-measured" not in page
    assert "against `generate`" in readme.read_text()
