"""The fast core of `nox -s fuzz`: a few cases of every kind, and that the prover sees what it looks for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from harness.tests.forks import Ended, forked, warm_up
from harness.tests.fuzz.formats import Format
from harness.tests.fuzz.kinds import JSON, KINDS, LINES, TENSORS, TEXT, TOML, TRACE
from harness.tests.fuzz.mutations import MUTATIONS, mutated
from harness.tests.fuzz.prover import Case, Prover, fault_of, grouped, table
from harness.tests.fuzz.world import build
from harness.tests.tiny_suite import small_device_limits

# those whose commands take milliseconds, two or three mutations of each kind
CORE = (
    *(("tree", mutation, number) for mutation, number in (("truncate", 1), ("nan", 1), ("version", 1))),
    *(("prompts", mutation, 2) for mutation in ("truncate", "flip")),
    *(("generations", mutation, number) for mutation in MUTATIONS for number in (0, 1)),
    *(("manifest", mutation, number) for mutation in ("delete", "nan", "extra") for number in (1, 2)),
    *(("trace", mutation, number) for mutation in ("flip", "nan", "reorder") for number in (0, 1, 2)),
    *(("claims", mutation, 0) for mutation in ("truncate", "version")),
    *(("heads", mutation, 0) for mutation in ("flip", "extra")),
    ("suite", "version", 0),
    ("adapter", "flip", 0),
    ("template", "delete", 0),
    ("config", "truncate", 0),
    ("conversations", "truncate", 0),
)


@pytest.fixture(scope="module")
def prover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prover]:
    """A prover in a world of its own."""
    warm_up()
    folder = tmp_path_factory.mktemp("fuzz")
    build(folder / "world")
    with small_device_limits(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDUSA_REPRO_CACHE", str(folder / "cache"))
        patch.setattr("harness.training.joint.check_overlap", lambda *args, **options: None)
        yield Prover(folder / "world", folder / "out")


def test_every_kind_and_mutation_of_the_core_is_refused_in_one_line_or_read(prover: Prover) -> None:
    cases = [prover.case(*name) for name in CORE]
    assert {case.kind for case in cases} == set(KINDS)
    assert [(case.label, case.fault, case.told) for case in cases if case.fault] == []
    assert sum(not case.same for case in cases) > len(CORE) / 2


def test_a_run_goes_on_where_it_was_cut_off(prover: Prover) -> None:
    first = [case for case in prover.run(["generations"], ["truncate"], limit=2) if not case.same]
    before = prover.log.path.read_bytes()
    with prover.log.path.open("a") as file:
        file.write('{"kind": "gen')  # cut by a kill
    again = [case for case in prover.run(["generations"], ["truncate"], limit=2) if not case.same]
    assert again == first and len(first) == 2 and prover.log.path.read_bytes() == before
    with patch("harness.tests.forks.code_state", return_value="of another day"):
        assert prover.log.rows() == []


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(0, "", "", 0.1), "accepted"),
        (Ended(3, "", "error: found a, need b\n", 0.1), ""),
        (Ended(3, "", "nothing\n", 0.1), "no one line"),
        (Ended(1, "", "", 0.1), "exit code 1"),
        (Ended(70, "", "", 0.1), "a defect of ours (70)"),
        (Ended(1, "", "Traceback (most recent call last):\n", 0.1), "traceback"),
        (Ended(-11, "", "", 0.1), "killed by signal 11"),
        (Ended(-9, "", "", 10.0, hung=True), "hang"),
    ],
)
def test_the_prover_sees_each_fault(ended: Ended, fault: str) -> None:
    assert fault_of(ended, ("report", "record"), strict=True, own=False) == fault


def test_a_fork_tells_code_and_streams_and_is_stopped(tmp_path: Path) -> None:
    def speak() -> None:
        print("said")
        raise SystemExit(7)

    def wait() -> None:
        while True:
            pass

    ended = forked(speak, folder=tmp_path, scratch=tmp_path, limit_s=10)
    assert (ended.code, ended.out, ended.hung) == (7, "said\n", False)
    assert forked(wait, folder=tmp_path, scratch=tmp_path, limit_s=0.2, busy=False).hung


@pytest.mark.parametrize(
    ("form", "data"),
    [
        (JSON, b'{"schema_version": 1, "a": [1, 2.5, "x"]}'),
        (LINES, b'{"a": 1}\n{"b": [2, 3]}\n'),
        (TOML, b'schema_version = 1\n[a]\nb = [1, 2]\nc = "x"\n'),
        (TEXT, b"one\n{{ two }}\nthree"),
    ],
    ids=["json", "lines", "toml", "text"],
)
def test_every_mutation_alters_what_a_file_says(form: Format, data: bytes) -> None:
    assert form.meaning(form.dump(form.load(data))) == form.meaning(data)
    assert form.meaning(b"\xef\xbb\xbf" + data) == form.meaning(data), "a byte-order mark says nothing"
    for mutation in MUTATIONS:
        altered = [mutated(mutation, data, form, random.Random(seed)) for seed in range(20)]
        assert any(form.meaning(one) != form.meaning(data) for one in altered), mutation
        assert mutated(mutation, data, form, random.Random(3)) == altered[3]


def test_tensors_and_traces_are_read_and_written_as_they_are(prover: Prover) -> None:
    heads = (prover.world / "heads.safetensors").read_bytes()
    assert TENSORS.meaning(TENSORS.dump(TENSORS.load(heads))) == TENSORS.meaning(heads)
    trace = (prover.world / "trace.npz").read_bytes()
    assert TRACE.meaning(TRACE.dump(TRACE.load(trace))) == TRACE.meaning(trace)


def test_the_table_counts_cases_and_faults() -> None:
    cases = [
        Case("suite", "flip", 0, "suite.toml", "reproduce suite.toml"),
        Case("suite", "flip", 1, "suite.toml", "reproduce suite.toml", fault="hang", told="slow"),
        Case("suite", "flip", 2, "suite.toml", "reproduce suite.toml", same=True),
    ]
    assert "| suite | 2/1  | 2/1 |" in table(cases)
    assert grouped(cases) == "- hang, suite: 1 cases, such as suite-flip-1 (reproduce suite.toml): slow"
