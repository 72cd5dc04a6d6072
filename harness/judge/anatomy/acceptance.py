"""How the drafts of an arm were accepted: by depth, by prompt, by category and along the text.

A step keeps the token that the model itself is sure of and the accepted drafts after it, so that its accepted
drafts are its kept tokens less one. The last step of a text is cut at its end and counts as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from harness.judge.totals import prompt_totals
from harness.records.run import RunRecord
from harness.records.trials import Generation
from harness.stats import Interval, Resamples

_STRETCHES = 4  # parts of the token budget that "along the text" tells apart


@dataclass(frozen=True)
class Stretch:
    """The steps that began after `start` to `end` - 1 new tokens of a text."""

    start: int
    end: int
    num_steps: int
    num_accepted: int

    @property
    def tokens_per_step(self) -> float | None:
        """Return kept tokens a step; None without a step."""
        return 1 + self.num_accepted / self.num_steps if self.num_steps else None


@dataclass(frozen=True)
class Acceptance:
    """How the drafts of one Medusa arm fared.

    `histogram[a]` counts steps with `a` accepted drafts, up to the tree's depth. `conditional[d - 1]` is, of
    the steps that accepted a draft at depth d - 1, the share that accepted one at depth d as well, its
    interval over prompts; None where no step got so far. `drafted[d - 1]` are the tree's nodes at depth d.
    `lowest` and `highest` are the prompts with the fewest and the most tokens a step.
    """

    arm: str
    histogram: tuple[int, ...]
    conditional: tuple[Interval | None, ...]
    drafted: tuple[int, ...]
    lowest: tuple[str, float]
    highest: tuple[str, float]
    along: tuple[Stretch, ...]

    @property
    def num_steps(self) -> int:
        """Return the number of steps, each of which drafts once."""
        return sum(self.histogram)

    @property
    def num_accepted(self) -> int:
        """Return the number of accepted drafts of all steps."""
        return sum(drafts * steps for drafts, steps in enumerate(self.histogram))

    @property
    def num_drafted(self) -> int:
        """Return the number of drafted tokens of all steps: every node of the tree but its root."""
        return sum(self.drafted) * self.num_steps

    @property
    def reached(self) -> tuple[int, ...]:
        """Return how many steps accepted a draft at each depth, from depth 1 on."""
        return tuple(accumulate(self.histogram[:0:-1]))[::-1]

    @property
    def use_of_nodes(self) -> float:
        """Return accepted over drafted tokens."""
        return self.num_accepted / self.num_drafted


def acceptances(record: RunRecord) -> tuple[Acceptance, ...]:
    """Return how drafts were accepted in each Medusa arm that decoded a step, in the suite's order."""
    found = []
    for arm in record.suite.arms:
        if arm.method == "medusa":
            generations = [one for one in record.generations if one.trial.arm == arm.name]
            if any(one.num_steps for one in generations):
                found.append(_acceptance(record, arm.name, generations))
    return tuple(found)


def _acceptance(record: RunRecord, arm: str, generations: Sequence[Generation]) -> Acceptance:
    depths = record.trees[arm].tree().depths[1:]
    depth = max(depths, default=0)
    nodes = Counter(depths)
    counts = Counter(kept - 1 for one in generations for kept in one.step_tokens)
    rates = {
        key: totals.decode_tokens / totals.steps
        for key, totals in prompt_totals(record, arm, timed=False).items()
        if totals.steps
    }
    low, high = min(rates, key=lambda key: (rates[key], key)), max(rates, key=lambda key: (rates[key], key))
    return Acceptance(
        arm=arm,
        histogram=tuple(counts[drafts] for drafts in range(depth + 1)),
        conditional=_conditional(record, generations, depth=depth),
        drafted=tuple(nodes[level] for level in range(1, depth + 1)),
        lowest=(low, rates[low]),
        highest=(high, rates[high]),
        along=_along(generations, max_new_tokens=record.suite.max_new_tokens),
    )


def _conditional(
    record: RunRecord, generations: Sequence[Generation], *, depth: int
) -> tuple[Interval | None, ...]:
    """Return for each depth the share of steps that got to it among those that got one level less far."""
    keys = sorted({one.trial.prompt_key for one in generations})
    reached = np.zeros((len(keys), depth + 1))
    for one in generations:
        row = reached[keys.index(one.trial.prompt_key)]
        for kept in one.step_tokens:
            row[:kept] += 1  # a step of one kept token reaches depth 0, the root, alone
    resamples = Resamples(len(keys), spec=record.suite.interval)
    draws, totals = resamples.totals(reached), reached.sum(axis=0)
    found: list[Interval | None] = []
    for level in range(1, depth + 1):
        if not totals[level - 1]:
            found.append(None)
            continue
        share = totals[level] / totals[level - 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = draws[:, level] / draws[:, level - 1]
        found.append(resamples.interval(float(share), np.where(np.isnan(shares), share, shares)))
    return tuple(found)


def _along(generations: Sequence[Generation], *, max_new_tokens: int) -> tuple[Stretch, ...]:
    """Return the steps by the part of the budget in which they began."""
    width = math.ceil(max_new_tokens / _STRETCHES)
    steps, accepted = Counter[int](), Counter[int]()
    for one in generations:
        begun = 1  # the prefill yields the first token
        for kept in one.step_tokens:
            steps[begun // width] += 1
            accepted[begun // width] += kept - 1
            begun += kept
    return tuple(
        Stretch(
            start=part * width,
            end=min((part + 1) * width, max_new_tokens),
            num_steps=steps[part],
            num_accepted=accepted[part],
        )
        for part in range(math.ceil(max_new_tokens / width))
    )
