"""How far an arm is from the best that its heads allow, and whether acceptance or cost is in the way.

The oracle drafts, in each step, exactly the tokens that the run's largest tree got accepted there, and
nothing else: it has that tree's tokens/step, and a step computes the accepted nodes alone. No tree can know
them before, so it is a bound and no plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.judge.step_costs import num_nodes, priced
from harness.records.run import RunRecord
from harness.specs.suite import ArmSpec
from harness.stats import Floats, Interval, Resamples


@dataclass(frozen=True)
class Oracle:
    """The oracle of one arm, and what parts the arm from it.

    `of` is the arm with the largest tree, of several the one with the most tokens/step, whose accepted drafts
    it knows. `acceptance` is the factor that its
    tokens/step lie above the arm's, `cost` the factor that its step is cheaper by: their product is the
    oracle's speedup over the arm's own.
    """

    arm: str
    of: str
    tokens_per_step: float
    speedup: Interval
    acceptance: float
    cost: float

    @property
    def cost_share(self) -> float | None:
        """Return the part of the gap, in logarithms, that is cost; None where there is no gap."""
        gap = math.log(self.acceptance * self.cost)
        return math.log(self.cost) / gap if gap > 0 else None


def oracle_step_s(record: RunRecord, accepted: int) -> float | None:
    """Return the seconds of a step that drafts `accepted` tokens, all right; None beyond the timed sizes.

    A step without any still reads the heads, as each step of a drafting arm does.
    """
    if accepted:
        return priced(record, 1 + accepted, part="step")
    vanilla_s, own_s = priced(record, 1, part="step"), priced(record, 2, part="own")
    return None if vanilla_s is None or own_s is None else vanilla_s + own_s


def oracles(record: RunRecord) -> tuple[Oracle, ...]:
    """Return the oracle of each Medusa arm whose speed is shown, in the suite's order.

    There is none where a step's cost was not timed at the sizes that are needed.
    """
    if not record.reports_speed:
        return ()
    arms = [arm for arm in record.suite.arms if arm.method == "medusa" and arm.baseline is not None]
    found = (_oracle(record, arm, among=[one for one in arms if _is_like(one, arm)]) for arm in arms)
    return tuple(one for one in found if one is not None)


def _is_like(one: ArmSpec, other: ArmSpec) -> bool:
    """Return whether two arms decode the same text from the same drafts, so that only their trees differ."""
    return one.model_dump(exclude={"name", "tree"}) == other.model_dump(exclude={"name", "tree"})


def _oracle(record: RunRecord, arm: ArmSpec, *, among: Sequence[ArmSpec]) -> Oracle | None:
    vanilla_s = priced(record, 1, part="step")
    known = {one.name: rows for one in among if (rows := _by_prompt(record, one.name)) is not None}
    if vanilla_s is None or arm.name not in known:
        return None

    def size(name: str) -> tuple[int, float]:
        tokens, steps, _ = known[name].sum(axis=0)
        return num_nodes(record, name), tokens / steps

    largest = max(known, key=size)
    own, best = known[arm.name], known[largest]
    resamples = Resamples(len(best), spec=record.suite.interval)
    totals, draws = best.sum(axis=0), resamples.totals(best)
    tokens, steps, seconds = totals[:3]
    arm_tokens, arm_steps, _ = own.sum(axis=0)
    own_s = _measured_step_s(record, arm.name)
    base_s = _measured_step_s(record, str(arm.baseline))
    if own_s is None or base_s is None:
        return None
    return Oracle(
        arm=arm.name,
        of=largest,
        tokens_per_step=float(tokens / steps),
        speedup=resamples.interval(
            float(tokens * vanilla_s / seconds), draws[:, 0] * vanilla_s / draws[:, 2]
        ),
        acceptance=float((tokens / steps) / (arm_tokens / arm_steps)),
        cost=float((own_s / base_s) / (seconds / steps / vanilla_s)),
    )


def _measured_step_s(record: RunRecord, arm: str) -> float | None:
    """Return an arm's mean decoding step over the generations whose times may be used."""
    timed = [one for one in record.generations if one.trial.arm == arm and record.is_timed(one)]
    steps = sum(one.num_steps for one in timed)
    return sum(one.decode_s for one in timed) / steps if steps else None


def _by_prompt(record: RunRecord, arm: str) -> Floats | None:
    """Return an arm's kept tokens, steps and the oracle's seconds for them, a row a prompt; None without.

    Shapes: [prompts, 3].
    """
    rows: dict[str, Floats] = {}
    prices: dict[int, float | None] = {}
    for one in record.generations:
        if one.trial.arm != arm:
            continue
        for kept in one.step_tokens:
            price = prices.setdefault(kept, oracle_step_s(record, kept - 1))
            if price is None:
                return None
            row = rows.setdefault(one.trial.prompt_key, np.zeros(3))
            row += (kept, 1, price)
    return np.array([rows[key] for key in sorted(rows)]) if rows else None
