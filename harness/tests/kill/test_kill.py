"""The fast core of `nox -s kill`: runs killed where they write, rename and are halfway through a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.tests.forks import warm_up
from harness.tests.kill.jobs import JOBS, RESULTS, write_run
from harness.tests.kill.prover import How, Prover, faults_of, steady


@pytest.fixture(scope="module")
def prover(heads_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prover]:
    """A prover of a small run."""
    warm_up()
    folder = tmp_path_factory.mktemp("kill")
    with steady():
        write_run(folder, heads_file)
        yield Prover(folder, folder / "out")


@pytest.mark.parametrize(("how", "share"), [("write", 0.5), ("rename", 0.8), ("torn", 0.6)])
def test_a_killed_run_goes_on_to_the_same_end(prover: Prover, how: How, share: float) -> None:
    events = prover.whole(JOBS["reproduce"]).events[how]
    kill = prover.kill(JOBS["reproduce"], 0, how=how, at=max(1, int(share * events)))
    assert kill.struck and kill.faults == ()


def test_what_was_lost_is_seen(prover: Prover, tmp_path: Path) -> None:
    """Without a record, with a line gone, or with a temporary file left, the prover says so."""
    job = JOBS["reproduce"]
    whole, folder = prover.whole(job), prover.folder(job, "spoilt")
    ended = prover.command(job, folder)
    assert list(faults_of(job, folder, whole, held=job.held(folder), again=ended)) == []
    held = job.held(folder)
    (lines,) = (folder / RESULTS).rglob("generations.jsonl")
    lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:-1]))
    (lines.parent / "trees.jsonabc.tmp").touch()
    told = list(faults_of(job, folder, whole, held=held, again=ended))
    assert any("lost 1 of" in one for one in told) and any("temporary files" in one for one in told)
    assert any("is not valid" in one for one in told)
