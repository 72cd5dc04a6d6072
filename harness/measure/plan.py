"""Which trial runs when: arms interleaved within each block.

The order is drawn once and saved with every record.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from harness.device.machine import device_info
from harness.device.prompts import NUM_RANDOM_PROMPTS, benchmark_prompts
from harness.errors import UserError
from harness.files import Frozen
from harness.records.machines.comparable import MeasuredMachine, not_comparable
from harness.records.machines.identity import machine_folders
from harness.records.opened import machine_of
from harness.records.provenance import DeviceInfo
from harness.records.run import RunRecord
from harness.records.trials import Failure, Generation, TrialKey
from harness.specs.suite import SuiteSpec


class PlannedTrial(Frozen):
    """A trial, with its index in the run and its block."""

    order: int
    block: int
    trial: TrialKey


def make_plan(suite: SuiteSpec, prompt_keys: Sequence[str]) -> tuple[PlannedTrial, ...]:
    """Return all trials in running order.

    A block is one prompt in one round with every arm and seed; its arms run in an order shuffled by the
    suite's plan seed, and never that of the block before, so that drift of the machine falls on all arms
    alike.
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
            trials.extend(
                PlannedTrial(order=first + index, block=number, trial=trial)
                for index, trial in enumerate(block)
            )
    return tuple(trials)


@dataclass(frozen=True)
class FinishedBlocks:
    """What a resume finds.

    It is the blocks that are done, how often each trial was tried, and the outcomes as the record goes on
    with them.
    """

    blocks: set[int]
    attempts: dict[TrialKey, int]
    kept: tuple[Generation | Failure, ...]


def finished_blocks(outcomes: Sequence[Generation | Failure], plan: Sequence[PlannedTrial]) -> FinishedBlocks:
    """Return which blocks of a plan are done.

    Of a block that a kill cut short, the generations keep their tokens and not their timings.
    """
    blocks: dict[int, set[TrialKey]] = {}
    block_of: dict[TrialKey, int] = {}
    for planned in plan:
        blocks.setdefault(planned.block, set()).add(planned.trial)
        block_of[planned.trial] = planned.block
    done = {outcome.trial for outcome in outcomes if isinstance(outcome, Failure) or outcome.timing_valid}
    finished = {block for block, trials in blocks.items() if trials <= done}
    kept = tuple(
        outcome.model_copy(update={"timing_valid": False})
        if isinstance(outcome, Generation) and block_of[outcome.trial] not in finished
        else outcome
        for outcome in outcomes
    )
    attempts: dict[TrialKey, int] = {}
    for outcome in kept:
        attempts[outcome.trial] = max(attempts.get(outcome.trial, 0), outcome.attempt + 1)
    return FinishedBlocks(finished, attempts, kept)


def print_plan(
    suite: SuiteSpec,
    *,
    results: Path,
    prompts_file: Path | None = None,
    base_folder: Path | None = None,
    console: Console,
) -> None:
    """Print arms, trials and the minutes that an arm should take.

    Minutes need a sealed record of the suite's model. The estimate takes each arm's seconds a generation from
    the newest such record, scaled by the token budget; an arm that it lacks shows none.
    """
    from harness.device.engine import best_device

    device = device_info(best_device())
    seconds, origin = _known_seconds(suite, results=results, device=device)
    num_prompts = _num_prompts(suite, prompts_file=prompts_file, base_folder=base_folder, console=console)
    table = Table("arm", "method", "tree", "seeds", "trials", "minutes")
    total = 0.0
    for arm in suite.arms:
        trials = num_prompts * suite.rounds * max(1, len(arm.seeds))
        minutes = seconds[arm.name] * trials / 60 if arm.name in seconds else None
        total += minutes or 0.0
        tree = arm.tree.kind if arm.tree is not None else "-"
        table.add_row(
            arm.name,
            arm.method,
            tree,
            str(len(arm.seeds) or "-"),
            str(trials),
            f"{minutes:.1f}" if minutes is not None else "?",
        )
    console.print(table)
    console.print(
        f"device: {device.kind} {device.name}; up to {num_prompts} prompts, {suite.max_new_tokens} new "
        "tokens each",
        highlight=False,
    )
    console.print(
        f"about {total:.0f} minutes of decoding, from record {origin}"
        if origin
        else "no record of this model yet: minutes unknown"
    )


def _num_prompts(
    suite: SuiteSpec, *, prompts_file: Path | None, base_folder: Path | None, console: Console
) -> int:
    """Return how many prompts a suite runs, without fetching any."""
    spec = suite.prompts
    if spec.source == "file":
        return len(
            benchmark_prompts(
                spec, prompts_file=prompts_file, base_folder=base_folder, allow_hub=False, console=console
            )
        )
    available, num_categories = {
        "mt_bench": (80, 8),
        "human_eval": (164, 1),
        "random": (NUM_RANDOM_PROMPTS, 1),
    }[spec.source]
    if spec.source == "random":
        return spec.limit or available
    return min(spec.limit or available, (spec.per_category or available) * num_categories, available)


def _known_seconds(
    suite: SuiteSpec, *, results: Path, device: DeviceInfo
) -> tuple[dict[str, float], str | None]:
    """Return each arm's seconds a generation, and the record that they are from.

    It is the newest of the suite's model: of this machine's folder before the one that older records of its
    name lie in, of both before other machines with this kind of device, and of those before any other.
    """
    newest = sorted(results.glob("*/*/*/manifest.json"), key=lambda path: path.parent.name, reverse=True)
    folders = machine_folders(device)

    def rank(manifest: Path) -> int:
        machine = manifest.parent.parent.name
        if machine in folders:
            return folders.index(machine)
        return len(folders) + (not machine.startswith(f"{device.kind}-"))

    for path in sorted(newest, key=rank):
        try:
            record = RunRecord.open(path.parent)
            is_other = record.suite.model != suite.model
        except UserError:
            continue  # an altered record, or one of another version, says nothing about this suite
        if is_other:
            continue
        scale = suite.max_new_tokens / record.suite.max_new_tokens
        arms = {generation.trial.arm for generation in record.generations}
        mean = {
            arm: float(np.mean([item.wall_s for item in record.generations if item.trial.arm == arm]))
            for arm in arms
        }
        where = path.parent.parent.name
        other = not_comparable(machine_of(record), MeasuredMachine(device))
        origin = f"{path.parent.name} of {where} ({other})" if other else path.parent.name
        return {arm: value * scale for arm, value in mean.items()}, origin
    return {}, None
