"""Measure the table of modes and the speed against batch, by real decoding.

Everything that is compared takes turns on the same texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

from harness.compose.curve import LatencyCurve
from harness.compose.trees import resolve_trees
from harness.device.arms import ArmRunner
from harness.device.clock import Clock
from harness.device.engine import Engine
from harness.device.locks import Held
from harness.device.trace import calibration_of
from harness.files import Frozen
from harness.measure.latency.faults import PREPARING_MODES, UNPREPARED, noting_fault
from harness.measure.latency.prompts import LatencyPrompt, random_prompts
from harness.measure.latency.sittings import Sitting, Watch
from harness.paths import resolve_path
from harness.records.latency import STOCK, BatchTrial, BatchTrials, LatencyPoint, ModeTrial
from harness.records.probes import StepCost
from harness.records.run import ArmTree
from harness.specs.latency import DtypeName, LatencySpec, ModeName
from harness.specs.suite import ArmSpec, GreedyAcceptance
from medusa_impl.acceptance import GreedyRule
from medusa_impl.decode import DecodingStep, decode_medusa, decode_vanilla
from medusa_impl.tree import DraftTree

_WARMUP_TOKENS = 12
_VANILLA = ArmSpec(name="vanilla", method="vanilla")
_STOCK = ArmSpec(name=STOCK, method="hf_greedy", baseline="vanilla")
_NO_WATCH = Watch()
_Trial = TypeVar("_Trial", bound=Frozen)


def measure_modes(
    engine: Engine,
    dtype: DtypeName,
    modes: Sequence[ModeName],
    prompts: Sequence[LatencyPrompt],
    *,
    max_new_tokens: int,
    clock: Clock,
    held: Held = contextlib.nullcontext,
    watch: Watch = _NO_WATCH,
) -> tuple[tuple[ModeTrial, ...], tuple[ModeTrial, ...]]:
    """Decode each prompt greedily in every mode and by Hugging Face `generate`, in turn.

    Each prompt begins with another of them. A mode that runs out of memory or cannot prepare a step is left
    out with all its trials, and `watch` is told; without `generate`, with which all are compared, nothing is
    left. The second value holds the trials that were disturbed and run again.
    """
    names: list[str] = [STOCK, *modes]
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    runners = {
        name: ArmRunner(
            engine,
            _STOCK if name == STOCK else _VANILLA,
            tree=None,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=longest,
            clock=clock,
        )
        for name in names
    }
    faults: dict[str, str] = {}

    def noting(name: str) -> contextlib.AbstractContextManager[None]:
        device = engine.runner.backbone.device
        return noting_fault(name, device=device, note=lambda reason: faults.update({name: reason}))

    with held():
        for name, runner in runners.items():
            with noting(name):
                _warm_up(engine, name, runner, prompts)

    def in_turn(number: int, prompt: LatencyPrompt) -> list[ModeTrial]:
        first, trials = number % len(names), []
        for name in (*names[first:], *names[:first]):
            if name not in faults:
                with noting(name):
                    trials.append(_mode_trial(engine, name, runners[name], prompt, dtype=dtype))
                if name not in (STOCK, engine.runner.mode):  # the engine fell back by itself
                    faults.setdefault(name, f"{name} {UNPREPARED}: {engine.runner.note}")
        return trials

    sits = ((f"{one.key} in all modes", partial(in_turn, number, one)) for number, one in enumerate(prompts))
    quiet, disturbed = _sat(sits, watch=watch, held=held, modes=tuple(names))
    for name, reason in faults.items():
        watch.note(f"the table of modes leaves out {name}: {reason}")
    if STOCK in faults:
        return (), ()
    return tuple(one for one in quiet if one.mode not in faults), tuple(
        one for one in disturbed if one.mode not in faults
    )


def _sat(
    sits: Iterable[tuple[str, Callable[[], list[_Trial]]]],
    *,
    watch: Watch,
    held: Held,
    modes: tuple[str, ...],
) -> tuple[list[_Trial], list[_Trial]]:
    """Return the trials of all sittings, and those that were disturbed and run again.

    Each has what was seen of the machine over it. `sits` says in words what is measured, and how.
    """
    quiet: list[_Trial] = []
    disturbed: list[_Trial] = []
    for what, measure in sits:
        with held():
            *earlier, last = watch.sittings(measure, what=what, modes=modes)
        quiet += _seen(last)
        disturbed += [trial for sitting in earlier for trial in _seen(sitting)]
    return quiet, disturbed


def _seen(sitting: Sitting[list[_Trial]]) -> list[_Trial]:
    """Return the trials of a sitting, each with what was seen of the machine over it."""
    return [trial.model_copy(update={"machine": sitting.machine}) for trial in sitting.timed]


def _mode_trial(
    engine: Engine, name: str, runner: ArmRunner, prompt: LatencyPrompt, *, dtype: DtypeName
) -> ModeTrial:
    result = _in_mode(engine, name, runner).generate(prompt.prompt_ids, seed=None)
    return ModeTrial.model_validate(
        {
            "dtype": dtype,
            "mode": name,
            "prompt_key": prompt.key,
            "prompt_tokens": len(prompt.prompt_ids),
            "token_ids": result.token_ids,
            "step_tokens": result.step_tokens,
            "step_times_s": result.step_times_s,
            "prefill_s": result.prefill_s,
        }
    )


def measure_batches(
    engine: Engine,
    spec: LatencySpec,
    points: Sequence[LatencyPoint],
    prompts: Sequence[LatencyPrompt],
    *,
    dtype: DtypeName,
    clock: Clock,
    held: Held = contextlib.nullcontext,
    base_folder: Path | None = None,
    watch: Watch = _NO_WATCH,
) -> BatchTrials | None:
    """Decode the same texts with vanilla and with Medusa, B at a time for each batch B.

    The engine keeps its present mode. Every batch decodes all prompts, in as many groups as it takes; within
    a group the two take turns in being first. A batch that runs out of memory, or that the mode cannot
    prepare, is left out, and `watch` is told. The result is None where none is left.
    """
    table = spec.batch_table
    assert table is not None
    mode: ModeName = engine.runner.mode
    tree = batch_tree(spec, engine, points, mode=mode, dtype=dtype, base_folder=base_folder)
    texts = prompts[: table.num_texts]
    faults: dict[int, str] = {}

    def noting(batch: int) -> contextlib.AbstractContextManager[None]:
        device = engine.runner.backbone.device
        return noting_fault(mode, device=device, note=lambda reason: faults.update({batch: reason}))

    few_tokens = min(_WARMUP_TOKENS, table.max_new_tokens)
    with held():
        for batch in table.batches:
            others = random_prompts(engine, [len(prompt.prompt_ids) for prompt in texts[:batch]])
            with noting(batch):
                for drafted in (None, tree.tree()):
                    _decode_together(engine, drafted, others, max_new_tokens=few_tokens, clock=clock)

    def both(number: int, batch: int, start: int) -> list[BatchTrial]:
        group, trials = texts[start : start + batch], []
        turns = ("vanilla", "medusa") if (number + start // batch) % 2 == 0 else ("medusa", "vanilla")
        with noting(batch):
            for method in turns:
                drafted = tree.tree() if method == "medusa" else None
                done = _decode_together(
                    engine, drafted, group, max_new_tokens=table.max_new_tokens, clock=clock
                )
                trials.append(_batch_trial(drafted, group, done, number=number))
        return trials

    sits = (
        (f"batch {batch}, round {number + 1}", partial(both, number, batch, start))
        for number, batch in product(range(table.rounds), table.batches)
        for start in range(0, len(texts), batch)
        if batch not in faults
    )
    quiet, disturbed = _sat(sits, watch=watch, held=held, modes=(mode,))
    for batch, reason in faults.items():
        watch.note(f"speed against batch leaves out batch {batch}: {reason}")
    kept, again = (tuple(one for one in some if one.batch not in faults) for some in (quiet, disturbed))
    return BatchTrials(dtype=dtype, mode=mode, tree=tree, trials=kept, disturbed=again) if kept else None


def _batch_trial(
    drafted: DraftTree | None,
    group: Sequence[LatencyPrompt],
    done: tuple[int, int, float],
    *,
    number: int,
) -> BatchTrial:
    num_tokens, num_steps, decode_s = done
    return BatchTrial(
        method="medusa" if drafted is not None else "vanilla",
        batch=len(group),
        round=number,
        prompt_keys=tuple(prompt.key for prompt in group),
        num_tokens=num_tokens,
        num_steps=num_steps,
        decode_s=decode_s,
    )


def batch_tree(
    spec: LatencySpec,
    engine: Engine,
    points: Sequence[LatencyPoint],
    *,
    mode: ModeName,
    dtype: DtypeName,
    base_folder: Path | None,
) -> ArmTree:
    """Return the tree that the batch table decodes with, resolved as a suite's is.

    `fastest` takes this run's own whole steps at batch 1.
    Raises: UserError where the calibration trace is of another model or other heads, or a tree is deeper than
    the heads.
    """
    assert spec.batch_table is not None
    calibration = None
    if spec.calibration_trace is not None:
        calibration = calibration_of(
            engine,
            resolve_path(spec.calibration_trace, base_folder=base_folder),
            where="calibration_trace",
        )
    costs = _whole_steps(
        [
            point
            for point in points
            if (point.dtype, point.mode, point.batch) == (dtype, mode, 1) and point.step_s
        ]
    )
    arm = ArmSpec(
        name="medusa",
        method="medusa",
        baseline="vanilla",
        tree=spec.batch_table.tree,
        acceptance=GreedyAcceptance(),
    )
    trees = resolve_trees(
        (arm,),
        calibration=calibration,
        costs=costs,
        num_heads=engine.heads.num_heads,
        base_folder=base_folder,
    )
    return trees["medusa"]


def _whole_steps(points: Sequence[LatencyPoint]) -> tuple[StepCost, ...]:
    """Return what a step costs at each measured size of the shortest context.

    It has as many heads as were measured and a tree can use.
    """
    if not points:
        return ()
    curve, context_tokens = LatencyCurve(points), min(point.context_tokens for point in points)
    most_heads = max(point.num_heads for point in points)
    costs = []
    for nodes in sorted({point.num_nodes for point in points if point.context_tokens == context_tokens}):
        heads = min(most_heads, nodes - 1)
        costs.append(
            StepCost(
                num_nodes=nodes,
                num_heads=heads,
                context_tokens=context_tokens,
                backbone_s=(curve.backbone_seconds(num_nodes=nodes, context_tokens=context_tokens),),
                step_s=(curve.seconds(num_nodes=nodes, num_heads=heads, context_tokens=context_tokens),),
            )
        )
    return tuple(costs)


def _decode_together(
    engine: Engine,
    tree: DraftTree | None,
    prompts: Sequence[LatencyPrompt],
    *,
    max_new_tokens: int,
    clock: Clock,
) -> tuple[int, int, float]:
    """Return tokens, steps and seconds after the first token of every row."""
    backbone, eos_ids, texts = (
        engine.runner.backbone,
        engine.loaded.eos_ids,
        [prompt.prompt_ids for prompt in prompts],
    )
    num_nodes, depth = (tree.num_nodes, tree.depth) if tree is not None else (1, 0)
    # a row that ends within a path keeps the rest of it, and still takes part in the others' steps
    longest = max(map(len, texts)) + max_new_tokens + depth + num_nodes
    cache = backbone.new_cache(batch_size=len(texts), max_length=longest)
    rule = GreedyRule()

    def decoding() -> Iterator[DecodingStep]:
        if tree is None:
            return decode_vanilla(
                backbone, texts, rule=rule, max_new_tokens=max_new_tokens, eos_ids=eos_ids, cache=cache
            )
        return decode_medusa(
            backbone,
            engine.heads,
            tree,
            texts,
            rule=rule,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            cache=cache,
        )

    if engine.runner.records_steps:  # of every length that attention reads, over this very cache
        for _ in decoding():
            continue
        cache.reset()
    steps = decoding()
    next(steps)
    started = clock()
    num_tokens, num_steps = 0, 0
    for step in steps:
        num_tokens += sum(len(tokens) for tokens in step.tokens)
        num_steps += 1
    return num_tokens, num_steps, clock() - started


def _warm_up(engine: Engine, name: str, runner: ArmRunner, prompts: Sequence[LatencyPrompt]) -> None:
    """Decode other texts first in one mode.

    A few tokens are enough, except where each size of a step has to be prepared: there all sizes that will be
    timed.
    """
    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    _in_mode(engine, name, runner)
    if name in PREPARING_MODES:  # each new size of the attention view is compiled or captured
        for other in random_prompts(engine, sorted(set(lengths))):
            runner.generate(other.prompt_ids, seed=None)
        return
    few = ArmRunner(
        engine,
        runner.arm,
        tree=None,
        max_new_tokens=_WARMUP_TOKENS,
        max_prompt_tokens=max(lengths),
        clock=runner.clock,
    )
    (other,) = random_prompts(engine, [max(lengths)])
    few.generate(other.prompt_ids, seed=None)


def _in_mode(engine: Engine, name: str, runner: ArmRunner) -> ArmRunner:
    """Switch the engine to a runner's mode; stock `generate` leaves every mode aside."""
    mode = next((mode for mode in engine.runner.available_modes() if mode == name), None)
    engine.runner.use(mode or "eager")
    return runner
