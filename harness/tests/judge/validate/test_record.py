"""Validation: a whole record has no fault, each kind of damage is found and named, schemas describe what is
written.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.files import file_sha256
from harness.judge.schemas import json_schemas, write_schemas
from harness.judge.validate.record import validate_record
from harness.records.opened import open_record
from harness.records.run import ArmTree
from harness.tests.fake_record import FakeParts, fake_rounding, write_fake_record


def test_whole_record_has_no_fault(tmp_path: Path) -> None:
    write_fake_record(tmp_path / "run", num_prompts=8, rounds=1, jitter=0.0)
    assert validate_record(tmp_path / "run") == ()


def _first(**changes: Any) -> Callable[[FakeParts], object]:
    return lambda parts: parts.edit(lambda generation: changes, limit=1)


def _change_trial(**changes: Any) -> Callable[[FakeParts], object]:
    return lambda parts: parts.edit(
        lambda generation: {"trial": generation.trial.model_copy(update=changes)}, arm="vanilla", limit=1
    )


def _environment(**changes: Any) -> Callable[[FakeParts], object]:
    return lambda parts: setattr(parts, "environment", parts.environment.model_copy(update=changes))


def _add_empty_step(parts: FakeParts) -> None:
    parts.edit(
        lambda one: {"step_tokens": (0, *one.step_tokens), "step_times_s": (0.1, *one.step_times_s)}, limit=1
    )


def _swap_vanilla_text(parts: FakeParts) -> None:
    parts.edit(lambda generation: {"token_ids": generation.token_ids[::-1]}, arm="vanilla")


def _orphan_tree(parts: FakeParts) -> None:
    parts.trees["chain"] = ArmTree(paths=((), (0, 0)), origin="made up")


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (
            _first(step_tokens=(1,), step_times_s=(0.1,)),
            "generations.jsonl:1: found steps of 1 tokens together",
        ),
        (_first(step_times_s=(0.1,)), "generations.jsonl:1: found 1 step times"),
        (_first(prefill_s=0.0), "generations.jsonl:1: found a time of no length"),
        (
            _add_empty_step,
            "of no token",
        ),
        (
            _first(token_ids=tuple(range(99)), step_tokens=(98,), step_times_s=(1.0,)),
            "1: found 99 tokens, need at most 40",
        ),
        (_change_trial(arm="other"), "found arm 'other'"),
        (_change_trial(seed=7), "found seed 7"),
        (_change_trial(round=5), "found round 5, need 0 to 0"),
        (lambda parts: parts.trees.pop("cartesian"), "trees.json: found no tree of arm 'cartesian'"),
        (_orphan_tree, "trees.json: found node (0, 0) without its parent"),
        (_swap_vanilla_text, "trace.npz: found other tokens for prompt"),
        (
            _environment(command="run /data/jane/s.toml"),
            "environment.json: found an absolute path in 'command'",
        ),
        (
            _environment(assets={"model": "/data/jane/m"}),
            "environment.json: found an absolute path in 'assets'",
        ),
        (
            lambda parts: parts.manifest_changes.update(num_generations=3),
            "generations.jsonl: found 88 generations, need 3",
        ),
        (
            lambda parts: parts.manifest_changes.update(num_failures=3),
            "generations.jsonl: found 0 failures, need 3",
        ),
        (lambda parts: parts.manifest_changes.update(num_planned=99), "found 88 of 99 planned trials"),
        (
            lambda parts: parts.manifest_changes.update(sha256={}),
            "suite.toml: found a file that the manifest does not seal",
        ),
    ],
)
def test_each_fault_is_found_and_named(
    tmp_path: Path, spoil: Callable[[FakeParts], object], fault: str
) -> None:
    write_fake_record(tmp_path / "run", spoil=spoil, num_prompts=8, rounds=1, jitter=0.0)
    faults = validate_record(tmp_path / "run")
    assert any(fault in line for line in faults), faults


@pytest.mark.parametrize(
    "name",
    ["environment.json", "trees.json", "profile.json", "manifest.json", "suite.toml", "generations.jsonl"],
)
def test_other_schema_version_is_refused(tmp_path: Path, name: str) -> None:
    write_fake_record(tmp_path / "run", num_prompts=8, rounds=1, jitter=0.0)
    path = tmp_path / "run" / name
    text = path.read_text()
    path.write_text(re.sub(r'(schema_version"?\s*[:=]\s*)1', r"\g<1>2", text))
    assert path.read_text() != text
    newer = f"{name}: found schema_version 2, need at most 1 (to mend it: update medusa-repro)"
    assert newer in validate_record(tmp_path / "run")


def _measured(parts: FakeParts) -> None:
    parts.rounding = fake_rounding(0.125)


def test_a_measured_rounding_is_part_of_the_record(tmp_path: Path) -> None:
    record = write_fake_record(
        tmp_path / "run", spoil=_measured, dtype="bfloat16", num_prompts=8, rounds=1, jitter=0.0
    )
    assert validate_record(record.folder) == ()
    assert record.rounding is not None and (
        record.rounding.largest_gap_shift,
        record.rounding.largest_head_shift,
    ) == (0.125, 0.125)
    path = record.folder / "rounding.json"
    schema, written = json_schemas()["rounding"], set(json.loads(path.read_text()))
    assert set(schema["required"]) <= written == set(schema["properties"])
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    faults = validate_record(record.folder)
    assert any(fault.startswith("rounding.json: found schema_version") for fault in faults), faults
    assert any(fault.startswith("rounding.json: found SHA-256") for fault in faults), faults


def test_several_faults_are_all_told_at_once(tmp_path: Path) -> None:
    write_fake_record(tmp_path / "run", num_prompts=8, rounds=1, jitter=0.0)
    folder = tmp_path / "run"
    (folder / "profile.json").write_text('{"schema_version": 1}')
    (folder / "trace.npz").write_bytes(b"PK not really")
    (folder / "device_limits.json").unlink()
    with (folder / "generations.jsonl").open("a") as file:
        file.write('{"torn')
    faults = validate_record(folder)
    for fault in (
        "profile.json: found rows: Field required",
        "trace.npz: found no readable trace",
        "generations.jsonl: found a truncated last line",
        "device_limits.json: found no file",
        "profile.json: found SHA-256",
    ):
        assert any(fault in line for line in faults), (fault, faults)
    assert not any(str(tmp_path) in line for line in faults), "a fault names a file, not a place"


def test_unfinished_record_is_told(tmp_path: Path) -> None:
    write_fake_record(tmp_path / "run", omit=["manifest.json"], num_prompts=8, rounds=1, jitter=0.0)
    (fault,) = validate_record(tmp_path / "run")
    assert "its seal is written last" in fault and "resume" in fault


def test_missing_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        validate_record(tmp_path / "none")


def test_schemas_know_every_key_that_a_record_writes(tmp_path: Path) -> None:
    write_fake_record(tmp_path / "run", num_prompts=8, rounds=1, jitter=0.0)
    schemas = json_schemas()
    for path in (tmp_path / "run").glob("*.json"):
        schema, written = schemas[path.stem], set(json.loads(path.read_text()))
        assert set(schema["required"]) <= written <= set(schema["properties"]), path.name
        assert schema["additionalProperties"] is False
    assert {"suite", "generation", "judgement"} <= set(schemas)
    assert schemas["generation"]["discriminator"]["propertyName"] == "kind"


def test_schemas_are_written_as_files(tmp_path: Path) -> None:
    paths = write_schemas(tmp_path / "schemas")
    assert {path.name for path in paths} == {f"{name}.schema.json" for name in json_schemas()}
    schemas = json_schemas()
    assert all(
        json.loads(path.read_text()) == schemas[path.name.removesuffix(".schema.json")] for path in paths
    )


def test_schemas_in_no_place_are_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="failed write"):
        write_schemas(tmp_path / "file")


FIXTURE = Path(__file__).resolve().parents[2] / "records" / "fixtures" / "v1"


def _lines(change: Callable[[list[Any]], object]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        rows = [json.loads(line) for line in text.splitlines()]
        change(rows)
        return "".join(json.dumps(row) + "\n" for row in rows)

    return changed


def _data(change: Callable[[Any], object]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return changed


def _value(name: str, value: str) -> Callable[[str], str]:
    """Put another value after the first key of a name, or into its list."""
    return lambda text: re.sub(rf'("{name}":\s*\[?)\s*-?[\d.e+-]+', rf"\g<1>{value}", text, count=1)


def _decoded(rows: list[Any]) -> Any:
    """Return the one row of the one decoded cell."""
    (cell,) = (row for row in rows if row["cell"] == "decoded")
    cell["rows"] = cell["rows"][:1]
    return cell["rows"][0]


def _faster(rows: list[Any]) -> None:
    times = [seconds / 10 for seconds in rows[0]["step_times_s"]]
    rows.append({**rows[0], "step_times_s": times})


def _next_attempt(rows: list[Any]) -> None:
    rows.append({**rows[0], "attempt": 1})


def _steps_of_a_round_more(rows: list[Any]) -> None:
    """Give an arm more lines after one prompt than there are rounds, each with times of its own."""
    one = rows[0]
    step_s = one["step_s"]
    for number in range(9):
        longer = [seconds * (1 + number / 1000) for seconds in step_s]
        rows.append({**one, "prompt_key": "mt_bench-81", "step_s": longer})


SEALED_LIES: list[tuple[str, str, Callable[[str], str], str]] = [
    ("suite", "arm_steps.jsonl", lambda text: '{"any": "thing"}\n', "arm_steps.jsonl: found "),
    ("suite", "arm_steps.jsonl", lambda text: text + text, "need it once"),
    ("suite", "arm_steps.jsonl", _lines(lambda rows: rows[0].update(arm="other")), "found arm 'other'"),
    ("suite", "arm_steps.jsonl", _lines(_steps_of_a_round_more), "each time that its block was run"),
    ("suite", "generations.jsonl", lambda text: text + text, "a second line of the same attempt"),
    ("suite", "generations.jsonl", _lines(_faster), "a second line of the same attempt"),
    ("suite", "generations.jsonl", _lines(_next_attempt), "found a valid timing of"),
    ("suite", "generations.jsonl", _lines(lambda rows: rows.pop()), "need one of each"),
    ("suite", "generations.jsonl", _lines(lambda rows: rows[0].update(order=rows[1]["order"])), "of another"),
    *(
        ("suite", "generations.jsonl", _value("prefill_s", value), "prefill_s")
        for value in ("NaN", "Infinity", "-1", "1e400")
    ),
    ("suite", "generations.jsonl", _value("step_times_s", "NaN"), "step_times_s"),
    ("suite", "generations.jsonl", _value("peak_memory_bytes", "9" * 30), "peak_memory_bytes"),
    ("suite", "device_limits.json", _value("read_bandwidth_bytes_per_s", "-1"), "read_bandwidth"),
    ("suite", "device_limits.json", _value("read_bandwidth_bytes_per_s", "0"), "read_bandwidth"),
    ("suite", "step_costs.json", _value("backbone_s", "NaN"), "backbone_s"),
    ("suite", "environment.json", _data(lambda data: data.update(started_utc="yesterday")), "started_utc"),
    ("suite", "environment.json", _data(lambda data: data["variables"].update(SECRET="x")), "'SECRET'"),
    ("suite", "environment.json", _data(lambda data: data.update(command="a file:///h/jane")), "'command'"),
    ("latency", "points.jsonl", lambda text: text + text, "found a point twice"),
    ("latency", "points.jsonl", _value("backbone_s", "Infinity"), "backbone_s"),
    ("latency", "points.jsonl", _lines(lambda rows: rows[0].update(batch=99)), "does not ask for"),
    ("latency", "points.jsonl", _lines(lambda rows: rows.pop()), "need as many as in"),
    ("latency", "modes.json", _value("step_times_s", "-1"), "step_times_s"),
    ("latency", "batches.json", _value("decode_s", "NaN"), "decode_s"),
    ("sweep", "cells.jsonl", lambda text: text + text, "found a cell twice"),
    ("latency", "points.jsonl", _value("backbone_s", "5e-324"), "backbone_s"),
    ("sweep", "cells.jsonl", _value("vanilla_step_s", "NaN"), "vanilla_step_s"),
    ("sweep", "cells.jsonl", _value("estimate", "NaN"), "need an estimate with bounds in order"),
    ("sweep", "cells.jsonl", _value("low", "1e300"), "need an estimate with bounds in order"),
    (
        "sweep",
        "cells.jsonl",
        _lines(lambda rows: _decoded(rows).update(medusa_s=0)),
        "steps with the tree in",
    ),
    (
        "sweep",
        "cells.jsonl",
        _lines(lambda rows: _decoded(rows).update(vanilla_s=0)),
        "found vanilla_s of 0 in every row",
    ),
    ("sweep", "cells.jsonl", _lines(lambda rows: rows[0]["speedup"].pop()), "columns of other lengths"),
    ("ablation", "arms.jsonl", lambda text: text + text, "need each planned arm and seed once"),
    ("ablation", "arms.jsonl", _value("kl_sum", "NaN"), "kl_sum"),
]


@pytest.mark.parametrize("kind", ["suite", "latency", "sweep", "ablation", "gpu", "gate"])
def test_a_record_cannot_have_taken_longer_than_there_was(kind: str, tmp_path: Path) -> None:
    """`nox -s fuzz` found it: a manifest with any number of seconds was valid."""
    shutil.copytree(FIXTURE / kind, tmp_path / "record")
    manifest = tmp_path / "record" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "elapsed_s": 1e9}))
    assert any("found elapsed_s 1e+09" in line for line in validate_record(tmp_path / "record"))
    with pytest.raises(UserError, match=r"elapsed_s 1e\+09"):
        open_record(tmp_path / "record")


@pytest.mark.parametrize(("kind", "name", "change", "fault"), SEALED_LIES)
def test_what_no_run_writes_is_a_fault_although_it_is_sealed(
    kind: str, name: str, change: Callable[[str], str], fault: str, tmp_path: Path
) -> None:
    """Whoever alters a record can seal it again: the files themselves have to be sound."""
    shutil.copytree(FIXTURE / kind, tmp_path / "record")
    path, manifest = tmp_path / "record" / name, tmp_path / "record" / "manifest.json"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    sealed = json.loads(manifest.read_text())
    sealed["sha256"][name] = file_sha256(path)
    manifest.write_text(json.dumps(sealed))
    faults = validate_record(tmp_path / "record")
    assert any(fault in line for line in faults), faults
    assert not any("SHA-256" in line for line in faults)
