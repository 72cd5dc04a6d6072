"""What goes wrong amid a latency run, planted: the rest is measured, and one line tells of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch
from rich.console import Console

import harness.device.locks
import harness.measure.latency.modes
import harness.measure.latency.run
from harness.device.arms import ArmRunner
from harness.device.engine import Engine
from harness.errors import ExitCode, UserError
from harness.judge.latency import batch_points, mode_rows
from harness.judge.validate.record import validate_record
from harness.measure.latency.faults import fault_in_words
from harness.measure.latency.modes import measure_batches, measure_modes
from harness.measure.latency.prompts import LatencyPrompt
from harness.measure.latency.room import check_device
from harness.measure.latency.run import LatencyOptions, run_latency
from harness.measure.latency.sittings import Watch
from harness.measure.latency.timers import measure_group
from harness.records.latency import STOCK, BatchTrials, LatencyRecord
from harness.report.latency import latency_headline, render_latency_report
from harness.tests.measure.latency.test_run import CPU, key, parsed, tiny_spec
from harness.tests.tiny_suite import TickClock, command, small_device_limits
from medusa_impl.engine.runner import StepRunner


@pytest.fixture(autouse=True)
def on_a_cpu(engine: Engine, monkeypatch: MonkeyPatch) -> Iterator[None]:
    """A CPU, no pause between two blocks, and the shared engine left in the mode that it had."""
    monkeypatch.setattr(harness.device.locks, "_YIELD_S", 0.0)
    monkeypatch.setattr(harness.measure.latency.run, "best_device", lambda: CPU)
    before = engine.runner.mode
    yield
    engine.runner.use(before)


@pytest.fixture
def offers_graphs(monkeypatch: MonkeyPatch) -> None:
    """A CPU whose engine offers CUDA graphs: each capture is tried for real and fails for real."""
    monkeypatch.setattr(StepRunner, "available_modes", lambda runner: ("cuda_graph", "eager"))
    monkeypatch.setattr(harness.measure.latency.run, "check_device", lambda spec, device: None)


def measured(data: dict[str, Any], results: Path, **options: Any) -> tuple[LatencyRecord, str]:
    """Run a spec; return its record, which has to be sound, and what was printed."""
    said = io.StringIO()
    with small_device_limits():
        folder = run_latency(
            parsed(data),
            spec_file=None,
            options=LatencyOptions(results=results, **options),
            console=Console(file=said, width=400),
        )
    assert validate_record(folder) == ()
    record = LatencyRecord(folder)
    assert render_latency_report(record).startswith("# ") and latency_headline(record)["latency"] == "tiny"
    return record, said.getvalue()


def small_data(**changes: Any) -> dict[str, Any]:
    grids = [{"num_nodes": [1, 4, 8], "num_heads": [3], "context_tokens": [24]}]
    table = {"num_prompts": 2, "max_new_tokens": 6, "context_tokens": 24, "sizes": [1, 8]}
    return tiny_spec(None, **{"grids": grids, "modes_table": table, "batch_table": None, **changes})


def prompts() -> list[LatencyPrompt]:
    return [LatencyPrompt(key=f"p{number}", prompt_ids=tuple(range(3 + number, 12))) for number in range(4)]


def test_sizes_whose_capture_fails_are_timed_in_eager_mode_and_say_so(
    offers_graphs: None, tmp_path: Path
) -> None:
    record, said = measured(small_data(modes=["cuda_graph"]), tmp_path)
    by_mode = {
        mode: [point for point in record.points if point.mode == mode] for mode in ("cuda_graph", "eager")
    }
    assert [point.num_nodes for point in by_mode["cuda_graph"]] == [1, 4, 8]
    for point in by_mode["cuda_graph"]:
        assert (point.skipped or "").startswith("cuda_graph mode could not run it: ") and not point.backbone_s
    assert [point.num_nodes for point in by_mode["eager"]] == [1, 4, 8]
    assert all(point.skipped is None for point in by_mode["eager"])
    assert [len(point.backbone_s) for point in by_mode["eager"]] == [4, 2, 2]  # one node beside both others
    assert record.manifest is not None and record.manifest.num_planned == 6
    assert said.count("cuda_graph mode could not run it") == 2, "one line for the curve, one for the table"
    assert "Traceback" not in said
    assert {row.mode for row in mode_rows(record)} == {STOCK}


def test_a_mode_that_eager_stands_next_to_is_not_timed_twice(offers_graphs: None, tmp_path: Path) -> None:
    record, _ = measured(small_data(modes=["cuda_graph", "eager"], modes_table=None), tmp_path)
    assert [(point.mode, point.skipped is None) for point in record.points] == [
        *[("cuda_graph", False)] * 3,
        *[("eager", True)] * 3,
    ]


def test_a_grid_that_asks_for_graphs_alone_gets_no_other_points(offers_graphs: None, tmp_path: Path) -> None:
    """A record holds what its spec asks for, and a validator counts it."""
    grid = {"num_nodes": [1, 4], "num_heads": [3], "context_tokens": [24], "modes": ["cuda_graph"]}
    record, _ = measured(small_data(modes=["cuda_graph"], modes_table=None, grids=[grid]), tmp_path)
    assert [point.mode for point in record.points] == ["cuda_graph"] * 2


def test_an_engine_that_falls_back_by_itself_gives_no_times_of_the_mode(
    engine: Engine, monkeypatch: MonkeyPatch
) -> None:
    """Else times of eager mode would stand in the record as those of a graph."""
    monkeypatch.setattr(StepRunner, "available_modes", lambda runner: ("eager",))
    (point,) = measure_group(engine, [key(4, 2, mode="cuda_graph")], repeats=1, clock=TickClock())
    assert not point.backbone_s
    assert point.skipped == (
        "cuda_graph mode could not run it: cuda_graph mode is not available here: fell back to eager"
    )
    told: list[str] = []
    trials, _ = measure_modes(
        engine,
        "float32",
        ["eager", "cuda_graph"],
        prompts()[:1],
        max_new_tokens=4,
        clock=TickClock(),
        watch=Watch(note=told.append),
    )
    assert {trial.mode for trial in trials} == {STOCK, "eager"} and len(told) == 1


def test_memory_that_runs_out_in_the_table_of_modes_leaves_that_mode_out(
    engine: Engine, monkeypatch: MonkeyPatch
) -> None:
    generate = ArmRunner.generate

    def full(runner: ArmRunner, prompt_ids: Any, **options: Any) -> Any:
        if len(prompt_ids) == 7 and runner.engine.runner.mode == "packed" and runner.max_new_tokens == 5:
            raise torch.OutOfMemoryError("CUDA out of memory at /root/x/y")
        return generate(runner, prompt_ids, **options)

    monkeypatch.setattr(ArmRunner, "generate", full)
    monkeypatch.setattr(StepRunner, "available_modes", lambda runner: ("packed", "eager"))
    told: list[str] = []
    trials, _ = measure_modes(
        engine,
        "float32",
        ["packed", "eager"],
        prompts()[:3],
        max_new_tokens=5,
        clock=TickClock(),
        watch=Watch(note=told.append),
    )
    assert [trial.prompt_key for trial in trials if trial.mode == "eager"] == ["p0", "p1", "p2"]
    assert {trial.mode for trial in trials} == {STOCK, "eager"}
    assert told == ["the table of modes leaves out packed: ran out of memory: CUDA out of memory at .../y"]


def test_without_generate_the_table_of_modes_is_empty_and_the_record_whole(
    monkeypatch: MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ArmRunner, "_generate_stock", full)
    record, said = measured(small_data(modes=["eager"]), tmp_path)
    assert record.modes is not None and record.modes.trials == () and mode_rows(record) == ()
    assert "the table of modes leaves out hf_generate: ran out of memory" in said


def test_memory_that_runs_out_at_a_batch_leaves_that_batch_out(
    engine: Engine, heads_file: Path, monkeypatch: MonkeyPatch
) -> None:
    table = {"batches": [1, 2], "tree": {"kind": "chain", "depth": 3}, "max_new_tokens": 5, "num_prompts": 4}
    spec = parsed(tiny_spec(heads_file, batch_table=table))
    decode = harness.measure.latency.modes._decode_together
    room = [1]

    def full(engine: Engine, tree: Any, texts: Any, **options: Any) -> Any:
        if len(texts) > room[0] and tree is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(engine, tree, texts, **options)

    monkeypatch.setattr(harness.measure.latency.modes, "_decode_together", full)
    told: list[str] = []

    def batches() -> BatchTrials | None:
        return measure_batches(
            engine, spec, [], prompts(), dtype="float32", clock=TickClock(), watch=Watch(note=told.append)
        )

    found = batches()
    assert found is not None and [point.batch for point in batch_points(found, spec=spec.interval)] == [1]
    assert told == ["speed against batch leaves out batch 2: ran out of memory: CUDA out of memory"]
    room[0] = 0
    assert batches() is None and len(told) == 3


def test_memory_that_runs_out_at_the_device_limits_leaves_a_record_without_them(
    monkeypatch: MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(harness.measure.latency.run, "better_limits", full)
    record, said = measured(small_data(modes=["eager"], modes_table=None), tmp_path)
    assert record.limits("float32") is None and all(point.skipped is None for point in record.points)
    assert "no device limits: ran out of memory" in said


def test_a_mistake_of_the_step_itself_is_no_fault_of_a_size() -> None:
    assert fault_in_words(RuntimeError("shapes differ"), mode="eager") is None
    assert fault_in_words(RuntimeError("shapes differ"), mode="packed") is None
    told = fault_in_words(NameError("name 'torch' is not defined"), mode="compiled")
    assert told == "compiled mode could not run it: NameError: name 'torch' is not defined"
    user = UserError(found="a", need="b", where="c")
    assert fault_in_words(user, mode="cuda_graph") is None, "which says what to do in words of its own"


def test_a_time_budget_leaves_a_sealed_record_that_says_what_it_lacks(
    monkeypatch: MonkeyPatch, tmp_path: Path
) -> None:
    """The second group begins after the end; so does the table of modes."""
    grid = {"num_nodes": [1, 4], "num_heads": [3], "context_tokens": [24], "batch": [1, 2]}
    groups: list[float] = []
    time_group = measure_group
    now = [0.0]

    def slow(*arguments: Any, **options: Any) -> Any:
        groups.append(now[0])
        now[0] += 70
        return time_group(*arguments, **options)

    monkeypatch.setattr(harness.measure.latency.run, "measure_group", slow)
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(harness.measure.latency.run, "time", clock)
    record, said = measured(small_data(modes=["eager"], grids=[grid]), tmp_path, time_budget_s=60.0)
    assert groups == [0.0]
    assert [(point.batch, point.skipped) for point in record.points] == [
        (1, None),
        (1, None),
        (2, "the time budget was used up"),
        (2, "the time budget was used up"),
    ]
    assert record.modes is None and "no table of modes: the time budget was used up" in said


def test_graphs_without_a_cuda_device_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    ran = command("latency", "gpu", "--results", tmp_path)
    assert ran.code == ExitCode.USER_ERROR and not list(tmp_path.iterdir())
    assert ran.error_line.startswith("error: found no CUDA device; ")
    spec = parsed(small_data(modes=["cuda_graph", "eager"]))
    with pytest.raises(UserError, match="no CUDA device"):
        check_device(spec, CPU)
    check_device(spec, torch.device("cuda"))
    check_device(parsed(small_data(modes=["eager"])), CPU)
    check_device(parsed(small_data(modes="auto")), CPU)
