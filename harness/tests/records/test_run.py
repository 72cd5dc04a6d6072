"""Record folders: round trips, torn and truncated files, altered files, unknown keys and versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.files import canonical_sha256, write_bytes, write_json
from harness.records.provenance import Environment
from harness.records.run import Manifest, RunRecord
from harness.records.trials import Generation, read_outcomes
from harness.tests.fake_record import FakeParts, write_fake_record


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return write_fake_record(tmp_path / "record", num_prompts=2)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_whole_record_is_read_back(record: RunRecord) -> None:
    record.check_seal()
    assert record.manifest is not None and record.manifest.complete
    assert len(record.generations) == len(record.outcomes) == record.manifest.num_planned
    assert record.environment.model_name == "made-up model"
    for part in (
        record.step_costs,
        record.profile,
        record.device_limits,
        record.heads_control,
        record.likelihoods,
        record.trace,
    ):
        assert part is not None
    assert record.trees["optimised_64"].tree().num_nodes == 64


def test_a_manifest_that_was_written_is_read_back(tmp_path: Path) -> None:
    """A computed field was written among the others and then refused as an unknown key, so that no sealed
    record could be read.
    """
    manifest = Manifest(
        suite="fake",
        num_planned=2,
        num_generations=1,
        num_failures=0,
        finished_utc="2024-01-19T12:00:00Z",
        elapsed_s=1,
        peak_memory_bytes=1,
        sha256={},
    )
    write_json(tmp_path / "manifest.json", manifest)
    assert RunRecord(tmp_path).manifest == manifest
    assert not manifest.complete


def test_missing_probes_are_none(tmp_path: Path) -> None:
    names = [
        "step_costs.json",
        "profile.json",
        "device_limits.json",
        "heads_control.json",
        "likelihoods.json",
        "trace.npz",
    ]
    record = write_fake_record(tmp_path, omit=[*names, "manifest.json"], num_prompts=2)
    for part in (
        record.step_costs,
        record.profile,
        record.device_limits,
        record.heads_control,
        record.likelihoods,
        record.trace,
    ):
        assert part is None
    assert record.manifest is None
    with pytest.raises(UserError, match=r"no manifest\.json"):
        record.check_seal()


def test_a_torn_tail_is_left_out_on_resume_and_refused_otherwise(record: RunRecord) -> None:
    path = record.folder / "generations.jsonl"
    whole = path.read_bytes()
    lines = whole.count(b"\n")
    last = whole[:-1].rindex(b"\n") + 1
    for size in (last + 1, last + 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert len(read_outcomes(path, allow_torn_tail=True)) == lines - 1
        with pytest.raises(UserError, match=rf"truncated last line.*generations\.jsonl:{lines}"):
            read_outcomes(path)
    path.write_bytes(whole[:last])
    assert len(read_outcomes(path)) == lines - 1


def test_a_truncated_line_inside_is_refused_with_its_number(record: RunRecord) -> None:
    path = record.folder / "generations.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2][:50] + "\n"
    path.write_text("".join(lines))
    for allow in (False, True):
        with pytest.raises(UserError, match=r"generations\.jsonl:3"):
            read_outcomes(path, allow_torn_tail=allow)


@pytest.mark.parametrize(
    "name",
    ["suite.toml", "environment.json", "trees.json", "generations.jsonl", "trace.npz", "likelihoods.json"],
)
def test_an_altered_or_missing_file_breaks_the_seal(name: str, record: RunRecord) -> None:
    path = record.folder / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=f"SHA-256.*in {name}"):
        RunRecord(record.folder).check_seal()
    path.unlink()
    with pytest.raises(UserError, match=f"no file.*in {name}"):
        RunRecord(record.folder).check_seal()


def test_an_unknown_key_is_refused_by_name(record: RunRecord) -> None:
    change_json(record.folder / "environment.json", host_name="x")
    with pytest.raises(UserError, match=r"host_name.*environment\.json"):
        _ = RunRecord(record.folder).environment


def test_an_unknown_key_in_a_trial_is_refused(record: RunRecord) -> None:
    path = record.folder / "generations.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(first.replace('{"schema_version"', '{"speed":1,"schema_version"') + "".join(rest))
    with pytest.raises(UserError, match=r"generations\.jsonl:1"):
        read_outcomes(path)


@pytest.mark.parametrize(
    "name", ["environment.json", "trees.json", "step_costs.json", "heads_control.json", "manifest.json"]
)
def test_another_schema_version_is_refused(name: str, record: RunRecord) -> None:
    change_json(record.folder / name, schema_version=2)
    with pytest.raises(
        UserError, match=rf"schema_version 2; need at most 1; in {name}; .*update medusa-repro"
    ):
        getattr(RunRecord(record.folder), name.removesuffix(".json"))


def test_a_folder_or_file_that_is_not_there(record: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        RunRecord(tmp_path / "nowhere")
    (record.folder / "environment.json").unlink()
    with pytest.raises(UserError, match=r"no readable environment\.json"):
        _ = RunRecord(record.folder).environment


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_bytes(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_of_several_attempts_the_last_valid_timing_counts(tmp_path: Path) -> None:
    def repeat(parts: FakeParts) -> None:
        first = parts.outcomes[0]
        assert isinstance(first, Generation)
        parts.outcomes.append(first.model_copy(update={"attempt": 1}))
        parts.outcomes.append(first.model_copy(update={"attempt": 2, "timing_valid": False}))

    record = write_fake_record(tmp_path, spoil=repeat, num_prompts=2)
    trial = record.outcomes[0].trial
    assert [generation.attempt for generation in record.generations if generation.trial == trial] == [1]
    assert len(record.generations) == len(record.outcomes) - 2


def test_records_hold_no_absolute_path(record: RunRecord) -> None:
    for path in record.folder.iterdir():
        assert str(record.folder).encode() not in path.read_bytes()


def test_canonical_hash_ignores_the_order_of_keys() -> None:
    assert (
        canonical_sha256({"a": 1, "b": [2]})
        == canonical_sha256({"b": [2], "a": 1})
        != canonical_sha256({"a": 1, "b": [3]})
    )


def test_the_environment_round_trips(record: RunRecord) -> None:
    assert Environment.model_validate_json(record.environment.model_dump_json()) == record.environment
