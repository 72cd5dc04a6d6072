"""Which trial runs when: arms interleaved within each block, in an order drawn once and saved with every record."""

from __future__ import annotations

import random
from collections.abc import Sequence

from harness.config import SuiteSpec
from harness.files import Frozen
from harness.records import TrialKey


class PlannedTrial(Frozen):
    """A trial and its place in the run."""

    order: int
    block: int
    trial: TrialKey


def make_plan(suite: SuiteSpec, prompt_keys: Sequence[str]) -> tuple[PlannedTrial, ...]:
    """Return all trials in running order.

    A block is one prompt in one round with every arm and seed; its arms run in an order shuffled by the suite's plan seed, and never that
    of the block before, so that drift of the machine falls on all arms alike.
    """
    trials: list[PlannedTrial] = []
    before: list[tuple[str, int | None]] = []
    for round_index in range(suite.rounds):
        for prompt_index, prompt_key in enumerate(prompt_keys):
            block = [
                TrialKey(arm=arm.name, prompt_key=prompt_key, round=round_index, seed=seed)
                for arm in suite.arms
                for seed in (arm.seeds or (None,))
            ]
            random.Random(f"{suite.plan_seed}-{round_index}-{prompt_key}").shuffle(block)
            if [(trial.arm, trial.seed) for trial in block] == before:  # few arms repeat an order by chance
                block.append(block.pop(0))
            before = [(trial.arm, trial.seed) for trial in block]
            number, first = round_index * len(prompt_keys) + prompt_index, len(trials)
            trials.extend(PlannedTrial(order=first + place, block=number, trial=trial) for place, trial in enumerate(block))
    return tuple(trials)
