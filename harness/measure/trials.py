"""Blocks of trials, timed one after another."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import psutil
from rich.markup import escape

from harness.device.arms import ArmRunner, TimedGeneration, TimedSteps
from harness.device.clock import processor_clock
from harness.device.engine import Engine
from harness.device.noise import ProcessorMoment
from harness.device.progress import counted, progress_bar
from harness.device.prompts import Prompt
from harness.device.trace import Text
from harness.errors import InvalidMeasurement
from harness.measure import probes
from harness.measure.plan import PlannedTrial, finished_blocks
from harness.measure.session import Session, device_turn, greedy_vanilla, tell_of_others
from harness.paths import without_paths
from harness.records.run import ARM_STEPS, ArmTree, RunRecord
from harness.records.store import Store
from harness.records.trials import Failure, Generation, GpuObservation, ProcessorObservation, TrialKey
from harness.specs.suite import ArmSpec
from medusa_impl.engine.memory import peak_memory_bytes, reset_peak_memory
from medusa_impl.tree import DraftTree

_WARMUP_TOKENS, _CONTROL_PROMPTS, _CONTROL_TOKENS, _ARM_STEPS = 12, 4, 64, 6


def control_texts(session: Session, engine: Engine) -> list[Text]:
    """Return vanilla's greedy texts on prompts that are never measured."""
    arm = ArmSpec(name="control", method="vanilla")
    longest = max(len(prompt.prompt_ids) for prompt in session.warmup)
    runner = ArmRunner(
        engine, arm, tree=None, max_new_tokens=_CONTROL_TOKENS, max_prompt_tokens=longest, clock=session.clock
    )
    texts = []
    for prompt in session.warmup[:_CONTROL_PROMPTS]:
        result = runner.generate(prompt.prompt_ids, seed=None)
        texts.append(Text(prompt, result.token_ids, result.ended_by))
    return texts


def arm_runners(session: Session, trees: dict[str, ArmTree]) -> dict[str, ArmRunner]:
    longest = (
        max(len(prompt.prompt_ids) for prompt in (*session.prompts, *session.warmup))
        + session.suite.max_new_tokens
    )
    runners = {}
    for arm in session.suite.arms:
        tree: DraftTree | None = trees[arm.name].tree() if arm.name in trees else None
        runners[arm.name] = ArmRunner(
            session.engines[arm.backbone],
            arm,
            tree=tree,
            max_new_tokens=session.suite.max_new_tokens,
            max_prompt_tokens=longest,
            clock=session.clock,
        )
    return runners


def take_up(
    store: Store[Generation | Failure], plan: Sequence[PlannedTrial]
) -> tuple[set[int], dict[TrialKey, int]]:
    """Make a store ready to go on, and return the finished blocks.

    The second value says of the other trials how often each was tried.
    """
    done = finished_blocks(store.lines(), plan)
    ARM_STEPS.done(store.folder)
    if done.kept:
        store.rewrite(done.kept)
    return done.blocks, done.attempts


def run_blocks(
    session: Session,
    runners: dict[str, ArmRunner],
    plan: Sequence[PlannedTrial],
    *,
    started: float,
    budget_s: float | None,
) -> int:
    """Run all blocks that are not done yet; return the peak memory seen."""
    finished, attempts = take_up(session.store, plan)
    todo = [
        list(block)
        for number, block in groupby(plan, key=lambda planned: planned.block)
        if number not in finished
    ]
    if todo or _disturbed(session, plan):
        with device_turn(session):
            _warm_up(session, runners)
    _check_mode(session)
    peak = peak_memory_bytes(session.device)  # of loading and probing; the trials start new peaks

    def has_time() -> bool:
        return budget_s is None or time.monotonic() - started <= budget_s

    with progress_bar(session.console) as progress:
        task = progress.add_task(
            "trials", total=len(plan), completed=len(plan) - sum(len(block) for block in todo)
        )
        for number, block in enumerate(todo):
            # later rounds only as a whole
            may_stop = block[0].trial.round == 0 or block[0].trial.prompt_key == plan[0].trial.prompt_key
            has_any = number > 0 or bool(finished)
            if may_stop and has_any and not has_time():
                break
            for outcome in _run_block(session, runners, block, attempts):
                now = f"trials, {outcome.trial.arm} on {outcome.trial.prompt_key}"
                progress.update(task, description=escape(now))
                if isinstance(outcome, Generation):
                    peak = max(peak, outcome.peak_memory_bytes or 0)
                progress.advance(task)
    return max(peak, _repeat_disturbed(session, runners, plan, has_time))


def _repeat_disturbed(
    session: Session,
    runners: dict[str, ArmRunner],
    plan: Sequence[PlannedTrial],
    has_time: Callable[[], bool],
) -> int:
    """Run the blocks again whose times cannot be used, as rounds of their own; return the peak memory seen.

    It ends when all are quiet, when the rule's repeats or the time are used up, or when a whole round made
    none quiet: a neighbour that stays is not waited for.
    """
    rule, peak = session.suite.disturbance, 0
    if rule is None:
        return peak
    for number in range(rule.max_repeats):
        again = _disturbed(session, plan)
        if not again or not has_time():
            break
        session.console.print(
            f"other work disturbed {len(again)} of the blocks: repeating them, round {number + 1} of at most "
            f"{rule.max_repeats}"
        )
        blocks = counted(again, "repeats, blocks", total=len(again), console=session.console)
        for block in (block for block in blocks if has_time()):
            _, attempts = take_up(session.store, plan)
            for outcome in _run_block(session, runners, block, attempts):
                if isinstance(outcome, Generation):
                    peak = max(peak, outcome.peak_memory_bytes or 0)
        if len(_disturbed(session, plan)) == len(again):
            break
    return peak


def _disturbed(session: Session, plan: Sequence[PlannedTrial]) -> list[list[PlannedTrial]]:
    """Return the blocks that were run, none of whose tries was quiet; none where no speed is reported."""
    if not session.suite.reports_speed or session.suite.disturbance is None:
        return []
    tries = RunRecord(session.store.folder).tries
    quiet = {(one.prompt_key, one.round) for one in tries if one.is_quiet}
    run = {(one.prompt_key, one.round) for one in tries} - quiet
    blocks = (list(block) for _, block in groupby(plan, key=lambda planned: planned.block))
    return [block for block in blocks if (block[0].trial.prompt_key, block[0].trial.round) in run]


def _run_block(
    session: Session,
    runners: dict[str, ArmRunner],
    block: Sequence[PlannedTrial],
    attempts: Mapping[TrialKey, int],
) -> Iterator[Generation | Failure]:
    """Run the trials of one prompt, then the arms' separate steps; yield each outcome as it is kept."""
    (prompt,) = (one for one in session.prompts if one.key == block[0].trial.prompt_key)
    rule = session.suite.disturbance
    turn_steps = rule.turn_steps if rule is not None else 0
    with device_turn(session):
        for group in _groups(block) if turn_steps else [block]:
            in_turns = [one for one in group if turn_steps and runners[one.trial.arm].takes_turns]
            alone = [one for one in group if one not in in_turns]
            for one in alone:
                trial = _Trial(session, runners, one, prompt, attempt=attempts.get(one.trial, 0))
                yield _kept(session, *_run_in_turns([trial], None))
            begun = [
                _Trial(session, runners, one, prompt, attempt=attempts.get(one.trial, 0)) for one in in_turns
            ]
            for outcome in _run_in_turns(begun, turn_steps) if begun else ():
                yield _kept(session, outcome)
        _time_arm_steps(session, runners, prompt)


def _kept(session: Session, outcome: Generation | Failure) -> Generation | Failure:
    _check_mode(session)
    session.store.append(outcome)
    if isinstance(outcome, Generation):
        tell_of_others(session.console, outcome.gpu)
    return outcome


def _groups(block: Sequence[PlannedTrial]) -> list[list[PlannedTrial]]:
    """Return a block's trials in groups in which each arm has one: an arm has one cache for all its seeds."""
    groups: list[list[PlannedTrial]] = []
    seen: Counter[str] = Counter()
    for planned in block:
        number = seen[planned.trial.arm]
        seen[planned.trial.arm] += 1
        if number == len(groups):
            groups.append([])
        groups[number].append(planned)
    return groups


def _warm_up(session: Session, runners: dict[str, ArmRunner]) -> None:
    for prompt in session.warmup[: session.suite.warmup_prompts]:
        for arm in session.suite.arms:
            runner = ArmRunner(
                session.engines[arm.backbone],
                arm,
                tree=runners[arm.name].tree,
                max_new_tokens=min(_WARMUP_TOKENS, session.suite.max_new_tokens),
                max_prompt_tokens=len(prompt.prompt_ids),
                clock=session.clock,
            )
            with contextlib.suppress(
                Exception
            ):  # an arm that cannot run fails in its own trials, where it is recorded
                runner.generate(prompt.prompt_ids, seed=0)
    for name, arm_runner in runners.items():
        try:
            arm_runner.record()
        except Exception as error:  # its own trials record it then, and say so if they fail
            session.console.print(
                f"{name}: no steps recorded ahead: {type(error).__name__}: {without_paths(str(error))[:200]}",
                markup=False,
            )


def _check_mode(session: Session) -> None:
    """Refuse to go on with an engine that left the mode which the record names: its steps are others.

    Raises: InvalidMeasurement with the engine's reason.
    """
    begun_in = RunRecord(session.store.folder).environment.engine
    for name, engine in session.engines.items():
        if engine.runner.mode != begun_in:
            raise InvalidMeasurement(
                f"engine_mode: found {engine.runner.mode} steps of the {name} backbone, need {begun_in} "
                f"ones, in which the run began ({engine.runner.note}); trials before are kept"
            )


class _Trial:
    """A trial under way: what it has used so far, whoever had a turn in between."""

    def __init__(
        self,
        session: Session,
        runners: dict[str, ArmRunner],
        planned: PlannedTrial,
        prompt: Prompt,
        *,
        attempt: int,
    ) -> None:
        self.session, self.planned, self.prompt, self.attempt = session, planned, prompt, attempt
        self._runner = runners[planned.trial.arm]
        self._thread_clock = processor_clock(session.device)
        self._processor_s, self._peak_bytes = 0.0, 0
        self._steps: TimedSteps | None = None
        self._result: TimedGeneration | None = None
        self._error: Exception | None = None

    def take(self, num_steps: int | None) -> bool:
        """Take so many steps, or all; return whether there are more. An exception ends the trial."""
        reset_peak_memory(self.session.device)
        started = self._thread_clock() if self._thread_clock is not None else 0.0
        goes_on = False
        try:
            if num_steps is None:
                self._result = self._runner.generate(self.prompt.prompt_ids, seed=self.planned.trial.seed)
            else:
                if self._steps is None:
                    self._steps = self._runner.begin(self.prompt.prompt_ids, seed=self.planned.trial.seed)
                goes_on = self._steps.take(num_steps)
                self._result = None if goes_on else self._steps.result()
        except Exception as error:  # becomes a Failure with no metric; the other trials go on
            self._error, self._steps = error, None
        if self._thread_clock is not None:
            self._processor_s += self._thread_clock() - started
        self._peak_bytes = max(self._peak_bytes, peak_memory_bytes(self.session.device))
        return goes_on

    def outcome(self, seen: ProcessorObservation, gpu: GpuObservation | None) -> Generation | Failure:
        """Return what became of it, and what was seen of the machine meanwhile."""
        planned, result, error = self.planned, self._result, self._error
        if result is None:
            return Failure(
                trial=planned.trial,
                order=planned.order,
                attempt=self.attempt,
                error_type=type(error).__name__,
                message=without_paths(str(error))[:500],
            )
        return Generation(
            trial=planned.trial,
            order=planned.order,
            attempt=self.attempt,
            category=self.prompt.category,
            prompt_tokens=len(self.prompt.prompt_ids),
            token_ids=result.token_ids,
            ended_by=result.ended_by,
            step_tokens=result.step_tokens,
            step_times_s=result.step_times_s,
            prefill_s=result.prefill_s,
            peak_memory_bytes=self._peak_bytes,
            cache_bytes=result.cache_bytes,
            load_average=psutil.getloadavg()[0] if sys.platform != "win32" else None,
            processor_s=self._processor_s if self._thread_clock is not None else None,
            processor=seen,
            gpu=gpu,
        )


def _run_in_turns(trials: Sequence[_Trial], turn_steps: int | None) -> list[Generation | Failure]:
    """Run trials of one prompt in turns of so many steps, or each whole; return their outcomes.

    In every round of turns the order is another one, so that no arm always follows the same other one.
    """
    order = random.Random(f"turns-{trials[0].planned.trial.prompt_key}-{trials[0].attempt}")
    before, going = ProcessorMoment.now(), list(trials)
    while going:
        going = [one for one in order.sample(going, len(going)) if one.take(turn_steps)]
    seen, watch = before.until(ProcessorMoment.now()), trials[0].session.gpu
    gpu = watch.observe() if watch is not None else None
    return [one.outcome(seen, gpu) for one in trials]


def _time_arm_steps(session: Session, runners: dict[str, ArmRunner], prompt: Prompt) -> None:
    """Time a few separate steps of vanilla and every greedy Medusa arm, one of each in turn.

    They follow the first half of the backbone's vanilla text of this block.
    """
    if not session.suite.reports_speed:
        return
    outcomes = RunRecord(session.store.folder).generations
    contexts = {}
    for backbone in session.suite.backbones:
        vanilla = greedy_vanilla(session.suite, backbone).name
        text = next(
            (
                item.token_ids
                for item in outcomes
                if item.trial.arm == vanilla and item.trial.prompt_key == prompt.key
            ),
            None,
        )
        if text is not None:
            contexts[backbone] = [*prompt.prompt_ids, *text[: len(text) // 2]]
    arms = [
        arm
        for arm in session.suite.arms
        if arm.backbone in contexts and arm.method in ("vanilla", "medusa") and not arm.stochastic
    ]
    steps: dict[str, probes.ArmSteps] = {}
    broken: set[str] = set()
    for arm in arms:
        with _left_out(session, arm, broken):
            steps[arm.name] = probes.ArmSteps(
                runners[arm.name], contexts[arm.backbone], seed=None, clock=session.clock
            )
    order, before = random.Random(f"{session.suite.plan_seed}-{prompt.key}"), ProcessorMoment.now()
    for _ in range(_ARM_STEPS):  # in turns, so that a drift of the machine falls on all arms alike
        for arm in order.sample(arms, len(arms)):
            if arm.name not in broken:
                with _left_out(session, arm, broken):
                    steps[arm.name].time_one()
    seen = before.until(ProcessorMoment.now())
    for one in (one for name, one in steps.items() if name not in broken):
        if one.num_timed:
            ARM_STEPS.append(session.store.folder, one.cost(prompt_key=prompt.key, processor=seen))


@contextlib.contextmanager
def _left_out(session: Session, arm: ArmSpec, broken: set[str]) -> Iterator[None]:
    """Leave an arm out of this block's separate steps if one raises; its trials are Failures of their own."""
    try:
        yield
    except Exception as error:
        broken.add(arm.name)
        session.console.print(
            f"no separate steps of {arm.name}: {type(error).__name__}: {without_paths(str(error))}",
            markup=False,
        )
