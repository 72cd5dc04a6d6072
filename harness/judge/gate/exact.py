"""What no neighbour bends: tokens/step, acceptance, texts, likelihoods and memory, compared exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from harness.records.gate.record import SIDES, Finding, Outcome, SideInfo, SideName, Turn
from harness.specs.gate import GateSpec, Quantity


def judge_exact(
    turns: Sequence[Turn], sides: Mapping[SideName, SideInfo], spec: GateSpec
) -> tuple[Finding, ...]:
    """Return what is found of counts, texts, likelihoods and memory, which no neighbour bends."""
    once = _first_turns(turns)
    found: list[Finding] = []
    for arm in spec.timed_arms:
        if arm.method == "medusa":
            found += _tokens_per_step(once, sides, spec, arm.name)
            found += _acceptance(once, spec, arm.name)
    found += _parity(turns, spec)
    found += _quality(once, spec)
    found += _memory(turns, spec)
    return (*found, *_not_judged(found, spec))


def _not_judged(found: Sequence[Finding], spec: GateSpec) -> list[Finding]:
    """Return what the gate has a margin for and had nothing of both versions to compare, as withheld.

    Acceptance is not among them: where no step accepted a draft token, there is no depth to speak of.
    """
    timed, sampled = (tuple(arm.name for arm in arms) for arms in (spec.timed_arms, spec.sampled_arms))
    drafting = tuple(arm.name for arm in spec.timed_arms if arm.method == "medusa")
    asked: dict[Quantity, tuple[str | None, ...]] = {
        "tokens_per_step": drafting,
        "parity": timed,
        "quality": sampled if spec.quality_prompts else (),
        "peak_memory": (None,),
    }
    there = {(one.quantity, one.arm) for one in found}
    return [
        Finding(
            quantity=quantity, arm=arm, base=None, head=None, change=None, margin=margin, outcome="withheld"
        )
        for quantity, arms in asked.items()
        for arm in arms
        if (margin := spec.margin(quantity)) is not None and (quantity, arm) not in there
    ]


def _first_turns(turns: Sequence[Turn]) -> dict[tuple[SideName, str, str], Turn]:
    """Return one turn of each version, arm and prompt that both versions decoded."""
    once: dict[tuple[SideName, str, str], Turn] = {}
    for turn in turns:
        once.setdefault((turn.side, turn.arm, turn.prompt_key), turn)
    both = {key[1:] for key in once if key[0] == "base"} & {key[1:] for key in once if key[0] == "head"}
    return {key: turn for key, turn in once.items() if key[1:] in both}


def _exact(
    quantity: Quantity,
    arm: str | None,
    values: Mapping[SideName, float],
    *,
    change: float,
    margin: float,
    depth: int | None = None,
) -> Finding:
    """Return a finding without an interval. A change at the margin, but for rounding, does not count."""
    slack = 1e-9
    outcome: Outcome = "equivalent"
    if change > margin + slack:
        outcome = "worse"
    elif change < -margin - slack:
        outcome = "better"
    return Finding(
        quantity=quantity,
        arm=arm,
        depth=depth,
        base=values["base"],
        head=values["head"],
        change=change,
        margin=margin,
        outcome=outcome,
    )


def _tokens_per_step(
    once: Mapping[tuple[SideName, str, str], Turn],
    sides: Mapping[SideName, SideInfo],
    spec: GateSpec,
    arm: str,
) -> list[Finding]:
    """Compare the replays of the calibration trace, where both versions have one; else the decoded counts."""
    margin = spec.margin("tokens_per_step")
    if margin is None:
        return []
    if all(arm in sides[side].replayed_tokens_per_step for side in SIDES):
        values = {side: sides[side].replayed_tokens_per_step[arm] for side in SIDES}
    else:
        values = {}
        for side in SIDES:
            counts = [turn.step_tokens for key, turn in once.items() if key[:2] == (side, arm)]
            values[side] = sum(map(sum, counts)) / max(sum(map(len, counts)), 1)
    if not values["base"]:
        return []
    return [_exact("tokens_per_step", arm, values, change=1 - values["head"] / values["base"], margin=margin)]


def acceptance_counts(steps: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return, for depths 1, 2, .., how many steps accepted a draft token there, of how many that came so far.

    A generation's last step is left out: the budget or the end of the text may have cut it.
    """
    accepted = [tokens - 1 for generation in steps for tokens in generation[:-1]]
    deepest = max(accepted, default=0)
    return [
        (sum(one >= depth for one in accepted), sum(one >= depth - 1 for one in accepted))
        for depth in range(1, deepest + 1)
    ]


def _acceptance(once: Mapping[tuple[SideName, str, str], Turn], spec: GateSpec, arm: str) -> list[Finding]:
    margin = spec.margin("acceptance")
    if margin is None:
        return []
    counts = {
        side: acceptance_counts([turn.step_tokens for key, turn in once.items() if key[:2] == (side, arm)])
        for side in SIDES
    }
    found = []
    values: dict[SideName, float]
    for index, (base, head) in enumerate(zip(counts["base"], counts["head"], strict=False)):
        values = {"base": base[0] / base[1], "head": head[0] / head[1]}
        change = values["base"] - values["head"]
        found.append(_exact("acceptance", arm, values, change=change, margin=margin, depth=index + 1))
    if len(counts["base"]) > len(counts["head"]):  # the head never came so deep
        depth = len(counts["head"]) + 1
        hits, tried = counts["base"][depth - 1]
        values = {"base": hits / tried, "head": 0.0}
        found.append(_exact("acceptance", arm, values, change=hits / tried, margin=margin, depth=depth))
    return found


def _parity(turns: Sequence[Turn], spec: GateSpec) -> list[Finding]:
    """Compare all texts of greedy arms, those of both turns of a version, too."""
    margin, greedy = spec.margin("parity"), {arm.name for arm in spec.timed_arms}
    if margin is None:
        return []
    texts: dict[tuple[str, str], dict[SideName, set[str]]] = defaultdict(
        lambda: {"base": set(), "head": set()}
    )
    for turn in turns:
        if turn.arm in greedy:
            texts[turn.arm, turn.prompt_key][turn.side].add(turn.text_sha256)
    found = []
    for arm in sorted(greedy):
        of_arm = [pair for (name, _), pair in texts.items() if name == arm and pair["base"] and pair["head"]]
        if of_arm:
            differing = sum(pair["base"] != pair["head"] for pair in of_arm) / len(of_arm)
            values: dict[SideName, float] = {"base": 0.0, "head": differing}
            found.append(_exact("parity", arm, values, change=differing, margin=margin))
    return found


def _quality(once: Mapping[tuple[SideName, str, str], Turn], spec: GateSpec) -> list[Finding]:
    margin = spec.margin("quality")
    if margin is None:
        return []
    found = []
    for arm in spec.sampled_arms:
        scores: dict[SideName, list[float]] = {"base": [], "head": []}
        for (side, name, _), turn in once.items():
            if name == arm.name and turn.mean_log_likelihood is not None:
                scores[side].append(turn.mean_log_likelihood)
        if scores["base"] and len(scores["base"]) == len(scores["head"]):
            values: dict[SideName, float] = {side: float(np.mean(scores[side])) for side in SIDES}
            change = values["base"] - values["head"]
            found.append(_exact("quality", arm.name, values, change=change, margin=margin))
    return found


def _memory(turns: Sequence[Turn], spec: GateSpec) -> list[Finding]:
    margin = spec.margin("peak_memory")
    values: dict[SideName, float] = {
        side: float(max((turn.peak_memory_bytes for turn in turns if turn.side == side), default=0))
        for side in SIDES
    }
    if margin is None or not values["base"] or not values["head"]:
        return []
    change = values["head"] / values["base"] - 1
    return [_exact("peak_memory", None, values, change=change, margin=margin)]
