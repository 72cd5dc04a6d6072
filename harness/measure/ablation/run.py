"""Train every arm at one token budget, then measure what became of its backbone and its heads.

Each arm is trained in a process of its own, so that its memory and its random numbers are its own; it is
measured here, as its files load from disk. One arm after another: a run that was cut off goes on with the
arm, and within it with the last checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.compose.trees import grow
from harness.device.engine import Engine, best_device, engine_from_heads, load_model
from harness.device.environment import describe_engine
from harness.device.locks import folder_held
from harness.device.machine import device_info
from harness.device.progress import progress_lines
from harness.device.prompts import take_up_date
from harness.device.trace import calibration_of
from harness.errors import UserError
from harness.files import write_json
from harness.measure.ablation.arm import ArmJob, arm_recipe, train_arm
from harness.measure.ablation.backbone_change import MeasuredText
from harness.measure.ablation.bench import ArmBench, held_out_prompts, reference_texts
from harness.paths import cache_dir, resolve_path
from harness.records.ablation import (
    ABLATION,
    TREE_FILE,
    AblationManifest,
    AblationRecord,
    ArmResult,
    original_text_file,
    steps_file,
    trace_file,
)
from harness.records.machines.identity import machine_folders
from harness.records.provenance import DeviceInfo, Environment
from harness.records.run import ArmTree
from harness.records.store import NO_REPORT, Store
from harness.records.trace import Trace
from harness.specs.ablation import AblationSpec
from harness.specs.suite import SearchedTree
from harness.training.joint import check_runnable
from harness.training.workers import end_with_parent
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.distill import CorpusPrompt
from medusa_impl.training_log import STEP_LOG
from medusa_impl.tree import DraftTree


@dataclass(frozen=True)
class AblateOptions:
    """What the command line may say about an ablation, besides the suite.

    `own_process` trains each arm in a process of its own.
    """

    results: Path
    work: Path | None = None
    resume: Path | None = None
    allow_hub: bool = False
    command: str = ""
    own_process: bool = True


def run_ablation(
    spec: AblationSpec, *, suite_file: Path | None, options: AblateOptions, console: Console
) -> Path:
    """Run an ablation, or resume it, and return the folder of its sealed record.

    Raises: UserError for input that cannot be run, an arm whose training fails, or a resume of another run.
    """
    started = time.monotonic()
    if options.resume is not None:
        AblationRecord(options.resume)
    base_folder = suite_file.parent if suite_file is not None else None
    recipes = {arm.name: arm_recipe(spec, arm.name, base_folder=base_folder) for arm in spec.arms}
    for recipe in recipes.values():
        check_runnable(recipe)
    console.print(
        f"{spec.name}: {len(spec.arms)} arms, {len(spec.seeds)} seeds, {spec.answer_tokens} "
        "answer tokens each"
    )
    loaded = load_model(
        spec.model, device=best_device(), allow_hub=options.allow_hub, base_folder=base_folder
    )
    engine = engine_from_heads(loaded, resolve_path(spec.start_heads, base_folder=base_folder))
    calibration = _calibration(spec, engine, base_folder=base_folder)
    take_up_date(loaded, ABLATION, spec, results=options.results, resume=options.resume)
    prompts = held_out_prompts(
        spec, loaded, left_out={prompt.key for prompt in calibration.prompts} if calibration else set()
    )
    references = reference_texts(spec, loaded, allow_hub=options.allow_hub)
    environment = _describe(
        engine, spec=spec, prompts=prompts, references=references, command=options.command
    )
    store = Store.open(
        options.results, kind=ABLATION, spec=spec, provenance=environment, resume=options.resume
    )
    if store.is_sealed:
        console.print(NO_REPORT.format(store.folder.name), soft_wrap=True)
        return store.folder
    work = (options.work or cache_dir() / "ablation") / spec.name / store.folder.name
    with folder_held(store.folder):
        write_json(store.folder / TREE_FILE, fixed_tree(spec, calibration, num_heads=engine.heads.num_heads))
        bench = ArmBench(spec, engine, prompts, references, work, console)
        _fill_record(store, bench, recipes, suite_file=suite_file, options=options)
        num_arms = len(AblationRecord(store.folder).results)
        elapsed_s = time.monotonic() - started
        store.seal(
            AblationManifest,
            suite=spec.name,
            num_planned=len(spec.plan()),
            num_arms=num_arms,
            elapsed_s=elapsed_s,
        )
    return store.folder


def _fill_record(
    store: Store[ArmResult],
    bench: ArmBench,
    recipes: Mapping[str, Medusa2Settings],
    *,
    suite_file: Path | None,
    options: AblateOptions,
) -> None:
    """Train and measure every arm and seed that is not done yet, one after another."""
    done = {(result.arm, result.seed) for result in store.lines()}
    plan = bench.spec.plan()
    with progress_lines(bench.console) as progress:
        task = progress.add_task("arms trained and measured", total=len(plan), completed=len(done))
        for arm, seed in plan:
            if (arm, seed) in done:
                continue
            if seed is None:
                start = bench.measure_start()
                _keep(store, start.result, trace=start.trace, step_log=None)
            else:
                job = ArmJob(
                    bench.spec, suite_file, arm, seed, bench.work / f"{arm}-{seed}", options.allow_hub
                )
                bench.console.print(f"{arm}, seed {seed}")
                _train_and_measure(store, bench, job, recipes[arm], options=options)
            progress.advance(task)


def _train_and_measure(
    store: Store[ArmResult],
    bench: ArmBench,
    job: ArmJob,
    recipe: Medusa2Settings,
    *,
    options: AblateOptions,
) -> None:
    _train(job, own_process=options.own_process)
    found = bench.measure(job, recipe)
    _keep(
        store,
        found.result,
        trace=found.trace,
        original_text=found.original_text,
        step_log=job.target / STEP_LOG,
    )


def _keep(
    store: Store[ArmResult],
    result: ArmResult,
    *,
    trace: Trace,
    original_text: Trace | None = None,
    step_log: Path | None,
) -> None:
    """Write an arm's files, its line last: without the line the arm counts as not done."""
    trace.save(store.folder / trace_file(result.label))
    if original_text is not None:
        original_text.save(store.folder / original_text_file(result.label))
    if step_log is not None:
        temporary = store.folder / (steps_file(result.label) + ".tmp")
        shutil.copyfile(step_log, temporary)
        os.replace(temporary, store.folder / steps_file(result.label))
    store.append(result)


def fixed_tree(spec: AblationSpec, calibration: Trace | None, *, num_heads: int) -> ArmTree:
    """Return the one tree that all arms are compared at."""
    if isinstance(spec.tree, SearchedTree):
        assert calibration is not None
        tree = grow(
            calibration, num_nodes=spec.tree.num_nodes, values=spec.tree.values, num_heads=num_heads
        ).tree
        return ArmTree(
            paths=tree.paths, origin=f"{spec.tree.values} growth on the calibration trace of the first heads"
        )
    return ArmTree(paths=DraftTree.chain(spec.tree.depth).paths, origin=f"chain of {spec.tree.depth}")


def print_ablation_plan(spec: AblationSpec, *, results: Path, console: Console) -> float:
    """Print what is run and how long each arm should take, and return the minutes in all.

    The rates are those of this machine's newest record of an ablation of the same model, else of an older one
    under its plain name, else the suite's own word for training.
    """
    train_s, evaluate_s, origin = _known_rates(spec, results=results)
    table = Table("arm", "recipe", "seeds", "answer tokens", "minutes a seed")
    minutes = (train_s * spec.answer_tokens + evaluate_s) / 60
    for arm in spec.arms:
        table.add_row(arm.name, arm.recipe, str(len(spec.seeds)), str(spec.answer_tokens), f"{minutes:.0f}")
    console.print(table)
    total = minutes * len(spec.arms) * len(spec.seeds)
    console.print(
        f"about {total:.0f} minutes, from {origin}; arms are kept as they finish, and a run resumes",
        highlight=False,
    )
    return total


def _known_rates(spec: AblationSpec, *, results: Path) -> tuple[float, float, str]:
    """Return seconds a trained token, seconds of measuring an arm, and where they come from."""
    texts = spec.held_out.num_prompts
    for path in _arms_of_machine(results, device=device_info(best_device())):
        try:
            record = AblationRecord.open(path.parent, unsealed=True)  # its rates count while it is under way
            trained = [result for result in record.results if result.num_answer_tokens]
            if record.spec.model != spec.model or not trained:
                continue
        except UserError:
            continue
        tokens = sum(result.num_answer_tokens for result in trained)
        scale = (
            texts
            * spec.held_out.max_new_tokens
            / (record.spec.held_out.num_prompts * record.spec.held_out.max_new_tokens)
        )
        measured = sum(result.evaluate_s for result in trained) / len(trained) * scale
        return sum(result.train_s for result in trained) / tokens, measured, f"record {path.parent.name}"
    rate = 1 / spec.expected_tokens_per_s
    return rate, rate * texts * spec.held_out.max_new_tokens, "the suite's own expectation"


def _arms_of_machine(results: Path, *, device: DeviceInfo) -> list[Path]:
    """Return the arms of a machine's records, its own folder first, and there the newest first."""
    found = (
        sorted(results.glob(f"*/{name}/*/arms.jsonl"), key=lambda path: path.parent.name, reverse=True)
        for name in machine_folders(device)
    )
    return [path for paths in found for path in paths]


def _train(job: ArmJob, *, own_process: bool) -> None:
    """Train an arm; what its work folder holds already is not done again."""
    if not own_process:
        train_arm(job)
        return
    context = multiprocessing.get_context("spawn")
    refusals: SimpleQueue[UserError] = context.SimpleQueue()
    process = context.Process(target=_train_apart, args=(refusals, job))
    process.start()
    process.join()
    if not refusals.empty():
        raise refusals.get()
    if process.exitcode:
        raise UserError(
            found=f"the training of {job.arm}, seed {job.seed}, ended with {process.exitcode}",
            need="all to finish",
            where=f"suite {job.spec.name!r}",
            do="read the message above; the same command goes on from the last checkpoint",
        )


def _train_apart(refusals: SimpleQueue[UserError], job: ArmJob) -> None:
    """Train an arm as a process of its own does: what the user can mend is told to the one that waits."""
    end_with_parent()
    try:
        train_arm(job)
    except UserError as error:
        refusals.put(error)


def _calibration(spec: AblationSpec, engine: Engine, *, base_folder: Path | None) -> Trace | None:
    if spec.calibration_trace is None:
        return None
    return calibration_of(
        engine, resolve_path(spec.calibration_trace, base_folder=base_folder), where="calibration_trace"
    )


def _describe(
    engine: Engine,
    *,
    spec: AblationSpec,
    prompts: Sequence[CorpusPrompt],
    references: Sequence[MeasuredText],
    command: str,
) -> Environment:
    measured = [
        *((prompt.key, prompt.prompt_ids) for prompt in prompts),
        *((text.key, text.sequence.token_ids) for text in references),
    ]
    texts = [[key, list(ids)] for key, ids in measured]
    return describe_engine(engine, dtype=spec.model.dtype, texts=texts, command=command)
