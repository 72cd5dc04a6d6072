"""What turns change: a neighbour in bursts over recorded steps, with arms one after another and in turns.

`python -m harness.tests.noise.turns` prints the error of a speedup over four prompts. The steps are those of
the newest committed run of the embedded suite on a CPU; while a burst lasts, a step takes `SLOWED` times as
long.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice

import numpy as np

from harness.records.run import RunRecord
from harness.tests.noise.burner import bursts
from harness.tests.noise.trial import BURST_SHARE
from harness.tests.test_layers import ROOT

ARMS = ("vanilla", "fastest", "optimised")
SLOWED, NUM_PROMPTS, NUM_STEPS, NUM_RUNS = 1.8, 4, 48, 400

Steps = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[int]]]]


def newest_embedded() -> RunRecord:
    """Return the newest committed run of the embedded suite on a CPU."""
    folders = (ROOT / "results" / "embedded").glob("cpu-*/*")
    return RunRecord.open(max(folders, key=lambda folder: folder.name))


def recorded_steps(record: RunRecord) -> Steps:
    """Return times and tokens of the first steps of each arm, by prompt."""
    found: dict[str, dict[str, tuple[Sequence[float], Sequence[int]]]] = defaultdict(dict)
    for one in record.generations:
        if one.trial.arm in ARMS:
            steps = one.step_times_s[:NUM_STEPS], one.step_tokens[:NUM_STEPS]
            found[one.trial.prompt_key][one.trial.arm] = steps
    return found


class Neighbour:
    """A machine whose steps take `SLOWED` times as long while a neighbour has a burst."""

    def __init__(self, seed: int, *, mean_s: float) -> None:
        self._drawn = bursts(seed, share=BURST_SHARE, mean_s=mean_s)
        self.now_s = random.Random(seed).uniform(0, mean_s)
        self._from_s = self._until_s = 0.0

    def takes(self, seconds: float) -> float:
        """Return how long work of so many quiet seconds takes from now on."""
        began_s, left_s = self.now_s, seconds
        while left_s > 0:
            if self.now_s >= self._until_s:
                pause_s, burst_s = next(self._drawn)
                self._from_s = self._until_s + pause_s
                self._until_s = self._from_s + burst_s
            elif self.now_s < self._from_s:
                quiet_s = min(left_s, self._from_s - self.now_s)
                self.now_s, left_s = self.now_s + quiet_s, left_s - quiet_s
            else:
                slow_s = min(left_s * SLOWED, self._until_s - self.now_s)
                self.now_s, left_s = self.now_s + slow_s, left_s - slow_s / SLOWED
                left_s = 0.0 if left_s < 1e-12 else left_s
        return self.now_s - began_s


def schedule(lengths: Mapping[str, int], order: Sequence[str], turn_steps: int) -> Iterator[tuple[str, int]]:
    """Yield arms and their steps in the order in which they are taken; 0 is one arm after another."""
    width = turn_steps or max(lengths.values())
    for start in range(0, max(lengths.values()), width):
        for arm in order:
            yield from ((arm, step) for step in range(start, min(start + width, lengths[arm])))


def speedup_errors(steps: Steps, seed: int, *, turn_steps: int, mean_s: float) -> list[float]:
    """Return by what share each arm's speedup of one run is off, for the arms after vanilla."""
    draws, machine = random.Random(seed), Neighbour(seed, mean_s=mean_s)
    taken, quiet = (dict.fromkeys(ARMS, 0.0) for _ in range(2))
    for key in draws.sample(sorted(steps), NUM_PROMPTS):
        lengths = {arm: len(steps[key][arm][0]) for arm in ARMS}
        for arm, step in schedule(lengths, draws.sample(ARMS, len(ARMS)), turn_steps):
            quiet[arm] += steps[key][arm][0][step]
            taken[arm] += machine.takes(steps[key][arm][0][step])
    # tokens are the same, so a speedup is off by what the times are
    return [
        (taken["vanilla"] / quiet["vanilla"]) / (taken[arm] / quiet[arm]) - 1 for arm in islice(ARMS, 1, None)
    ]


def spread(steps: Steps, *, turn_steps: int, mean_s: float, num_runs: int = NUM_RUNS) -> float:
    """Return the standard deviation of the error of a speedup, all arms and runs together."""
    runs = (speedup_errors(steps, seed, turn_steps=turn_steps, mean_s=mean_s) for seed in range(num_runs))
    return float(np.std(list(chain.from_iterable(runs))))


def main() -> None:
    """Print the error for bursts of several lengths."""
    record = newest_embedded()
    steps = recorded_steps(record)
    print(f"{NUM_RUNS} runs of {NUM_PROMPTS} prompts, steps of {record.folder.name}, slowed {SLOWED} times")
    for mean_s in (0.2, 2.0, 10.0):
        told = ", ".join(
            f"{name} {spread(steps, turn_steps=turn_steps, mean_s=mean_s):.1%}"
            for name, turn_steps in (("one after another", 0), ("turns of 4", 4), ("turns of 1", 1))
        )
        print(f"bursts of {mean_s:g} s: {told}")


if __name__ == "__main__":
    main()
