"""Decode a tree for real, as a check of what replay and composition say of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from harness.compose.composer import Composer, KnotPrices, Seconds
from harness.compose.differences import decoded_difference
from harness.device.arms import ArmRunner, TimedGeneration
from harness.device.clock import Clock
from harness.device.engine import Engine
from harness.device.locks import Held
from harness.device.prompts import Prompt
from harness.errors import UserError
from harness.measure.sweep.sampled import arm_of
from harness.measure.sweep.tasks import CellInputs, DecodedTask
from harness.records.sweep_cells import DecodedCell, DecodedRow, StepDifference
from harness.records.trace import PromptTrace, Trace
from harness.specs.suite import ArmSpec
from harness.specs.sweep import SampledSetting
from harness.stats import Interval
from medusa_impl.tree import DraftTree

_WARMUP_TOKENS = 12


def traced_prompts(inputs: CellInputs, prompts: Sequence[Prompt]) -> tuple[tuple[Prompt, PromptTrace], ...]:
    """Return the prompts to decode with their traces, spread evenly over the trace.

    Raises: UserError where the suite's prompts are not those of the trace.
    """
    wanted, traced = inputs.spec.decoded, {prompt.key: prompt for prompt in inputs.trace.prompts}
    assert wanted is not None
    pairs = [
        (prompt, traced[prompt.key])
        for prompt in prompts
        if prompt.key in traced and traced[prompt.key].prompt_tokens == len(prompt.prompt_ids)
    ]
    if len(pairs) < min(wanted.num_prompts, len(traced)):
        raise UserError(
            found=f"{len(pairs)} prompts of the suite in the trace",
            need="the suite that the trace was recorded with",
            where="suite",
        )
    indices = np.linspace(0, len(pairs) - 1, min(wanted.num_prompts, len(pairs))).round().astype(int)
    return tuple(pairs[index] for index in dict.fromkeys(indices.tolist()))


def decode_point(
    inputs: CellInputs,
    engine: Engine,
    task: DecodedTask,
    pairs: Sequence[tuple[Prompt, PromptTrace]],
    warm_ups: Sequence[Prompt],
    *,
    clock: Clock,
    held: Held = contextlib.nullcontext,
) -> DecodedCell:
    """Return steps and times of prompts under vanilla and one tree, with those of replay and composition.

    The two take turns, and the first of them changes from prompt to prompt.
    """
    started, tree, trace = clock(), task.tree, inputs.trace
    longest = max(len(prompt.prompt_ids) for prompt in (*(prompt for prompt, _ in pairs), *warm_ups))
    vanilla, medusa = _both_arms(
        engine, tree, max_new_tokens=trace.provenance.max_new_tokens, longest=longest, clock=clock
    )
    with held():
        for runner in (vanilla, medusa):
            _warm_up(runner, warm_ups, clock=clock)
    part = Composer(
        Trace(provenance=trace.provenance, prompts=tuple(traced for _, traced in pairs)),
        knots=inputs.knots,
        interval=inputs.spec.interval,
    )
    prices = KnotPrices(task.curve, knots=part.knots, context="trace", batch=1)
    composed_vanilla, composed_medusa = (part.seconds(one, prices) for one in (DraftTree.root_only(), tree))
    assert composed_vanilla is not None and composed_medusa is not None  # only covered trees are drawn
    replay = part.index.replay(tree)
    rows, differences = list[DecodedRow](), list[StepDifference]()
    for number, (prompt, traced) in enumerate(pairs):
        with held():
            plain, drafted = _in_turn(vanilla, medusa, prompt, vanilla_first=number % 2 == 0)
        rows.append(
            DecodedRow(
                prompt_key=prompt.key,
                num_tokens=len(drafted.token_ids),
                vanilla_s=sum(plain.step_times_s),
                medusa_s=sum(drafted.step_times_s),
                medusa_steps=len(drafted.step_tokens),
                composed_vanilla_s=float(composed_vanilla.by_unit[number]),
                composed_medusa_s=float(composed_medusa.by_unit[number]),
            )
        )
        replayed = replay.hops(number).tolist()
        difference = step_difference(traced, drafted, tree, replayed=replayed, trace=trace)
        if difference is not None:
            differences.append(difference)
    return DecodedCell(
        curve=task.curve.label,
        tree=task.index,
        rows=tuple(rows),
        differences=tuple(differences),
        gap=_gap(part, composed_vanilla, composed_medusa, rows=rows)
        if task.curve.num_rounds is not None
        else None,
        elapsed_s=clock() - started,
    )


def _both_arms(
    engine: Engine, tree: DraftTree, *, max_new_tokens: int, longest: int, clock: Clock
) -> tuple[ArmRunner, ArmRunner]:
    """Return vanilla and greedy decoding with a tree."""

    def runner(arm: ArmSpec, drafted: DraftTree | None) -> ArmRunner:
        return ArmRunner(
            engine,
            arm,
            tree=drafted,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=longest,
            clock=clock,
        )

    vanilla = ArmSpec(name="vanilla", method="vanilla")
    return runner(vanilla, None), runner(arm_of(SampledSetting(rule="greedy"), ()), tree)


def _gap(part: Composer, vanilla: Seconds, tree: Seconds, *, rows: Sequence[DecodedRow]) -> Interval:
    """Return how far the composed speedup is off the one that the rows measured."""
    vanilla_s, tree_s = (np.array([getattr(row, name) for row in rows]) for name in ("vanilla_s", "medusa_s"))
    return part.gap(vanilla, tree, vanilla_s=vanilla_s, tree_s=tree_s)


def _in_turn(
    vanilla: ArmRunner, medusa: ArmRunner, prompt: Prompt, *, vanilla_first: bool
) -> tuple[TimedGeneration, TimedGeneration]:
    """Return what vanilla and the tree make of a prompt, one after the other."""
    if vanilla_first:
        plain = vanilla.generate(prompt.prompt_ids, seed=None)
        return plain, medusa.generate(prompt.prompt_ids, seed=None)
    drafted = medusa.generate(prompt.prompt_ids, seed=None)
    return vanilla.generate(prompt.prompt_ids, seed=None), drafted


def _warm_up(runner: ArmRunner, warm_ups: Sequence[Prompt], *, clock: Clock) -> None:
    few = ArmRunner(
        runner.engine,
        runner.arm,
        tree=runner.tree,
        max_new_tokens=min(_WARMUP_TOKENS, runner.max_new_tokens),
        max_prompt_tokens=max(len(prompt.prompt_ids) for prompt in warm_ups),
        clock=clock,
    )
    few.generate(warm_ups[0].prompt_ids, seed=None)


def step_difference(
    traced: PromptTrace, result: TimedGeneration, tree: DraftTree, *, replayed: Sequence[int], trace: Trace
) -> StepDifference | None:
    """Return where decoding first took another step than the replay, or None.

    It says whether rounding explains the difference.
    """
    found = decoded_difference(
        trace, traced, tree, token_ids=result.token_ids, step_tokens=result.step_tokens, replayed=replayed
    )
    if found is None:
        return None
    position, kind = found
    return StepDifference(
        prompt_key=traced.key,
        position=position,
        decoded_steps=len(result.step_tokens),
        replayed_steps=len(replayed),
        kind=kind,
    )
