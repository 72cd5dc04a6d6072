"""Recording latencies on tiny models: known clocks, dropped steps, memory that runs out, runs that are cut
and resumed.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from functools import cache as cached
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from pytest import MonkeyPatch

import harness.device.locks
import harness.device.machine
import harness.measure.latency.engine
import harness.measure.latency.room
import harness.measure.latency.run
import harness.measure.latency.timers
from harness.device.engine import Engine, LoadedModel
from harness.device.machine import git_state
from harness.errors import ExitCode, UserError
from harness.files import Frozen
from harness.judge.latency import batch_points, mode_rows
from harness.judge.validate.record import validate_record
from harness.measure.latency.engine import chosen_modes, facts_of_engine, load_latency_engine, planned_facts
from harness.measure.latency.faults import PREPARING_MODES
from harness.measure.latency.modes import batch_tree, measure_batches, measure_modes
from harness.measure.latency.prompts import LatencyPrompt, table_prompts
from harness.measure.latency.room import check_fits, skip_reason
from harness.measure.latency.run import LatencyOptions, run_latency
from harness.measure.latency.timers import (
    comb_tree,
    filled_cache,
    measure_group,
    rewind,
    stretch_of,
    visited,
)
from harness.records.latency import (
    LATENCY,
    OUT_OF_TIME,
    POINTS_FILE,
    STOCK,
    LatencyPoint,
    LatencyRecord,
    facts_of_shape,
    read_points,
)
from harness.records.store import Store
from harness.specs.latency import HeadsForm, LatencySpec, ModeName, PointKey, parse_latency_spec
from harness.specs.shapes import ShapeSpec
from harness.tests.tiny_suite import (
    BESIDE_ANYTHING,
    QUIET,
    Ran,
    TickClock,
    WorkClock,
    command,
    small_device_limits,
    smoke_suite,
)
from medusa_impl.decode import TreeStep
from medusa_impl.engine.backbone import Backbone

CPU = torch.device("cpu")
TINY_SHAPE = ShapeSpec(
    name="tiny-llama",
    model_type="llama",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_size=8,
    intermediate_size=48,
    vocab_size=160,
    tie_word_embeddings=True,
    max_positions=64,
    rope_theta=10000.0,
    source="made up for a test",
)


def key(num_nodes: int, num_heads: int = 0, **changes: Any) -> PointKey:
    sizes: dict[str, Any] = {"dtype": "float32", "mode": "eager", "context_tokens": 20, "batch": 1, **changes}
    return PointKey(num_nodes=num_nodes, num_heads=num_heads, **sizes)


def tiny_spec(heads_file: Path | None, **changes: Any) -> dict[str, Any]:
    """A spec of the smoke model that is run in about a second."""
    data = {
        "schema_version": 1,
        "kind": "latency",
        "name": "tiny",
        "description": "for tests",
        "model": smoke_suite().model_dump(mode="json", exclude_none=True)["model"],
        "heads": {"path": str(heads_file)}
        if heads_file is not None
        else {"num_heads": 4, "architecture": "shared"},
        "dtypes": ["float32"],
        "modes": ["eager", "packed"],
        "repeats": 2,
        "prompts": {"source": "random", "prompt_tokens": 9},
        "grids": [
            {"num_nodes": [1, 4, 8], "num_heads": [3], "context_tokens": [24]},
            {"num_nodes": [1, 16], "num_heads": [2], "context_tokens": [24], "batch": [2]},
        ],
        "modes_table": {"num_prompts": 2, "max_new_tokens": 6, "context_tokens": 24, "sizes": [1, 8, 32]},
        "batch_table": {"batches": [1, 2], "tree": {"kind": "fastest", "max_nodes": 6}, "max_new_tokens": 6},
        "interval": {"num_resamples": 100},
        "disturbance": BESIDE_ANYTHING,
        **changes,
    }
    return {name: value for name, value in data.items() if value is not None}


def parsed(data: dict[str, Any]) -> LatencySpec:
    return parse_latency_spec(tomli_w.dumps(data), where="the test")


@pytest.fixture(scope="module", autouse=True)
def quick_and_steady() -> Iterator[None]:
    """One state of the checkout for all runs, no pause for other processes between two blocks, and a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.device.machine, "git_state", cached(git_state))
        patch.setattr(harness.device.locks, "_YIELD_S", 0.0)
        for module in (harness.measure.latency.run, harness.measure.latency.room):
            patch.setattr(module, "best_device", lambda: CPU)
        yield


@pytest.fixture(autouse=True)
def same_mode_afterwards(engine: Engine) -> Iterator[None]:
    """All tests of a session share the engine."""
    before = engine.runner.mode
    yield
    engine.runner.use(before)


@pytest.fixture(scope="module")
def calibrated(engine: Engine, heads_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny spec with a calibration trace of its own model and heads."""
    from harness.device.trace import record_trace
    from harness.tests.device.test_trace import texts_of

    file = tmp_path_factory.mktemp("trace") / "calibration.npz"
    record_trace(engine, texts_of(engine, budget=24), max_new_tokens=24, extra={}).save(file)
    return tiny_spec(heads_file, calibration_trace=str(file))


class LatencyRun(Frozen):
    """A tiny run made through the command line."""

    data: dict[str, Any]
    spec_file: Path
    folder: Path
    code: int
    last_line: str


@pytest.fixture(scope="module")
def ran(calibrated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> LatencyRun:
    home = tmp_path_factory.mktemp("latency")
    file = home / "tiny.toml"
    file.write_text(tomli_w.dumps(calibrated))
    done = command("latency", file, "--results", home / "results")
    (folder,) = (home / "results" / "latency" / "tiny").glob("*/*")
    assert done.out, done.err
    return LatencyRun(
        data=calibrated, spec_file=file, folder=folder, code=done.code, last_line=done.out.splitlines()[-1]
    )


def test_comb_trees_have_their_nodes_and_levels() -> None:
    for nodes, depth in ((1, 5), (2, 5), (6, 5), (8, 1), (64, 5), (128, 3)):
        tree = comb_tree(nodes, depth=depth)
        assert tree.num_nodes == nodes and tree.depth == min(depth, nodes - 1)
        assert max(tree.num_ranks, default=0) == -(-(nodes - 1) // max(tree.depth, 1))


def test_cache_read_in_chunks_is_the_cache_of_the_whole_text(
    engine: Engine, monkeypatch: MonkeyPatch
) -> None:
    backbone, logits = engine.runner.backbone, []
    for chunk in (512, 7):
        monkeypatch.setattr(harness.measure.latency.timers, "_CHUNK_TOKENS", chunk)
        cache = filled_cache(backbone, context_tokens=30, batch=2, room_tokens=1)
        assert list(cache.lengths) == [30, 30]
        step = backbone.forward(
            torch.tensor([[5], [6]]),
            depths=torch.zeros(1, dtype=torch.long),
            visible=torch.ones(1, 1, dtype=torch.bool),
            cache=cache,
        )
        logits.append(step.logits.clone())
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.equal(logits[0][0], logits[0][1]), "rows hold texts of their own"


def test_rewound_cache_gives_the_same_step_again(engine: Engine) -> None:
    """What a timed step kept is forgotten and the context before it is intact."""
    backbone = engine.runner.backbone
    cache = filled_cache(backbone, context_tokens=20, batch=1, room_tokens=8)

    def step() -> torch.Tensor:
        return backbone.forward(
            torch.tensor([[5]]),
            depths=torch.zeros(1, dtype=torch.long),
            visible=torch.ones(1, 1, dtype=torch.bool),
            cache=cache,
        ).logits.clone()

    before = step()
    backbone.prefill(torch.tensor([1, 2, 3]), cache=cache)
    assert not torch.equal(step(), before)
    rewind(cache, context_tokens=20)
    assert list(cache.lengths) == [20] and torch.equal(step(), before)


@pytest.mark.parametrize("mode", ["eager", "packed"])
def test_points_are_timed_at_their_sizes(engine: Engine, mode: str) -> None:
    """On a clock that counts tokens through the backbone, a step of N nodes takes N whatever the heads, the
    batch and the repeat.
    """
    if mode not in engine.runner.available_modes():
        pytest.skip("this CPU has no packed operators")
    keys = [
        key(1, mode=mode, batch=2),
        key(4, 3, mode=mode, batch=2),
        key(9, 4, mode=mode, batch=2),
        key(9, mode=mode, batch=2),
    ]
    with WorkClock(engine.loaded.model) as clock:
        points = measure_group(engine, keys, repeats=3, clock=clock)
    assert [point.key for point in points] == keys and engine.runner.mode == mode
    for point in points:
        count = 9 if point.num_nodes == 1 else 3  # one node is timed beside each of the others
        assert point.times_a_round == (count,) and point.timing == "decoding"
        assert point.backbone_s == (float(point.num_nodes),) * count
        assert point.heads_s == ((0.0,) * count if point.num_heads else ())
        assert point.step_s == (
            (float(point.num_nodes),) * count if point.num_heads or point.num_nodes == 1 else ()
        )
        assert point.skipped is None and (point.peak_memory_bytes or 0) > 0


def test_every_part_is_timed_once_a_repeat(engine: Engine) -> None:
    """On a clock that ticks at each reading, each part takes one tick; what is run to warm up is not
    timed.
    """
    clock = TickClock()
    (point,) = measure_group(engine, [key(4, 2)], repeats=2, clock=clock)
    assert point.backbone_s == point.heads_s == point.step_s == (1.0, 1.0)
    assert clock.reads == 2 * 3 * 2  # two readings for each of three parts, twice


def test_sizes_take_turns_and_each_visit_drops_its_first_pass(
    engine: Engine, monkeypatch: MonkeyPatch
) -> None:
    """A pass right after another size's once made one node look as dear as eight on a CPU in eager mode."""
    timed: list[int] = []
    forward = Backbone.forward

    def noting(backbone: Backbone, token_ids: torch.Tensor, **options: Any) -> Any:
        timed.append(token_ids.shape[1])
        return forward(backbone, token_ids, **options)

    monkeypatch.setattr(Backbone, "forward", noting)
    points = measure_group(engine, [key(2), key(3), key(5)], repeats=4, clock=TickClock())
    assert timed == [2, 3, 5, *[3] * 4, *[5] * 4, *[2] * 4, *[5] * 2, *[2] * 2, *[3] * 2]
    assert all(len(point.backbone_s) == 4 for point in points)


def test_one_node_is_visited_before_every_other_size(engine: Engine) -> None:
    """Every speedup rests on it. Timed as seldom as any other size, it once came out too fast in a sweep, and
    the composed speedup too low in twelve decoded points of twelve.
    """
    one, two, three = key(1), key(2), key(3, 2)
    assert visited([one, two, three], number=0, num_rounds=2) == [one, two, one, three]
    assert visited([one, two, three], number=1, num_rounds=2) == [one, two, one, three]
    assert visited([one, two, three], number=2, num_rounds=3) == [one, three, one, two]
    assert visited([two, three], number=1, num_rounds=2) == [three, two]
    assert visited([one], number=0, num_rounds=1) == [one]
    points = measure_group(engine, [one, two, three], repeats=5, clock=TickClock())
    assert [point.times_a_round for point in points] == [(6, 4), (3, 2), (3, 2)]
    assert [len(point.backbone_s) for point in points] == [10, 5, 5]


def test_a_visit_decodes_on_over_a_growing_text(engine: Engine, monkeypatch: MonkeyPatch) -> None:
    """Steps of one visit follow each other; the next visit starts at another length about the context."""
    lengths: list[int] = []
    step = TreeStep.take

    def noting(self: TreeStep, *arguments: Any, **options: Any) -> Any:
        lengths.append(self.cache.lengths[0])
        return step(self, *arguments, **options)

    monkeypatch.setattr(TreeStep, "take", noting)
    (point,) = measure_group(engine, [key(1)], repeats=9, clock=TickClock())
    assert point.timing == "decoding" and point.times_a_round == (3, 3, 3)
    warm, *visits = lengths[0], lengths[1:5], lengths[5:9], lengths[9:]
    assert all(visit == list(range(visit[0], visit[0] + 4)) for visit in visits)  # the first is not timed
    starts = [warm, *(visit[0] for visit in visits)]
    assert len(set(starts)) == 4 and 10 <= min(starts) < 20 < max(starts) <= 30


def test_visits_are_spread_evenly_about_the_context_and_stay_within_the_positions(engine: Engine) -> None:
    backbone = engine.runner.backbone
    assert backbone.max_positions is not None
    free = stretch_of([key(1), key(8, 3)], backbone=backbone)
    starts = [free.start(visit) for visit in range(64)]
    assert abs(sum(starts) / 64 - 20) < 1 and (min(starts), max(starts)) == (10, 30)
    most = backbone.max_positions - 8
    tight = stretch_of([key(8, 3, context_tokens=most)], backbone=backbone)
    assert tight.longest + tight.grown + 8 <= backbone.max_positions
    (point,) = measure_group(engine, [key(8, 3, context_tokens=most)], repeats=3, clock=TickClock())
    assert point.skipped is None and len(point.step_s) == 3


def test_a_mode_that_prepares_its_steps_keeps_to_the_context(engine: Engine) -> None:
    """It would compile or capture a step anew for another length, in a timed step at worst."""
    for mode in PREPARING_MODES:
        stretch = stretch_of([key(1, mode=mode)], backbone=engine.runner.backbone)
        assert (stretch.longest, stretch.span, stretch.grown) == (20, 0, 1)
        assert {stretch.start(visit) for visit in range(9)} == {20}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory at /root/x/y"), MemoryError()])
def test_point_that_runs_out_of_memory_is_skipped_and_the_others_go_on(
    engine: Engine, monkeypatch: MonkeyPatch, error: Exception
) -> None:
    forward = Backbone.forward

    def narrow(backbone: Backbone, token_ids: torch.Tensor, **options: Any) -> Any:
        if token_ids.shape[1] == 8:
            raise error
        return forward(backbone, token_ids, **options)

    monkeypatch.setattr(Backbone, "forward", narrow)
    small, large = measure_group(engine, [key(4, 2), key(8, 2)], repeats=2, clock=TickClock())
    assert small.backbone_s == (1.0, 1.0) and small.skipped is None
    assert (
        (large.skipped or "").startswith("ran out of memory")
        and not large.backbone_s
        and "/root" not in (large.skipped or "")
    )


def test_context_that_runs_out_of_memory_skips_its_whole_group(
    engine: Engine, monkeypatch: MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(Backbone, "prefill", full)
    points = measure_group(engine, [key(1), key(4)], repeats=1, clock=TickClock())
    assert all((point.skipped or "").startswith("ran out of memory") for point in points)


def test_other_errors_are_not_mistaken_for_memory(engine: Engine, monkeypatch: MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Backbone, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure_group(engine, [key(1)], repeats=1, clock=TickClock())


def test_points_beyond_memory_or_positions_are_not_tried() -> None:
    facts = facts_of_shape(TINY_SHAPE, heads=HeadsForm(), random_weights=False)
    fits: dict[str, Any] = {"packs": True, "free_bytes": 10**9, "memory_share": 0.5}
    assert skip_reason(key(4), facts, **fits) is None
    assert skip_reason(key(44), facts, **fits) is None
    assert skip_reason(key(45), facts, **fits) == "needs 65 positions, the model has 64"
    assert skip_reason(key(45), facts.model_copy(update={"random_weights": True}), **fits) is None
    needed = facts.needed_bytes(key(4), packs=True)
    assert skip_reason(key(4), facts, packs=True, free_bytes=2 * needed, memory_share=0.5) is None
    reason = skip_reason(key(4), facts, packs=True, free_bytes=2 * needed - 1, memory_share=0.5)
    assert reason is not None and "GB" in reason
    assert skip_reason(key(4), facts, packs=False, free_bytes=2 * needed - 1, memory_share=0.5) is None


def test_shape_that_cannot_fit_is_refused_before_it_is_made(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(harness.measure.latency.engine, "load_shapes", lambda: {"tiny-llama": TINY_SHAPE})
    spec = parsed(shape_spec())
    check_fits(spec, dtype="float32", free_bytes=10**9)
    with pytest.raises(UserError, match="tiny-llama in float32"):
        check_fits(spec, dtype="float32", free_bytes=10_000)


def test_auto_modes_leave_out_the_one_that_takes_minutes() -> None:
    auto = parsed(tiny_spec(None, modes="auto", batch_table=None))
    assert chosen_modes(auto, ("packed", "eager", "compiled")) == ("packed", "eager")
    assert chosen_modes(parsed(tiny_spec(None, batch_table=None)), ("eager",)) == ("eager", "packed")


def shape_spec(**changes: Any) -> dict[str, Any]:
    return tiny_spec(None, model=None, shape="tiny-llama", batch_table=None, modes=["eager"], **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_facts_of_a_made_model_are_those_planned(dtype: Any, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(harness.measure.latency.engine, "load_shapes", lambda: {"tiny-llama": TINY_SHAPE})
    spec = parsed(shape_spec(dtypes=["float32", "bfloat16"]))
    engine = load_latency_engine(spec, dtype=dtype, device=CPU, base_folder=None, allow_hub=False)
    assert engine.runner.packed_bytes == 0  # copies for a mode that is not timed may not fit
    facts = facts_of_engine(engine)
    assert facts == planned_facts(spec) and facts.random_weights
    assert facts.step_bytes(dtype) == engine.weight_bytes
    with torch.inference_mode():
        states = torch.ones(1, 32, dtype=engine.runner.backbone.dtype)
        logits = engine.heads(states, lm_head=engine.runner.backbone.lm_head)
    assert (
        logits.shape == (1, 4, 160)
        and logits.isfinite().all()
        and not torch.equal(logits[0, 0], logits[0, 1])
    )


def test_facts_of_a_tiny_model_are_those_planned(tiny: tuple[LoadedModel, Engine], heads_file: Path) -> None:
    engine = tiny[1]
    spec = parsed(
        tiny_spec(
            heads_file, heads={"num_heads": 4, "architecture": engine.heads.architecture}, batch_table=None
        )
    )
    assert facts_of_engine(engine) == planned_facts(spec)
    assert facts_of_engine(engine).step_bytes("float32") == engine.weight_bytes


def test_facts_of_a_folder_need_no_weights(tiny: tuple[LoadedModel, Engine], tmp_path: Path) -> None:
    loaded, engine = tiny
    loaded.model.config.save_pretrained(tmp_path / "model")
    data = tiny_spec(
        None,
        model={"path": str(tmp_path / "model")},
        heads={"num_heads": 4, "architecture": "shared"},
        batch_table=None,
    )
    planned = planned_facts(parsed(data))
    same = {"name": "model", "random_weights": False, "head_architecture": "shared"}
    assert planned == facts_of_engine(engine).model_copy(update=same)
    with pytest.raises(UserError, match="no folder 'none'"):
        planned_facts(parsed({**data, "model": {"path": str(tmp_path / "none")}}))


def test_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="vicuna-7b"):
        planned_facts(parsed(shape_spec()))


def test_modes_decode_the_same_prompts_in_turn_at_known_speeds(engine: Engine) -> None:
    """A vanilla step and a step of `generate` move one token through the backbone, so each mode makes one
    token a second.
    """
    prompts = [
        LatencyPrompt(key=f"p{number}", prompt_ids=tuple(range(3 + number, 12))) for number in range(3)
    ]
    modes: list[ModeName] = [mode for mode in engine.runner.available_modes() if mode != "compiled"]
    with WorkClock(engine.loaded.model) as clock:
        trials, _ = measure_modes(engine, "float32", modes, prompts, max_new_tokens=7, clock=clock)
    names = [STOCK, *modes]
    turns = [[trial.mode for trial in trials if trial.prompt_key == prompt.key] for prompt in prompts]
    assert turns == [[*names[first % len(names) :], *names[: first % len(names)]] for first in range(3)]
    for trial in trials:
        assert trial.step_tokens == (1,) * 6 and trial.step_times_s == (1.0,) * 6
        assert trial.prefill_s == trial.prompt_tokens and len(trial.token_ids) == 7
    by_prompt = {
        prompt.key: {trial.token_ids for trial in trials if trial.prompt_key == prompt.key}
        for prompt in prompts
    }
    assert all(len(texts) == 1 for texts in by_prompt.values()), "float32 decodes the same text in every mode"


def test_batches_decode_the_same_texts_at_known_speeds(engine: Engine, heads_file: Path) -> None:
    """A vanilla step of B rows takes a second on this clock and a chain of 4 takes 5, so speedup =
    tokens/step / 5 at batch 1.
    """
    table = {
        "batches": [1, 2, 4],
        "tree": {"kind": "chain", "depth": 4},
        "max_new_tokens": 9,
        "num_prompts": 8,
    }
    spec = parsed(tiny_spec(heads_file, batch_table=table))
    prompts = table_prompts(spec, engine, allow_hub=False)
    assert len(prompts) == 8 and all(len(prompt.prompt_ids) == 9 for prompt in prompts)
    with WorkClock(engine.loaded.model) as clock:
        found = measure_batches(engine, spec, [], prompts, dtype="float32", clock=clock)
    assert found is not None and found.mode == engine.runner.mode and len(found.tree.paths) == 5
    for batch in (1, 2, 4):
        for method in ("vanilla", "medusa"):
            mine = [trial for trial in found.trials if (trial.batch, trial.method) == (batch, method)]
            assert [name for trial in mine for name in trial.prompt_keys] == [
                prompt.key for prompt in prompts
            ]
            assert sum(trial.num_tokens for trial in mine) == 8 * 8
    points = {point.batch: point for point in batch_points(found, spec=spec.interval)}
    assert [points[batch].vanilla_tokens_per_s for batch in (1, 2, 4)] == [1, 2, 4]
    assert points[1].speedup.estimate == pytest.approx(points[1].tokens_per_step / 5)
    assert points[1].tokens_per_step > 1


def test_tree_of_the_batch_table_is_the_fastest_by_this_runs_own_steps(
    calibrated: dict[str, Any], engine: Engine
) -> None:
    """Free nodes make the largest tree the fastest, dear ones the smallest; sizes between two measured ones
    are interpolated.
    """

    def points(seconds_a_node: float) -> list[LatencyPoint]:
        times = {nodes: (1.0 + seconds_a_node * (nodes - 1),) for nodes in (1, 16)}
        sizes = ((1, 0), (16, 4))
        return [
            LatencyPoint(
                **dict(key(nodes, heads)),
                backbone_s=times[nodes],
                heads_s=(0.0,) if heads else (),
                step_s=times[nodes],
            )
            for nodes, heads in sizes
        ]

    spec = parsed(calibrated)
    options: dict[str, Any] = {"mode": "eager", "dtype": "float32", "base_folder": None}
    assert len(batch_tree(spec, engine, points(0.0), **options).paths) == 6
    assert len(batch_tree(spec, engine, points(9.0), **options).paths) == 2
    with pytest.raises(UserError, match="no step times"):
        batch_tree(spec, engine, [], **options)


def test_run_writes_a_whole_record_and_its_report(ran: LatencyRun) -> None:
    assert ran.code == ExitCode.OK
    record = LatencyRecord(ran.folder)
    record.check_seal()
    assert validate_record(ran.folder) == ()
    assert {path.name for path in ran.folder.iterdir()} == {
        "spec.toml",
        "environment.json",
        "model.json",
        "device_limits.json",
        POINTS_FILE,
        "modes.json",
        "batches.json",
        "manifest.json",
        "report.md",
    }
    assert record.spec.calibration_trace == "calibration.npz", "no folder of this machine is kept"
    skipped = [point for point in record.points if point.skipped is not None]
    assert {point.num_nodes for point in record.points if point.skipped is None} == {1, 4, 8, 16}
    assert all("not available" in (point.skipped or "") for point in skipped)
    for point in record.points:
        if point.skipped is None:
            assert len(point.backbone_s) == sum(point.times_a_round) > 0
            assert (point.num_heads > 0) == bool(point.heads_s)
    rows = mode_rows(record)
    assert [row.is_auto for row in rows].count(True) == 1 and all(row.num_same_text == 2 for row in rows)
    assert record.batches is not None and 2 <= len(record.batches.tree.paths) <= 6
    assert "size chosen from" in record.batches.tree.origin
    shown = json.loads(ran.last_line)
    assert shown["latency"] == "tiny" and shown["num_points"] == len(record.points) - len(skipped)
    text = (ran.folder / "report.md").read_text()
    assert "## Table of modes" in text and "Break-even:" in text and str(ran.folder.parent) not in text


def test_report_is_written_again_without_a_device(
    ran: LatencyRun, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    folder = shutil.copytree(ran.folder, tmp_path / ran.folder.name)
    before = (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    page = tmp_path / "PAGE.md"
    page.write_text("Title\n<!-- begin:modes -->\n<!-- end:modes -->\nrest\n")
    monkeypatch.setattr(harness.measure.latency.run, "run_latency", _never)
    done = command("report", folder, "--readme", page)
    assert done.code == ExitCode.OK and (folder / "report.md").read_text() == before
    assert "against `generate`" in page.read_text() and page.read_text().endswith("rest\n")


def _never(*arguments: object, **options: object) -> None:
    raise AssertionError("something was loaded or measured")


def cut_copy(run: LatencyRun, folder: Path, *, num_bytes: int, keep: tuple[str, ...] = ()) -> Path:
    """A copy of a run as a kill would leave it after so many bytes of points."""
    shutil.copytree(run.folder, folder)
    for late in {"manifest.json", "report.md", "modes.json", "batches.json"} - set(keep):
        (folder / late).unlink()
    with (folder / POINTS_FILE).open("r+b") as file:
        file.truncate(num_bytes)
    (folder / "modes.json0.tmp").write_text("half a fi")
    return folder


def resumed(run: LatencyRun, folder: Path, **changes: Any) -> Path:
    options = LatencyOptions(results=folder.parent / "unused", resume=folder)
    with small_device_limits():
        return run_latency(
            parsed({**run.data, **changes}), spec_file=run.spec_file, options=options, console=QUIET
        )


def several_rounds(**changes: Any) -> LatencySpec:
    """Two groups of two sizes, timed in three rounds of three times."""
    grid = {"num_nodes": [1, 4], "num_heads": [2], "context_tokens": [20, 32]}
    return parsed(shape_spec(dtypes=["float32"], grids=[grid], repeats=9, **changes))


def timed_rounds(
    spec: LatencySpec,
    results: Path,
    monkeypatch: MonkeyPatch,
    *,
    die_after: int | None = None,
    sitting_s: float = 0.0,
    **options: Any,
) -> list[tuple[int, tuple[int, ...]]]:
    """Run a spec, and return which contexts and rounds were timed in turn.

    It is killed after so many sittings; each takes so long on the run's clock.
    """
    sat: list[tuple[int, tuple[int, ...]]] = []

    def noting(engine: Engine, keys: Any, *, rounds: range, **how: Any) -> Any:
        if len(sat) == die_after:
            raise KeyboardInterrupt
        sat.append((keys[0].context_tokens, tuple(rounds)))
        return measure_group(engine, keys, rounds=rounds, **how)

    with monkeypatch.context() as patch, small_device_limits():
        patch.setattr(harness.measure.latency.engine, "load_shapes", lambda: {"tiny-llama": TINY_SHAPE})
        patch.setattr(harness.measure.latency.run, "measure_group", noting)
        clock = SimpleNamespace(monotonic=lambda: sitting_s * len(sat))
        patch.setattr(harness.measure.latency.run, "time", clock)
        with contextlib.suppress(KeyboardInterrupt):
            run_latency(
                spec, spec_file=None, options=LatencyOptions(results=results, **options), console=QUIET
            )
    return sat


def test_the_rounds_of_a_group_are_spread_over_the_run(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """A machine's speed drifts over minutes. Timed within one, a group's rounds all met one level, and looked
    surer than they were.
    """
    spec = several_rounds(modes_table=None)
    sat = timed_rounds(spec, tmp_path, monkeypatch)
    assert sat == [(context, (number,)) for number in range(3) for context in (20, 32)]
    (folder,) = tmp_path.glob("latency/*/*/*")
    points = LatencyRecord(folder).points
    assert [(point.context_tokens, point.num_nodes) for point in points] == [
        (context, nodes) for context in (20, 32) for nodes in (1, 4)
    ]
    assert all(point.times_a_round == (3, 3, 3) and len(point.step_s) == 9 for point in points)
    assert all(point.timing == "decoding" for point in points)
    assert validate_record(folder) == ()


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_run_that_is_killed_between_rounds_goes_on_with_the_next(
    tmp_path: Path, monkeypatch: MonkeyPatch, after: int
) -> None:
    spec = several_rounds(modes_table=None)
    every = [(context, (number,)) for number in range(3) for context in (20, 32)]
    assert timed_rounds(spec, tmp_path, monkeypatch, die_after=after) == every[:after]
    (folder,) = tmp_path.glob("latency/*/*/*")
    before = LatencyRecord(folder).points
    assert timed_rounds(spec, tmp_path, monkeypatch, resume=folder) == every[after:]
    points = {point.key: point for point in LatencyRecord(folder).points}
    assert all(point.times_a_round == (3, 3, 3) for point in points.values()) and len(points) == 4
    for point in before:
        assert points[point.key].step_s[: len(point.step_s)] == point.step_s
    assert validate_record(folder) == ()


def test_rounds_that_time_leaves_out_leave_what_was_timed(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """A budget that ends in the second round costs rounds, no size."""
    spec = several_rounds(modes_table=None)
    sat = timed_rounds(spec, tmp_path, monkeypatch, sitting_s=10.0, time_budget_s=25.0)
    assert sat == [(20, (0,)), (32, (0,)), (20, (1,))]
    (folder,) = tmp_path.glob("latency/*/*/*")
    counts = [len(point.times_a_round) for point in LatencyRecord(folder).points]
    assert counts == [2, 2, 1, 1] and validate_record(folder) == ()


def test_later_rounds_are_added_and_a_failed_sitting_takes_nothing_away(engine: Engine) -> None:
    first, later = (
        measure_group(engine, [key(4, 2)], repeats=6, rounds=range(number, number + 1), clock=TickClock())[0]
        for number in (0, 1)
    )
    both = first.with_rounds_of(later.model_copy(update={"peak_memory_bytes": 1}))
    assert both.times_a_round == (3, 3) and both.step_s == first.step_s + later.step_s
    assert both.peak_memory_bytes == first.peak_memory_bytes
    failed = LatencyPoint(**dict(first.key), skipped="ran out of memory")
    assert first.with_rounds_of(failed) == first


@pytest.mark.parametrize("share", [0.0, 0.21, 0.63, 0.999, 1.0])
def test_run_cut_at_any_byte_resumes_and_measures_nothing_twice(
    ran: LatencyRun, tmp_path: Path, share: float
) -> None:
    whole = LatencyRecord(ran.folder)
    folder = cut_copy(
        ran,
        tmp_path / "run",
        num_bytes=int(share * (ran.folder / POINTS_FILE).stat().st_size),
        keep=("modes.json",),
    )
    before = read_points(folder / POINTS_FILE, allow_torn_tail=True)
    modes = (folder / "modes.json").read_bytes()
    assert resumed(ran, folder) == folder
    record = LatencyRecord(folder)
    assert validate_record(folder) == () and record.points[: len(before)] == before
    assert sorted(map(_place, record.points)) == sorted(map(_place, whole.points))
    assert (folder / "modes.json").read_bytes() == modes and record.batches is not None
    assert not list(folder.glob("*.tmp"))


def test_what_a_time_budget_left_undone_is_measured_when_the_run_goes_on(
    ran: LatencyRun, tmp_path: Path
) -> None:
    """A run killed after its budget and before its seal once went on without one, and measured nothing."""
    folder = cut_copy(ran, tmp_path / "run", num_bytes=0, keep=("modes.json", "batches.json"))
    whole = read_points(ran.folder / POINTS_FILE)
    late = [LatencyPoint(**dict(point.key), skipped=OUT_OF_TIME) for point in whole[3:]]
    Store(folder, kind=LATENCY).append(*whole[:3], *late)
    resumed(ran, folder)
    record = LatencyRecord(folder)
    assert validate_record(folder) == () and record.points[:3] == whole[:3]
    assert not any(point.skipped == OUT_OF_TIME for point in record.points)
    assert sorted(map(_place, record.points)) == sorted(map(_place, whole))


def _place(point: PointKey) -> tuple[str, int, int, int, int]:
    return point.mode, point.batch, point.context_tokens, point.num_nodes, point.num_heads


def test_cut_anywhere_leaves_whole_points_only(ran: LatencyRun, tmp_path: Path) -> None:
    content = (ran.folder / POINTS_FILE).read_bytes()
    points = read_points(ran.folder / POINTS_FILE)
    for num_bytes in range(0, len(content), 97):
        (tmp_path / POINTS_FILE).write_bytes(content[:num_bytes])
        done = {point.key for point in Store(tmp_path, kind=LATENCY).lines()}
        num_lines = content[:num_bytes].count(b"\n")
        assert done == {point.key for point in points[:num_lines]}
        assert read_points(tmp_path / POINTS_FILE) == points[:num_lines]


def test_unfinished_run_of_the_same_kind_is_found_and_resumed(ran: LatencyRun, tmp_path: Path) -> None:
    home = tmp_path / "results" / "latency" / "tiny" / ran.folder.parent.name
    home.mkdir(parents=True)
    folder = cut_copy(ran, home / ran.folder.name, num_bytes=400)
    done = command("latency", ran.spec_file, "--results", tmp_path / "results")
    assert done.code == ExitCode.OK and [path.name for path in home.iterdir()] == [folder.name]
    assert validate_record(folder) == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("commit", "f" * 40), ("packages", {"torch": "1.0"}), ("heads_sha256", "0" * 64), ("dtype", "float16")],
)
def test_resume_refuses_what_another_began(ran: LatencyRun, tmp_path: Path, name: str, value: object) -> None:
    folder = cut_copy(ran, tmp_path / "run", num_bytes=0)
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**environment, name: value}))
    with pytest.raises(UserError, match=f"another {name}"):
        resumed(ran, folder)


def test_resume_refuses_another_device_spec_or_a_finished_run(ran: LatencyRun, tmp_path: Path) -> None:
    folder = cut_copy(ran, tmp_path / "run", num_bytes=0)
    with pytest.raises(UserError, match="another spec"):
        resumed(ran, folder, repeats=3)
    environment = json.loads((folder / "environment.json").read_text())
    environment["device"]["name"] = "another CPU"
    (folder / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(UserError, match="another device"):
        resumed(ran, folder)
    told = shutil.copytree(ran.folder, tmp_path / "told")
    (told / "report.md").write_text("told")
    with pytest.raises(UserError, match="a finished run"):
        resumed(ran, told)


def test_published_shape_runs_in_two_dtypes_with_random_weights(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.measure.latency.engine, "load_shapes", lambda: {"tiny-llama": TINY_SHAPE})
    grid = {"num_nodes": [1, 4], "num_heads": [2], "context_tokens": [80]}
    data = shape_spec(dtypes=["float32", "bfloat16"], grids=[grid], repeats=1)
    data["modes_table"] = {"num_prompts": 1, "max_new_tokens": 4, "context_tokens": 80}
    with small_device_limits():
        folder = run_latency(
            parsed(data), spec_file=None, options=LatencyOptions(results=tmp_path), console=QUIET
        )
    record = LatencyRecord(folder)
    assert validate_record(folder) == () and record.facts == facts_of_shape(
        TINY_SHAPE, heads=record.spec.heads.form, random_weights=True
    )
    assert [(point.dtype, point.num_nodes) for point in record.points] == [
        (d, n) for d in ("float32", "bfloat16") for n in (1, 4)
    ]
    assert all(point.skipped is None for point in record.points), (
        "80 tokens are more than 64 positions, which random weights never learned"
    )
    assert record.limits("bfloat16") is not None and (folder / "device_limits_bfloat16.json").exists()
    assert (
        record.modes is not None
        and set(record.modes.auto) == {"float32", "bfloat16"}
        and record.batches is None
    )


def test_dry_run_loads_nothing_and_says_what_would_be_skipped(
    ran: LatencyRun, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.measure.latency.run, "load_latency_engine", _never)
    results = ("--results", tmp_path / "results", "--dry-run")
    done = command("latency", ran.spec_file, "--nodes", "1,8", "--modes", "eager", *results)
    assert done.code == ExitCode.OK and not (tmp_path / "results").exists()
    assert json.loads(done.out.splitlines()[-1]) == {"latency": "tiny", "points": 4, "skipped": 0}
    monkeypatch.setattr(harness.measure.latency.room, "free_memory_bytes", lambda device: 1000)
    done = command("latency", ran.spec_file, "--nodes", "1,8", "--modes", "eager", *results)
    assert json.loads(done.out.splitlines()[-1])["skipped"] == 4
    shipped: Ran = command(
        "latency", "gpu", "--shape", "vicuna-13b-v1.5", "--contexts", "1024", "--batches", "1", *results
    )
    assert (
        shipped.code == ExitCode.OK
        and json.loads(shipped.out.splitlines()[-1])["latency"] == "gpu_vicuna_13b_v1_5"
    )


def test_wrong_names_are_user_errors(tmp_path: Path) -> None:
    assert (
        "'gpu'" in command("latency", "none").error_line
        and "smoke" not in command("latency", "smoke").error_line.split("need")[1]
    )
    assert "latency" not in command("reproduce", "none").error_line
    unknown = command("latency", "gpu", "--shape", "no-such-shape", "--dry-run")
    assert unknown.code == ExitCode.USER_ERROR and "no-such-shape" in unknown.error_line
    assert command("report", tmp_path / "nothing").code == ExitCode.USER_ERROR


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"num_heads": 5}, "num_heads = 5 and 4 heads in the file"),
        ({"num_layers": 2}, "heads.num_layers = 2; need 1, as the checkpoint has"),
        ({"architecture": "own"}, "heads.architecture = 'own'; need 'shared', as the checkpoint has"),
    ],
)
def test_a_form_that_is_not_the_checkpoints_is_refused(
    said: dict[str, object], found: str, heads_file: Path
) -> None:
    """What a spec said of its checkpoint's heads had no effect."""
    heads = {"path": str(heads_file), **said}
    spec = parsed(tiny_spec(heads_file, heads=heads, batch_table=None))
    with pytest.raises(UserError, match=re.escape(found)):
        load_latency_engine(spec, dtype="float32", device=CPU, base_folder=None, allow_hub=False)


def test_grids_need_no_more_heads_than_the_checkpoint_has(heads_file: Path, engine: Engine) -> None:
    grids = [{"num_nodes": [9], "num_heads": [engine.heads.num_heads + 1], "context_tokens": [8]}]
    with pytest.raises(UserError, match="as the checkpoint has"):
        load_latency_engine(
            parsed(tiny_spec(heads_file, grids=grids, batch_table=None)),
            dtype="float32",
            device=CPU,
            base_folder=None,
            allow_hub=False,
        )


def test_random_weights_have_no_texts(engine: Engine, heads_file: Path) -> None:
    spec = parsed(tiny_spec(heads_file, batch_table=None, prompts={"source": "mt_bench"}))
    with pytest.raises(UserError, match="prompts of text for random weights"):
        table_prompts(spec, engine, allow_hub=False)
    long = parsed(tiny_spec(heads_file, batch_table=None, prompts={"source": "random", "prompt_tokens": 250}))
    with pytest.raises(UserError, match="positions"):
        table_prompts(long, engine, allow_hub=False)
