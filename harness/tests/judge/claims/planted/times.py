"""Changes of a made-up run's generations and separately timed steps whose effect on a figure is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np

from harness.records.probes import StepCost, StepCosts
from harness.records.trace import PromptTrace
from harness.records.trials import Generation
from harness.tests.fake_record import FakeParts
from harness.tests.judge.claims.planted.traces import change_prompts

BARE_STEP_S = 0.02


def pace(
    parts: FakeParts,
    arm: str,
    *,
    over: str,
    rate: float | None = None,
    speed: float | None = None,
    wall_speed: float | None = None,
) -> None:
    """Let an arm keep `rate` times another's tokens a step on each prompt, `speed` times those a second.

    `wall_speed` counts the prefill, which is then as long as that takes. Every other prompt is 4 % faster
    than that and the rest 4 % slower, so that intervals have a width.
    """
    others = {
        one.trial.prompt_key: one
        for one in parts.outcomes
        if isinstance(one, Generation) and one.trial.arm == over
    }
    bends = {key: (0.96, 1.04)[place % 2] for place, key in enumerate(sorted(others))}

    def change(one: Generation) -> dict[str, Any]:
        other, bend = others[one.trial.prompt_key], bends[one.trial.prompt_key]
        tokens, other_tokens = one.num_tokens - 1, other.num_tokens - 1
        num_steps = len(one.step_tokens)
        if rate is not None:
            num_steps = min(tokens, max(1, round(tokens * other.num_steps / other_tokens / rate)))
        spent_s = sum(one.step_times_s)
        if speed is not None:
            spent_s = sum(other.step_times_s) * tokens / other_tokens / (speed * bend)
        prefill_s = one.prefill_s
        if wall_speed is not None:
            other_s = other.prefill_s + sum(other.step_times_s)
            prefill_s = other_s * one.num_tokens / other.num_tokens / (wall_speed * bend) - spent_s
        kept = tuple(tokens // num_steps + (step < tokens % num_steps) for step in range(num_steps))
        times_s = (spent_s / num_steps,) * num_steps
        return {"step_tokens": kept, "step_times_s": times_s, "prefill_s": prefill_s}

    parts.edit(change, arm=arm)


def part_texts(parts: FakeParts, arm: str, *, count: int = 1, gap: float | None = None) -> None:
    """Let some of an arm's texts part from the others at their sixth token.

    With `gap` that is the distance of the top two logits there.
    """
    assert parts.trace is not None
    parted = set()

    def change(one: Generation) -> dict[str, Any]:
        parted.add(one.trial.prompt_key)
        return {"token_ids": (*one.token_ids[:5], one.token_ids[5] + 1, *one.token_ids[6:])}

    parts.edit(change, arm=arm, limit=count)
    if gap is None:
        return

    def bring_near(prompt: PromptTrace, number: int) -> dict[str, Any]:
        assert prompt.gaps is not None
        gaps = prompt.gaps.copy()
        if prompt.key in parted:
            gaps[5] = gap
        return {"gaps": gaps}

    change_prompts(parts, bring_near)


def time_steps(parts: FakeParts, factors: Mapping[str, Callable[[StepCost], float]]) -> None:
    """Time the arms' steps after each prompt's block, scaled by an arm's factor; a step varies by 3 %."""
    assert parts.step_costs is not None
    rng = np.random.default_rng(3)
    rows = [cost for cost in parts.step_costs.costs if cost.arm is None]
    for key in dict.fromkeys(outcome.trial.prompt_key for outcome in parts.outcomes):
        for cost in parts.step_costs.costs:
            if cost.arm is not None:
                factor = factors[cost.arm](cost) if cost.arm in factors else 1.0
                level = factor * float(np.exp(rng.normal(0.0, 0.03)))
                update = {"step_s": tuple(level * step_s for step_s in cost.step_s), "prompt_key": key}
                rows.append(cost.model_copy(update=update))
    parts.step_costs = StepCosts(costs=tuple(rows))


def add_to_step(parts: FakeParts, arm: str, *, against: str, ratio: float) -> None:
    """Let an arm's whole step take `ratio` times its backbone's part, or vanilla's whole step."""
    assert parts.step_costs is not None
    (vanilla,) = (cost for cost in parts.step_costs.costs if cost.arm == "vanilla")

    def factor(cost: StepCost) -> float:
        other = cost.backbone_s if against == "backbone" else vanilla.step_s
        return ratio * median(other) / median(cost.step_s)

    time_steps(parts, {arm: factor})


def cost_nodes(parts: FakeParts, per_node: float) -> None:
    """Let a bare step of n nodes cost 1 + `per_node` x (n - 1) times one of a single node."""
    assert parts.step_costs is not None

    def costed(cost: StepCost) -> StepCost:
        seconds = BARE_STEP_S * (1 + per_node * (cost.num_nodes - 1))
        return cost.model_copy(update={"backbone_s": (seconds,)}) if cost.arm is None else cost

    parts.step_costs = StepCosts(costs=tuple(map(costed, parts.step_costs.costs)))


def cut_tree(parts: FakeParts, arm: str, *, num_nodes: int) -> None:
    """Leave an arm's tree its first nodes only."""
    tree = parts.trees[arm]
    parts.trees[arm] = tree.model_copy(update={"paths": tree.paths[:num_nodes]})


def per_node_for(parts: FakeParts, arm: str, *, over: str, cost: float) -> float:
    """Return the cost of a node with which a step of one arm's tree costs `cost` times one of another's."""
    own, other = (len(parts.trees[name].paths) - 1 for name in (arm, over))
    return (cost - 1) / (own - cost * other)
