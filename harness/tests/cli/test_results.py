"""`results`: pages made again from real records, and what it says of a page that they do not give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.errors import ExitCode
from harness.files import file_sha256
from harness.paths import default_results
from harness.tests.fake_latency import write_fake_latency
from harness.tests.tiny_suite import Ran, command

FIXTURES = Path(__file__).resolve().parents[1] / "records" / "fixtures" / "v1"
LATENCY = "latency/embedded/cpu-amd-epyc-2c/20261123T182039Z-65181af9"
OLDER = "latency/cpu/cpu-amd-epyc-2c/20261123T181739Z-bed6d352"
README = "".join(
    f"# Figures by hand\n\n<!-- begin:{name} -->\n{text}\n<!-- end:{name} -->\n\n"
    for name, text in {
        "modes": f"[a](results/{LATENCY}/report.md)",
        "claims": "",
        "devices": "",
        "training": "",
    }.items()
)


def copied(place: str, home: Path) -> Path:
    """Copy a committed record without its page, and return its folder."""
    return Path(
        shutil.copytree(default_results() / place, home / place, ignore=shutil.ignore_patterns("*.md"))
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A results folder whose pages were made once, and what the command said."""
    home = tmp_path_factory.mktemp("checkout") / "results"
    copied(LATENCY, home)
    (home / "profile").mkdir()
    shutil.copyfile(FIXTURES / "training_profile.json", home / "profile" / "training-one-cpu.json")
    (home.parent / "README.md").write_text(README)
    return home, command("results", "--results", home)


@pytest.fixture
def home(made: tuple[Path, Ran], tmp_path: Path) -> Path:
    """A copy of that folder for one test to change."""
    shutil.copytree(made[0].parent, tmp_path / "checkout")
    return tmp_path / "checkout" / "results"


def last(ran: Ran) -> dict[str, Any]:
    return dict(json.loads(ran.out.splitlines()[-1]))


def test_every_page_and_table_is_made(made: tuple[Path, Ran]) -> None:
    home, ran = made
    assert ran.code == ExitCode.OK, ran.err
    over_all = ["results/claims.md", "results/devices.md", "results/index.html"]
    pages = ["README.md", *over_all, f"results/{LATENCY}/report.md"]
    assert last(ran) == {"changed": pages, "taken": [], "left_out": {}, "invalid": []}
    text = (home.parent / "README.md").read_text()
    assert text.count("# Figures by hand") == 4 and "against `generate`" in text and "positions/s" in text
    assert (home / LATENCY / "report.md").read_text() == (
        default_results() / LATENCY / "report.md"
    ).read_text()


def test_made_again_nothing_changes(home: Path) -> None:
    assert last(command("results", "--results", home))["changed"] == []
    ran = command("results", "--results", home, "--check")
    assert ran.code == ExitCode.OK and last(ran) == {"differing": [], "invalid": []}


def test_each_page_that_the_records_do_not_give_is_named(home: Path) -> None:
    report, picture = home / LATENCY / "report.md", home / LATENCY / "figures" / "old.svg"
    report.write_text(report.read_text().replace("1.", "2.", 1))
    picture.parent.mkdir()
    picture.write_text("<svg/>")  # a figure that no record gives any more
    (home / "claims.md").unlink()
    readme = home.parent / "README.md"
    readme.write_text(readme.read_text().replace("| vanilla", "| Vanilla", 1))
    copied(OLDER, home)  # and what is made of all records was not made again after it
    before = {path: path.read_bytes() for path in home.parent.rglob("*") if path.is_file()}
    ran = command("results", "--results", home, "--check")
    named = [
        "README.md",
        "results/claims.md",
        "results/devices.md",
        "results/index.html",
        f"results/{OLDER}/report.md",
        f"results/{LATENCY}/figures/old.svg",
        f"results/{LATENCY}/report.md",
    ]
    assert ran.code == ExitCode.USER_ERROR and last(ran)["differing"] == named
    assert ", ".join(named) in ran.error_line and "run medusa-repro results" in ran.error_line
    assert before == {path: path.read_bytes() for path in home.parent.rglob("*") if path.is_file()}


def test_an_altered_record_is_refused(home: Path) -> None:
    (home / LATENCY / "model.json").write_text("{}")
    ran = command("results", "--results", home, "--check")
    assert ran.code == ExitCode.USER_ERROR and "model.json" in ran.error_line


@pytest.mark.parametrize(
    ("text", "need"),
    [
        ("<!-- begin:modes -->\n<!-- end:modes -->\n", "0 reports linked in the block 'modes'"),
        (
            "<!-- begin:modes -->\n[a](results/latency/x/y/z/report.md)\n<!-- end:modes -->\n",
            "records that are not there: modes",
        ),
    ],
)
def test_a_table_that_shows_no_record_is_named(home: Path, text: str, need: str) -> None:
    (home.parent / "README.md").write_text(text)
    ran = command("results", "--results", home)
    assert ran.code == ExitCode.USER_ERROR and need in ran.error_line


def resealed(folder: Path, name: str, **changes: object) -> None:
    """Change a file of a record and seal the record again."""
    file, manifest = folder / name, json.loads((folder / "manifest.json").read_text())
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    manifest["sha256"][name] = file_sha256(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_sound_records_of_other_machines_are_taken_over_and_others_are_not(
    home: Path, tmp_path: Path
) -> None:
    source = tmp_path / "down"
    for artefact in ("altered", "dirty", "elsewhere", "fine"):
        copied(OLDER, source / f"records-{artefact}")
    (source / "records-altered" / OLDER / "model.json").write_text("{}")
    resealed(source / "records-dirty" / OLDER, "environment.json", dirty=True)
    (source / "records-elsewhere" / OLDER).rename((source / "records-elsewhere" / OLDER).with_name("newest"))
    (source / "records-fine" / OLDER / "run.sh").write_text("#!/bin/sh\n")
    invalid = source / "records-invalid" / "fake" / "made-up" / "20240119T115000Z-01234567"
    write_fake_latency(invalid)
    limits = {"read_bandwidth_bytes_per_s": 1e12, "matmul_flop_per_s": 1e10, "method": "made up"}
    resealed(invalid, "device_limits.json", **limits, row_product_bytes_per_s=1e12)
    copied(LATENCY, source / "records-again")

    ran = command("results", "--results", home, "--take", source)
    assert ran.code == ExitCode.OK, ran.err
    said = last(ran)
    assert said["taken"] == [OLDER] and f"results/{OLDER}/report.md" in said["changed"]
    assert "results/devices.md" in said["changed"] and not (home / OLDER / "run.sh").exists()
    reasons = {name.split("/")[0].removeprefix("records-"): why for name, why in said["left_out"].items()}
    expected = {
        "again": "found a record that is there already",
        "altered": "found model.json",
        "dirty": "found no commit, or a checkout with changes",
        "elsewhere": "found a folder of another name",
        "invalid": "found an invalid measurement",
    }
    assert {name: why.split(";")[0].split(":")[0] for name, why in reasons.items()} == expected
    assert not (home / "latency" / "fake").exists()
    assert command("results", "--results", home, "--check").code == ExitCode.OK


def test_a_gates_record_is_taken_over_under_its_own_folder_and_its_page_is_made(
    home: Path, tmp_path: Path
) -> None:
    place = "made/cpu-a-machine-2c/20261127T222307Z-50c6ceda"
    shutil.copytree(FIXTURES / "gate", tmp_path / "down" / "gate-cpu" / place)
    said = last(command("results", "--results", home, "--take", tmp_path / "down"))
    assert said["taken"] == [f"gate/{place}"] and said["left_out"] == {} and said["invalid"] == []
    page = (home / "gate" / place / "report.md").read_text()
    assert page.startswith("# A gate: `smoke`") and "The same again here:" in page
    assert command("results", "--results", home, "--check").code == ExitCode.OK
    undecided = tmp_path / "other" / place.replace("222307", "222308")
    shutil.copytree(FIXTURES / "gate", undecided)
    resealed(undecided, "gate.json", exit_code=int(ExitCode.INVALID_MEASUREMENT))
    said = last(command("results", "--results", home, "--take", tmp_path / "other"))
    assert said["taken"] == [] and "found an invalid measurement" in str(said["left_out"])


def test_it_asks_for_folders_that_are_there(tmp_path: Path, home: Path) -> None:
    assert command("results", "--results", tmp_path / "absent").code == ExitCode.USER_ERROR
    assert command("results", "--results", home, "--take", tmp_path / "absent").code == ExitCode.USER_ERROR
    both = command("results", "--results", home, "--check", "--take", home)
    assert both.code == ExitCode.USER_ERROR and "--check with --take" in both.error_line
