"""Alters files and runs the commands that read them: what is wrong with how each ended, and the table."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.tests.forks import CaseLog, Ended, command_line, forked, installed
from harness.tests.fuzz.kinds import KINDS, Command, Target
from harness.tests.fuzz.mutations import MUTATIONS, mutated

HANG_S = 10.0
INSTALLED_HANG_S = 60.0  # a process of its own imports first, on a machine that may be busy
INSTALLED_EVERY = 50
TRIES = 4  # of cases that alter what the file says, out of so many times as many
Name = tuple[str, str, int]  # kind, mutation, number


@dataclass(frozen=True)
class Case:
    """One altered file and what came of it; `fault` is empty where nothing is wrong, `same` says that the
    file still said what it did.
    """

    kind: str
    mutation: str
    number: int
    file: str
    command: str
    same: bool = False
    code: int = 0
    seconds: float = 0.0
    fault: str = ""
    told: str = ""

    @property
    def name(self) -> Name:
        """Return what tells cases apart."""
        return self.kind, self.mutation, self.number

    @property
    def label(self) -> str:
        """Return what the case is called in messages and folders."""
        return f"{self.kind}-{self.mutation}-{self.number}"


class Prover:
    """Runs cases in a world, one at a time; what each altered is put back after it."""

    def __init__(self, world: Path, out: Path, *, seed: int = 0) -> None:
        self.world, self.out, self.seed = world, out, seed
        self.log = CaseLog(out / "cases.jsonl", seed)
        self._whole: dict[str, bytes] = {}
        out.mkdir(parents=True, exist_ok=True)

    def run(self, kinds: Sequence[str], mutations: Sequence[str], *, limit: int) -> Iterator[Case]:
        """Run cases until each pair of kind and mutation has `limit` that changed what the file says."""
        before = {case.name: case for case in (Case(**row) for row in self.log.rows())}
        num_run = len(before)
        for kind in kinds:
            for mutation in mutations:
                counted = 0
                for number in range(limit * TRIES):
                    if counted == limit:
                        break
                    case = before.get((kind, mutation, number))
                    if case is None:
                        case = self.case(
                            kind, mutation, number, own_process=(num_run + 1) % INSTALLED_EVERY == 0
                        )
                        num_run += not case.same
                        self.log.add(asdict(case))
                    counted += not case.same
                    yield case

    def case(self, kind: str, mutation: str, number: int, *, own_process: bool = False) -> Case:
        """Run one case; the same seed and name alter the file in the same way."""
        target, command = KINDS[kind].target(number)
        rng = random.Random(f"{self.seed}/{kind}/{mutation}/{number}")
        whole = self._bytes(target.file)
        altered = mutated(mutation, whole, target.form, rng)
        if altered == whole or target.form.meaning(altered) == target.form.meaning(whole):
            return Case(kind, mutation, number, target.file, " ".join(command), same=True)
        ended = self._run(target, altered, command, own_process=own_process)
        fault = fault_of(ended, command, strict=is_strict(target, mutation, whole, altered), own=own_process)
        told = _told(ended)
        case = Case(
            kind,
            mutation,
            number,
            target.file,
            " ".join(command),
            code=ended.code,
            seconds=round(ended.seconds, 3),
            fault=fault,
            told=told,
        )
        if fault:
            self._save(case, altered, ended)
        return case

    def baseline(self, kind: str) -> list[str]:
        """Return what is wrong with the commands of a kind on whole files: nothing may be."""
        wrong = []
        for target in KINDS[kind].targets:
            for command in target.commands:
                ended = self._run(target, self._bytes(target.file), command, own_process=False)
                # 2: nothing is wrong with the files, but the tiny model's heads draft badly
                if ended.code not in (0, 2) or ended.hung:
                    wrong.append(f"{' '.join(command)}: exit code {ended.code}: {_told(ended)}")
        return wrong

    def _bytes(self, file: str) -> bytes:
        if file not in self._whole:
            self._whole[file] = (self.world / file).read_bytes()
        return self._whole[file]

    def _run(self, target: Target, altered: bytes, command: Command, *, own_process: bool) -> Ended:
        scratch = self.world / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        changed = {target.file: altered}
        if target.sealed_by is not None:
            manifest = json.loads(self._bytes(target.sealed_by))
            manifest["sha256"][Path(target.file).name] = hashlib.sha256(altered).hexdigest()
            changed[target.sealed_by] = json.dumps(manifest).encode()
        try:
            for file, data in changed.items():
                (self.world / file).write_bytes(data)
            if own_process:
                return installed(command, folder=self.world, limit_s=INSTALLED_HANG_S)
            return forked(command_line(command), folder=self.world, scratch=self.out, limit_s=HANG_S)
        finally:
            for file in changed:
                (self.world / file).write_bytes(self._bytes(file))

    def _save(self, case: Case, altered: bytes, ended: Ended) -> None:
        folder = self.out / "failing" / case.label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(case.file).name).write_bytes(altered)
        (folder / "stderr").write_text(ended.err[-20_000:], encoding="utf-8")
        (folder / "case.json").write_text(json.dumps(asdict(case), indent=1), encoding="utf-8")


def is_strict(target: Target, mutation: str, whole: bytes, altered: bytes) -> bool:
    """Return whether no command may take the altered file for whole."""
    if mutation in target.strict and not _only_in_open_tables(target, whole, altered):
        return True
    return target.checked is not None and target.checked(altered) != target.checked(whole)


def _only_in_open_tables(target: Target, whole: bytes, altered: bytes) -> bool:
    """Return whether two files differ in nothing but tables that may hold any key."""
    if not target.open_tables:
        return False
    contents = []
    for data in (whole, altered):
        try:
            value = target.form.load(data)
        except (ValueError, RecursionError, OSError, KeyError, zipfile.BadZipFile, zlib.error):
            return False
        contents.append(json.dumps(_without(value, target.open_tables), sort_keys=True, default=str))
    return contents[0] == contents[1]


def _without(value: Any, names: Sequence[str]) -> Any:
    """Return a value without what tables of these names hold."""
    if isinstance(value, dict):
        return {key: None if key in names else _without(one, names) for key, one in value.items()}
    return [_without(one, names) for one in value] if isinstance(value, list) else value


def fault_of(ended: Ended, command: Command, *, strict: bool, own: bool) -> str:
    """Return what is wrong with how a command ended; empty for nothing."""
    if ended.hung:
        return "hang"
    if ended.code < 0:
        return f"killed by signal {-ended.code}"
    if "Traceback (most recent call last)" in ended.err:
        return "traceback"
    if ended.code == 1:
        return "exit code 1"
    if ended.code == 70:
        return "a defect of ours (70)"
    if ended.code == 3 and not own and _error_lines(ended) != 1:
        return "no one line"
    if ended.code not in (0, 2, 3):
        return f"exit code {ended.code}"
    if strict and (_says_valid(ended) if command[0] == "validate" else ended.code != 3):
        return "accepted"
    return ""


def _error_lines(ended: Ended) -> int:
    return sum(line.startswith("error:") for line in ended.err.split("\n"))


def _says_valid(ended: Ended) -> bool:
    return ended.code == 0 or '"valid": true' in ended.out


def _told(ended: Ended) -> str:
    lines = [line for line in ended.err.replace("\x1b", " ").split("\n") if line.strip()]
    return lines[-1][:300] if lines else ended.out.strip().split("\n")[-1][:300]


def table(cases: Iterable[Case]) -> str:
    """Return the cases that count by kind and mutation, and after a slash the faults among them."""
    counted = [case for case in cases if not case.same]
    num: Counter[tuple[str, str]] = Counter((case.kind, case.mutation) for case in counted)
    bad: Counter[tuple[str, str]] = Counter((case.kind, case.mutation) for case in counted if case.fault)
    mutations = [name for name in MUTATIONS if any(mutation == name for _, mutation in num)]
    kinds = [kind for kind in KINDS if any(kind == name for name, _ in num)]
    rows = [["kind", *mutations, "all"]]
    for kind in kinds:
        cells = [f"{num[kind, one]}/{bad[kind, one]}" for one in mutations]
        both = (sum(counts[kind, one] for one in mutations) for counts in (num, bad))
        rows.append([kind, *cells, "/".join(map(str, both))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def grouped(cases: Iterable[Case]) -> str:
    """Return the faults by kind of file and of fault, the most frequent first, with one example each."""
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        if case.fault:
            groups.setdefault((case.fault, case.kind, _shape(case)), []).append(case)
    ranked = sorted(groups.items(), key=lambda item: (_RANK.get(item[0][0], 3), -len(item[1])))
    return "\n".join(
        f"- {fault}, {kind}: {len(found)} cases, such as {found[0].label} ({found[0].command}): "
        f"{found[0].told[:200]}"
        for (fault, kind, _), found in ranked
    )


_RANK = {"accepted": 0, "hang": 1, "traceback": 2}


def _shape(case: Case) -> str:
    """Return what cases of one cause have in common: of an accepted file its name and how it was altered."""
    if case.fault == "accepted":
        return f"{case.file} {case.mutation} {case.command.split()[0]}"
    return case.told.split(":")[0][:60] + case.command.split()[0]


def nice() -> None:
    """Let others on this machine go first."""
    os.nice(15)


def wanted(asked: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Return what was asked for, or all there is. Raises: SystemExit for a name that is not known."""
    names = list(known)
    for name in asked or []:
        if name not in names:
            raise SystemExit(f"found {name!r}, need one of {', '.join(names)}")
    return list(asked or names)
