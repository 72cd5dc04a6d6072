"""What is measured apart from the timed generations, on clocks whose right answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from harness.device.arms import ArmRunner
from harness.device.engine import Engine
from harness.device.prompts import Prompt, suite_prompts, warmup_prompts
from harness.device.trace import Text
from harness.measure import probes
from harness.records.trials import Failure
from harness.tests.device.test_trace import texts_of
from harness.tests.tiny_suite import TickClock, WorkClock, smoke_suite
from medusa_impl.engine.runner import StepRunner
from medusa_impl.heads import MedusaHeads
from medusa_impl.tree import DraftTree


def test_step_costs_are_those_of_their_nodes(engine: Engine) -> None:
    sizes = (1, 2, 4, 7, 30)
    with WorkClock(engine.loaded.model) as clock:
        costs = probes.measure_step_costs(engine, sizes, context_tokens=20, repeats=3, clock=clock)
    assert [cost.num_nodes for cost in costs] == list(sizes)
    for cost in costs:
        assert cost.backbone_s == (float(cost.num_nodes),) * 3
        assert cost.step_s == ((float(cost.num_nodes),) * 3 if cost.num_nodes > 1 else ())
        assert cost.context_tokens == 20 and cost.arm is None
    assert [cost.num_heads for cost in costs] == [0, 1, 3, 4, 4]


def test_arm_steps_are_timed_behind_the_context_and_after_the_first(engine: Engine) -> None:
    arm, tree = smoke_suite().arm("chain"), DraftTree.chain(4)
    context = texts_of(engine, budget=30, count=1)[0]
    prompt = (*context.prompt.prompt_ids, *context.token_ids[:15])
    with WorkClock(engine.loaded.model) as clock:
        runner = ArmRunner(
            engine, arm, tree=tree, max_new_tokens=40, max_prompt_tokens=len(prompt), clock=clock
        )
        steps = probes.ArmSteps(runner, prompt, seed=None, clock=clock)
        for _ in range(3):
            steps.time_one()
        cost = steps.cost(prompt_key="a")
    assert cost.prompt_key == "a"
    assert (cost.arm, cost.num_nodes, cost.num_heads, cost.context_tokens) == ("chain", 5, 4, len(prompt))
    assert cost.step_s == cost.backbone_s == (5.0,) * 3


def test_arm_steps_end_with_the_text(engine: Engine) -> None:
    arm = smoke_suite().arm("vanilla")
    prompt = suite_prompts(smoke_suite(), engine.loaded)[0].prompt_ids
    with WorkClock(engine.loaded.model) as clock:
        runner = ArmRunner(
            engine, arm, tree=None, max_new_tokens=4, max_prompt_tokens=len(prompt), clock=clock
        )
        steps = probes.ArmSteps(runner, prompt, seed=None, clock=clock)
        for _ in range(50):
            steps.time_one()
        cost = steps.cost()
    assert cost.step_s == (1.0, 1.0) and cost.num_heads == 0  # of three steps the first is left out


def test_a_step_that_raises_is_the_last_and_has_no_time(engine: Engine) -> None:
    """A generator that raised is at its end, which would look like the text's."""
    arm = smoke_suite().arm("vanilla")
    prompt = suite_prompts(smoke_suite(), engine.loaded)[0].prompt_ids
    with WorkClock(engine.loaded.model) as clock:
        runner = ArmRunner(
            engine, arm, tree=None, max_new_tokens=40, max_prompt_tokens=len(prompt), clock=clock
        )
        steps = probes.ArmSteps(runner, prompt, seed=None, clock=clock)
        steps.time_one()
        hook = engine.loaded.model.register_forward_pre_hook(_raise)
        with pytest.raises(RuntimeError, match="no memory"):
            steps.time_one()
        hook.remove()
        steps.time_one()
        assert steps.cost().step_s == (1.0,)


def _raise(*_: object) -> None:
    raise RuntimeError("no memory")


def test_profile_gives_the_backbone_all_of_a_clock_that_only_it_moves(engine: Engine) -> None:
    prompts = [prompt.prompt_ids for prompt in suite_prompts(smoke_suite(), engine.loaded)[:2]]
    for name, tree in (("vanilla", None), ("chain", DraftTree.chain(4))):
        with WorkClock(engine.loaded.model) as clock:
            runner = ArmRunner(
                engine,
                smoke_suite().arm(name),
                tree=tree,
                max_new_tokens=16,
                max_prompt_tokens=40,
                clock=clock,
            )
            row = probes.profile_arm(runner, prompts, seed=None, clock=clock)
        assert row.arm == name and row.step_s == row.backbone_s == row.num_steps * (
            tree.num_nodes if tree else 1
        )
        assert row.own_code_share == 0


def test_profile_counts_every_section(engine: Engine) -> None:
    """On a clock that ticks at each reading, every section takes a second for each time that it is
    entered.
    """
    prompt = suite_prompts(smoke_suite(), engine.loaded)[0].prompt_ids
    clock = TickClock()
    runner = ArmRunner(
        engine,
        smoke_suite().arm("chain"),
        tree=DraftTree.chain(4),
        max_new_tokens=16,
        max_prompt_tokens=40,
        clock=clock,
    )
    row = probes.profile_arm(runner, [prompt], seed=None, clock=clock)
    parts = (row.backbone_s, row.heads_s, row.candidates_s, row.acceptance_s, row.cache_s)
    assert all(part >= row.num_steps and part % row.num_steps == 0 for part in parts)
    assert row.heads_s == row.acceptance_s == row.num_steps
    assert row.step_s > sum(parts) and 0 < row.own_code_share < 1


def control_texts(engine: Engine) -> list[Text]:
    runner = ArmRunner(
        engine,
        smoke_suite().arm("vanilla"),
        tree=None,
        max_new_tokens=48,
        max_prompt_tokens=40,
        clock=TickClock(),
    )
    texts = []
    for prompt in warmup_prompts(smoke_suite(), engine.loaded):
        result = runner.generate(prompt.prompt_ids, seed=None)
        texts.append(Text(prompt, result.token_ids, result.ended_by))
    return texts


def test_trained_heads_beat_random_ones(engine: Engine) -> None:
    texts = control_texts(engine)
    control = probes.control_heads(engine, texts)
    assert control.num_positions == len(texts) * 47
    assert len(control.trained_top1) == len(control.random_top1) == len(control.identity_top1) == 4
    assert all(
        trained > random for trained, random in zip(control.trained_top1, control.random_top1, strict=True)
    )
    assert probes.control_heads(engine, texts) == control
    other = probes.control_heads(engine, texts, seed=1)
    assert other.random_top1 != control.random_top1 and other.trained_top1 == control.trained_top1


def test_untrained_heads_are_told_as_such(engine: Engine) -> None:
    """Identity heads score as the identity control does: the control cannot flatter them."""
    heads = MedusaHeads(num_heads=4, num_layers=1, hidden_size=64, vocab_size=128, architecture="shared")
    untrained = type(engine)(**{**vars(engine), "runner": StepRunner(engine.loaded.model, heads)})
    control = probes.control_heads(untrained, control_texts(engine))
    assert control.trained_top1 == control.identity_top1


def test_likelihood_is_the_mean_of_token_log_probabilities(engine: Engine) -> None:
    text = texts_of(engine, count=1)[0]
    sampled = Text(Prompt(text.prompt.key, None, text.prompt.prompt_ids), (5, 9, 77, 3), "budget")
    with engine.runner.stock() as model, torch.inference_mode():
        total = 0.0
        for place, token in enumerate(sampled.token_ids):
            logits = model(
                input_ids=torch.tensor([[*text.prompt.prompt_ids, *sampled.token_ids[:place]]])
            ).logits[0, -1]
            total += math.log(torch.softmax(logits.double(), -1)[token])
    assert probes.mean_log_likelihood(engine, sampled) == pytest.approx(total / 4, abs=1e-4)


def test_failure_has_no_metric_at_all() -> None:
    assert not {"token_ids", "step_tokens", "step_times_s", "prefill_s"} & set(Failure.model_fields)
