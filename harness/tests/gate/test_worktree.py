"""The base's worktree: found by real git, and gone again however the gate ends."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.errors import UserError
from harness.gate.worktree import (
    Base,
    _host,
    base_of,
    checkout_root,
    interrupted_by_term,
    remove_stale,
    worktree,
)
from harness.paths import code_folder

HOLDS = """
import signal, sys, time
from pathlib import Path
from harness.gate.worktree import interrupted_by_term, worktree

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script's background may have put off
with interrupted_by_term(), worktree(Path(sys.argv[1]), sys.argv[2], home=Path(sys.argv[3])) as folder:
    print(folder.name, flush=True)
    time.sleep(120)
"""


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a clone with two commits on main and one on a branch that left main at the first."""
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.email", "nobody@example.org")
    git(folder, "config", "user.name", "nobody")
    for text in ("one", "two"):
        (folder / "file.txt").write_text(text)
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", text)
    git(folder, "switch", "-qc", "branch", "HEAD~1")
    (folder / "other.txt").write_text("three")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "three")
    return folder


def test_the_base_is_the_merge_base_with_main_or_what_is_named(clone: Path) -> None:
    base = base_of(clone, None)
    assert base.commit == git(clone, "rev-parse", "main~1") and base.found == "merge base with main"
    assert base_of(clone, "main").commit == git(clone, "rev-parse", "main")
    with pytest.raises(UserError, match="found no revision 'nowhere'"):
        base_of(clone, "nowhere")
    with pytest.raises(UserError, match="found no revision '--all'"):
        base_of(clone, "--all")
    git(clone, "branch", "-m", "main", "trunk")
    with pytest.raises(UserError, match="found no branch main"):
        base_of(clone, None)


def test_a_clean_main_is_compared_with_the_commit_before_it(clone: Path) -> None:
    """It was compared with itself, and nothing said so."""
    git(clone, "switch", "-q", "main")
    first, second = git(clone, "rev-parse", "main~1"), git(clone, "rev-parse", "main")
    (clone / "results").mkdir()
    (clone / "results" / "gate.json").write_text("what a run writes is no change of the code")
    base = base_of(clone, None)
    assert base.commit == first
    assert base.found == "first parent: HEAD is the merge base with main and nothing is changed"
    (clone / "file.txt").write_text("changed")
    assert base_of(clone, None) == Base(second, "merge base with main"), "what is not committed is the change"
    git(clone, "checkout", "-q", "--", "file.txt")
    (clone / "new.txt").write_text("so is a new file")
    assert base_of(clone, None).commit == second
    (clone / "new.txt").unlink()
    assert base_of(clone, "main").commit == second, "whoever names it gets it"
    git(clone, "switch", "-q", "--detach", "main~1")
    with pytest.raises(UserError, match=r"and no commit before it; need two versions.*--base REVISION"):
        base_of(clone, None)


def test_of_a_merge_on_main_the_first_parent_is_the_base(clone: Path) -> None:
    git(clone, "switch", "-q", "main")
    before = git(clone, "rev-parse", "main")
    git(clone, "merge", "-q", "--no-ff", "-m", "merge", "branch")
    assert base_of(clone, None).commit == before


def test_a_main_that_is_behind_is_not_the_base(clone: Path) -> None:
    """A branch that left the fetched main at its second commit has nothing to do with that commit."""
    git(clone, "update-ref", "refs/remotes/origin/main", "main")
    git(clone, "switch", "-qc", "later", "main")
    (clone / "more.txt").write_text("four")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "four")
    git(clone, "branch", "-qf", "main", "main~1")
    base = base_of(clone, None)
    assert (base.commit, base.found) == (
        git(clone, "rev-parse", "origin/main"),
        "merge base with origin/main",
    )


def test_a_users_own_worktree_stays_known(clone: Path, tmp_path: Path) -> None:
    """One on a disk that is not there now, which `git worktree prune` would forget."""
    git(clone, "worktree", "add", "-q", "--detach", str(tmp_path / "away"), "main")
    (tmp_path / "away").rename(tmp_path / "unplugged")
    with worktree(clone, git(clone, "rev-parse", "main"), home=tmp_path / "home"):
        pass
    assert len(git(clone, "worktree", "list").splitlines()) == 2


def test_without_a_checkout_or_git_one_line_says_so(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout_root(clone) == clone.resolve()
    (tmp_path / "bare").mkdir()
    (clone / "untracked").mkdir()
    for folder in (tmp_path / "bare", clone / "untracked"):
        with pytest.raises(UserError, match=r"found no git checkout.*--baseline"):
            checkout_root(folder)
    monkeypatch.setenv("PATH", str(tmp_path / "bare"))
    with pytest.raises(UserError, match="found no git checkout"):
        checkout_root(clone)


def test_a_worktree_holds_the_commit_and_is_gone_afterwards(clone: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with worktree(clone, git(clone, "rev-parse", "main"), home=home) as folder:
        assert (folder / "file.txt").read_text() == "two" and not (folder / "other.txt").exists()
        assert remove_stale(home) == (), "its gate is alive"
        assert len(git(clone, "worktree", "list").splitlines()) == 2
    assert list(home.iterdir()) == [] and len(git(clone, "worktree", "list").splitlines()) == 1
    with pytest.raises(UserError, match="found no worktree of"), worktree(clone, "f" * 40, home=home):
        pass
    assert list(home.iterdir()) == []


def test_a_checkout_runs_no_hook_of_the_clone(clone: Path, tmp_path: Path) -> None:
    hook = clone / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    hook.chmod(0o755)
    with worktree(clone, git(clone, "rev-parse", "main"), home=tmp_path / "home"):
        assert not (tmp_path / "ran").exists()
    git(clone, "checkout", "-q", "main")
    assert (tmp_path / "ran").exists(), "an ordinary checkout runs it"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_gate_leaves_no_worktree_behind(clone: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Not after SIGKILL either: what it leaves, another process removes."""
    home = tmp_path / "home"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, clone, git(clone, "rev-parse", "main"), home],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(code_folder().parent)},
    )
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert (home / name / "file.txt").exists()
    process.send_signal(number)
    process.wait(30)
    ends = time.monotonic() + (20 if number == signal.SIGKILL else 0)
    while list(home.iterdir()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert list(home.iterdir()) == [] and len(git(clone, "worktree", "list").splitlines()) == 1


def test_what_a_gate_and_its_minder_left_the_next_one_removes(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, commit = tmp_path / "home", git(clone, "rev-parse", "main")
    with worktree(clone, commit, home=home) as folder:
        left = home / folder.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")
        git(clone, "worktree", "move", str(folder), str(left))
        monkeypatch.setattr(platform, "node", lambda: "another-host")
        assert remove_stale(home) == (), "another host's: its processes are not to be seen here"
        monkeypatch.undo()
        assert remove_stale(home) == (left.name,)
    assert len(git(clone, "worktree", "list").splitlines()) == 1
    assert platform.node() not in left.name


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    """The number of a killed gate may be given out again; the time of its beginning is not."""
    home, own, host = tmp_path / "home", psutil.Process(), _host()
    begun = int(own.create_time())
    gone = {f"{host}-{own.pid}-{begun - 5}-abc", f"{host}-no-number-abc", f"{host}-{2**22 + 1}-1-abc"}
    kept = {
        f"{host}-{own.pid}-{begun}-abc",
        f"{host}-{own.pid}-{begun + 1}-abc",
        f"{'0' * 12}-1-1-abc",
        "1-1-a",
    }
    for name in gone | kept:
        (home / name).mkdir(parents=True)
    assert set(remove_stale(home)) == gone and {path.name for path in home.iterdir()} == kept


def test_a_request_to_end_is_an_interrupt_only_meanwhile() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupted_by_term():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
