"""Tries mutants in a copy of the checkout, one at a time, and keeps what became of each."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.tests.forks import ROOT, CaseLog
from harness.tests.mutate.covers import LEFT_OUT, deciding_tests
from harness.tests.mutate.draw import Mutant

EQUIVALENT = Path(__file__).with_name("equivalent.toml")
MAX_EQUIVALENT = 20
LIMIT_FACTOR, SHORTEST_LIMIT_S = 8.0, 20.0  # times what the same tests take on the whole code
WHOLE_LIMIT_S = 600.0


@dataclass(frozen=True)
class Tried:
    """What became of one mutant; `by` is the test that killed it, `state` what that test's file was."""

    name: str
    where: str
    operator: str
    before: str
    after: str
    killed: bool
    by: str
    state: str
    seconds: float


@dataclass(frozen=True)
class Reason:
    """Why no output of a mutant can differ: the file, the lines before and after, and the reason."""

    file: str
    before: str
    after: str
    reason: str


class Prover:
    """A copy of the checkout, and a process in it that runs tests on what is written there."""

    def __init__(self, tree: Path, out: Path, *, seed: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.tree = tree
        self.log = CaseLog(out / "mutants.jsonl", seed, code_of_targets())
        _copy(tree)
        self._whole_s: dict[tuple[str, ...], float] = {}
        self._warm = subprocess.Popen(
            [sys.executable, "-m", "harness.tests.mutate.warm"],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        assert self._warm.stdin is not None
        self._warm.stdin.close()
        self._warm.wait()

    def run(self, mutants: Sequence[Mutant]) -> Iterator[tuple[Mutant, Tried]]:
        """Yield what becomes of each mutant.

        A mutant that was tried before is not tried again where the code is the same and either the test that
        killed it, or all tests that let it live.
        """
        known = {row["name"]: Tried(**row) for row in self.log.rows()}
        for mutant in mutants:
            tried = known.get(mutant.name)
            if tried is None or tried.state != self._state(mutant, tried):
                tried = self.try_one(mutant)
                self.log.add(asdict(tried))
            yield mutant, tried

    def try_one(self, mutant: Mutant) -> Tried:
        """Write a mutant into the copy, run the tests of its file, and put the file back."""
        tests = deciding_tests(mutant.file)
        limit_s = max(SHORTEST_LIMIT_S, LIMIT_FACTOR * self.whole_s(tests))
        path = self.tree / mutant.file
        whole, times = path.read_bytes(), path.stat()
        try:
            path.write_text(mutant.text, encoding="utf-8")
            told = self._ask(tests, limit_s)
        finally:
            path.write_bytes(whole)
            os.utime(
                path, ns=(times.st_atime_ns, times.st_mtime_ns)
            )  # so that its compiled code counts again
        by = told["by"] if told["code"] >= 0 else "the limit in time"
        tried = Tried(
            mutant.name,
            mutant.where,
            mutant.place.operator,
            mutant.before,
            mutant.after,
            killed=told["code"] != 0,
            by=by,
            state="",
            seconds=told["seconds"],
        )
        return Tried(**{**asdict(tried), "state": self._state(mutant, tried)})

    def whole_s(self, tests: tuple[str, ...]) -> float:
        """Return the seconds that tests take on the whole code. Raises: SystemExit where they fail there."""
        if tests not in self._whole_s:
            told = self._ask(tests, WHOLE_LIMIT_S, keep=True)
            if told["code"]:
                raise SystemExit(
                    f"found that {told['by'] or ' '.join(tests)} ends with {told['code']} on the whole code, "
                    "need tests that pass there"
                )
            self._whole_s[tests] = told["seconds"]
        return self._whole_s[tests]

    def _ask(self, tests: Sequence[str], limit_s: float, *, keep: bool = False) -> dict[str, Any]:
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--benchmark-disable", *tests]
        options += ["--hypothesis-seed=0", "-k", " and ".join(f"not {one}" for one in LEFT_OUT)]
        assert self._warm.stdin is not None and self._warm.stdout is not None
        self._warm.stdin.write(json.dumps({"options": options, "limit_s": limit_s, "keep": keep}) + "\n")
        self._warm.stdin.flush()
        told: dict[str, Any] = json.loads(self._warm.stdout.readline())
        return told

    def _state(self, mutant: Mutant, tried: Tried) -> str:
        """Return the state of the tests that decided: the file that killed it, else all that let it live."""
        by = tried.by.split("::")[0] if tried.killed else ""
        deciding = (by,) if by.endswith(".py") else deciding_tests(mutant.file)
        return _hash([self.tree / test for test in deciding], base=self.tree)


def code_of_targets() -> str:
    """Return what tells one state of the code and of the tests' helpers from another; tests are no part."""
    files = [path for part in ("harness", "medusa_impl") for path in (ROOT / part).rglob("*.py")]
    return _hash(
        sorted(
            path for path in files if not path.name.startswith("test_") and path.parent != EQUIVALENT.parent
        ),
        base=ROOT,
    )


def _hash(files: Iterable[Path], *, base: Path) -> str:
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.relative_to(base)}\n".encode())
        whole.update(path.read_bytes() if path.exists() else b"")
    return whole.hexdigest()[:16]


def _copy(tree: Path) -> None:
    """Copy the files that git knows, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, listed)):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def reasons() -> list[Reason]:
    """Return the mutants of which no output can differ, with the reasons."""
    found = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("mutants", [])
    return [Reason(**one) for one in found]


def table(tried: Sequence[tuple[Mutant, Tried]], excused: set[str]) -> str:
    """Return a row a file: mutants, killed, equivalent with a reason, and left."""
    rows = [("file", "mutants", "killed", "equivalent", "left")]
    for file in [*dict.fromkeys(mutant.file for mutant, _ in tried), ""]:
        own = [(one, after) for one, after in tried if file in (one.file, "")]
        killed = sum(after.killed for _, after in own)
        equal = sum(not after.killed and one.name in excused for one, after in own)
        counts = (len(own), killed, equal, len(own) - killed - equal)
        rows.append((file or "all", *map(str, counts)))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
