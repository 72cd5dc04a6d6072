"""Exactly the faults that a change of a sealed record makes, and none where it makes none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.files import file_sha256
from harness.judge.validate.record import validate_record

FIXTURES = Path(__file__).resolve().parents[2] / "records" / "fixtures" / "v1"
Change = Callable[[Any], object]


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def faults_of(folder: Path, kind: str, changes: Mapping[str, Change], **manifest_changes: Any) -> list[str]:
    """Change files of a record, each given as what it holds, seal it again and return its faults."""
    record = folder / "record"
    shutil.copytree(FIXTURES / kind, record)
    sealed = json.loads((record / "manifest.json").read_text(encoding="utf-8"))
    for name, change in changes.items():
        path = record / name
        text = path.read_text(encoding="utf-8")
        data = lines(text) if path.suffix == ".jsonl" else json.loads(text)
        change(data)
        whole = (
            "".join(json.dumps(row) + "\n" for row in data) if path.suffix == ".jsonl" else json.dumps(data)
        )
        path.write_text(whole, encoding="utf-8")
        sealed["sha256"][name] = file_sha256(path)
    (record / "manifest.json").write_text(json.dumps(sealed | manifest_changes), encoding="utf-8")
    return list(validate_record(record))


@pytest.mark.parametrize("kind", ["suite", "latency", "sweep", "ablation"])
def test_whole_records_have_no_fault(kind: str, tmp_path: Path) -> None:
    assert faults_of(tmp_path, kind, {}) == []


def add_step(tokens: int) -> Change:
    def change(rows: list[Any]) -> None:
        rows[3]["step_tokens"].append(tokens)
        rows[3]["step_times_s"].append(0.1)

    return change


def empty_step(rows: list[Any]) -> None:
    rows[3]["step_tokens"].append(0)
    rows[3]["step_times_s"].append(0.1)


def fewer_in_a_step(rows: list[Any]) -> None:
    steps = rows[0]["step_tokens"]
    steps[steps.index(2)] = 1


def orders_of_each_other(rows: list[Any]) -> None:
    rows[1]["order"] = rows[0]["order"]


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (
            add_step(1),
            ["generations.jsonl:4: found steps of 96 tokens together, need 95, all but the first"],
        ),
        (
            fewer_in_a_step,
            ["generations.jsonl:1: found steps of 94 tokens together, need 95, all but the first"],
        ),
        (empty_step, ["generations.jsonl:4: found a step of no token, need at least one"]),
        (
            lambda rows: rows[3]["step_times_s"].__setitem__(0, 0.0),
            ["generations.jsonl:4: found a time of no length, need seconds above 0"],
        ),
        (
            lambda rows: rows[3].update(prefill_s=0.0),
            ["generations.jsonl:4: found a time of no length, need seconds above 0"],
        ),
        (
            orders_of_each_other,
            ["generations.jsonl:2: found order 1 of another trial, need its own"],
        ),
    ],
)
def test_lines_of_a_run(tmp_path: Path, change: Change, faults: list[str]) -> None:
    assert faults_of(tmp_path, "suite", {"generations.jsonl": change}) == faults


def test_a_round_that_was_not_asked_is_the_first_past_the_last(tmp_path: Path) -> None:
    found = faults_of(tmp_path, "suite", {"generations.jsonl": lambda rows: rows[0]["trial"].update(round=1)})
    assert "generations.jsonl:1: found round 1, need 0 to 0" in found
    assert "generations.jsonl: found no line of 1 planned trials, need one of each" in found


def one_more_line(name: str, **changes: Any) -> Change:
    def change(data: Any) -> None:
        rows = data if isinstance(data, list) else data[name]
        rows.append({**next(row for row in rows if _fits(row, changes)), **changes.get("to", {})})

    return change


def _fits(row: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in changes.items() if key != "to")


def test_as_many_lines_of_an_arm_after_a_prompt_as_rounds(tmp_path: Path) -> None:
    def keyed(num: int) -> Change:
        def change(rows: list[Any]) -> None:
            first = next(row for row in rows if row["arm"] == "vanilla")
            first["prompt_key"] = "mt_bench-81"
            if num > 1:
                rows.append({**first, "step_s": [1.01 * seconds for seconds in first["step_s"]]})

        return change

    assert faults_of(tmp_path / "one", "suite", {"arm_steps.jsonl": keyed(1)}) == []
    assert faults_of(tmp_path / "two", "suite", {"arm_steps.jsonl": keyed(2)}) == [
        "arm_steps.jsonl: found 2 lines of vanilla after mt_bench-81, need at most 1, one each "
        "time that its block was run"
    ]


def test_shapes_are_there_once_and_arms_may_share_one(tmp_path: Path) -> None:
    twice = one_more_line("costs", num_nodes=8)
    found = faults_of(tmp_path / "shape", "suite", {"step_costs.json": twice})
    assert found == ["step_costs.json: found shape (8, 5, 192) 2 times, need it once"]

    def of_arms(data: Any) -> None:
        one = data["costs"][0]
        data["costs"] += [{**one, "arm": "vanilla"}, {**one, "arm": "vanilla"}]

    assert faults_of(tmp_path / "arms", "suite", {"step_costs.json": of_arms}) == []


@pytest.mark.parametrize(("more", "is_late"), [(0, False), (1, True), (-7200, False)])
def test_an_hour_of_loading_is_allowed_before_a_record_begins(
    tmp_path: Path, more: int, is_late: bool
) -> None:
    changes = {"environment.json": lambda data: data.update(started_utc="2026-01-01T00:00:00Z")}
    found = faults_of(
        tmp_path, "suite", changes, finished_utc="2026-01-01T01:00:00Z", elapsed_s=float(7200 + more)
    )
    assert found == (
        [
            f"manifest.json: found elapsed_s {7200 + more:g}, need at most the 3600 s from beginning to end, "
            "and 3600 s more for loading before it was begun (to mend it: restore the file or run the suite "
            "again)"
        ]
        if is_late
        else []
    )


@pytest.mark.parametrize(
    "value",
    ["/home/jane/x", ["plain", "/home/jane/x"], {"/home/jane/x": "plain"}, {"a": {"b": ["/home/jane"]}}],
)
def test_absolute_paths_are_found_however_deep(tmp_path: Path, value: Any) -> None:
    from pydantic import BaseModel

    from harness.judge.validate.faults import path_faults

    class Holder(BaseModel):
        fine: str = "runs/fake"
        held: Any

    assert list(path_faults(Holder(held=value), file="x.json")) == [
        "x.json: found an absolute path in 'held', need none: it tells a machine or a user apart"
    ]
    assert list(path_faults(Holder(held={"a": ["b", {"c": 1}]}), file="x.json")) == []


def test_things_are_repeated_from_the_second_on() -> None:
    from harness.judge.validate.faults import repeated

    assert list(repeated("aabccc", file="f", noun="letter")) == [
        "f: found letter a 2 times, need it once",
        "f: found letter c 3 times, need it once",
    ]
    long = "word  \n " * 40
    (told,) = repeated([long, long], file="f", noun="text")
    assert told == f"f: found text {' '.join(long.split())[:80]} 2 times, need it once"


def modes(change: Callable[[Any], object]) -> dict[str, Change]:
    return {"modes.json": lambda data: change(data["trials"][1])}


@pytest.mark.parametrize("by", [-1, 1])
def test_steps_of_a_mode_add_up(tmp_path: Path, by: int) -> None:
    def change(trial: Any) -> None:
        trial["step_tokens"][0] += by

    total = 31 + by
    assert faults_of(tmp_path, "latency", modes(change)) == [
        f"modes.json: trial 2: found steps of {total} tokens together, need 31, all but the first"
    ]


def test_a_mode_has_a_time_a_step(tmp_path: Path) -> None:
    assert faults_of(tmp_path, "latency", modes(lambda trial: trial["step_times_s"].pop())) == [
        "modes.json: trial 2: found 30 step times, need 31, one a step"
    ]


def test_trials_of_the_tables_are_there_once(tmp_path: Path) -> None:
    again: Change = lambda data: data["trials"].append(data["trials"][0])  # noqa: E731
    assert faults_of(tmp_path, "latency", {"modes.json": again, "batches.json": again}) == [
        "modes.json: found trial ('float32', 'hf_generate', 'mt_bench-81') 2 times, need it once",
        "batches.json: found trial ('vanilla', 1, 0, ('mt_bench-81',)) 2 times, need it once",
    ]


def skip(*, keep_times: bool) -> Change:
    def change(rows: list[Any]) -> None:
        rows[0].update(skipped="no memory")
        if not keep_times:
            rows[0].update(backbone_s=[], heads_s=[], step_s=[])

    return change


def nothing_measured(rows: list[Any]) -> None:
    rows[0].update(backbone_s=[], heads_s=[], step_s=[])


def test_a_point_has_times_or_a_reason(tmp_path: Path) -> None:
    skipped = faults_of(
        tmp_path / "skipped",
        "latency",
        {"points.jsonl": skip(keep_times=False)},
        num_measured=21,
        num_skipped=1,
    )
    assert skipped == []
    both = faults_of(
        tmp_path / "both", "latency", {"points.jsonl": skip(keep_times=True)}, num_measured=21, num_skipped=1
    )
    assert both == ["points.jsonl:1: found times and a reason to skip, need one"]
    neither = faults_of(tmp_path / "neither", "latency", {"points.jsonl": nothing_measured})
    assert neither == ["points.jsonl:1: found neither times nor a reason, need one"]


@pytest.mark.parametrize("counts", [(21, 0), (23, 0), (22, 1), (21, 1)])
def test_a_manifest_counts_points_and_skipped_ones(tmp_path: Path, counts: tuple[int, int]) -> None:
    found = faults_of(tmp_path, "latency", {}, num_measured=counts[0], num_skipped=counts[1])
    assert "points.jsonl: found 22 points, 0 skipped, need as many as in manifest.json" in found


@pytest.mark.parametrize("num_planned", [21, 23])
def test_every_planned_point_is_there_and_no_other(tmp_path: Path, num_planned: int) -> None:
    found = faults_of(tmp_path, "latency", {}, num_planned=num_planned)
    wanted = f"points.jsonl: found 22 of {num_planned} planned points, need all (to mend it: resume the run)"
    assert wanted in found


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"num_done": 6}, "cells.jsonl: found 7 cells, 1 failed ones and 36 points, need as many as in"),
        ({"num_failed": 2}, "cells.jsonl: found 7 cells, 1 failed ones and 36 points, need as many as in"),
        ({"num_points": 35}, "cells.jsonl: found 7 cells, 1 failed ones and 36 points, need as many as in"),
        ({"num_planned": 9}, "cells.jsonl: found 8 of 9 planned cells, need exactly these (to mend it: res"),
        ({"num_planned": 7}, "cells.jsonl: found 8 of 7 planned cells, need exactly these (to mend it: res"),
    ],
)
def test_a_sweeps_manifest_counts_its_cells(tmp_path: Path, changes: dict[str, int], fault: str) -> None:
    assert any(fault in line for line in faults_of(tmp_path, "sweep", {}, **changes))


def test_an_unfinished_sweep_has_no_counts_to_agree_with(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "sweep", tmp_path / "record")
    (tmp_path / "record" / "manifest.json").unlink()
    (only,) = validate_record(tmp_path / "record")
    assert only.startswith("manifest.json: ")


def trees(change: Callable[[Any], object]) -> dict[str, Change]:
    return {"trees.json": change}


def test_every_tree_has_one_calibrated_figure(tmp_path: Path) -> None:
    for name, change in (
        ("fewer", lambda data: data["calibrated"].pop()),
        ("more", lambda data: data["calibrated"].append(1.0)),
    ):
        found = faults_of(tmp_path / name, "sweep", trees(change))
        assert any(line.startswith("trees.json: found ") and "calibrated figures" in line for line in found)


def test_a_rate_belongs_to_a_tree_that_is_there(tmp_path: Path) -> None:
    def change(data: Any) -> None:
        data["rates"][-1]["tree"] = len(data["trees"])

    found = faults_of(tmp_path, "sweep", trees(change))
    assert any("found a rate of a tree that is not there" in line for line in found)


def composed(change: Callable[[Any], object]) -> dict[str, Change]:
    return {"cells.jsonl": lambda rows: change(rows[0])}


@pytest.mark.parametrize("column", ["step_s", "tokens_per_s", "speedup", "speedup_low", "speedup_high"])
@pytest.mark.parametrize("longer", [False, True])
def test_columns_of_a_cell_have_an_entry_a_tree(tmp_path: Path, column: str, longer: bool) -> None:
    def change(cell: Any) -> None:
        cell[column] = cell[column] * 2 if longer else cell[column][1:]

    found = faults_of(tmp_path, "sweep", composed(change))
    assert any("found columns of other lengths, need 18 entries, one a tree" in line for line in found), found


def test_a_cells_trees_are_there_and_once(tmp_path: Path) -> None:
    num = len(json.loads((FIXTURES / "sweep" / "trees.json").read_text(encoding="utf-8"))["trees"])

    def strange(cell: Any) -> None:
        cell["trees"][-1] = num

    def twice(cell: Any) -> None:
        cell["trees"][-1] = cell["trees"][0]

    missing = f"cells.jsonl:1: found a tree that is not in trees.json, need one of its {num}"
    assert missing in faults_of(tmp_path / "strange", "sweep", composed(strange))
    assert "cells.jsonl:1: found a tree twice, need each once" in faults_of(
        tmp_path / "twice", "sweep", composed(twice)
    )


def steps_file(change: Callable[[Any], object]) -> dict[str, Change]:
    return {"steps-medusa1-0.jsonl": change}


def test_an_arms_steps_are_as_many_as_it_says_and_in_order(tmp_path: Path) -> None:
    for name, change, told in (
        ("short", lambda rows: rows.pop(), "found 3, need 4"),
        ("long", lambda rows: rows.append({**rows[-1], "step": rows[-1]["step"] + 1}), "found 5, need 4"),
        ("again", lambda rows: rows[1].update(step=rows[0]["step"]), "found a step twice or out of order"),
        ("back", lambda rows: rows.reverse(), "found a step twice or out of order"),
    ):
        found = faults_of(tmp_path / name, "ablation", steps_file(change))
        assert any(line.startswith("steps of medusa1") and told in line for line in found), (name, found)
        assert len(found) == 1


def test_arms_are_planned_and_there_once(tmp_path: Path) -> None:
    for name, change, told in (
        ("twice", lambda rows: rows.append(rows[1]), "found ('medusa1', 0), need each planned arm and seed"),
        ("other", lambda rows: rows[1].update(seed=77), "found ('medusa1', 77), need each planned arm and"),
        ("fewer", lambda rows: rows.pop(), "found 2 arms, need as many as in manifest.json"),
        ("left", lambda rows: rows.pop(), "planned arms and seeds, need all (to mend it: resume the run)"),
    ):
        found = faults_of(tmp_path / name, "ablation", {"arms.jsonl": change})
        assert any(told in line for line in found), (name, found)


def test_files_of_an_arm_that_do_not_load_are_told(tmp_path: Path) -> None:
    for name, told in (
        ("trace-medusa1-0.npz", "trace of medusa1"),
        ("trace-original-text-ramped-0.npz", "trace of the original's text by ramped"),
        ("steps-ramped-0.jsonl", "steps of ramped"),
    ):
        shutil.copytree(FIXTURES / "ablation", tmp_path / name)
        (tmp_path / name / name).write_bytes(b"not this")
        found = validate_record(tmp_path / name)
        assert any(line.startswith(told) for line in found), (name, found)
