"""Run one cell of a sweep on this machine's device: a setting whose text a replay cannot give, or a tree
decoded for real as a check.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.compose.composer import Composer, KnotPrices
from harness.compose.devices import StepTimes
from harness.compose.differences import decoded_difference
from harness.device.arms import ArmRunner, TimedGeneration
from harness.device.clock import Clock, device_clock
from harness.device.engine import Engine, best_device, load_engine, load_model
from harness.device.locks import Held, device_held
from harness.device.machine import device_info
from harness.device.prompts import SuitePrompt, check_lengths, suite_prompts, warmup_prompts
from harness.device.trace import KeptText
from harness.errors import UserError
from harness.measure import probes
from harness.paths import without_paths
from harness.records.sweep_cells import (
    AnyCell,
    DecodedCell,
    DecodedRow,
    FailedCell,
    SampledCell,
    SampledRow,
    StepDifference,
    decoded_key,
    sampled_key,
)
from harness.records.trace import PromptTrace, Trace
from harness.specs.hardware import match_device
from harness.specs.suite import ArmSpec, GreedyAcceptance, RejectionAcceptance, SuiteSpec, TypicalAcceptance
from harness.specs.sweep import SampledSetting, SweepSpec
from medusa_impl.tree import DraftTree

_TREE = {"kind": "chain", "depth": 1}  # ArmSpec wants one; ArmRunner takes the resolved tree
_WARMUP_TOKENS = 12


@dataclass(frozen=True)
class SampledTask:
    """One setting to run, with the tree and its place in the sweep; vanilla has none."""

    setting: SampledSetting
    tree: DraftTree | None
    place: int | None

    @property
    def key(self) -> str:
        """The key of the cell that it becomes."""
        return sampled_key(self.setting)

    @property
    def words(self) -> str:
        """What is run, in one line."""
        return self.setting.words


@dataclass(frozen=True)
class DecodedTask:
    """One tree to decode for real where its curve is from: on this machine, or on a cluster's node of that
    accelerator type.
    """

    tree: DraftTree
    place: int
    curve: StepTimes
    accelerator_type: str | None = None

    @property
    def key(self) -> str:
        """The key of the cell that it becomes."""
        return decoded_key(self.place, accelerator_type=self.accelerator_type)

    @property
    def words(self) -> str:
        """What is run, in one line."""
        where = f" on {self.accelerator_type}" if self.accelerator_type is not None else ""
        return f"tree {self.place}, {self.tree.num_nodes} nodes, decoded{where}"


RunTask = SampledTask | DecodedTask


@dataclass(frozen=True)
class CellInputs:
    """What all run cells of a sweep share, whichever machine runs them.

    `base_folder` is the folder of the suite's file, from which its paths go on.
    """

    spec: SweepSpec
    suite: SuiteSpec
    base_folder: Path
    trace: Trace
    knots: tuple[int, ...]
    allow_hub: bool


class CellRunner:
    """Runs the cells of one sweep on this machine's device, on an engine that is loaded once.

    Raises: UserError where the suite's model or heads are not those of the trace, or its prompts do not suit
    the sweep.
    """

    def __init__(self, inputs: CellInputs) -> None:
        spec, suite, device = inputs.spec, inputs.suite, best_device()
        loaded = load_model(
            suite.model, device=device, allow_hub=inputs.allow_hub, base_folder=inputs.base_folder
        )
        self._inputs, self._device = inputs, device
        self._engine = load_engine(suite, loaded, base_folder=inputs.base_folder)
        inputs.trace.require_same(
            backbone_sha256=loaded.sha256,
            heads_sha256=self._engine.heads_sha256,
            where="trace",
            noun="trace",
        )
        prompts = suite_prompts(suite, loaded, allow_hub=inputs.allow_hub)
        self._sampled_prompts = sampled_prompts(spec, prompts) if spec.sampled is not None else ()
        if spec.sampled is not None:
            check_lengths(self._sampled_prompts, self._engine, max_new_tokens=spec.sampled.max_new_tokens)
        self._traced = traced_prompts(inputs, prompts) if spec.decoded is not None else ()
        self._warm_ups = warmup_prompts(suite, loaded)
        self._clock, self._first_mode = device_clock(device), self._engine.runner.mode

    def run(self, task: RunTask) -> AnyCell:
        """Return the cell of a task; what goes wrong becomes a failed cell with no figure, and the others go
        on.
        """
        try:
            return self._run(task)
        except Exception as error:
            return failed_cell(task, error_type=type(error).__name__, message=str(error))

    def _run(self, task: RunTask) -> AnyCell:
        if isinstance(task, SampledTask):
            self._engine.runner.use(self._first_mode)
            return run_sampled(
                self._inputs, self._engine, task, self._sampled_prompts, clock=self._clock, held=self._held
            )
        name, label = device_info(self._device).name, task.curve.label
        if (match_device(name) or name) != label.device:
            raise UserError(
                found=f"a {name}",
                need=f"{label.device}, whose curve the point is composed with",
                where="this node",
            )
        if label.mode is not None:
            self._engine.runner.use(label.mode)  # what the curve was timed in
        return decode_point(
            self._inputs, self._engine, task, self._traced, self._warm_ups, clock=self._clock, held=self._held
        )

    def _held(self) -> contextlib.AbstractContextManager[None]:
        return device_held(self._device)


def failed_cell(task: RunTask, *, error_type: str, message: str) -> FailedCell:
    """Return the cell of a task that could not be run."""
    return FailedCell(
        key=task.key, words=task.words, error_type=error_type, message=without_paths(message)[:500]
    )


def sampled_prompts(spec: SweepSpec, prompts: Sequence[SuitePrompt]) -> tuple[SuitePrompt, ...]:
    """Return the prompts of the sampled points.

    Raises: UserError where no prompt is of the wanted categories.
    """
    wanted = spec.sampled
    assert wanted is not None
    found = [prompt for prompt in prompts if not wanted.categories or prompt.category in wanted.categories]
    if not found:
        known = sorted({prompt.category or "none" for prompt in prompts})
        none = f"no prompt of {', '.join(wanted.categories)}"
        raise UserError(found=none, need=f"some of {', '.join(known)}", where="sampled.categories")
    return tuple(found[: wanted.num_prompts])


def arm_of(setting: SampledSetting, seeds: Sequence[int]) -> ArmSpec:
    """Return a setting as an arm."""
    name = f"{setting.rule}_sweep"
    if setting.rule == "vanilla":
        return ArmSpec(name=name, method="vanilla", temperature=setting.temperature, seeds=tuple(seeds))
    acceptance: GreedyAcceptance | RejectionAcceptance | TypicalAcceptance = GreedyAcceptance()
    if setting.rule == "rejection":
        acceptance = RejectionAcceptance(rule="rejection", temperature=setting.temperature)
    elif setting.rule == "typical":
        assert setting.epsilon is not None and setting.delta is not None
        acceptance = TypicalAcceptance(
            rule="typical", temperature=setting.temperature, epsilon=setting.epsilon, delta=setting.delta
        )
    drawn = tuple(seeds) if setting.rule != "greedy" else ()
    return ArmSpec.model_validate(
        {
            "name": name,
            "method": "medusa",
            "baseline": "vanilla",
            "tree": _TREE,
            "acceptance": acceptance,
            "seeds": drawn,
        }
    )


def run_sampled(
    inputs: CellInputs,
    engine: Engine,
    task: SampledTask,
    prompts: Sequence[SuitePrompt],
    *,
    clock: Clock,
    held: Held = contextlib.nullcontext,
) -> SampledCell:
    """Run one setting on every prompt and seed, and score its texts under the backbone.

    Nothing is timed; the device is held all the same, text by text, so as not to disturb what another run
    times.
    """
    wanted = inputs.spec.sampled
    assert wanted is not None
    started = clock()
    arm = arm_of(task.setting, wanted.seeds)
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    runner = ArmRunner(
        engine,
        arm,
        tree=task.tree,
        max_new_tokens=wanted.max_new_tokens,
        max_prompt_tokens=longest,
        clock=clock,
    )
    rows = []
    for prompt in prompts:
        for seed in arm.seeds or (None,):
            with held():
                result = runner.generate(prompt.prompt_ids, seed=seed)
                rows.append(_sampled_row(engine, prompt, result, seed=seed))
    return SampledCell(setting=task.setting, tree=task.place, rows=tuple(rows), elapsed_s=clock() - started)


def _sampled_row(
    engine: Engine, prompt: SuitePrompt, result: TimedGeneration, *, seed: int | None
) -> SampledRow:
    text = KeptText(prompt.key, prompt.category, prompt.prompt_ids, result.token_ids, result.ended_by)
    return SampledRow(
        prompt_key=prompt.key,
        category=prompt.category,
        seed=seed,
        prompt_tokens=len(prompt.prompt_ids),
        num_tokens=len(result.token_ids),
        ended_by=result.ended_by,
        step_tokens=result.step_tokens,
        log_likelihood=probes.mean_log_likelihood(engine, text) * len(result.token_ids),
        text_sha256=hashlib.sha256(json.dumps(result.token_ids).encode()).hexdigest()[:16],
    )


def traced_prompts(
    inputs: CellInputs, prompts: Sequence[SuitePrompt]
) -> tuple[tuple[SuitePrompt, PromptTrace], ...]:
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
    places = np.linspace(0, len(pairs) - 1, min(wanted.num_prompts, len(pairs))).round().astype(int)
    return tuple(pairs[place] for place in dict.fromkeys(places.tolist()))


def decode_point(
    inputs: CellInputs,
    engine: Engine,
    task: DecodedTask,
    pairs: Sequence[tuple[SuitePrompt, PromptTrace]],
    warm_ups: Sequence[SuitePrompt],
    *,
    clock: Clock,
    held: Held = contextlib.nullcontext,
) -> DecodedCell:
    """Decode prompts with vanilla and with one tree in turn, timed, and set steps and times beside replay and
    composition.
    """
    started, tree, curve, trace = clock(), task.tree, task.curve, inputs.trace
    longest = max(len(prompt.prompt_ids) for prompt in (*(prompt for prompt, _ in pairs), *warm_ups))
    vanilla, medusa = (
        ArmRunner(
            engine,
            arm,
            tree=drafted,
            max_new_tokens=trace.provenance.max_new_tokens,
            max_prompt_tokens=longest,
            clock=clock,
        )
        for arm, drafted in (
            (ArmSpec(name="vanilla", method="vanilla"), None),
            (arm_of(SampledSetting(rule="greedy"), ()), tree),
        )
    )
    with held():
        for runner in (vanilla, medusa):
            _warm_up(runner, warm_ups, clock=clock)
    part = Composer(
        Trace(provenance=trace.provenance, prompts=tuple(traced for _, traced in pairs)),
        knots=inputs.knots,
        interval=inputs.spec.interval,
    )
    prices = KnotPrices(curve, knots=part.knots, context="trace", batch=1)
    composed = {}
    for name, drafted in (("vanilla", DraftTree.root_only()), ("medusa", tree)):
        steps = part.steps(drafted)
        values = prices.step(steps.num_nodes, steps.num_heads)
        assert values is not None  # only covered trees are drawn
        composed[name] = (steps.shares @ values).tolist()
    replay = part.index.replay(tree)
    rows, differences = list[DecodedRow](), list[StepDifference]()
    for number, (prompt, traced) in enumerate(pairs):
        with held():
            turns = [vanilla.generate, medusa.generate]
            results = [
                turn(prompt.prompt_ids, seed=None) for turn in (turns if number % 2 == 0 else turns[::-1])
            ]
        plain, drafted_result = results if number % 2 == 0 else results[::-1]
        rows.append(
            DecodedRow(
                prompt_key=prompt.key,
                num_tokens=len(drafted_result.token_ids),
                vanilla_s=sum(plain.step_times_s),
                medusa_s=sum(drafted_result.step_times_s),
                medusa_steps=len(drafted_result.step_tokens),
                composed_vanilla_s=composed["vanilla"][number],
                composed_medusa_s=composed["medusa"][number],
            )
        )
        difference = step_difference(
            traced, drafted_result, tree, replayed=replay.hops(number).tolist(), trace=trace
        )
        if difference is not None:
            differences.append(difference)
    return DecodedCell(
        curve=curve.label,
        tree=task.place,
        rows=tuple(rows),
        differences=tuple(differences),
        elapsed_s=clock() - started,
    )


def _warm_up(runner: ArmRunner, warm_ups: Sequence[SuitePrompt], *, clock: Clock) -> None:
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
    """Return where decoding first took another step than the replay, and whether rounding explains it; None
    where all steps agree.
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
