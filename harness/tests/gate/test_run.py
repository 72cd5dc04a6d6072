"""A gate end to end over real clones: a planted slowdown, a base that does not run, a stored baseline.

The model is tiny and the machine may be busy, so that only a slowdown by several times is planted here; what
a gate sees of 5 % is drawn from recorded steps in `test_simulate.py`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from harness.errors import ExitCode
from harness.paths import CACHE_VARIABLE, code_folder
from harness.records.gate.record import GATE_FILE
from harness.tests.gate.planted import CHANGED, clone_as_it_is, gate_in, git, slow_down
from harness.tests.tiny_suite import command

T = TypeVar("T")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = code_folder().parent
    if not (checkout / ".git").exists():
        pytest.skip("this code lies in no git checkout")
    return clone_as_it_is(checkout, tmp_path_factory.mktemp("gate") / "clone")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep worktrees and calibrations of a test in a folder of its own; the tiny model needs no asset."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "cache"


def gated(clone: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return gate_in(clone, "smoke", *words, captures=True)


def test_a_planted_slowdown_is_a_regression_and_its_record_serves_as_a_baseline(
    clone: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "job.md"))
    slow_down(clone, 6.0)
    try:
        done = gated(clone, "--base", "HEAD", "--results", tmp_path / "results")
    finally:
        git(clone, "checkout", "--quiet", "--", str(CHANGED))
    assert done.returncode == ExitCode.GATE_REGRESSION, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["outcome"] == "REGRESSION" and last["dirty"] is True and last["valid"]["speeds"] is True
    outcomes = {name: one["outcome"] for name, one in last["findings"].items()}
    assert outcomes["step_s/vanilla"] == outcomes["step_s/tree"] == outcomes["tokens_per_s/tree"] == "worse"
    assert {outcomes[name] for name in ("parity/tree", "parity/vanilla", "tokens_per_step/tree")} == {
        "equivalent"
    }
    assert outcomes["quality/typical"] == "equivalent"
    assert last["slowed"]["part"] == "host", "the time was planted outside of every marked part"
    (folder,) = (tmp_path / "results" / "gate" / "smoke").glob("*/*")
    assert {path.name for path in folder.iterdir()} == {
        "gate.json",
        "junit.xml",
        "bmf.json",
        "headline.json",
        "manifest.json",
        "report.md",
    }
    assert json.loads((folder / "headline.json").read_text()) == last
    summary = (folder / "report.md").read_text()
    base = git(clone, "rev-parse", "HEAD")
    place = Path(os.path.relpath(tmp_path / "results", clone)).as_posix()
    assert summary.rstrip().endswith(f"nox -s gate -- smoke --base {base} --results {place}\n```")
    assert "differs from its commit: it was measured as it is" in summary
    assert summary.rstrip().endswith((tmp_path / "job.md").read_text().strip())
    _as_any_record(folder)
    assert list((cache / "gate" / "worktrees").iterdir()) == []
    assert len(git(clone, "worktree", "list").splitlines()) == 1
    _as_baseline(clone, folder, tmp_path)


def _as_any_record(folder: Path) -> None:
    """`validate` and `report` open it; a regression is a valid measurement."""
    said = (folder / "report.md").read_bytes()
    checked = command("validate", folder)
    assert checked.code == 0 and json.loads(checked.out.splitlines()[-1])["num_faults"] == 0
    (folder / "report.md").unlink()
    told = command("report", folder)
    assert told.code == 0 and (folder / "report.md").read_bytes() == said
    assert told.out.splitlines()[-1] == (folder / "headline.json").read_text().strip()


def _as_baseline(clone: Path, folder: Path, tmp_path: Path) -> None:
    """The slowed head as a baseline: ratios alone are compared, and nobody else's device."""
    done = gated(clone, "--baseline", folder, "--results", tmp_path / "again")
    assert done.returncode != ExitCode.USER_ERROR, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    timed = {name.split("/")[0] for name in last["findings"]} & {
        "step_s",
        "tokens_per_s",
        "overhead",
        "speedup",
    }
    assert timed == {"overhead", "speedup"}
    (again,) = (tmp_path / "again" / "gate" / "smoke").glob("*/*")
    assert command("validate", again).code == 0 and "has no seal" not in (again / "report.md").read_text()
    words = shlex.split(last["repeat"])
    assert (clone / words[words.index("--baseline") + 1]).resolve() == folder.resolve()
    assert last["findings"]["parity/tree"]["outcome"] == "equivalent"
    data = json.loads((folder / GATE_FILE).read_text())
    data["sides"]["head"]["device"]["name"] = "Another processor"
    (folder / GATE_FILE).write_text(json.dumps(data))
    done = gated(clone, "--baseline", folder, "--results", tmp_path / "again")
    assert done.returncode == ExitCode.USER_ERROR and "as sealed; in gate.json" in done.stderr
    (folder / "manifest.json").unlink()
    done = gated(clone, "--baseline", folder, "--results", tmp_path / "again")
    assert done.returncode == ExitCode.USER_ERROR
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "found a baseline of another device (Another processor" in line
    data["schema_version"] = 99
    (folder / GATE_FILE).write_text(json.dumps(data))
    done = gated(clone, "--baseline", folder)
    assert done.returncode == ExitCode.USER_ERROR and "found schema_version 99; need at most 1" in done.stderr


def test_a_killed_gate_takes_its_processes_and_its_worktree_with_it(
    clone: Path, tmp_path: Path, cache: Path
) -> None:
    """They went on for up to 24 s, until a model was loaded and the next request did not come."""
    gate = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "harness",
            "gate",
            "smoke",
            "--base",
            "HEAD",
            "--results",
            tmp_path / "results",
        ],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        sides = until(lambda: versions_of(gate.pid), seconds=60)
        time.sleep(1)  # while they load
    finally:
        gate.kill()
        gate.wait()
    _, alive = psutil.wait_procs(sides, timeout=2)
    assert alive == []
    until(lambda: not list((cache / "gate" / "worktrees").iterdir()), seconds=20)
    assert len(git(clone, "worktree", "list").splitlines()) == 1 and not (tmp_path / "results").exists()


def versions_of(pid: int) -> list[psutil.Process]:
    """Return the processes of both versions of a gate; none before both are there."""
    children = psutil.Process(pid).children()
    found = [one for one in children if any(word.endswith("turns.py") for word in one.cmdline())]
    return found if len(found) == 2 else []


def until(found: Callable[[], T], *, seconds: float) -> T:
    """Return what is found as soon as it is true; fails where it is not in time."""
    ends = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return value


def test_a_base_that_does_not_run_is_one_line(clone: Path, tmp_path: Path) -> None:
    head = git(clone, "rev-parse", "HEAD")
    text = (clone / CHANGED).read_text(encoding="utf-8")
    (clone / CHANGED).write_text(text.replace("class ArmRunner", "class NoSuchRunner"), encoding="utf-8")
    git(clone, "commit", "--quiet", "--all", "--message", "Break")
    broken = git(clone, "rev-parse", "HEAD")
    git(clone, "reset", "--quiet", "--hard", head)
    done = gated(clone, "--base", broken, "--results", tmp_path / "results")
    assert done.returncode == ExitCode.USER_ERROR and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "found a base that does not run (ImportError: cannot import name 'ArmRunner'" in line
    assert line.endswith("to mend it: name another --base") and str(tmp_path) not in line
    assert not (tmp_path / "results").exists() and len(git(clone, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--base", "nowhere"), "found no revision 'nowhere'"),
        (("--base", "HEAD", "--calibrate"), "found --base and --calibrate"),
        (("--base", "HEAD", "--baseline", "x"), "found --base and --baseline"),
        (("--baseline", "nothing.json"), "found no readable nothing.json"),
    ],
)
def test_what_cannot_be_compared_is_one_line(clone: Path, words: tuple[str, ...], found: str) -> None:
    done = gated(clone, *words)
    assert done.returncode == ExitCode.USER_ERROR and "Traceback" not in done.stderr
    assert sum(line.startswith("error:") for line in done.stderr.splitlines()) == 1
    assert found in done.stderr


def test_without_git_one_line_says_what_to_do(clone: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    exported.mkdir()
    git(clone, "archive", "--output", str(tmp_path / "all.tar"), "HEAD", "harness", "medusa_impl", "suites")
    subprocess.run(["tar", "-xf", tmp_path / "all.tar", "-C", exported], check=True)
    done = gated(exported)
    assert done.returncode == ExitCode.USER_ERROR
    assert "error: found no git checkout" in done.stderr and "--baseline FOLDER" in done.stderr
