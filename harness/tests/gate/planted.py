"""A gate over a clone of this checkout in which every step takes a share longer, or none does.

    python -m harness.tests.gate.planted --share 0.05 [GATE ..]     a regression to be caught: exit code 1
    python -m harness.tests.gate.planted --share 0 [GATE ..]        this checkout against itself: exit code 0

The clone lies in a temporary folder; the record goes into this checkout's results/ unless --results follows.
What follows the options is handed to `medusa-repro gate`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.paths import code_folder

CHANGED = Path("harness") / "device" / "arms.py"
SLOWED = '''

_steps_as_they_were = ArmRunner.steps


def _slowed(runner, *arguments, **options):
    """Take a share longer for each step, busy all the while."""
    steps = _steps_as_they_were(runner, *arguments, **options)
    while True:
        began = runner.clock()
        try:
            step = next(steps)
        except StopIteration:
            return
        ends = (now := runner.clock()) + {share} * (now - began)
        while runner.clock() < ends:
            pass
        yield step


ArmRunner.steps = _slowed
'''


def git(folder: Path, *words: str) -> str:
    """Return what git says. Raises: CalledProcessError where it fails."""
    named = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    done = subprocess.run(
        ["git", "-C", str(folder), *named, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def clone_as_it_is(checkout: Path, folder: Path) -> Path:
    """Return a clone of a checkout, in which changes that are not committed yet are a commit of their own."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", checkout, folder], check=True)
    changed = git(checkout, "diff", "--name-only", "HEAD").splitlines()
    new = git(checkout, "ls-files", "--others", "--exclude-standard").splitlines()
    for name in (*changed, *new):
        (folder / name).unlink(missing_ok=True)
        if (checkout / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, folder / name)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "As it is")
    return folder


def slow_down(clone: Path, share: float) -> None:
    """Let every step in a clone take a share longer, as a change that is not committed."""
    text = (clone / CHANGED).read_text(encoding="utf-8")
    (clone / CHANGED).write_text(text + SLOWED.replace("{share}", repr(share)), encoding="utf-8")


def gate_in(clone: Path, *words: str | Path, captures: bool = False) -> subprocess.CompletedProcess[str]:
    """Return `medusa-repro gate` as it ended in a clone, with the clone's own code."""
    return subprocess.run(
        [sys.executable, "-m", "harness", "gate", *map(str, words)],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=captures,
        text=True,
        check=False,
    )


def main(words: Sequence[str] | None = None) -> int:
    """Clone, plant, gate; return the gate's exit code."""
    parser = argparse.ArgumentParser(prog="python -m harness.tests.gate.planted", description=__doc__)
    parser.add_argument("--share", type=float, required=True, help="by which each step takes longer")
    given, rest = parser.parse_known_args(words)
    checkout = code_folder().parent
    if "--results" not in rest:
        rest += ["--results", str(checkout / "results")]
    with tempfile.TemporaryDirectory(prefix="medusa-repro-planted-") as folder:
        clone = clone_as_it_is(checkout, Path(folder) / "clone")
        if given.share:
            slow_down(clone, given.share)
        return gate_in(clone, "--base", "HEAD", *rest).returncode


if __name__ == "__main__":
    sys.exit(main())
