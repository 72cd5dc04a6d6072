"""`nox -s results_pull_request` with a real remote; of `gh`, which is not here, the words are kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GH = """\
#!/bin/sh
case "$2" in
list) cat "$GH_WORDS.numbers" 2> /dev/null; exit 0 ;;
esac
printf '%s\\n' "$@" >> "$GH_WORDS"
if [ -e "$GH_WORDS.refuses" ]; then
    echo "pull request create failed: GitHub Actions is not permitted to create pull requests" >&2
    exit 1
fi
echo 7 > "$GH_WORDS.numbers"
"""


@dataclass(frozen=True)
class Repository:
    """A checkout with the noxfile, README and one record, its bare remote, and what `gh` was told."""

    checkout: Path
    remote: Path
    told: Path
    programs: Path

    def propose(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run the session."""
        nox = [sys.executable, "-m", "nox", "-s", "results_pull_request", "--", *map(str, words)]
        environment = {
            **os.environ,
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "GH_WORDS": str(self.told),
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        return subprocess.run(nox, cwd=self.checkout, env=environment, capture_output=True, text=True)

    def git(self, *words: str) -> str:
        """Return what git answers in the remote."""
        return subprocess.check_output(["git", "-C", str(self.remote), *words], text=True)

    def branches(self) -> list[str]:
        """Return the branches of the remote but for main."""
        names = self.git("for-each-ref", "--format=%(refname:short)", "refs/heads").split()
        return sorted(set(names) - {"main"})


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    checkout, remote, programs = tmp_path / "checkout", tmp_path / "remote.git", tmp_path / "bin"
    (checkout / "results" / "old").mkdir(parents=True)
    for name in ("noxfile.py", "pyproject.toml"):
        shutil.copyfile(ROOT / name, checkout / name)
    (checkout / "README.md").write_text("old\n")
    (checkout / "results" / "old" / "report.md").write_text("old\n")
    programs.mkdir()
    (programs / "gh").write_text(GH)
    (programs / "gh").chmod(0o755)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (
        ("init", "--quiet", "--initial-branch", "main"),
        ("add", "."),
        (*identity, "commit", "--quiet", "--message", "Begin"),
        ("clone", "--quiet", "--bare", ".", str(remote)),
        ("remote", "add", "origin", str(remote)),
    ):
        subprocess.run(["git", *words], cwd=checkout, check=True)
    return Repository(checkout, remote, tmp_path / "told.txt", programs)


def pages(folder: Path, *, readme: str) -> Path:
    """Return a folder with a README and one more record."""
    (folder / "results" / "new").mkdir(parents=True)
    (folder / "README.md").write_text(readme)
    (folder / "results" / "new" / "report.md").write_text("new\n")
    return folder


def test_what_differs_is_proposed_once(repository: Repository, tmp_path: Path) -> None:
    folder = pages(tmp_path / "pages", readme="new\n")
    ran = repository.propose(folder)
    assert ran.returncode == 0, ran.stderr
    (branch,) = repository.branches()
    assert repository.git("show", "--format=", "--name-status", branch).split() == [
        "M", "README.md", "A", "results/new/report.md"
    ]  # fmt: skip
    words = repository.told.read_text().splitlines()
    assert words[:4] == ["pr", "create", "--head", branch] and "--body" in words
    assert repository.git("rev-parse", "main") == repository.git("rev-parse", f"{branch}^")

    subprocess.run(["git", "reset", "--quiet", "--hard", "HEAD^"], cwd=repository.checkout, check=True)
    again = repository.propose(folder)
    assert again.returncode == 0 and "holds the same" in again.stderr
    assert repository.told.read_text().splitlines() == words and repository.branches() == [branch]


def test_a_pull_request_that_is_refused_fails_and_is_asked_for_again(
    repository: Repository, tmp_path: Path
) -> None:
    """The branch was there, so the next run took it for proposed: green, and no pull request."""
    folder, refuses = pages(tmp_path / "pages", readme="new\n"), Path(f"{repository.told}.refuses")
    refuses.touch()
    for tries in (1, 2):
        ran = repository.propose(folder)
        assert ran.returncode != 0 and "not permitted to create pull requests" in ran.stdout + ran.stderr
        assert repository.told.read_text().splitlines().count("create") == tries
        subprocess.run(
            ["git", "reset", "--quiet", "--hard", repository.git("rev-parse", "main").strip()],
            cwd=repository.checkout,
            check=True,
        )
    (branch,) = repository.branches()
    refuses.unlink()
    assert repository.propose(folder).returncode == 0
    words = repository.told.read_text().splitlines()
    assert words.count("create") == 3 and words.count(branch) == 3 and repository.branches() == [branch]


def test_nothing_is_proposed_where_nothing_differs(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "README.md").write_text("old\n")
    ran = repository.propose(tmp_path / "pages")
    assert ran.returncode == 0 and "nothing to propose" in ran.stderr
    assert repository.branches() == [] and not repository.told.exists()


@pytest.mark.parametrize("name", ["noxfile.py", ".github/workflows/gate.yml", "harness/x.py"])
def test_nothing_but_pages_is_taken(repository: Repository, tmp_path: Path, name: str) -> None:
    """The job has the right to write: what it is given may change no line that runs."""
    folder = pages(tmp_path / "pages", readme="new\n")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("changed\n")
    ran = repository.propose(folder)
    assert ran.returncode != 0 and name in ran.stderr
    assert (repository.checkout / "README.md").read_text() == "old\n" and repository.branches() == []


def test_a_link_is_not_followed(repository: Repository, tmp_path: Path) -> None:
    folder = pages(tmp_path / "pages", readme="new\n")
    (folder / "results" / "link").symlink_to(tmp_path)
    assert repository.propose(folder).returncode != 0
    assert repository.branches() == []


def test_it_asks_for_its_folder(repository: Repository, tmp_path: Path) -> None:
    for words in ((), (tmp_path / "absent",)):
        ran = repository.propose(*words)
        assert ran.returncode != 0 and "name it after --" in ran.stderr
