"""Run a suite: everything that touches the device on the way to a sealed record."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness import probes
from harness.compose.replay import Trace
from harness.compose.trees import check_fixed_trees, resolve_trees
from harness.config import ArmSpec, BackboneName, FastestTree, FileTree, SearchedTree, SuiteSpec
from harness.device.arms import ArmRunner
from harness.device.clock import device_clock
from harness.device.doctor import foreign_gpu_processes
from harness.device.engine import Engine, best_device, describe_engine, load_engine, load_model, load_tuned_engine
from harness.device.limits import measure_device_limits
from harness.device.locks import device_held, folder_held
from harness.device.prompts import SuitePrompt, check_lengths, suite_prompts, warmup_prompts
from harness.device.trace import HEAD_TIE_MARGIN, KeptText, record_trace
from harness.errors import InvalidMeasurement, UserError
from harness.files import write_json
from harness.paths import resolve_path, without_paths
from harness.plan import PlannedTrial, make_plan
from harness.records import (
    CALIBRATION_FILE,
    HEADS_CONTROL_FILE,
    ROUNDING_FILE,
    TIE_SHIFTS,
    TRACE_FILE,
    ArmTree,
    ArmTrees,
    DeviceLimits,
    Environment,
    Failure,
    Generation,
    Likelihood,
    Likelihoods,
    Profile,
    RunRecord,
    StepCosts,
    file_of,
)
from harness.rounding import measure_rounding
from harness.run_store import RunStore
from harness.tiny_heads import train_tiny_heads
from medusa_impl.memory import peak_memory_bytes, reset_peak_memory
from medusa_impl.tree import DraftTree

_WARMUP_TOKENS, _CONTROL_PROMPTS, _CONTROL_TOKENS, _ARM_STEPS = 12, 4, 64, 3


@dataclass(frozen=True)
class RunOptions:
    """What the command line may change about a run."""

    results: Path
    limit: int | None = None
    time_budget_s: float | None = None
    prompts_file: Path | None = None
    tree_file: Path | None = None
    resume: Path | None = None
    allow_hub: bool = False
    command: str = ""


@dataclass
class _Session:
    suite: SuiteSpec
    engines: Mapping[BackboneName, Engine]
    prompts: tuple[SuitePrompt, ...]
    warmup: tuple[SuitePrompt, ...]
    store: RunStore
    console: Console
    clock: Callable[[], float]
    device: torch.device

    @property
    def engine(self) -> Engine:
        """The engine of the original backbone."""
        return self.engines["original"]


def effective_suite(suite: SuiteSpec, options: RunOptions) -> SuiteSpec:
    """Return the suite with the command line's changes in it."""
    prompts, arms = suite.prompts, suite.arms
    if options.tree_file is not None:
        DraftTree.from_json(options.tree_file)
        given = FileTree(kind="file", path=str(options.tree_file))
        arms = tuple(arm.model_copy(update={"tree": given}) if isinstance(arm.tree, SearchedTree | FastestTree) else arm for arm in arms)
        if arms == suite.arms:
            raise UserError(found="no arm with a searched tree", need="one that --tree can stand in for", where=f"suite {suite.name!r}")
    if options.prompts_file is not None:
        prompts = prompts.model_copy(update={"source": "file", "path": options.prompts_file.name, "per_category": None})
    if options.limit is not None:
        prompts = prompts.model_copy(update={"limit": options.limit})
    return suite.model_copy(update={"prompts": prompts, "arms": arms})


def greedy_vanilla(suite: SuiteSpec, backbone: BackboneName = "original") -> ArmSpec:
    """Return the arm whose texts are traced and scored against.

    Raises: UserError where the suite has none.
    """
    found = (arm for arm in suite.arms if arm.method == "vanilla" and not arm.stochastic and arm.backbone == backbone)
    arm = next(found, None)
    if arm is None:
        what = f"no greedy vanilla arm on the {backbone} backbone"
        raise UserError(found=what, need="one: its texts are the reference", where=f"suite {suite.name!r}")
    return arm


def run_suite(suite: SuiteSpec, *, suite_file: Path | None, options: RunOptions, console: Console) -> Path:
    """Run a suite, or resume it, and return the folder of its sealed record.

    Raises: UserError for input that cannot be run; InvalidMeasurement where the heads do not beat random ones.
    """
    started = time.monotonic()
    suite = effective_suite(suite, options)
    for backbone in suite.backbones:
        greedy_vanilla(suite, backbone)
    if options.resume is not None:
        RunRecord(options.resume)  # must be there before minutes go into loading
    device = best_device()
    if foreign := foreign_gpu_processes():
        raise UserError(found=f"{foreign} other processes on the GPU", need="a GPU of our own", where="this machine", do="stop them")
    beside = suite_file.parent if suite_file is not None else None
    console.print(f"[bold]{suite.name}[/bold]: loading {suite.model.asset or suite.model.path or 'a tiny random model'}")
    loaded = load_model(suite.model, device=device, allow_hub=options.allow_hub, beside=beside)
    prompts = suite_prompts(suite, loaded, prompts_file=options.prompts_file, allow_hub=options.allow_hub)
    warmup = warmup_prompts(suite, loaded)
    heads = train_tiny_heads(loaded, suite, prompts=warmup) if suite.heads.train_steps is not None else None
    engine = load_engine(suite, loaded, beside=beside, heads=heads)
    if engine.runner.note:
        console.print(engine.runner.note)
    tuned = load_tuned_engine(suite, device=device, allow_hub=options.allow_hub, beside=beside)
    engines: dict[BackboneName, Engine] = {"original": engine} if tuned is None else {"original": engine, "tuned": tuned}
    calibrations = {name: _calibration(suite, name, one, beside=beside) for name, one in engines.items()}
    for name, one in engines.items():
        has_calibration = calibrations[name] is not None
        check_fixed_trees(suite, num_heads=one.heads.num_heads, beside=beside, has_calibration=has_calibration, backbone=name)
        check_lengths(prompts, one, max_new_tokens=suite.max_new_tokens)
    _check_step_shapes(suite, engines)
    environment = describe(engine, suite=suite, prompts=prompts, command=options.command, tuned=tuned)
    store = RunStore.open(options.results, suite=suite, environment=environment, resume=options.resume)
    session = _Session(suite, engines, prompts, warmup, store, console, device_clock(device), device)
    with folder_held(store.folder):
        _fill_record(session, calibrations, beside=beside, started=started, budget_s=options.time_budget_s)
    return store.folder


def _fill_record(
    session: _Session, calibrations: Mapping[BackboneName, Trace | None], *, beside: Path | None, started: float, budget_s: float | None
) -> None:
    """Probe, decode, score and seal."""
    suite, store, prompts = session.suite, session.store, session.prompts
    with _device(session):
        trees = _prepare(session, calibrations, beside=beside)
    runners = _runners(session, trees)
    plan = make_plan(suite, [prompt.key for prompt in prompts])
    peak = _run_blocks(session, runners, plan, started=started, budget_s=budget_s)
    with _device(session):
        _after(session, runners)
    outcomes = RunRecord(store.folder).outcomes
    done = len({outcome.trial.prompt_key for outcome in outcomes})
    rounds = 1 + max(outcome.trial.round for outcome in outcomes)
    if (done, rounds) != (len(prompts), suite.rounds):
        session.console.print(f"time budget used up: the record holds the first {done} prompts in {rounds} of {suite.rounds} rounds")
        suite = suite.model_copy(update={"prompts": suite.prompts.model_copy(update={"limit": done}), "rounds": rounds})
        store.write_suite(suite)
        plan = make_plan(suite, [prompt.key for prompt in prompts[:done]])
    store.seal(
        suite=suite.name,
        num_planned=len(plan),
        elapsed_s=time.monotonic() - started,
        peak_memory_bytes=max(peak, peak_memory_bytes(session.device)),
    )


def describe(engine: Engine, *, suite: SuiteSpec, prompts: Sequence[SuitePrompt], command: str, tuned: Engine | None = None) -> Environment:
    """Return where the record will come from."""
    texts = [[prompt.key, list(prompt.prompt_ids)] for prompt in prompts]
    return describe_engine(engine, dtype=suite.model.dtype, texts=texts, command=command, tuned=tuned)


def _device(session: _Session) -> contextlib.AbstractContextManager[None]:
    """Hold the device for one timed block; a suite that reports no speed disturbs nobody's figures and waits for nobody."""
    if not session.suite.reports_speed:
        return contextlib.nullcontext()
    return device_held(session.device, on_wait=lambda: session.console.print("another run holds the device: waiting for its turn"))


def _calibration(suite: SuiteSpec, backbone: BackboneName, engine: Engine, *, beside: Path | None) -> Trace | None:
    path = suite.calibration_of(backbone)
    if path is None:
        return None
    calibration = Trace.load(resolve_path(path, beside=beside))
    provenance = calibration.provenance
    if (provenance.model_hash, provenance.heads_hash) != (engine.loaded.sha256, engine.heads_sha256):
        raise UserError(
            found="a calibration trace of another model or other heads",
            need=f"one of backbone {engine.loaded.sha256[:12]} and heads {(engine.heads_sha256 or 'none')[:12]}",
            where="calibration_trace" if backbone == "original" else f"{backbone}.calibration_trace",
            do="record it again with medusa-repro trace"
            if backbone == "original"
            else "name the one that medusa-repro train wrote with it",
        )
    return calibration


def _check_step_shapes(suite: SuiteSpec, engines: Mapping[BackboneName, Engine]) -> None:
    """Refuse to choose a fastest tree for a backbone whose steps read other amounts than those that are timed, the original's."""
    shapes = {name: (one.weight_bytes, one.heads_bytes, one.heads.num_heads) for name, one in engines.items()}
    for arm in suite.arms:
        if isinstance(arm.tree, FastestTree) and shapes[arm.backbone] != shapes["original"]:
            raise UserError(
                found=f"weights, heads and number of heads {shapes[arm.backbone]} of the {arm.backbone} backbone, in bytes",
                need=f"those of the original, {shapes['original']}: its steps are the ones that are timed",
                where=f"arm {arm.name!r}",
                do="name a tree of another kind",
            )


def _prepare(session: _Session, calibrations: Mapping[BackboneName, Trace | None], *, beside: Path | None) -> dict[str, ArmTree]:
    """Measure the device, refuse useless heads, choose the trees, measure rounding; on resume everything is read back instead."""
    folder, suite, engine = session.store.folder, session.suite, session.engine
    if (folder / "trees.json").exists():
        session.console.print(f"resuming {folder.name}")
        trees = RunRecord(folder).trees
        _check_same_files(suite, trees, beside=beside)
        return trees
    for backbone, calibration in calibrations.items():
        if calibration is not None:
            calibration.save(folder / file_of(CALIBRATION_FILE, backbone))
    session.console.print("measuring the device, the draft heads against random ones, and step costs")
    limits: DeviceLimits = measure_device_limits(session.device, engine.runner.backbone.dtype, clock=session.clock)
    write_json(folder / "device_limits.json", limits)
    texts = {backbone: _control_texts(session, one) for backbone, one in session.engines.items()}
    for backbone, one in session.engines.items():
        control = probes.control_heads(one, texts[backbone])
        write_json(folder / file_of(HEADS_CONTROL_FILE, backbone), control)
        if control.trained_top1[0] <= control.random_top1[0]:
            raise InvalidMeasurement(
                f"heads_beat_random: found top-1 {control.trained_top1[0]:.3f} of head 1 of the {backbone} backbone on "
                f"{control.num_positions} positions, need more than the {control.random_top1[0]:.3f} of randomly weighted heads; "
                "nothing was timed"
            )
    costs = probes.measure_step_costs(
        engine,
        suite.probes.step_nodes,
        context_tokens=suite.probes.step_context_tokens,
        repeats=suite.probes.step_repeats,
        clock=session.clock,
    )
    write_json(folder / "step_costs.json", StepCosts(costs=costs))
    found: dict[str, ArmTree] = {}
    for backbone, one in session.engines.items():
        num_heads = one.heads.num_heads
        found |= resolve_trees(
            suite, calibration=calibrations[backbone], costs=costs, num_heads=num_heads, beside=beside, backbone=backbone
        )
    trees = {arm.name: found[arm.name] for arm in suite.arms if arm.name in found}
    if engine.runner.backbone.dtype != torch.float32:
        session.console.print("measuring this precision's rounding")
        for backbone, one in session.engines.items():
            own = [arm for arm in suite.arms if arm.backbone == backbone]
            own_trees = {arm.name: trees[arm.name].tree() for arm in own if arm.name in trees}
            write_json(folder / file_of(ROUNDING_FILE, backbone), measure_rounding(one, texts[backbone], arms=own, trees=own_trees))
    write_json(folder / "trees.json", ArmTrees(trees=trees))
    return trees


def _check_same_files(suite: SuiteSpec, trees: Mapping[str, ArmTree], *, beside: Path | None) -> None:
    """Refuse to go on with a tree file that has changed since the run began."""
    for arm in suite.arms:
        if isinstance(arm.tree, FileTree) and DraftTree.from_json(resolve_path(arm.tree.path, beside=beside)) != trees[arm.name].tree():
            raise UserError(
                found=f"another tree in {Path(arm.tree.path).name}",
                need="the one that began the run",
                where=f"arm {arm.name!r}",
                do="restore it, or give the new tree another name",
            )


def _control_texts(session: _Session, engine: Engine) -> list[KeptText]:
    """Return vanilla's greedy texts on prompts that are never measured."""
    arm = ArmSpec(name="control", method="vanilla")
    longest = max(len(prompt.prompt_ids) for prompt in session.warmup)
    runner = ArmRunner(engine, arm, tree=None, max_new_tokens=_CONTROL_TOKENS, max_prompt_tokens=longest, clock=session.clock)
    texts = []
    for prompt in session.warmup[:_CONTROL_PROMPTS]:
        result = runner.generate(prompt.prompt_ids, seed=None)
        texts.append(KeptText(prompt.key, prompt.category, prompt.prompt_ids, result.token_ids, result.ended_by))
    return texts


def _runners(session: _Session, trees: dict[str, ArmTree]) -> dict[str, ArmRunner]:
    longest = max(len(prompt.prompt_ids) for prompt in (*session.prompts, *session.warmup)) + session.suite.max_new_tokens
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


def _run_blocks(
    session: _Session, runners: dict[str, ArmRunner], plan: Sequence[PlannedTrial], *, started: float, budget_s: float | None
) -> int:
    """Run all blocks that are not done yet; return the peak memory seen."""
    finished, attempts = session.store.prepare_resume(plan)
    prompts = {prompt.key: prompt for prompt in session.prompts}
    todo = [list(block) for number, block in groupby(plan, key=lambda planned: planned.block) if number not in finished]
    if todo:
        with _device(session):
            _warm_up(session, runners)
    peak = peak_memory_bytes(session.device)  # of loading and probing; the trials start new peaks
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=session.console) as progress:
        task = progress.add_task("trials", total=len(plan), completed=len(plan) - sum(len(block) for block in todo))
        for number, block in enumerate(todo):
            may_stop = block[0].trial.round == 0 or block[0].trial.prompt_key == plan[0].trial.prompt_key  # later rounds only as a whole
            has_any = number > 0 or bool(finished)
            if budget_s is not None and may_stop and has_any and time.monotonic() - started > budget_s:
                break
            with _device(session):
                for planned in block:
                    progress.update(task, description=escape(f"{planned.trial.arm} on {planned.trial.prompt_key}"))
                    prompt = prompts[planned.trial.prompt_key]
                    outcome = _run_trial(session, runners, planned, prompt, attempt=attempts.get(planned.trial, 0))
                    session.store.append(outcome)
                    if isinstance(outcome, Generation):
                        peak = max(peak, outcome.peak_memory_bytes or 0)
                    progress.advance(task)
                _time_arm_steps(session, runners, prompts[block[0].trial.prompt_key])
    return peak


def _warm_up(session: _Session, runners: dict[str, ArmRunner]) -> None:
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
            with contextlib.suppress(Exception):  # an arm that cannot run fails in its own trials, where it is recorded
                runner.generate(prompt.prompt_ids, seed=0)


def _run_trial(
    session: _Session, runners: dict[str, ArmRunner], planned: PlannedTrial, prompt: SuitePrompt, *, attempt: int
) -> Generation | Failure:
    trial = planned.trial
    reset_peak_memory(session.device)
    try:
        result = runners[trial.arm].generate(prompt.prompt_ids, seed=trial.seed)
    except Exception as error:  # whatever went wrong becomes a Failure with no metric; the other trials go on
        return Failure(
            trial=trial, order=planned.order, attempt=attempt, error_type=type(error).__name__, message=without_paths(str(error))[:500]
        )
    return Generation(
        trial=trial,
        order=planned.order,
        attempt=attempt,
        category=prompt.category,
        prompt_tokens=len(prompt.prompt_ids),
        token_ids=result.token_ids,
        ended_by=result.ended_by,
        step_tokens=result.step_tokens,
        step_times_s=result.step_times_s,
        prefill_s=result.prefill_s,
        peak_memory_bytes=peak_memory_bytes(session.device),
        cache_bytes=result.cache_bytes,
        load_average=psutil.getloadavg()[0] if sys.platform != "win32" else None,
    )


def _time_arm_steps(session: _Session, runners: dict[str, ArmRunner], prompt: SuitePrompt) -> None:
    """Time a few separate steps of vanilla and every greedy Medusa arm in the middle of its backbone's vanilla text of this block."""
    if not session.suite.reports_speed:
        return
    outcomes = RunRecord(session.store.folder).generations
    contexts = {}
    for backbone in session.suite.backbones:
        vanilla = greedy_vanilla(session.suite, backbone).name
        text = next((item.token_ids for item in outcomes if item.trial.arm == vanilla and item.trial.prompt_key == prompt.key), None)
        if text is not None:
            contexts[backbone] = [*prompt.prompt_ids, *text[: len(text) // 2]]
    for arm in session.suite.arms:
        context = contexts.get(arm.backbone)
        if context is not None and arm.method in ("vanilla", "medusa") and not arm.stochastic:
            try:
                cost = probes.measure_arm_steps(runners[arm.name], context, num_steps=_ARM_STEPS, seed=None, clock=session.clock)
            except Exception as error:  # a broken arm costs only its own figures; its trials are Failures of their own
                session.console.print(f"no separate steps of {arm.name}: {type(error).__name__}: {without_paths(str(error))}", markup=False)
                continue
            if cost.step_s:
                session.store.append_arm_steps(cost)


def _after(session: _Session, runners: dict[str, ArmRunner]) -> None:
    """Everything that follows the timed part: trace, profile, likelihoods, and the separately timed steps in one file."""
    folder, suite = session.store.folder, session.suite
    record = RunRecord(folder)
    prompts = {prompt.key: prompt for prompt in session.prompts}
    generations = record.generations
    session.console.print("tracing the vanilla texts, profiling, scoring sampled texts")
    for backbone, engine in session.engines.items():
        rounding = record.rounding_of(backbone)
        vanilla = greedy_vanilla(suite, backbone).name
        texts = [
            KeptText(item.trial.prompt_key, item.category, prompts[item.trial.prompt_key].prompt_ids, item.token_ids, item.ended_by)
            for item in generations
            if item.trial.arm == vanilla and item.trial.round == 0
        ]
        if texts:
            trace = record_trace(
                engine,
                texts,
                max_new_tokens=suite.max_new_tokens,
                extra={"suite": suite.name},
                head_tie_margin=HEAD_TIE_MARGIN if rounding is None else TIE_SHIFTS * rounding.largest_head_shift,
                text_tie_margin=None if rounding is None else TIE_SHIFTS * rounding.largest_gap_shift,
            )
            trace.save(folder / file_of(TRACE_FILE, backbone))
    if suite.reports_speed:
        chosen = [prompt.prompt_ids for prompt in session.prompts[: suite.probes.profile_prompts]]
        failed = {failure.trial.arm for failure in record.failures}
        rows = [
            probes.profile_arm(runners[arm.name], chosen, seed=None, clock=session.clock)
            for arm in suite.arms
            if arm.method in ("vanilla", "medusa") and not arm.stochastic and arm.name not in failed
        ]
        write_json(folder / "profile.json", Profile(rows=tuple(row for row in rows if row.num_steps)))
    sampled = [item for item in generations if suite.arm(item.trial.arm).stochastic]
    if sampled:
        scored = [
            Likelihood(
                trial=item.trial,
                mean_log_likelihood=probes.mean_log_likelihood(
                    session.engine,
                    KeptText(
                        item.trial.prompt_key, item.category, prompts[item.trial.prompt_key].prompt_ids, item.token_ids, item.ended_by
                    ),
                ),
            )
            for item in sampled
        ]
        write_json(folder / "likelihoods.json", Likelihoods(rows=tuple(scored)))
    costs = record.step_costs.costs if record.step_costs is not None else ()
    by_size = tuple(cost for cost in costs if cost.arm is None)
    write_json(folder / "step_costs.json", StepCosts(costs=(*by_size, *session.store.arm_steps())))
