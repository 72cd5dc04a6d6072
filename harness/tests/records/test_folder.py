"""The kind of a record: said by its manifest, else told by the files that it holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from harness.errors import UserError
from harness.files import write_json
from harness.judge.validate.record import validate_record
from harness.records.ablation import ABLATION, AblationManifest, newest_ablations
from harness.records.folder import RecordKind, kind_of
from harness.records.gpu.record import GPU, GpuManifest
from harness.records.latency import LATENCY, LatencyManifest
from harness.records.run import RUN, Manifest
from harness.records.store import Store, StoreKind
from harness.records.sweep import SWEEP, SweepManifest
from harness.tests.fake_ablation import write_fake_ablation
from harness.tests.fake_record import write_fake_record

STORES: dict[RecordKind, StoreKind[Any]] = {
    "suite": RUN,
    "latency": LATENCY,
    "sweep": SWEEP,
    "ablation": ABLATION,
    "gpu": GPU,
}
COUNTS: dict[RecordKind, tuple[type[Any], dict[str, Any]]] = {
    "suite": (
        Manifest,
        {"suite": "x", "num_generations": 0, "num_failures": 0, "peak_memory_bytes": 0},
    ),
    "latency": (
        LatencyManifest,
        {"spec": "x", "num_measured": 0, "num_skipped": 0, "peak_memory_bytes": 0},
    ),
    "sweep": (SweepManifest, {"sweep": "x", "num_done": 0, "num_failed": 0, "num_points": 0}),
    "ablation": (AblationManifest, {"suite": "x", "num_arms": 0}),
    "gpu": (GpuManifest, {"plan": "x", "num_accepted": 0}),
}


def test_every_kind_has_a_store_but_for_gates_which_are_written_at_their_end() -> None:
    kinds = set(get_args(RecordKind)) - {"gate"}
    assert {store.record_kind for store in STORES.values()} == kinds == set(STORES)


@pytest.mark.parametrize("kind", STORES)
def test_a_manifest_says_the_kind_that_it_was_sealed_as(tmp_path: Path, kind: RecordKind) -> None:
    model, counts = COUNTS[kind]
    Store(tmp_path, kind=STORES[kind]).seal(model, num_planned=0, elapsed_s=1.0, **counts)
    assert json.loads((tmp_path / "manifest.json").read_text())["kind"] == kind
    assert kind_of(tmp_path) == kind
    assert model.model_validate_json((tmp_path / "manifest.json").read_text()).kind == kind


@pytest.mark.parametrize("kind", STORES)
def test_a_kind_is_told_by_the_lines_or_by_the_spec_of_an_old_record(
    tmp_path: Path, kind: RecordKind
) -> None:
    store = STORES[kind]
    (tmp_path / store.lines.name).write_text("")
    assert kind_of(tmp_path) == kind
    (tmp_path / store.lines.name).unlink()
    (tmp_path / store.spec_file).write_text("")
    (tmp_path / "environment.json").write_text("{}")
    if kind == "ablation":  # its spec is called as a run's is; the one tree is written before the first arm
        (tmp_path / "tree.json").write_text("{}")
    assert kind_of(tmp_path) == kind


@pytest.mark.parametrize("manifest", ['{"suite": "x"}', '{"kind": null}', "[]", "not JSON", "\xff"])
def test_a_manifest_that_says_no_kind_leaves_it_to_the_files(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest, encoding="latin-1")
    (tmp_path / "sweep.toml").write_text("")
    assert kind_of(tmp_path) == "sweep"


@pytest.mark.parametrize("kind", ["suite", "ablation"])
def test_an_unfinished_record_is_told_by_its_spec(tmp_path: Path, kind: RecordKind) -> None:
    """Both have a suite.toml and nothing else of their own before the first trial or arm."""
    (tmp_path / "suite.toml").write_text(f'schema_version = 1\nkind = "{kind}"\n')
    (tmp_path / "environment.json").write_text("{}")
    assert kind_of(tmp_path) == kind


def test_a_manifest_that_says_another_kind_than_the_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "sweep"}')
    (tmp_path / "suite.toml").write_text("")
    with pytest.raises(UserError, match=r"found kind 'sweep' without sweep.toml; need a folder that holds"):
        kind_of(tmp_path)


def test_a_folder_of_records_is_told_from_a_record(tmp_path: Path) -> None:
    for name in ("20240101T000000Z-1", "20240102T000000Z-2"):
        (tmp_path / "suite" / "cpu" / name).mkdir(parents=True)
        (tmp_path / "suite" / "cpu" / name / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"name a record in it, such as .*20240102T000000Z-2"):
        kind_of(tmp_path)


def test_the_hint_looks_no_deeper_than_records_lie(tmp_path: Path) -> None:
    """Of a whole disk it took eleven seconds, and named a folder that had nothing to do with it."""
    (tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "d" / "manifest.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        kind_of(tmp_path)
    assert caught.value.do is None


def test_a_kind_that_is_not_known_yet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "quality"}')
    (tmp_path / "suite.toml").write_text("")
    with pytest.raises(UserError) as caught:
        kind_of(tmp_path)
    assert "found a record of kind 'quality'; need one of latency, sweep, ablation, gpu, gate, suite" in str(
        caught.value
    )
    assert "manifest.json; to mend it: update medusa-repro" in str(caught.value)
    with pytest.raises(UserError, match="quality"):
        validate_record(tmp_path)


def _nothing(folder: Path) -> None:
    pass


def _something_else(folder: Path) -> None:
    (folder / "notes.txt").write_text("no record")
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize("fill", [_nothing, _something_else])
def test_a_folder_without_a_record_is_refused_in_one_line(
    tmp_path: Path, fill: Callable[[Path], None]
) -> None:
    fill(tmp_path)
    with pytest.raises(
        UserError, match=r"found no record; need a folder with one of spec\.toml, sweep\.toml"
    ):
        kind_of(tmp_path)
    with pytest.raises(UserError, match="found no such folder"):
        kind_of(tmp_path / "none")


def test_the_newest_ablations_are_found_among_records_of_other_kinds(tmp_path: Path) -> None:
    ours = tmp_path / "training" / "cpu" / "20240101T000000Z-1"
    write_fake_ablation(ours)
    write_fake_record(tmp_path / "fake" / "cpu" / "20240102T000000Z-2", num_prompts=2)
    other = tmp_path / "foreign" / "cpu" / "20240103T000000Z-3"
    other.mkdir(parents=True)
    (other / "manifest.json").write_text("{}")
    assert [record.folder for record in newest_ablations(tmp_path)] == [ours]


def test_a_run_that_says_its_kind_validates(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path / "run", num_prompts=8, rounds=1, jitter=0.0)
    assert record.manifest is not None
    write_json(tmp_path / "run" / "manifest.json", record.manifest.model_copy(update={"kind": "suite"}))
    assert validate_record(tmp_path / "run") == ()
