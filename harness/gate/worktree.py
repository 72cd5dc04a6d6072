"""The base's code in a git worktree of its own, which is gone again when the gate ends, however it ends."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from harness.errors import UserError
from harness.paths import code_folder

MAIN_NAMES = ("main", "origin/main", "master", "origin/master")
_SECONDS = 300
_CLOCK_S = 2  # by which the time of a process's beginning may change, when the clock is set right
_MINDER = """
import sys
sys.stdin.buffer.read()
from pathlib import Path
from harness.gate.worktree import remove_for_good
remove_for_good(Path(sys.argv[1]))
"""
_WRITTEN_BY_RUNS = (":(top,exclude)results", ":(top,exclude)README.md")  # as for a record's `dirty`


@dataclass(frozen=True)
class Base:
    """The commit to compare with, and how it was found."""

    commit: str
    found: str


def checkout_root(folder: Path) -> Path:
    """Return the root of the git checkout that tracks a folder.

    Raises: UserError where there is none, or no git.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    tracked = root is not None and _git(folder, "ls-files", "--error-unmatch", "--", ".") is not None
    if root is None or not tracked:
        raise UserError(
            found="no git checkout",
            need="one, whose merge base with main is measured as the base",
            where="the folder of this code",
            do="run it in a clone, or compare with a stored record: --baseline FOLDER",
        )
    return Path(root)


def base_of(root: Path, revision: str | None) -> Base:
    """Return the base: a revision, or the merge base of this checkout with main.

    A merge base that is this very checkout would compare it with itself: its first parent is taken instead.
    Raises: UserError for a revision that git does not know, where no main is found, or for a first commit.
    """
    if revision is not None:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        if commit is None:
            raise UserError(
                found=f"no revision {revision!r}",
                need="a commit, branch or tag that this clone holds",
                where="--base",
                do="fetch it, or name another",
            )
        return Base(commit, f"revision {revision}")
    # Of a branch here and the one that was fetched, one may be behind: the nearer merge base counts.
    known = [(commit, name) for name in MAIN_NAMES if (commit := _git(root, "merge-base", "HEAD", name))]
    if known:
        commit, name = min(
            known, key=lambda one: int(_git(root, "rev-list", "--count", f"{one[0]}..HEAD") or 0)
        )
        return _with_a_change(root, commit, name=name)
    raise UserError(
        found="no branch main",
        need=f"one of {', '.join(MAIN_NAMES)}, with history in common",
        where="this clone",
        do="name the base: --base REVISION, or fetch main with its history",
    )


def _with_a_change(root: Path, commit: str, *, name: str) -> Base:
    """Return the merge base as it is where this checkout differs from it, else the commit before it."""
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", ":(top)", *_WRITTEN_BY_RUNS)
    if commit != head or changed != "":
        return Base(commit, f"merge base with {name}")
    parent = _git(root, "rev-parse", "--verify", "--quiet", "HEAD^1")
    if parent is None:
        raise UserError(
            found="a checkout that is its own merge base with main, and no commit before it",
            need="two versions to compare",
            where="this clone",
            do="name the base: --base REVISION, or fetch the history",
        )
    return Base(parent, f"first parent: HEAD is the merge base with {name} and nothing is changed")


@contextlib.contextmanager
def worktree(root: Path, commit: str, *, home: Path) -> Iterator[Path]:
    """Check a commit out into a folder below `home`, and remove it afterwards.

    Where this process is killed, another one removes it. Where that is killed, too, the folder's name says
    whose it is, and the next gate on this host removes it.
    Raises: UserError where git cannot.
    """
    remove_stale(home)
    home.mkdir(parents=True, exist_ok=True)
    own = psutil.Process()
    folder = home / f"{_host()}-{own.pid}-{int(own.create_time())}-{commit[:12]}"
    quiet = ("-c", "core.hooksPath=/dev/null")  # a checkout here runs nothing
    minder = _minder(folder)
    try:
        if _git(root, *quiet, "worktree", "add", "--detach", "--quiet", str(folder), commit) is None:
            raise UserError(
                found=f"no worktree of {commit[:12]}",
                need="git to check it out",
                where="the cache folder",
                do="look for room on the disk, and run git worktree prune",
            )
        yield folder
    finally:
        _remove(folder)
        minder.kill()
        minder.communicate()


def _minder(folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that removes a worktree when this one ends, however it ends.

    It waits for the end of a pipe that this process alone holds, in a session of its own, so that what ends
    all processes of a terminal leaves it alone.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _MINDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(code_folder().parent)},
        start_new_session=True,
    )


def remove_stale(home: Path) -> tuple[str, ...]:
    """Remove the worktrees of this host's gates that are gone, and return their names."""
    gone = [folder for folder in sorted(home.glob("*-*-*-*")) if _is_stale(folder.name)]
    for folder in gone:
        _remove(folder)
    return tuple(folder.name for folder in gone)


def _is_stale(name: str) -> bool:
    """Return whether a worktree is of this host and its gate is gone; of another host nobody here knows."""
    host, pid, begun, _ = name.split("-", 3)
    if host != _host():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - int(begun)) > _CLOCK_S
    except (ValueError, psutil.Error):
        return True


def _host() -> str:
    """Return what stands for this host in a name, and does not tell it."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def remove_for_good(folder: Path) -> None:
    """Remove a worktree whose gate was killed, while git or a version's process may still write into it."""
    for _ in range(10):
        _remove(folder)
        time.sleep(0.1)


def _remove(folder: Path) -> None:
    """Remove a worktree's files, and let its clone forget it."""
    clone = None
    with contextlib.suppress(OSError):  # of a worktree that git did not finish
        told = (folder / ".git").read_text(encoding="utf-8").strip().removeprefix("gitdir: ")
        clone = Path(told).parents[1]  # its own folder lies in .git/worktrees
    if clone is not None and clone.is_dir():
        _git(clone, "worktree", "remove", "--force", "--force", str(folder))
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def interrupted_by_term() -> Iterator[None]:
    """Let a request to end be an interrupt meanwhile, so that what was begun is put away."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _git(folder: Path, *words: str) -> str | None:
    """Return what git says, without its last newline; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
