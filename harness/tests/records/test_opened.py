"""The one door to records: an altered or unfinished one of any kind is refused, whoever reads it."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.compose.devices import find_curves, find_latency_records
from harness.errors import UserError
from harness.judge.validate.record import validate_record
from harness.records.ablation import newest_ablations
from harness.records.folder import RecordKind
from harness.records.opened import RECORDS, open_record, open_trace, seal_fault_of
from harness.specs.latency import HeadsForm

ROOT = Path(__file__).resolve().parents[3]
FIXTURES = Path(__file__).parent / "fixtures" / "v1"
KINDS: tuple[RecordKind, ...] = ("suite", "latency", "sweep", "ablation", "gpu", "gate")
DATA = {
    "suite": "trees.json",
    "latency": "model.json",
    "sweep": "trees.json",
    "ablation": "tree.json",
    "gpu": "tests.json",
    "gate": "bmf.json",
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / kind, tmp_path / kind)
    return tmp_path / kind


def alter(folder: Path, kind: str) -> None:
    """Change a record's data without changing what they say."""
    path = folder / DATA[kind]
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))


def unlist(folder: Path, kind: str) -> None:
    seal = json.loads((folder / "manifest.json").read_text())
    del seal["sha256"][DATA[kind]]
    (folder / "manifest.json").write_text(json.dumps(seal))


def cut_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-9])


SPOILERS: dict[str, Callable[[Path, str], object]] = {
    "altered": alter,
    "without its manifest": lambda folder, kind: (folder / "manifest.json").unlink(),
    "a file less": lambda folder, kind: (folder / DATA[kind]).unlink(),
    "not listed": unlist,
    "nothing listed": lambda folder, kind: (folder / "manifest.json").write_text(
        json.dumps({**json.loads((folder / "manifest.json").read_text()), "sha256": {}})
    ),
    "a file more": lambda folder, kind: (folder / "more.jsonl").write_text("{}\n"),
    "a manifest that is cut short": lambda folder, kind: cut_manifest(folder),
}


def test_a_whole_record_opens_as_its_kind(folder: Path, kind: RecordKind) -> None:
    record = open_record(folder)
    assert type(record) is RECORDS[kind] and record.unsealed is None


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_a_record_that_is_not_as_it_was_sealed_is_refused_and_can_be_looked_at(
    folder: Path, kind: str, spoiler: str
) -> None:
    SPOILERS[spoiler](folder, kind)
    with pytest.raises(UserError, match=r"to look at it all the same: --unsealed$"):
        open_record(folder)
    looked_at = open_record(folder, unsealed=True)
    assert looked_at.unsealed is not None and looked_at.unsealed.startswith("found ")
    assert validate_record(folder) != ()


@pytest.mark.parametrize("name", ["/dev/zero", "../suite/suite.toml", "..", "a\\b", "pipe\n"])
def test_a_manifest_names_files_of_its_folder_alone(folder: Path, kind: str, name: str) -> None:
    """`validate` once read /dev/zero for ever."""
    sealed = json.loads((folder / "manifest.json").read_text())
    sealed["sha256"][name] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(sealed))
    with pytest.raises(UserError, match="need the name of a file"):
        open_record(folder)
    assert any(fault.startswith("manifest.json: ") for fault in validate_record(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no pipes in folders")
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"]
)
def test_no_file_of_a_record_is_a_pipe_or_a_device(
    folder: Path, kind: str, make: Callable[[Path], object]
) -> None:
    """To open a pipe waits for a writer that never comes; the test would not end."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".md")
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(UserError):
            open_record(folder)
        try:
            assert validate_record(folder) != (), name
        except UserError as error:  # the file that tells the kind
            assert error.need
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    assert validate_record(folder) == ()


def test_a_trace_in_an_altered_record_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "suite", tmp_path / "run")
    open_trace(tmp_path / "run" / "trace.npz")
    alter(tmp_path / "run", "suite")
    with pytest.raises(UserError, match="as sealed"):
        open_trace(tmp_path / "run" / "trace.npz")
    assert seal_fault_of(tmp_path / "run" / "trace.npz") is not None
    assert open_trace(tmp_path / "run" / "trace.npz", unsealed=True).prompts


def test_a_trace_of_a_record_that_lost_files_is_refused_and_a_link_to_it_too(tmp_path: Path) -> None:
    """Without the files that tell its kind, a record passed for a folder that is none."""
    shutil.copytree(FIXTURES / "suite", tmp_path / "run")
    (tmp_path / "link.npz").symlink_to(tmp_path / "run" / "trace.npz")
    open_trace(tmp_path / "link.npz")
    for name in ("suite.toml", "generations.jsonl"):
        (tmp_path / "run" / name).unlink()
    for path in (tmp_path / "run" / "trace.npz", tmp_path / "link.npz"):
        with pytest.raises(UserError):
            open_trace(path)
        assert seal_fault_of(path) is not None


def test_a_trace_in_no_record_has_no_seal() -> None:
    assert open_trace(FIXTURES / "trace.npz").prompts and seal_fault_of(FIXTURES / "trace.npz") is None


def test_whoever_looks_for_records_of_a_kind_finds_no_altered_one(tmp_path: Path) -> None:
    latency, ablation = tmp_path / "latency" / "a" / "m" / "1", tmp_path / "b" / "m" / "1"
    for kind, folder in (("latency", latency), ("ablation", ablation)):
        shutil.copytree(FIXTURES / kind, folder)
    assert len(find_latency_records(tmp_path)) == len(newest_ablations(tmp_path)) == 1
    for kind, folder in (("latency", latency), ("ablation", ablation)):
        alter(folder, kind)
    for look in (find_latency_records, newest_ablations):
        with pytest.raises(UserError, match="as sealed"):
            look(tmp_path)
    with pytest.raises(UserError, match="as sealed"):
        find_curves(str(latency), results=tmp_path, shape=None, dtype=None, heads=HeadsForm())


def test_only_what_writes_a_record_makes_one_without_its_seal() -> None:
    """A new reader that takes the constructor would read altered records as if whole."""
    names = {kind.__name__ for kind in RECORDS.values()}
    found = {
        path.relative_to(ROOT / "harness").parts[0]
        for path in (ROOT / "harness").rglob("*.py")
        if "tests" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    }
    assert found == {
        "measure",
        "records",
        "judge",
    }  # records under way, and `validate`, which tells all faults
