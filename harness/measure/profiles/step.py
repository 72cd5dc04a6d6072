"""Profile a step on the device: vanilla and trees of growing size, in turn.

All follow the same kept texts of the suite's own model.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity

from harness.compose.replay import ReplayIndex
from harness.compose.trees import grow
from harness.device.arms import ArmRunner
from harness.device.clock import Clock, Marks, SectionTimer, device_clock
from harness.device.engine import Engine, best_device, load_model
from harness.device.locks import Held, device_turns
from harness.device.progress import counted
from harness.device.prompts import suite_prompts, take_date
from harness.device.trace import calibration_of
from harness.errors import UserError
from harness.measure.run import describe
from harness.measure.session import suite_engine
from harness.paths import resolve_path
from harness.records.profiles.step import PARTS, Part, SizeProfile, StepProfile
from harness.records.run import ArmTree
from harness.records.trace import Trace
from harness.specs.suite import ArmSpec, GreedyAcceptance, SearchedTree, SuiteSpec
from medusa_impl.engine.runner import Mode

_VISIT_STEPS = 8  # marked steps, and as many without marks, of one size before the next size has its turn
_VANILLA = ArmSpec(name="vanilla", method="vanilla")


def profile_suite(
    suite: SuiteSpec,
    *,
    suite_file: Path,
    sizes: Sequence[int],
    mode: str | None,
    num_steps: int,
    allow_hub: bool,
    command: str,
    console: Console,
) -> StepProfile:
    """Return the profile of a suite's steps, by size of the tree.

    Nested trees are grown on the calibration trace, and `num_steps` marked steps of each size are timed.
    Raises: UserError for an unknown mode, a suite without a fitting calibration trace, or texts too short to
    time a step.
    """
    if mode is not None and mode not in get_args(Mode):
        raise UserError(
            found=f"--mode {mode}", need=f"one of {list(get_args(Mode))}", where="the command line"
        )
    if suite.calibration_trace is None:
        raise UserError(
            found="no calibration_trace", need="one to grow trees on", where=f"suite {suite.name!r}"
        )
    trace_file = resolve_path(suite.calibration_trace, base_folder=suite_file.parent)
    console.print(f"{suite.name}: loading {suite.model.asset or suite.model.path or 'a tiny random model'}")
    loaded = load_model(suite.model, device=best_device(), allow_hub=allow_hub, base_folder=suite_file.parent)
    take_date(loaded)
    prompts = suite_prompts(
        suite, loaded, base_folder=suite_file.parent, allow_hub=allow_hub, console=console
    )[: suite.probes.profile_prompts]
    chosen: Mode | None = next((known for known in get_args(Mode) if known == mode), None)
    engine = suite_engine(suite, loaded, base_folder=suite_file.parent, mode=chosen, allow_hub=allow_hub)
    if engine.runner.note:
        console.print(engine.runner.note)
    device = engine.runner.backbone.device
    clock = device_clock(device)
    trees = nested_trees(calibration_of(engine, trace_file), sizes=sizes, num_heads=engine.heads.num_heads)
    held = device_turns(device, console=console)
    with held():
        contexts = kept_contexts(
            engine,
            [prompt.prompt_ids for prompt in prompts],
            max_new_tokens=suite.max_new_tokens,
            clock=clock,
        )
    profiles = measure_sizes(
        engine, trees, contexts, num_steps=num_steps, clock=clock, held=held, console=console
    )
    return StepProfile(
        suite=suite.name,
        environment=describe(engine, suite=suite, prompts=prompts, command=command),
        context_tokens=tuple(len(context) for context in contexts),
        sizes=profiles,
    )


def nested_trees(calibration: Trace, *, sizes: Sequence[int], num_heads: int) -> tuple[ArmTree, ...]:
    """Return the best tree of each size, with what the trace predicts for it.

    All are cut from one growth on the joint hits of the trace.
    """
    grown = grow(calibration, num_nodes=max(sizes), values="joint", num_heads=num_heads)
    index = ReplayIndex(calibration)
    return tuple(
        ArmTree(
            paths=(tree := grown.nested(size)).paths,
            origin="joint growth on the calibration trace",
            predicted_tokens_per_step=index.replay(tree).tokens_per_step,
        )
        for size in sizes
    )


def kept_contexts(
    engine: Engine, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, clock: Clock
) -> tuple[tuple[int, ...], ...]:
    """Return each prompt with the first half of its greedy answer.

    A step after it does what a step in the middle of a text does.
    """
    longest = max(len(prompt) for prompt in prompts)
    runner = ArmRunner(
        engine, _VANILLA, tree=None, max_new_tokens=max_new_tokens, max_prompt_tokens=longest, clock=clock
    )
    texts = [runner.generate(prompt, seed=None).token_ids for prompt in prompts]
    return tuple((*prompt, *text[: len(text) // 2]) for prompt, text in zip(prompts, texts, strict=True))


def measure_sizes(
    engine: Engine,
    trees: Sequence[ArmTree],
    contexts: Sequence[Sequence[int]],
    *,
    num_steps: int,
    clock: Clock,
    held: Held = contextlib.nullcontext,
    console: Console | None = None,
) -> tuple[SizeProfile, ...]:
    """Time at least `num_steps` marked steps of every tree, and as many without marks.

    There are fewer only where the text ends. Round by round every tree decodes after the same context, each
    round beginning with another tree, so that drift of the machine hits all alike; the device is held for a
    round. Every tree first decodes after every context untimed, so that all shapes have occurred.
    Raises: UserError where no step of some tree could be timed.
    """
    steps_a_visit = min(_VISIT_STEPS, num_steps)
    runners = [_runner(engine, tree, contexts, num_steps=2 * steps_a_visit, clock=clock) for tree in trees]
    visits = [_Visits() for _ in trees]
    rounds = range(-(-num_steps // steps_a_visit))
    with held():
        for context, runner in itertools.product(contexts, runners):
            _visit(runner, context, _Visits(), num_steps=2 * steps_a_visit, clock=clock)
    shown_on = console or Console(quiet=True)
    for number in counted(rounds, "profiling, rounds", total=len(rounds), console=shown_on):
        first = number % len(trees)
        with held():
            for index in (*range(first, len(trees)), *range(first)):
                context = contexts[number % len(contexts)]
                _visit(runners[index], context, visits[index], num_steps=2 * steps_a_visit, clock=clock)
    with held():
        busy_s = [_device_busy_s(runner, contexts[0], num_steps=steps_a_visit) for runner in runners]
    return tuple(
        taken.profile(tree, busy_s=busy) for taken, tree, busy in zip(visits, trees, busy_s, strict=True)
    )


class _Visits:
    """What was timed of one tree."""

    def __init__(self) -> None:
        self.parts_s: dict[Part, list[float]] = defaultdict(list)
        self.step_s: list[float] = []
        self.unmarked_step_s: list[float] = []
        self.kept_tokens: list[int] = []

    def profile(self, tree: ArmTree, *, busy_s: float | None) -> SizeProfile:
        if not self.step_s or not self.unmarked_step_s:
            raise UserError(
                found=f"no timed step of the tree of {len(tree.paths)} nodes: the texts end too early",
                need="answers that go on for a few steps",
                where="the prompts",
                do="raise probes.profile_prompts, or give other prompts",
            )
        return SizeProfile(
            tree=tree,
            parts_s={part: tuple(self.parts_s[part]) for part in PARTS},
            step_s=tuple(self.step_s),
            unmarked_step_s=tuple(self.unmarked_step_s),
            kept_tokens=tuple(self.kept_tokens),
            device_busy_s=busy_s,
        )


def _runner(
    engine: Engine, tree: ArmTree, contexts: Sequence[Sequence[int]], *, num_steps: int, clock: Clock
) -> ArmRunner:
    """Return a runner of one tree with room for a visit.

    That is the prefill's token, a first step and `num_steps` more, all of full depth.
    """
    drafted = tree.tree()
    arm, longest = _VANILLA, max(len(context) for context in contexts)
    budget = 1 + (num_steps + 1) * (drafted.depth + 1)
    engine.runner.backbone.check_positions(prompt_tokens=longest, max_new_tokens=budget, depth=drafted.depth)
    if drafted.num_nodes > 1:
        spec = SearchedTree(kind="searched", num_nodes=drafted.num_nodes)
        arm = ArmSpec(
            name=f"nodes_{drafted.num_nodes}",
            method="medusa",
            baseline="vanilla",
            tree=spec,
            acceptance=GreedyAcceptance(),
        )
    return ArmRunner(
        engine,
        arm,
        tree=drafted if drafted.num_nodes > 1 else None,
        max_new_tokens=budget,
        max_prompt_tokens=longest,
        clock=clock,
    )


def _visit(
    runner: ArmRunner, context: Sequence[int], visits: _Visits, *, num_steps: int, clock: Clock
) -> None:
    """Time steps after a context, marked and unmarked in turn.

    Prefill and first step are dropped: they meet what another size left in the caches.
    """
    timer = SectionTimer(clock)
    marks = Marks(timer)
    marks.on = False
    started = clock()
    for number, step in enumerate(runner.steps(context, seed=None, section=marks)):
        elapsed_s = clock() - started
        if number >= 2:
            visits.kept_tokens.append(len(step.tokens[0]))
            if marks.on:
                visits.step_s.append(elapsed_s)
                for part in PARTS:
                    visits.parts_s[part].append(timer.seconds[part])
            else:
                visits.unmarked_step_s.append(elapsed_s)
        if number == num_steps + 1 or step.ended[0] is not None:
            break
        timer.seconds.clear()
        marks.on = number % 2 == 1
        started = clock()


def _device_busy_s(runner: ArmRunner, context: Sequence[int], *, num_steps: int) -> float | None:
    """Return the summed time of kernels and copies a step, by the profiler's own device times; None on a CPU.

    Only these times are taken from the profiled steps: a profiler makes the host slower, not the kernels.
    """
    device = runner.engine.runner.backbone.device
    if device.type != "cuda":
        return None
    steps = runner.steps(context, seed=None)
    for _ in itertools.islice(steps, 2):  # prefill and first step
        continue
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        taken = sum(1 for _ in itertools.islice(steps, num_steps))
        torch.cuda.synchronize(device)
    on_device = [
        event
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    return sum(event.self_device_time_total for event in on_device) / 1e6 / taken if taken else None
