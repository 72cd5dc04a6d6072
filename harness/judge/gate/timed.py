"""Changes of step times between two versions that took their steps in turn, block by block.

In a block both versions decode one prompt with each arm, one step the one, one step the other. What drifts on
a machine for longer than a step falls on both alike, so the unit is the pair of steps at one index:

    step        0        1        2        3        4 (marked)     5  ..
    taken       base     head     base     head     base           head
                head     base     head     base     head           base
    pair        d_0      d_1      d_2      d_3      parts alone    d_5

d is the logarithm of head over base. A block's change is the mean of its d without the fifth at either end:
bursts that hit fewer steps than that do not count, and neither does a slowdown that does. Marked steps give
the time of the backbone, whose ratio to vanilla's is the step cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from harness.judge.gate.looks import (
    Floats,
    as_share,
    bounds,
    half_width,
    last_tail,
    log_margin,
    outcome_of,
    smallest_seen,
    spent,
)
from harness.records.gate.record import SIDES, Finding, NoiseFloor, SideName, SlowedPart, Turn
from harness.specs.gate import TIMED, GateSpec, Quantity

RATIOS: tuple[Quantity, ...] = ("step_cost", "overhead", "speedup")  # all that a stored baseline can bear
BACKBONE = "backbone"  # the part of a step whose time is its cost
TRIM = 0.2  # share of pairs left out at either end
_BlockKey = tuple[str, str]  # prompt, arm


@dataclass(frozen=True)
class Change:
    """A timed quantity, one entry a prompt: logarithms of both versions' values, and how much head is worse.

    Shapes: [P] each.
    """

    quantity: Quantity
    arm: str
    base: Floats
    head: Floats
    values: Floats

    @property
    def name(self) -> str:
        """The quantity with its arm."""
        return f"{self.quantity}/{self.arm}"


@dataclass(frozen=True)
class _Duel:
    """One arm on one prompt: logarithms of step times and backbone times, and of tokens a step."""

    step_s: Mapping[SideName, float]
    backbone_s: Mapping[SideName, float]
    tokens: Mapping[SideName, float]
    step_change: float
    backbone_change: float


def is_disturbed(turn: Turn, *, others_share: float) -> bool:
    """Return whether other processes used more than a share of the cores, or the GPU at all, in a turn."""
    return turn.purpose == "timed" and (turn.others_share > others_share or turn.num_foreign > 0)


def disturbed_blocks(turns: Sequence[Turn], spec: GateSpec) -> frozenset[int]:
    """Return the blocks that hold a disturbed turn."""
    limit = spec.disturbance.others_share
    return frozenset(turn.block for turn in turns if is_disturbed(turn, others_share=limit))


def quiet_turns(turns: Sequence[Turn], spec: GateSpec) -> tuple[Turn, ...]:
    """Return the timed turns of undisturbed blocks, of each prompt those of its first such block."""
    disturbed, chosen = disturbed_blocks(turns, spec), dict[str, int]()
    for turn in turns:
        if turn.purpose == "timed" and turn.block not in disturbed:
            chosen.setdefault(turn.prompt_key, turn.block)
    return tuple(
        turn for turn in turns if turn.purpose == "timed" and chosen.get(turn.prompt_key) == turn.block
    )


def next_prompt(
    keys: Sequence[str], *, tried: Sequence[str], quiet: Collection[str], wanted: int
) -> str | None:
    """Return the prompt of the next block before a look of `wanted` quiet blocks; None where they are there.

    New prompts come first; then those whose blocks were disturbed, the one that waited longest first.
    """
    if sum(key in quiet for key in keys[:wanted]) >= min(wanted, len(keys)):
        return None
    fresh = next((key for key in keys[:wanted] if key not in tried), None)
    if fresh is not None:
        return fresh
    again = [key for key in keys[:wanted] if key not in quiet]
    return min(again, key=lambda key: len(tried) - 1 - tried[::-1].index(key))


def timed_changes(
    quiet: Sequence[Turn], spec: GateSpec, *, only: Collection[Quantity] = TIMED
) -> tuple[Change, ...]:
    """Return the change of each timed quantity that the gate judges, over the prompts of both versions.

    A text that is too short for a pair of steps of each kind is left out, with all arms of its prompt.
    """
    duels = _duels(quiet, spec)
    arms = [arm.name for arm in spec.timed_arms]
    prompts = [key for key in dict.fromkeys(turn.prompt_key for turn in quiet)]
    prompts = [key for key in prompts if all((key, arm) in duels for arm in arms)]
    rows = {arm: [duels[key, arm] for key in prompts] for arm in arms}
    return tuple(
        _change(quantity, arm, rows, vanilla=spec.vanilla) for quantity, arm in timed_names(spec, only=only)
    )


def _change(quantity: Quantity, arm: str, rows: Mapping[str, Sequence[_Duel]], *, vanilla: str) -> Change:
    levels: dict[SideName, Floats] = {}
    for side in SIDES:
        step, over = _column(rows[arm], "step_s", side), _column(rows[vanilla], "step_s", side)
        tokens = _column(rows[arm], "tokens", side)
        levels[side] = {
            "step_s": step,
            "step_cost": _column(rows[arm], "backbone_s", side) - _column(rows[vanilla], "backbone_s", side),
            "overhead": step - over,
            "speedup": tokens - step + over,
            "tokens_per_s": tokens - step,
        }[quantity]
    steps = np.array([duel.step_change for duel in rows[arm]])
    of_vanilla = np.array([duel.step_change for duel in rows[vanilla]])
    backbone = np.array([duel.backbone_change for duel in rows[arm]])
    of_vanillas = np.array([duel.backbone_change for duel in rows[vanilla]])
    lost = _column(rows[arm], "tokens", "base") - _column(rows[arm], "tokens", "head")
    values = {
        "step_s": steps,
        "step_cost": backbone - of_vanillas,
        "overhead": steps - of_vanilla,
        "speedup": lost + steps - of_vanilla,
        "tokens_per_s": lost + steps,
    }[quantity]
    return Change(quantity, arm, levels["base"], levels["head"], values)


def _column(duels: Sequence[_Duel], field: str, side: SideName) -> Floats:
    return np.array([getattr(duel, field)[side] for duel in duels], dtype=np.float64)


def _duels(quiet: Sequence[Turn], spec: GateSpec) -> dict[_BlockKey, _Duel]:
    turns: dict[_BlockKey, dict[SideName, Turn]] = defaultdict(dict)
    for turn in quiet:
        turns[turn.prompt_key, turn.arm][turn.side] = turn
    found = {}
    for key, pair in turns.items():
        if len(pair) == len(SIDES) and (duel := _duel(pair, mark_every=spec.mark_every)) is not None:
            found[key] = duel
    return found


def is_marked(index: int, *, mark_every: int) -> bool:
    """Return whether the parts of the step at an index, from 0, are timed."""
    return index % mark_every == mark_every - 1


def _duel(pair: Mapping[SideName, Turn], *, mark_every: int) -> _Duel | None:
    """Return what a pair of turns says; None where it has no pair of steps, or none that is marked."""
    length = min(len(turn.step_s) for turn in pair.values())
    plain = [index for index in range(length) if not is_marked(index, mark_every=mark_every)]
    num_marked = length - len(plain)
    if not plain or not num_marked:
        return None
    steps = {side: np.log([pair[side].step_s[index] for index in plain]) for side in SIDES}
    backbone = {side: np.log(pair[side].parts_s[BACKBONE][:num_marked]) for side in SIDES}
    return _Duel(
        step_s={side: _centre(steps[side]) for side in SIDES},
        backbone_s={side: _centre(backbone[side]) for side in SIDES},
        tokens={side: math.log(sum(pair[side].step_tokens) / len(pair[side].step_tokens)) for side in SIDES},
        step_change=_centre(steps["head"] - steps["base"]),
        backbone_change=_centre(backbone["head"] - backbone["base"]),
    )


def _centre(values: Floats) -> float:
    return float(stats.trim_mean(values, TRIM))


def timed_names(spec: GateSpec, *, only: Collection[Quantity] = TIMED) -> tuple[tuple[Quantity, str], ...]:
    """Return every timed quantity that the gate judges, with its arm; ratios to vanilla not of vanilla."""
    return tuple(
        (quantity, arm.name)
        for quantity in TIMED
        for arm in spec.timed_arms
        if quantity in only
        and spec.margin(quantity) is not None
        and (arm.name != spec.vanilla or quantity not in RATIOS)
    )


def judge_timed(
    changes: Sequence[Change], spec: GateSpec, *, num_blocks: int, judged_at: int
) -> tuple[Finding, ...]:
    """Return what a look finds of each timed quantity.

    `num_blocks` are there now, `judged_at` were at the look before; 0 where this is the first. What has fewer
    than three prompts is withheld.
    """
    whole = spec.looks[-1]
    error = spent(spec.alpha, num_blocks / whole) - spent(spec.alpha, judged_at / whole)
    tail, left = error / max(len(changes), 1), last_tail(spec, num_quantities=max(len(changes), 1))
    return tuple(_judged(one, spec, tail=tail, last=left) for one in changes)


def _judged(one: Change, spec: GateSpec, *, tail: float, last: float) -> Finding:
    given = spec.margin(one.quantity)
    assert given is not None
    if len(one.values) < 3:
        return _blank(one.quantity, one.arm, given)
    margin = log_margin(one.quantity, given)
    mean, low, high = map(float, bounds(one.values, tail=tail))
    spread = float(one.values.std(ddof=1))
    sees = smallest_seen(spread, margin=margin, num_blocks=spec.looks[-1], tail=last, power=spec.power)
    return Finding(
        quantity=one.quantity,
        arm=one.arm,
        base=math.exp(float(one.base.mean())),
        head=math.exp(float(one.head.mean())),
        change=as_share(one.quantity, mean),
        low=as_share(one.quantity, low),
        high=as_share(one.quantity, high),
        level=1 - 2 * tail,
        margin=given,
        sees=as_share(one.quantity, sees),
        num_blocks=len(one.values),
        outcome=outcome_of(low, high, margin=margin),
    )


def _blank(quantity: Quantity, arm: str, margin: float) -> Finding:
    return Finding(
        quantity=quantity, arm=arm, base=None, head=None, change=None, margin=margin, outcome="withheld"
    )


def no_times(spec: GateSpec, *, only: Collection[Quantity] = TIMED) -> tuple[Finding, ...]:
    """Return every timed quantity as withheld, for a machine that was not quiet enough."""
    return tuple(
        _blank(quantity, arm, spec.margin(quantity) or 0.0) for quantity, arm in timed_names(spec, only=only)
    )


def tails_apart(quiet: Sequence[Turn], spec: GateSpec, *, share: float) -> tuple[str, ...]:
    """Return the arms whose total step time changed otherwise than their middle steps, by more than a share.

    What is slow in few steps alone moves the totals and not the middle.
    """
    found = []
    for arm in spec.timed_arms:
        duels = _duels([turn for turn in quiet if turn.arm == arm.name], spec)
        totals = {
            side: sum(sum(t.step_s) for t in quiet if (t.side, t.arm) == (side, arm.name)) for side in SIDES
        }
        if duels and all(totals.values()):
            middle = float(np.mean([duel.step_change for duel in duels.values()]))
            if abs(math.log(totals["head"] / totals["base"]) - middle) > share:
                found.append(arm.name)
    return tuple(found)


def parts_of(turns: Sequence[Turn], spec: GateSpec) -> tuple[SlowedPart, ...]:
    """Return the median time of each part of a step in both versions; what no part covers is the host's."""
    found = []
    for arm in spec.timed_arms:
        rows: dict[SideName, dict[str, list[float]]] = {side: defaultdict(list) for side in SIDES}
        for turn in turns:
            if turn.purpose == "timed" and turn.arm == arm.name and turn.parts_s:
                _add_parts(rows[turn.side], turn, mark_every=spec.mark_every)
        for part in sorted(set(rows["base"]) & set(rows["head"])):
            base_s, head_s = (float(np.median(rows[side][part])) for side in SIDES)
            found.append(SlowedPart(arm=arm.name, part=part, base_s=base_s, head_s=head_s))
    return tuple(found)


def _add_parts(rows: dict[str, list[float]], turn: Turn, *, mark_every: int) -> None:
    marked = [s for index, s in enumerate(turn.step_s) if is_marked(index, mark_every=mark_every)]
    for part, seconds in turn.parts_s.items():
        rows[part] += seconds
    for whole, *covered in zip(marked, *turn.parts_s.values(), strict=True):
        rows["host"].append(max(whole - sum(covered), 0.0))


def most_slowed(parts: Sequence[SlowedPart], findings: Sequence[Finding]) -> SlowedPart | None:
    """Return the part that got slower most, of an arm whose steps did; None where no step got slower."""
    arms = {one.arm for one in findings if one.quantity in TIMED and one.outcome == "worse"}
    slower = [part for part in parts if part.arm in arms and part.head_s > part.base_s]
    return max(slower, key=lambda part: part.head_s - part.base_s, default=None)


def for_baseline(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return a stored gate's turns of its head, as a base to compare with."""
    return tuple(turn.model_copy(update={"side": "base"}) for turn in turns if turn.side == "head")


def calibrated(runs: Sequence[Sequence[Change]], spec: GateSpec) -> dict[str, NoiseFloor]:
    """Return the noise of each quantity, by its name; `runs` are of one version against itself.

    Each run has processes of its own. What is left between runs is what their means differ from nothing
    beyond their blocks' own noise; no number of blocks averages it away. Raises: ValueError without a run.
    """
    if not runs:
        raise ValueError("found no run, need one against itself")
    found, tail, whole = {}, last_tail(spec, num_quantities=len(runs[0])), spec.looks[-1]
    for group in zip(*runs, strict=True):
        rows = [one.values for one in group]
        variances, weights = [row.var(ddof=1) for row in rows], [len(row) - 1 for row in rows]
        within = math.sqrt(float(np.average(variances, weights=weights)))
        by_blocks = within**2 * float(np.mean([1 / len(row) for row in rows]))
        squares = float(np.mean([row.mean() ** 2 for row in rows]))  # about 0, which is the truth
        between = math.sqrt(max(squares - by_blocks, 0.0))
        quantity, margin = group[0].quantity, spec.margin(group[0].quantity)
        assert margin is not None
        extra = float(stats.norm.isf(1 - spec.power)) * between
        seen = smallest_seen(
            within, margin=log_margin(quantity, margin), num_blocks=whole, tail=tail, power=spec.power
        )
        found[group[0].name] = NoiseFloor(
            spread=within,
            between=between,
            floor=abs(as_share(quantity, half_width(within, num_blocks=whole, tail=tail) + extra)),
            sees=abs(as_share(quantity, seen + extra)),
        )
    return found
