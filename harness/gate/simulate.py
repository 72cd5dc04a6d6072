"""How often a gate raises an alarm and what it finds, drawn from the recorded step times of machines.

    python -m harness.gate.simulate [RECORD ..] [--gate NAME] [--runs N]

A recorded text's steps are dealt out to two versions as the gate deals them, one step each in turn: what
neighbouring steps of one code differ by is the noise of a pair. A block is a window of a recorded vanilla
text and one of a text with a tree, of one prompt. The records are those of one machine each. What two
processes of one code differ by for as long as they live is in no such record; `gate --calibrate` measures it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from harness.errors import ExitCode, UserError
from harness.judge.gate.looks import Floats, bounds, log_margin, spent
from harness.judge.gate.timed import TRIM, is_marked, timed_names
from harness.paths import default_results, shipped
from harness.records.run import RunRecord
from harness.specs.gate import GateSpec, Quantity, load_gate_spec

Bools = NDArray[np.bool_]
SEED = 20261127
_LEAST_PAIRS = 8
_TOKENS_PER_STEP = 1.9  # of the gate's tree on its texts, so that a text has about as many steps


@dataclass(frozen=True)
class Noise:
    """What blocks of one code differ by, of one machine: changes of step and backbone, by prompt.

    Shapes: [W, 2] each, a window of steps a row.
    """

    machine: str
    vanilla: tuple[Floats, ...]
    tree: tuple[Floats, ...]


@dataclass(frozen=True)
class Counted:
    """How many of so many simulated gates raised an alarm, or ended blind, and after how many blocks."""

    alarms: int
    blind: int
    runs: int
    mean_blocks: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share, by Clopper and Pearson."""
        found = stats.binomtest(self.alarms, self.runs).proportion_ci(0.95)
        return float(found.low), float(found.high)


def window_changes(step_s: ArrayLike, *, num_pairs: int, mark_every: int) -> Floats:
    """Return the changes of step and backbone of every window of a text's steps, dealt out in turn.

    Shapes: [W, 2]; none for a text that is too short. A text with fewer steps is one window.
    """
    logs = np.log(np.asarray(step_s, dtype=np.float64))
    pairs = min(num_pairs, len(logs) // 2)
    if pairs < _LEAST_PAIRS:
        return np.empty((0, 2))
    sign = np.where(np.arange(pairs) % 2 == 0, 1.0, -1.0)  # which version took the first of the two
    marked = np.array([is_marked(index, mark_every=mark_every) for index in range(pairs)])
    rows = []
    for start in range(len(logs) - 2 * pairs + 1):
        steps = logs[start : start + 2 * pairs].reshape(pairs, 2)
        changes = sign * (steps[:, 1] - steps[:, 0])
        rows.append([stats.trim_mean(changes[~marked], TRIM), stats.trim_mean(changes[marked], TRIM)])
    return np.array(rows)


def recorded_noise(record: RunRecord, spec: GateSpec) -> Noise:
    """Return the noise of a run's machine, from the texts of its vanilla arms and of its arms with a tree.

    Raises: UserError for a run without both.
    """
    pairs = {"vanilla": spec.max_new_tokens - 1, "medusa": round(spec.max_new_tokens / _TOKENS_PER_STEP)}
    found: dict[str, dict[str, list[Floats]]] = {"vanilla": defaultdict(list), "medusa": defaultdict(list)}
    for text in record.generations:
        method = record.suite.arm(text.trial.arm).method
        if method in found and text.timing_valid:
            rows = window_changes(text.step_times_s, num_pairs=pairs[method], mark_every=spec.mark_every)
            if len(rows):
                found[method][text.trial.prompt_key].append(rows)
    keys = sorted(set(found["vanilla"]) & set(found["medusa"]))
    if not keys:
        raise UserError(
            found="no prompt with texts of both kinds",
            need="a run with a vanilla arm and one with a tree",
            where=record.folder.name,
        )
    columns = {method: tuple(np.concatenate(rows[key]) for key in keys) for method, rows in found.items()}
    device = record.environment.device
    machine = f"{device.name}, {device.num_cores} cores, {record.folder.name}"
    return Noise(machine, columns["vanilla"], columns["medusa"])


def draw(noise: Noise, *, runs: int, blocks: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return drawn changes of the vanilla arm and of the tree's, both of one prompt in a block.

    The versions change places by chance. Shapes: [runs, blocks, 2] each.
    """
    prompts = rng.integers(len(noise.vanilla), size=(runs, blocks))
    sides = rng.choice([-1.0, 1.0], size=(runs, blocks, 1))
    drawn = []
    for rows in (noise.vanilla, noise.tree):
        lengths = np.array([len(row) for row in rows])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        index = starts[prompts] + (rng.random((runs, blocks)) * lengths[prompts]).astype(np.int64)
        drawn.append(np.concatenate(rows)[index] * sides)
    return drawn[0], drawn[1]


def changes_of(vanilla: Floats, tree: Floats, spec: GateSpec) -> dict[tuple[Quantity, str], Floats]:
    """Return every timed quantity's changes from those of steps and backbones. Shapes: [runs, blocks]."""
    found: dict[tuple[Quantity, str], Floats] = {}
    for quantity, arm in timed_names(spec):
        own = vanilla if arm == spec.vanilla else tree
        found[quantity, arm] = {
            "step_s": own[..., 0],
            "tokens_per_s": own[..., 0],
            "step_cost": own[..., 1] - vanilla[..., 1],
            "overhead": own[..., 0] - vanilla[..., 0],
            "speedup": own[..., 0] - vanilla[..., 0],
        }[quantity]
    return found


@dataclass(frozen=True)
class Ended:
    """How gates ended: with an alarm, blind to the slowdown that they must see, after how many blocks.

    Shapes: [runs] each.
    """

    worse: Bools
    blind: Bools
    blocks: NDArray[np.int64]


def simulate(changes: Mapping[tuple[Quantity, str], Floats], spec: GateSpec) -> Ended:
    """Return how gates end that see these changes. Shapes: `changes` [runs, blocks].

    It decides as `judge_timed`, `kept` and `exit_code` do, for all gates at once.
    """
    runs = len(next(iter(changes.values())))
    open_ = {key: np.ones(runs, dtype=bool) for key in changes}
    worse, blind = np.zeros(runs, dtype=bool), np.zeros(runs, dtype=bool)
    ended, before = np.zeros(runs, dtype=np.int64), 0
    for look in spec.looks:
        error = spent(spec.alpha, look / spec.looks[-1]) - spent(spec.alpha, before / spec.looks[-1])
        going = ended == 0
        for key, values in changes.items():
            margin = log_margin(key[0], spec.margin(key[0]) or 0.0)
            _, low, high = bounds(values[:, :look], tail=error / len(changes))
            worse |= open_[key] & going & (low > margin)
            decided = (low > margin) | (high < -margin) | ((low >= -margin) & (high <= margin))
            open_[key] &= ~(going & decided)
            if key[0] == "step_s" and look == spec.looks[-1]:
                blind |= open_[key] & going & (np.expm1(high) >= spec.must_see)
        ended[going & ~np.any(list(open_.values()), axis=0)] = look
        before = look
    ended[ended == 0] = spec.looks[-1]
    return Ended(worse, blind & ~worse, ended)


def counted(
    noise: Noise,
    spec: GateSpec,
    *,
    runs: int,
    slower: Mapping[str, float],
    between: float = 0.0,
    seed: int = SEED,
) -> Counted:
    """Return what simulated gates say of a head whose steps take longer by these shares, by kind of arm.

    `between` is the standard deviation of what the two processes of a gate differ by all along.
    """
    rng = np.random.default_rng(seed)
    vanilla, tree = draw(noise, runs=runs, blocks=spec.looks[-1], rng=rng)
    lasting = rng.normal(0.0, between, size=(2, runs, 1, 1))
    vanilla = vanilla + np.log1p(slower.get("vanilla", 0.0)) + lasting[0]
    tree = tree + np.log1p(slower.get("tree", 0.0)) + lasting[1]
    ended = simulate(changes_of(vanilla, tree, spec), spec)
    return Counted(int(ended.worse.sum()), int(ended.blind.sum()), runs, float(ended.blocks.mean()))


PLANTED: Mapping[str, Mapping[str, float]] = {
    "itself": {},
    "every step 5 % slower": {"vanilla": 0.05, "tree": 0.05},
    "steps with a tree 5 % slower": {"tree": 0.05},
}


def line_of(found: Counted) -> str:
    """Return counted gates in words."""
    low, high = found.interval
    return (
        f"{found.alarms} of {found.runs} alarms, {100 * found.alarms / found.runs:.2f} % "
        f"[{100 * low:.2f}, {100 * high:.2f}], {found.blind} blind, {found.mean_blocks:.1f} blocks"
    )


def committed_runs(results: Path) -> tuple[Path, ...]:
    """Return the sealed runs of a results folder, the first of each machine's folder and suite last."""
    return tuple(sorted(path.parent for path in results.glob("embedded*/*/*/manifest.json") if _is_run(path)))


def _is_run(manifest: Path) -> bool:
    return (manifest.parent / "generations.jsonl").exists() and not (manifest.parent / "arms.jsonl").exists()


def main(words: Sequence[str] | None = None) -> int:
    """Simulate gates on each record's noise; print a line for each, and one of JSON at the end."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.gate.simulate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("records", nargs="*", type=Path, help="folders of runs; else all of results/")
    parser.add_argument("--gate", default="gate", help="name of a shipped gate")
    parser.add_argument("--runs", type=int, default=10_000, help="simulated gates of each kind")
    parser.add_argument(
        "--between", type=float, default=0.0, help="share by which two processes of one code differ all along"
    )
    given = parser.parse_args(words)
    told = []
    try:
        spec = load_gate_spec(shipped("gate", f"{given.gate}.toml"))
        for folder in given.records or committed_runs(default_results()):
            noise = recorded_noise(RunRecord.open(folder), spec)
            for name, slower in PLANTED.items():
                found = counted(noise, spec, runs=given.runs, slower=slower, between=given.between)
                print(f"{noise.machine}: {name}: {line_of(found)}")
                row = {"machine": noise.machine, "head": name, "between": given.between}
                told.append({**row, **vars(found), "interval": found.interval})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    print(json.dumps({"gate": given.gate, "simulated": told}))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
