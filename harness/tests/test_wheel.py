"""The wheel works where nothing else is: an environment of its own, outside a checkout, without git.

Torch alone is 1.7 GB, so that environment installs the wheel and links what the wheel says it needs, and no
more, from the environment that runs the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("harness", "medusa_impl", "suites")
# what a machine sets for its own libraries
KEPT_VARIABLES = ("OPENBLAS_", "CUDA_", "LD_LIBRARY_PATH")
# the work is so small that a second thread only waits, for minutes where other work takes the cores
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.wheel


@dataclass(frozen=True)
class Installed:
    """The wheel, installed into an environment of its own; commands run in an empty folder without a home."""

    wheel: Path
    environment: Path
    work: Path

    @property
    def site(self) -> Path:
        return next(self.environment.glob("lib/python*/site-packages"))

    def run(self, program: str, *arguments: str) -> str:
        """Return what a program of the environment printed; fails where its exit code is not 0."""
        variables = {name: text for name, text in os.environ.items() if name.startswith(KEPT_VARIABLES)}
        folder = self.environment / "bin"
        done = subprocess.run(
            [str(folder / program), *arguments],
            cwd=self.work,
            env={**variables, **ONE_THREAD, "PATH": str(folder), "HOME": str(self.environment / "home")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def last_line(self, *arguments: str) -> dict[str, object]:
        """Return the JSON object with which a command of `medusa-repro` ends."""
        told: dict[str, object] = json.loads(self.run("medusa-repro", *arguments).splitlines()[-1])
        return told


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("wheel")
    built, environment, work = base / "dist", base / "environment", base / "work"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = ("--quiet", "--no-deps")
    pinned = ("--build-constraint", str(ROOT / "constraints.txt"))
    subprocess.run([*pip, "wheel", *options, *pinned, "--wheel-dir", str(built), str(ROOT)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (wheel,) = built.glob("*.whl")
    python = str(environment / "bin" / "python")
    subprocess.run([*pip, "--python", python, "install", *options, str(wheel)], check=True)
    work.mkdir()
    (environment / "home").mkdir()
    found = Installed(wheel=wheel, environment=environment, work=work)
    (own,) = metadata.distributions(path=[str(found.site)])
    for needed in needs(own):
        link(needed, found.site)
    return found


def needs(wanted: metadata.Distribution) -> Iterator[metadata.Distribution]:
    """Return what a distribution needs, and what that needs, without extras that nobody asks for."""
    waiting: list[tuple[metadata.Distribution, frozenset[str]]] = [(wanted, frozenset())]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one, extras = waiting.pop()
        for requirement in map(Requirement, one.requires or ()):
            marker, key = requirement.marker, (requirement.name.lower(), frozenset(requirement.extras))
            asked = marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, ""))
            if asked and key not in seen:
                seen.add(key)
                found = metadata.distribution(requirement.name)
                waiting.append((found, key[1]))
                yield found


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Link the files and folders that a distribution put into its site-packages into another one."""
    for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / name).exists():  # a folder that distributions share is linked once
            (site / name).symlink_to(Path(str(distribution.locate_file(name))))


def shipped_files() -> set[str]:
    """Return what a wheel has to hold of this checkout: every file of the packages but the tests."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file()
        and not {"tests", "__pycache__"} & set(path.relative_to(ROOT).parts)
        and path.suffix not in (".tmp", ".part")  # half-written, and ignored by git
    }


def copied_record(suite: str, work: Path) -> Path:
    """Return a copy of a suite's newest committed record, without its report."""
    newest = max((ROOT / "results" / suite).glob("*/*/manifest.json"), key=lambda path: path.parent.name)
    copy = work / "copies" / suite
    shutil.copytree(newest.parent, copy, ignore=shutil.ignore_patterns("report.md", "*.png"))
    return copy


def test_the_wheel_holds_all_code_and_data_and_no_tests(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == shipped_files()
    assert len([name for name in names if name.startswith("suites/")]) > 40


def test_only_the_wheel_is_there(installed: Installed) -> None:
    """Neither this checkout nor git nor what only tests and extras need can be reached."""
    code = (
        f"import json, sys; import {', '.join(PACKAGES)}; print(json.dumps([sys.path, ["
        + ", ".join(f"{package}.__file__" for package in PACKAGES)
        + "]]))"
    )
    search_path, files = json.loads(installed.run("python", "-c", code))
    assert all(Path(file).is_relative_to(installed.site) for file in files)
    assert not any(Path(entry).is_relative_to(ROOT) for entry in search_path)
    present = {found.name for found in metadata.distributions(path=[str(installed.site)])}
    assert {"medusa-repro", "torch", "transformers"} <= present
    assert not {"pytest", "matplotlib", "ray", "ruff"} & present
    assert shutil.which("git", path=str(installed.environment / "bin")) is None


def test_it_says_its_version_and_looks_at_the_machine(installed: Installed) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert installed.run("medusa-repro", "--version") == f"medusa-repro {version}\n"
    assert "threads" in installed.run("medusa-repro", "doctor")


def test_smoke_leaves_a_sound_record_in_the_working_directory(installed: Installed) -> None:
    told = installed.last_line("reproduce", "smoke")
    (manifest,) = installed.work.glob("results/smoke/*/*/manifest.json")
    assert told["valid"] == {"texts": True, "speeds": None}
    environment = json.loads((manifest.parent / "environment.json").read_text())
    assert environment["commit"] is None and environment["dirty"] is None
    record = str(manifest.parent.relative_to(installed.work))
    assert installed.last_line("validate", record)["valid"] is True


@pytest.mark.parametrize("suite", ["embedded", "embedded_training_quick"])
def test_a_copied_record_is_validated_and_reported(installed: Installed, suite: str) -> None:
    """The second kind draws curves where matplotlib is there; here it is not, and the report does without."""
    record = copied_record(suite, installed.work)
    assert installed.last_line("validate", str(record)) == {
        "record": suite,
        "valid": True,
        "num_faults": 0,
    }
    installed.last_line("report", str(record))
    assert (record / "report.md").read_text().startswith("# ")
