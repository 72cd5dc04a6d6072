"""Run a suite: everything that touches the device on the way to a sealed record."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

from rich.console import Console

from harness.compose.trees import check_fixed_trees
from harness.device.clock import device_clock
from harness.device.doctor import require_own_gpu
from harness.device.engine import (
    Engine,
    best_device,
    load_model,
    load_tuned_engine,
)
from harness.device.environment import describe_engine
from harness.device.locks import folder_held
from harness.device.prompts import Prompt, check_lengths, suite_prompts, take_up_date, warmup_prompts
from harness.device.trace import calibration_of
from harness.errors import UserError
from harness.files import DataPath
from harness.measure.follow_up import follow_up
from harness.measure.plan import make_plan
from harness.measure.preparation import prepare
from harness.measure.session import Session, device_turn, greedy_vanilla, suite_engine
from harness.measure.trials import arm_runners, run_blocks
from harness.paths import resolve_path
from harness.records.provenance import Environment
from harness.records.run import (
    RUN,
    Manifest,
    RunRecord,
)
from harness.records.store import NO_REPORT, Store
from harness.records.trace import Trace
from harness.specs.disturbance import DisturbanceRule
from harness.specs.suite import ArmSpec, BackboneName, FastestTree, FileTree, SearchedTree, SuiteSpec
from medusa_impl.engine.memory import peak_memory_bytes
from medusa_impl.tree import DraftTree


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


def effective_suite(suite: SuiteSpec, options: RunOptions) -> SuiteSpec:
    """Return the suite with the command line's changes in it."""
    prompts, arms, headline = suite.prompts, suite.arms, suite.headline_arm
    if options.tree_file is not None:
        DraftTree.from_json(options.tree_file)
        arms, renamed = _with_tree(suite.arms, options.tree_file)
        headline = renamed.get(headline, headline) if headline is not None else None
        if arms == suite.arms:
            raise UserError(
                found="no arm with a searched tree",
                need="one that --tree can stand in for",
                where=f"suite {suite.name!r}",
            )
    if options.prompts_file is not None:
        prompts = prompts.model_copy(
            update={"source": "file", "path": DataPath(options.prompts_file.name), "per_category": None}
        )
    if options.limit is not None:
        prompts = prompts.model_copy(update={"limit": options.limit})
    changes: dict[str, object] = {"prompts": prompts, "arms": arms, "headline_arm": headline}
    if suite.disturbance is None and suite.reports_speed:
        changes["disturbance"] = DisturbanceRule()
    return suite.model_copy(update=changes)


def _with_tree(arms: Sequence[ArmSpec], file: Path) -> tuple[tuple[ArmSpec, ...], dict[str, str]]:
    """Return the arms with a file's tree in place of the searched ones, and the new names by the old ones.

    Arms that only their trees told apart become one. It is named after the file, since the names that the
    suite gave say how its trees were found.
    """
    tree = FileTree(kind="file", path=DataPath(file.absolute()))
    stem = re.sub(r"[^a-z0-9]+", "_", file.stem.lower()).strip("_") or "tree"
    names = {arm.name for arm in arms if not isinstance(arm.tree, SearchedTree | FastestTree)}
    found: list[ArmSpec] = []
    made: dict[ArmSpec, str] = {}  # the name that an arm got, by the arm as it would be called without others
    renamed: dict[str, str] = {}
    for arm in arms:
        if not isinstance(arm.tree, SearchedTree | FastestTree):
            found.append(arm)
            continue
        words = [stem, "tuned" if arm.backbone == "tuned" else "", _sampled_rule(arm)]
        name = "_".join(filter(None, words))
        with_tree = arm.model_copy(update={"tree": tree, "name": name})
        if with_tree not in made:
            number, free = count(2), name
            while free in names:
                free = f"{name}_{next(number)}"
            names.add(free)
            made[with_tree] = free
            found.append(with_tree.model_copy(update={"name": free}))
        renamed[arm.name] = made[with_tree]
    return tuple(found), renamed


def _sampled_rule(arm: ArmSpec) -> str:
    return arm.acceptance.rule if arm.acceptance is not None and arm.acceptance.rule != "greedy" else ""


def run_suite(suite: SuiteSpec, *, suite_file: Path | None, options: RunOptions, console: Console) -> Path:
    """Run a suite, or resume it, and return the folder of its sealed record.

    Raises: UserError for input that cannot be run; InvalidMeasurement where the heads do not beat random
    ones.
    """
    started = time.monotonic()
    suite = effective_suite(suite, options)
    for backbone in suite.backbones:
        greedy_vanilla(suite, backbone)
    if options.resume is not None:
        RunRecord(options.resume)  # must be there before minutes go into loading
    device = best_device()
    gpu = require_own_gpu()
    base_folder = suite_file.parent if suite_file is not None else None
    console.print(f"{suite.name}: loading {suite.model.asset or suite.model.path or 'a tiny random model'}")
    loaded = load_model(suite.model, device=device, allow_hub=options.allow_hub, base_folder=base_folder)
    take_up_date(loaded, RUN, suite, results=options.results, resume=options.resume)
    prompts = suite_prompts(
        suite,
        loaded,
        prompts_file=options.prompts_file,
        base_folder=base_folder,
        allow_hub=options.allow_hub,
        console=console,
    )
    warmup = warmup_prompts(suite, loaded)
    engine = suite_engine(suite, loaded, base_folder=base_folder, allow_hub=options.allow_hub)
    if engine.runner.note:
        console.print(engine.runner.note)
    tuned = load_tuned_engine(suite, device=device, allow_hub=options.allow_hub, base_folder=base_folder)
    engines: dict[BackboneName, Engine] = (
        {"original": engine} if tuned is None else {"original": engine, "tuned": tuned}
    )
    calibrations = {
        name: _calibration(suite, name, one, base_folder=base_folder) for name, one in engines.items()
    }
    for name, one in engines.items():
        has_calibration = calibrations[name] is not None
        _check_engine(suite, name, one, prompts, base_folder=base_folder, has_calibration=has_calibration)
    _check_step_shapes(suite, engines)
    environment = describe(engine, suite=suite, prompts=prompts, command=options.command, tuned=tuned)
    store = Store.open(options.results, kind=RUN, spec=suite, provenance=environment, resume=options.resume)
    session = Session(suite, engines, prompts, warmup, store, console, device_clock(device), device, gpu)
    if store.is_sealed:
        console.print(NO_REPORT.format(store.folder.name), soft_wrap=True)
        return store.folder
    with folder_held(store.folder):
        store.restore_spec()
        _fill_record(
            session, calibrations, base_folder=base_folder, started=started, budget_s=options.time_budget_s
        )
    return store.folder


def _check_engine(
    suite: SuiteSpec,
    backbone: BackboneName,
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    base_folder: Path | None,
    has_calibration: bool,
) -> None:
    """Refuse trees, texts and probes that a backbone and its heads have no room for."""
    check_fixed_trees(
        suite,
        num_heads=engine.heads.num_heads,
        vocab_size=engine.heads.vocab_size,
        base_folder=base_folder,
        has_calibration=has_calibration,
        backbone=backbone,
    )
    check_lengths(prompts, engine, max_new_tokens=suite.max_new_tokens)
    _check_probes(suite, engine)


def _fill_record(
    session: Session,
    calibrations: Mapping[BackboneName, Trace | None],
    *,
    base_folder: Path | None,
    started: float,
    budget_s: float | None,
) -> None:
    """Probe, decode, score and seal."""
    suite, store, prompts = session.suite, session.store, session.prompts
    began = [("loading", started), ("preparing", time.monotonic())]
    with device_turn(session):
        trees = prepare(session, calibrations, base_folder=base_folder)
    runners = arm_runners(session, trees)
    plan = make_plan(suite, [prompt.key for prompt in prompts])
    began.append(("decoding", time.monotonic()))
    peak = run_blocks(session, runners, plan, started=started, budget_s=budget_s)
    began.append(("following", time.monotonic()))
    with device_turn(session):
        follow_up(session, runners)
    began.append(("", time.monotonic()))
    outcomes = RunRecord(store.folder).outcomes
    done = len({outcome.trial.prompt_key for outcome in outcomes})
    rounds = 1 + max(outcome.trial.round for outcome in outcomes)
    if (done, rounds) != (len(prompts), suite.rounds):
        session.console.print(
            f"time budget used up: the record holds the first {done} prompts in {rounds} of {suite.rounds} "
            "rounds"
        )
        suite = suite.model_copy(
            update={"prompts": suite.prompts.model_copy(update={"limit": done}), "rounds": rounds}
        )
        store.shorten_spec(suite)
        plan = make_plan(suite, [prompt.key for prompt in prompts[:done]])
    record = RunRecord(store.folder)
    store.seal(
        Manifest,
        suite=suite.name,
        num_planned=len(plan),
        num_generations=len(record.generations),
        num_failures=len(record.failures),
        elapsed_s=time.monotonic() - started,
        stages_s={name: end - begin for (name, begin), (_, end) in pairwise(began)},
        peak_memory_bytes=max(peak, peak_memory_bytes(session.device)),
    )


def describe(
    engine: Engine,
    *,
    suite: SuiteSpec,
    prompts: Sequence[Prompt],
    command: str,
    tuned: Engine | None = None,
) -> Environment:
    """Return where the record will come from."""
    texts = [[prompt.key, list(prompt.prompt_ids)] for prompt in prompts]
    return describe_engine(engine, dtype=suite.model.dtype, texts=texts, command=command, tuned=tuned)


def _calibration(
    suite: SuiteSpec, backbone: BackboneName, engine: Engine, *, base_folder: Path | None
) -> Trace | None:
    path = suite.calibration_of(backbone)
    if path is None:
        return None
    is_original = backbone == "original"
    return calibration_of(
        engine,
        resolve_path(path, base_folder=base_folder),
        where="calibration_trace" if is_original else f"{backbone}.calibration_trace",
        do=None if is_original else "name the one that medusa-repro train wrote with it",
    )


def _check_probes(suite: SuiteSpec, engine: Engine) -> None:
    """Refuse to time steps after more tokens than the model has positions for, or of too wide a tree."""
    widest, vocab_size = max(suite.probes.step_nodes), engine.heads.vocab_size
    if widest > vocab_size:
        raise UserError(
            found=f"{widest} nodes",
            need=f"at most {vocab_size}, the size of the vocabulary",
            where="probes.step_nodes",
        )
    try:
        engine.runner.backbone.check_positions(
            prompt_tokens=suite.probes.step_context_tokens, max_new_tokens=0, depth=engine.heads.num_heads
        )
    except UserError as error:
        raise UserError(
            found=f"{suite.probes.step_context_tokens} tokens before a timed step",
            need=error.need,
            where="probes.step_context_tokens",
            do="lower it",
        ) from error


def _check_step_shapes(suite: SuiteSpec, engines: Mapping[BackboneName, Engine]) -> None:
    """Refuse a fastest tree for a backbone whose steps read other amounts than the timed ones.

    The timed ones are the original's.
    """
    shapes = {name: (one.weight_bytes, one.heads_bytes, one.heads.num_heads) for name, one in engines.items()}
    for arm in suite.arms:
        if isinstance(arm.tree, FastestTree) and shapes[arm.backbone] != shapes["original"]:
            raise UserError(
                found=f"weights, heads and number of heads {shapes[arm.backbone]} of the {arm.backbone} "
                "backbone, in bytes",
                need=f"those of the original, {shapes['original']}: its steps are the ones that are timed",
                where=f"arm {arm.name!r}",
                do="name a tree of another kind",
            )
