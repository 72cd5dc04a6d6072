"""Arms whose steps are recorded and replayed: nothing is recorded in a timed trial."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.device.arms import ArmRunner
from harness.device.engine import Engine
from harness.device.prompts import suite_prompts
from harness.errors import ExitCode
from harness.measure import probes, trials
from harness.measure.session import Session
from harness.tests.tiny_suite import UNDISTURBED, command, micro_data, smoke_suite, write_suite
from medusa_impl import acceptance
from medusa_impl import heads as heads_module
from medusa_impl.engine.captured_step import Failure, RecordedSteps
from medusa_impl.engine.launch import run_directly
from medusa_impl.tests.recorded_graphs import RecordedGraphs
from medusa_impl.tree import DraftTree

ONE_AFTER_ANOTHER = {**UNDISTURBED, "turn_steps": 0}
TREE = DraftTree.cartesian((3, 2, 1))


@pytest.fixture
def graphs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedGraphs]:
    """Let the tiny engine record its steps, with the way through a step that a GPU takes."""
    for module in (acceptance, heads_module):
        monkeypatch.setattr(module, "may_look", lambda device: False)
    made, mode = RecordedGraphs(), engine.runner.mode
    # Packed weights are of a kind that the recorder cannot follow. Other engines of this session share the
    # model, and may have left theirs attached: they go with ours.
    engine.runner.use("packed")
    engine.runner.use("eager")
    engine.runner.backbone.launch = RecordedSteps(made)
    assert engine.runner.records_steps
    yield made
    engine.runner.backbone.launch = run_directly
    engine.runner.use(mode)


def arm_runner(engine: Engine, arm: str) -> ArmRunner:
    return ArmRunner(
        engine,
        smoke_suite().arm(arm),
        tree=None if arm == "vanilla" else TREE,
        max_new_tokens=70,
        max_prompt_tokens=64,
        clock=time.perf_counter,
    )


@pytest.mark.parametrize("arm", ["vanilla", "chain"])
def test_what_attention_may_read_is_recorded_before_the_trials(
    engine: Engine, graphs: RecordedGraphs, arm: str
) -> None:
    prompts = [prompt.prompt_ids for prompt in suite_prompts(smoke_suite(), engine.loaded)][:2]
    runner = arm_runner(engine, arm)
    runner.record()
    assert engine.runner.note == "" and graphs.num_captures == 3, (
        "up to 64 slots, to 128 and to the cache's end"
    )
    texts = [runner.generate(prompt, seed=None).token_ids for prompt in prompts]
    assert graphs.num_captures == 3
    engine.runner.backbone.launch = run_directly
    direct = arm_runner(engine, "vanilla")
    assert texts == [direct.generate(prompt, seed=None).token_ids for prompt in prompts]


def test_without_recorded_steps_nothing_is_taken(engine: Engine) -> None:
    runner = arm_runner(engine, "vanilla")
    runner.record()
    assert runner._cache is not None and runner._cache.lengths == [0]


def test_separate_steps_and_their_backbone_are_other_steps(engine: Engine, graphs: RecordedGraphs) -> None:
    """With its parts marked a recorded step is several graphs, so its length is that of another step."""
    prompt = suite_prompts(smoke_suite(), engine.loaded)[0].prompt_ids
    steps = probes.ArmSteps(arm_runner(engine, "chain"), prompt, seed=None, clock=time.perf_counter)
    assert graphs.num_captures == 1 + 6, "the whole step, and six parts"
    for _ in range(3):
        steps.time_one()
    cost = steps.cost()
    assert graphs.num_captures == 7 and len(cost.step_s) == len(cost.backbone_s) == 3
    (shape,) = probes.measure_step_costs(engine, (7,), context_tokens=20, repeats=2, clock=time.perf_counter)
    assert graphs.num_captures == 14 and len(shape.step_s) == len(shape.backbone_s) == 2


def test_the_parts_of_a_profile_are_recorded_before_it_begins(
    engine: Engine, graphs: RecordedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt.prompt_ids for prompt in suite_prompts(smoke_suite(), engine.loaded)][:2]
    runner, before = arm_runner(engine, "chain"), []
    generate = runner.generate

    def noting(*arguments: object, **options: object) -> object:
        before.append(graphs.num_captures)
        return generate(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "generate", noting)
    row = probes.profile_arm(runner, prompts, seed=None, clock=time.perf_counter)
    assert before == [3 * 6] * 2 and graphs.num_captures == 3 * 6
    assert row.num_steps > 0 and row.heads_s > 0


def test_a_run_whose_engine_leaves_its_mode_ends_there(
    heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_turns = trials._run_in_turns
    taken = []

    def losing(group: list[Any], turn_steps: int | None) -> object:
        session: Session = group[0].session
        outcome = run_in_turns(group, turn_steps)
        taken.append(outcome)
        if len(taken) == 3:
            failed = Failure()
            failed.text = "operation not permitted"
            launch = RecordedSteps(RecordedGraphs(), failed=failed)
            session.engines["original"].runner.backbone.launch = launch
        return outcome

    monkeypatch.setattr(trials, "_run_in_turns", losing)
    data = {**micro_data(heads_file, disturbance=ONE_AFTER_ANOTHER), "engine": "packed"}
    suite = write_suite(tmp_path / "micro.toml", data)
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    assert ran.code == ExitCode.INVALID_MEASUREMENT and len(taken) == 3
    told = " ".join(ran.err.split())
    assert "engine_mode: found eager steps of the original backbone, need packed ones" in told
    assert "operation not permitted" in told
    (folder,) = (tmp_path / "results").glob("micro/*/*")
    assert len((folder / "generations.jsonl").read_text().splitlines()) == 2
