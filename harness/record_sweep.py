"""Run a sweep: compose what a replay gives, then decode what it cannot, on the device; every cell is on disk as soon as it is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness import probes
from harness.arms import ArmRunner, TimedGeneration
from harness.clock import Clock, device_clock
from harness.config import ArmSpec, GreedyAcceptance, RejectionAcceptance, SuiteSpec, TypicalAcceptance, load_suite
from harness.device_curves import StepTimes
from harness.engine import Engine, best_device, load_engine, load_model
from harness.environment import device_info, git_state, package_versions, python_version
from harness.errors import UserError
from harness.hardware import match_device
from harness.locks import device_held, folder_held
from harness.paths import resolve_path
from harness.quality.parity import HEAD_TIES_KEY, TIE_MARGIN_FLOAT32
from harness.record_trace import KeptText
from harness.records import file_sha256
from harness.report.formatting import without_paths
from harness.suite_prompts import SuitePrompt, check_lengths, suite_prompts, warmup_prompts
from harness.sweep import Composer, KnotPrices, SweepPlan, compose, plan_sweep, tree_rates
from harness.sweep_record import (
    AnyCell,
    DecodedCell,
    DecodedRow,
    FailedCell,
    SampledCell,
    SampledRow,
    StepDifference,
    SweepOrigin,
    TraceFacts,
    decoded_key,
    sampled_key,
)
from harness.sweep_specs import SampledSetting, SweepSpec
from harness.sweep_store import SweepStore
from harness.trace import PromptTrace, Trace
from medusa_impl.tree import DraftTree

_TREE = {"kind": "chain", "depth": 1}  # ArmSpec wants one; ArmRunner takes the resolved tree
_WARMUP_TOKENS = 12
_NO_CURVE = "decoded none"  # the key of the one failed cell where no curve is this device's own

Held = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class SweepOptions:
    """What the command line may say about a sweep, besides the spec; `replay_only` leaves out all that the device would have to run."""

    results: Path
    resume: Path | None = None
    replay_only: bool = False
    cache: Path | None = None
    allow_hub: bool = False
    command: str = ""


def run_sweep(spec: SweepSpec, *, spec_file: Path | None, options: SweepOptions, console: Console) -> Path:
    """Run a sweep, or resume it, and return the folder of its sealed record.

    Raises: UserError for input that does not belong together, or a resume of another sweep.
    """
    started = time.monotonic()
    beside = spec_file.parent if spec_file is not None else None
    if options.replay_only:
        spec = spec.model_copy(update={"sampled": None, "decoded": None})
    console.print(f"[bold]{spec.name}[/bold]: traces, trees and searches")
    plan = plan_sweep(spec, beside=beside, results=options.results, cache=options.cache)
    store = SweepStore.open(options.results, spec=spec, origin=describe_sweep(plan, command=options.command), resume=options.resume)
    with folder_held(store.folder):
        done = store.prepare(tree_rates(plan))
        runs = _planned_runs(plan, beside=beside)
        num_planned = len(plan.cells) + len(plan.refused) + len(runs)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            composing = progress.add_task("composed", total=len(plan.cells) + len(plan.refused))
            kept = {key for key in done if key.split()[0] in ("composed", "curve")}
            progress.update(composing, completed=len(kept))
            for cell in compose(plan, done=done):
                store.append(cell)
                progress.advance(composing)
            if any(key not in done for key in runs):
                running = progress.add_task("run", total=len(runs), completed=sum(key in done for key in runs))
                for cell in run_cells(plan, done=done, beside=beside, allow_hub=options.allow_hub, on_start=_shower(progress, running)):
                    store.append(cell)
                    progress.advance(running)
        store.seal(num_planned=num_planned, elapsed_s=time.monotonic() - started)
    return store.folder


def describe_sweep(plan: SweepPlan, *, command: str) -> SweepOrigin:
    """Return where the record will come from."""
    commit, dirty = git_state(Path(__file__).parent)
    return SweepOrigin(
        commit=commit,
        dirty=dirty,
        command=command,
        python=python_version(),
        packages=package_versions(),
        device=device_info(best_device()),
        inputs={name: file_sha256(path) for name, path in plan.inputs.items()},
        trace=_facts(plan.composer.index.trace),
        calibration=_facts(plan.calibration.trace),
        roofline_error=plan.error,
        started_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )


def _facts(trace: Trace) -> TraceFacts:
    return TraceFacts(
        model_sha256=trace.provenance.model_hash,
        heads_sha256=trace.provenance.heads_hash,
        dtype=trace.provenance.dtype,
        max_new_tokens=trace.provenance.max_new_tokens,
        num_prompts=len(trace.prompts),
        num_positions=trace.num_positions,
        num_heads=trace.num_heads,
    )


def _shower(progress: Progress, task: TaskID) -> Callable[[str], None]:
    return lambda words: progress.update(task, description=escape(words))


def _planned_runs(plan: SweepPlan, *, beside: Path | None) -> tuple[str, ...]:
    """The keys of the cells that the device runs, in their order; decoded points are drawn on the curve of the device itself."""
    spec = plan.spec
    keys = [sampled_key(setting) for setting in spec.sampled.settings] if spec.sampled is not None else []
    if spec.decoded is not None:
        curve = own_curve(plan, load_suite(resolve_path(spec.suite, beside=beside)))
        keys += [decoded_key(place) for place in drawn_points(plan, curve)] if curve is not None else [_NO_CURVE]
    return tuple(keys)


def own_curve(plan: SweepPlan, suite: SuiteSpec) -> StepTimes | None:
    """Return this machine's own measured curve of the trace's model in the suite's dtype; None where there is none."""
    name = device_info(best_device()).name
    for curve in plan.curves:
        label = curve.label
        same = (label.device, label.shape, label.dtype) == (match_device(name) or name, plan.spec.shape, suite.model.dtype)
        if label.kind == "measured" and same:
            return curve
    return None


def drawn_points(plan: SweepPlan, curve: StepTimes) -> tuple[int, ...]:
    """Return the trees to decode, drawn by the spec's seed from all that the curve covers, root alone left out."""
    wanted = plan.spec.decoded
    assert wanted is not None
    prices = KnotPrices(curve, knots=plan.composer.knots, context="trace", batch=1)
    offered = [place for place, tree in enumerate(plan.drafts) if tree.depth and prices.step(tree.num_nodes, tree.depth) is not None]
    rng = np.random.default_rng(wanted.seed)
    return tuple(sorted(rng.choice(offered, size=min(wanted.num_points, len(offered)), replace=False).tolist()))


def run_cells(
    plan: SweepPlan, *, done: frozenset[str], beside: Path | None, allow_hub: bool, on_start: Callable[[str], None]
) -> Iterator[AnyCell]:
    """Yield every sampled and every decoded cell that is not done; what goes wrong in one is its own failure.

    Raises: UserError where the suite's model or heads are not those of the trace.
    """
    spec, suite_file = plan.spec, resolve_path(plan.spec.suite, beside=beside)
    suite, device = load_suite(suite_file), best_device()
    on_start("loading the model")
    loaded = load_model(suite.model, device=device, allow_hub=allow_hub, beside=suite_file.parent)
    engine = load_engine(suite, loaded, beside=suite_file.parent)
    check_engine(engine, plan.composer.index.trace)
    prompts = suite_prompts(suite, loaded, allow_hub=allow_hub)
    clock = device_clock(device)

    def held() -> contextlib.AbstractContextManager[None]:
        return device_held(device)

    if spec.sampled is not None:
        chosen = sampled_prompts(spec, prompts)
        check_lengths(chosen, engine, max_new_tokens=spec.sampled.max_new_tokens)
        for setting in spec.sampled.settings:
            if sampled_key(setting) not in done:
                on_start(setting.words)
                run = partial(run_sampled, plan, engine, setting, chosen, clock=clock, held=held)
                yield _guarded(sampled_key(setting), setting.words, run)
    if spec.decoded is None:
        return
    curve = own_curve(plan, suite)
    if curve is None:
        if _NO_CURVE not in done:
            message = f"no latency record of this device for {spec.shape} in {suite.model.dtype}: nothing to check a composition with"
            yield FailedCell(key=_NO_CURVE, words="points decoded for real", error_type="UserError", message=message)
        return
    points = drawn_points(plan, curve)
    traced = traced_prompts(plan, prompts)
    warm_ups = warmup_prompts(suite, loaded)
    if curve.label.mode is not None:
        engine.runner.use(curve.label.mode)  # what the curve was timed in
    for place in points:
        if decoded_key(place) not in done:
            words = f"tree {place}, {plan.drafts[place].num_nodes} nodes, decoded"
            on_start(words)
            run_point = partial(decode_point, plan, engine, curve, place, traced, warm_ups, clock=clock, held=held)
            yield _guarded(decoded_key(place), words, run_point)


def _guarded(key: str, words: str, run: Callable[[], AnyCell]) -> AnyCell:
    try:
        return run()
    except Exception as error:  # whatever went wrong becomes a failed cell with no figure; the others go on
        return FailedCell(key=key, words=words, error_type=type(error).__name__, message=without_paths(str(error))[:500])


def check_engine(engine: Engine, trace: Trace) -> None:
    """Refuse a suite whose model or heads are not those that the trace is of."""
    provenance = trace.provenance
    if (provenance.model_hash, provenance.heads_hash) != (engine.loaded.sha256, engine.heads_sha256):
        raise UserError(
            found="a trace of another model or other heads",
            need=f"one of backbone {engine.loaded.sha256[:12]} and heads {(engine.heads_sha256 or 'none')[:12]}",
            where="trace",
            do="record it again with medusa-repro trace",
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
        acceptance = TypicalAcceptance(rule="typical", temperature=setting.temperature, epsilon=setting.epsilon, delta=setting.delta)
    drawn = tuple(seeds) if setting.rule != "greedy" else ()
    return ArmSpec.model_validate(
        {"name": name, "method": "medusa", "baseline": "vanilla", "tree": _TREE, "acceptance": acceptance, "seeds": drawn}
    )


def run_sampled(
    plan: SweepPlan,
    engine: Engine,
    setting: SampledSetting,
    prompts: Sequence[SuitePrompt],
    *,
    clock: Clock,
    held: Held = contextlib.nullcontext,
) -> SampledCell:
    """Run one setting on every prompt and seed, and score its texts under the backbone.

    Nothing is timed; the device is held all the same, text by text, so as not to disturb what another run times.
    """
    wanted = plan.spec.sampled
    assert wanted is not None and plan.run_tree is not None
    started = clock()
    arm = arm_of(setting, wanted.seeds)
    tree = None if setting.rule == "vanilla" else plan.run_tree
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    runner = ArmRunner(engine, arm, tree=tree, max_new_tokens=wanted.max_new_tokens, max_prompt_tokens=longest, clock=clock)
    rows = []
    for prompt in prompts:
        for seed in arm.seeds or (None,):
            with held():
                result = runner.generate(prompt.prompt_ids, seed=seed)
                rows.append(_sampled_row(engine, prompt, result, seed=seed))
    place = plan.places[tree] if tree is not None else None
    return SampledCell(setting=setting, tree=place, rows=tuple(rows), elapsed_s=clock() - started)


def _sampled_row(engine: Engine, prompt: SuitePrompt, result: TimedGeneration, *, seed: int | None) -> SampledRow:
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


def traced_prompts(plan: SweepPlan, prompts: Sequence[SuitePrompt]) -> tuple[tuple[SuitePrompt, PromptTrace], ...]:
    """Return the prompts to decode with their traces, spread evenly over the trace.

    Raises: UserError where the suite's prompts are not those of the trace.
    """
    wanted, traced = plan.spec.decoded, {prompt.key: prompt for prompt in plan.composer.index.trace.prompts}
    assert wanted is not None
    pairs = [
        (prompt, traced[prompt.key])
        for prompt in prompts
        if prompt.key in traced and traced[prompt.key].prompt_tokens == len(prompt.prompt_ids)
    ]
    if len(pairs) < min(wanted.num_prompts, len(traced)):
        raise UserError(
            found=f"{len(pairs)} prompts of the suite in the trace", need="the suite that the trace was recorded with", where="suite"
        )
    places = np.linspace(0, len(pairs) - 1, min(wanted.num_prompts, len(pairs))).round().astype(int)
    return tuple(pairs[place] for place in dict.fromkeys(places.tolist()))


def decode_point(
    plan: SweepPlan,
    engine: Engine,
    curve: StepTimes,
    place: int,
    pairs: Sequence[tuple[SuitePrompt, PromptTrace]],
    warm_ups: Sequence[SuitePrompt],
    *,
    clock: Clock,
    held: Held = contextlib.nullcontext,
) -> DecodedCell:
    """Decode prompts with vanilla and with one tree in turn, timed, and set steps and times beside replay and composition."""
    started, tree = clock(), plan.drafts[place]
    trace = plan.composer.index.trace
    longest = max(len(prompt.prompt_ids) for prompt in (*(prompt for prompt, _ in pairs), *warm_ups))
    vanilla, medusa = (
        ArmRunner(engine, arm, tree=drafted, max_new_tokens=trace.provenance.max_new_tokens, max_prompt_tokens=longest, clock=clock)
        for arm, drafted in ((ArmSpec(name="vanilla", method="vanilla"), None), (arm_of(SampledSetting(rule="greedy"), ()), tree))
    )
    with held():
        for runner in (vanilla, medusa):
            _warm_up(runner, warm_ups, clock=clock)
    part = Composer(
        Trace(provenance=trace.provenance, prompts=tuple(traced for _, traced in pairs)),
        knots=plan.composer.knots.astype(int).tolist(),
        interval=plan.spec.interval,
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
            results = [turn(prompt.prompt_ids, seed=None) for turn in (turns if number % 2 == 0 else turns[::-1])]
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
        difference = step_difference(traced, drafted_result, replayed=replay.hops(number).tolist(), trace=trace)
        if difference is not None:
            differences.append(difference)
    return DecodedCell(curve=curve.label, tree=place, rows=tuple(rows), differences=tuple(differences), elapsed_s=clock() - started)


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


def step_difference(traced: PromptTrace, result: TimedGeneration, *, replayed: Sequence[int], trace: Trace) -> StepDifference | None:
    """Return where decoding first took another step than the replay, and whether rounding explains it; None where all steps agree."""
    decoded = list(accumulate(result.step_tokens, initial=1))[:-1]
    tokens, ids = traced.tokens.tolist(), list(result.token_ids)
    if decoded == list(replayed) and ids == tokens:
        return None
    common = takewhile(lambda pair: pair[0] == pair[1], zip(decoded, replayed, strict=False))
    position = max((first for first, _ in common), default=1)
    parted = next((at for at, (ours, theirs) in enumerate(zip(ids, tokens, strict=False)) if ours != theirs), None)
    at_text_tie = parted is not None and traced.gaps is not None and float(traced.gaps[parted]) < TIE_MARGIN_FLOAT32
    ties = trace.provenance.extra.get(HEAD_TIES_KEY, [])
    at_head_tie = isinstance(ties, list) and any(isinstance(tie, list) and tie[:2] == [traced.key, position] for tie in ties)
    return StepDifference(
        prompt_key=traced.key,
        position=position,
        decoded_steps=len(decoded),
        replayed_steps=len(replayed),
        kind="tie" if at_text_tie or (ids == tokens and at_head_tie) else "bug",
    )
