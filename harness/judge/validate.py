"""Whether a record folder is whole: every file loads, agrees with the others and with the seal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from harness.errors import UserError
from harness.files import file_sha256
from harness.paths import holds_absolute_path
from harness.records.ablation import ARMS_FILE, AblationRecord
from harness.records.folder import RecordKind, file_of, kind_of
from harness.records.latency import (
    POINTS_FILE,
    LatencyRecord,
)
from harness.records.run import (
    HEADS_CONTROL_FILE,
    ROUNDING_FILE,
    TRACE_FILE,
    Generation,
    RunRecord,
)
from harness.records.sweep import (
    CELLS_FILE,
    ORIGIN_FILE,
    TREES_FILE,
    SweepRecord,
)
from harness.records.sweep import SPEC_FILE as SWEEP_FILE
from harness.records.sweep_cells import ComposedCell
from harness.specs.ablation import START_ARM
from harness.specs.suite import BackboneName

_OF_BACKBONES = tuple(
    file_of(name, backbone)
    for name in (TRACE_FILE, HEADS_CONTROL_FILE, ROUNDING_FILE)
    for backbone in get_args(BackboneName)
)
_PROBES = ("step_costs.json", "profile.json", "device_limits.json", "likelihoods.json")
_SEALED = ("suite.toml", "environment.json", "trees.json", "generations.jsonl", *_OF_BACKBONES, *_PROBES)


def validate_record(folder: Path) -> tuple[str, ...]:
    """Return every fault of a record folder of any kind, as one line each; none for a whole record.

    Looked at: each file's schema and version, the seal, the manifest's counts, each trial against the suite,
    each generation's sums, each Medusa arm's tree, the trace against the vanilla text, and that nothing names
    a folder of one machine.
    Raises: UserError if there is no such folder, or no record in it.
    """
    faults: Mapping[RecordKind, Callable[[Path], tuple[str, ...]]] = {
        "suite": _run_faults,
        "latency": _latency_faults,
        "sweep": _sweep_faults,
        "ablation": _ablation_faults,
    }
    return faults[kind_of(folder)](folder)


def _run_faults(folder: Path) -> tuple[str, ...]:
    record = RunRecord(folder)
    loaders: dict[str, Callable[[], object]] = {
        "suite.toml": lambda: record.suite,
        "environment.json": lambda: record.environment,
        "trees.json": lambda: record.trees,
        "generations.jsonl": lambda: record.outcomes,
        "step_costs.json": lambda: record.step_costs,
        "profile.json": lambda: record.profile,
        "device_limits.json": lambda: record.device_limits,
        "likelihoods.json": lambda: record.likelihoods,
        "manifest.json": lambda: record.manifest,
    }
    for backbone in get_args(BackboneName):
        loaders[file_of(HEADS_CONTROL_FILE, backbone)] = partial(record.heads_control_of, backbone)
        loaders[file_of(ROUNDING_FILE, backbone)] = partial(record.rounding_of, backbone)
        loaders[file_of(TRACE_FILE, backbone)] = partial(record.trace_of, backbone)
    unreadable = {
        name: str(fault) for name, load in loaders.items() if (fault := _fault_of(load)) is not None
    }
    faults = [f"{name}: {fault}" for name, fault in unreadable.items()]
    relations: tuple[tuple[set[str], Callable[[RunRecord], Iterator[str]]], ...] = (
        ({"manifest.json"}, _seal_faults),
        ({"manifest.json", "generations.jsonl"}, _count_faults),
        ({"generations.jsonl"}, _sum_faults),
        ({"suite.toml", "generations.jsonl"}, _trial_faults),
        ({"suite.toml", "trees.json"}, _tree_faults),
        (
            {
                "suite.toml",
                "generations.jsonl",
                *(file_of(TRACE_FILE, name) for name in get_args(BackboneName)),
            },
            _trace_faults,
        ),
        ({"environment.json"}, _place_faults),
    )
    for needed, relation in relations:
        if not needed & set(unreadable):
            faults += relation(record)
    return tuple(faults)


def _latency_faults(folder: Path) -> tuple[str, ...]:
    record = LatencyRecord(folder)
    loaders: dict[str, Callable[[], object]] = {
        "spec.toml": lambda: record.spec,
        "environment.json": lambda: record.environment,
        "model.json": lambda: record.facts,
        POINTS_FILE: lambda: record.points,
        "modes.json": lambda: record.modes,
        "batches.json": lambda: record.batches,
        "manifest.json": lambda: record.manifest,
    }
    faults = _unreadable(loaders)
    if _fault_of(lambda: record.spec) is None:  # the spec says which dtypes there are limits of
        faults += _unreadable(
            {"device_limits.json": lambda: [record.limits(dtype) for dtype in record.spec.dtypes]}
        )
    if faults:
        return tuple(faults)
    if (fault := _fault_of(record.check_seal)) is not None:
        faults.append(f"manifest.json: {fault}")
    manifest, skipped = record.manifest, sum(point.skipped is not None for point in record.points)
    if manifest is not None and (manifest.num_measured, manifest.num_skipped) != (
        len(record.points) - skipped,
        skipped,
    ):
        faults.append(
            f"{POINTS_FILE}: found {len(record.points)} points, {skipped} skipped, need as many as in "
            "manifest.json"
        )
    if len({point.key for point in record.points}) != len(record.points):
        faults.append(f"{POINTS_FILE}: found a point twice, need each once")
    faults += [
        f"{POINTS_FILE}:{number}: found "
        f"{'times and a reason to skip' if point.backbone_s else 'neither times nor a reason'}, need one"
        for number, point in enumerate(record.points, start=1)
        if bool(point.backbone_s) == (point.skipped is not None)
    ]
    return (*faults, *_place_faults(record))


def _ablation_faults(folder: Path) -> tuple[str, ...]:
    record = AblationRecord(folder)
    loaders: dict[str, Callable[[], object]] = {
        "suite.toml": lambda: record.spec,
        "environment.json": lambda: record.environment,
        "tree.json": lambda: record.tree.tree(),
        ARMS_FILE: lambda: record.results,
        "manifest.json": lambda: record.manifest,
    }
    faults = _unreadable(loaders)
    if faults:
        return tuple(faults)
    if (fault := _fault_of(record.check_seal)) is not None:
        faults.append(f"manifest.json: {fault}")
    done = [(result.arm, result.seed) for result in record.results]
    if unplanned := sorted(
        {str(one) for one in done if one not in record.spec.plan() or done.count(one) > 1}
    ):
        faults.append(f"{ARMS_FILE}: found {unplanned[0]}, need each planned arm and seed once")
    if record.manifest is not None and record.manifest.num_arms != len(done):
        faults.append(f"{ARMS_FILE}: found {len(done)} arms, need as many as in manifest.json")
    for result in record.results:
        if (fault := _fault_of(partial(record.trace, result))) is not None:
            faults.append(f"trace of {result.label}: {fault}")
        if (fault := _fault_of(partial(record.original_text_trace, result))) is not None:
            faults.append(f"trace of the original's text by {result.label}: {fault}")
        if (fault := _fault_of(partial(record.steps, result))) is not None:
            faults.append(f"steps of {result.label}: {fault}")
        elif result.arm != START_ARM and len(record.steps(result)) != result.num_steps:
            faults.append(
                f"steps of {result.label}: found {len(record.steps(result))}, need {result.num_steps}"
            )
    return (*faults, *_place_faults(record))


def _sweep_faults(folder: Path) -> tuple[str, ...]:
    record = SweepRecord(folder)
    loaders: dict[str, Callable[[], object]] = {
        SWEEP_FILE: lambda: record.spec,
        ORIGIN_FILE: lambda: record.origin,
        TREES_FILE: lambda: [one.tree() for one in record.trees.trees],
        CELLS_FILE: lambda: record.cells,
        "manifest.json": lambda: record.manifest,
    }
    faults = _unreadable(loaders)
    if faults:
        return tuple(faults)
    if (fault := _fault_of(record.check_seal)) is not None:
        faults.append(f"manifest.json: {fault}")
    manifest, failed = record.manifest, len(record.failed)
    found = (len(record.cells) - failed, failed, record.num_points)
    if manifest is not None and (manifest.num_done, manifest.num_failed, manifest.num_points) != found:
        faults.append(
            f"{CELLS_FILE}: found {found[0]} cells, {failed} failed ones and {found[2]} points, need as "
            "many as in manifest.json"
        )
    if manifest is not None and len(record.cells) < manifest.num_planned:
        found_cells = f"found {len(record.cells)} of {manifest.num_planned} planned cells"
        faults.append(f"{CELLS_FILE}: {found_cells}, need all (to mend it: resume the sweep)")
    if len({one.key for one in record.cells}) != len(record.cells):
        faults.append(f"{CELLS_FILE}: found a cell twice, need each once")
    for number, one in enumerate(record.cells, start=1):
        places = one.trees if isinstance(one, ComposedCell) else (getattr(one, "tree", None),)
        if any(place is not None and not 0 <= place < len(record.trees.trees) for place in places):
            faults.append(
                f"{CELLS_FILE}:{number}: found a tree that is not in {TREES_FILE}, need one of its "
                f"{len(record.trees.trees)}"
            )
    return (*faults, *_place_faults(record))


def _unreadable(loaders: Mapping[str, Callable[[], object]]) -> list[str]:
    return [f"{name}: {fault}" for name, load in loaders.items() if (fault := _fault_of(load)) is not None]


def _fault_of(load: Callable[[], object]) -> str | None:
    try:
        load()
    except UserError as error:
        mend = f" (to mend it: {error.do})" if error.do else ""
        return f"found {error.found}, need {error.need}{mend}"
    except (UnicodeDecodeError, OSError) as error:
        return f"found an unreadable file ({type(error).__name__}), need a whole one"
    return None


def _seal_faults(record: RunRecord) -> Iterator[str]:
    if record.manifest is None:
        yield (
            "manifest.json: found none, need the seal that a finished run writes last (to mend it: "
            "resume the run with the same command)"
        )
        return
    sealed = record.manifest.sha256
    for name, digest in sealed.items():
        path = record.folder / name
        found = file_sha256(path)[:12] if path.is_file() else "no file"
        if found != digest[:12]:
            yield (
                f"{name}: found SHA-256 {found}, need {digest[:12]} as sealed (to mend it: restore the "
                "file or run the suite again)"
            )
    for name in _SEALED:
        if name not in sealed and (record.folder / name).exists():
            yield f"{name}: found a file that the manifest does not seal, need its SHA-256 there"


def _count_faults(record: RunRecord) -> Iterator[str]:
    manifest = record.manifest
    if manifest is None:
        return
    failed = len({failure.trial for failure in record.failures})
    for noun, found, stated in (
        ("generations", len(record.generations), manifest.num_generations),
        ("failures", failed, manifest.num_failures),
    ):
        if found != stated:
            yield f"generations.jsonl: found {found} {noun}, need {stated} as in manifest.json"
    if not manifest.complete:
        done = manifest.num_generations + manifest.num_failures
        yield (
            f"manifest.json: found {done} of {manifest.num_planned} planned trials, need all (to mend "
            "it: resume the run)"
        )


def _sum_faults(record: RunRecord) -> Iterator[str]:
    for number, outcome in enumerate(record.outcomes, start=1):
        if not isinstance(outcome, Generation):
            continue
        where = f"generations.jsonl:{number}"
        if sum(outcome.step_tokens) != outcome.num_tokens - 1:
            yield (
                f"{where}: found steps of {sum(outcome.step_tokens)} tokens together, need "
                f"{outcome.num_tokens - 1}, all but the first"
            )
        if len(outcome.step_times_s) != outcome.num_steps:
            yield (
                f"{where}: found {len(outcome.step_times_s)} step times, need {outcome.num_steps}, one a step"
            )
        if any(tokens < 1 for tokens in outcome.step_tokens):
            yield f"{where}: found a step of no token, need at least one"
        if any(seconds <= 0 for seconds in (outcome.prefill_s, *outcome.step_times_s)):
            yield f"{where}: found a time of no length, need seconds above 0"


def _trial_faults(record: RunRecord) -> Iterator[str]:
    suite = record.suite
    seeds: dict[str, set[int | None]] = {arm.name: set(arm.seeds) or {None} for arm in suite.arms}
    for number, outcome in enumerate(record.outcomes, start=1):
        where, trial = f"generations.jsonl:{number}", outcome.trial
        if trial.arm not in seeds:
            yield f"{where}: found arm {trial.arm!r}, need one of suite.toml"
            continue
        if trial.seed not in seeds[trial.arm]:
            yield f"{where}: found seed {trial.seed}, need a seed that suite.toml gives arm {trial.arm!r}"
        if not 0 <= trial.round < suite.rounds:
            yield f"{where}: found round {trial.round}, need 0 to {suite.rounds - 1}"
        if isinstance(outcome, Generation) and outcome.num_tokens > suite.max_new_tokens:
            yield f"{where}: found {outcome.num_tokens} tokens, need at most {suite.max_new_tokens}"


def _tree_faults(record: RunRecord) -> Iterator[str]:
    for arm in record.suite.arms:
        if arm.method == "medusa" and arm.name not in record.trees:
            yield f"trees.json: found no tree of arm {arm.name!r}, need one"
    for name, tree in record.trees.items():
        fault = _fault_of(tree.tree)
        if fault is not None:
            yield f"trees.json: tree of arm {name!r}: {fault}"


def _trace_faults(record: RunRecord) -> Iterator[str]:
    for backbone in record.suite.backbones:
        trace = record.trace_of(backbone)
        greedy = {
            arm.name
            for arm in record.suite.arms
            if arm.method == "vanilla" and not arm.stochastic and arm.backbone == backbone
        }
        texts: dict[str, set[tuple[int, ...]]] = {}
        for generation in record.generations:
            if generation.trial.arm in greedy:
                texts.setdefault(generation.trial.prompt_key, set()).add(generation.token_ids)
        for prompt in trace.prompts if trace is not None else ():
            if tuple(prompt.tokens.tolist()) not in texts.get(prompt.key, set()):
                file = file_of(TRACE_FILE, backbone)
                yield (
                    f"{file}: found other tokens for prompt {prompt.key!r} than vanilla decoding "
                    "wrote, need the same"
                )


def _place_faults(record: RunRecord | LatencyRecord | AblationRecord | SweepRecord) -> Iterator[str]:
    origin: BaseModel = record.origin if isinstance(record, SweepRecord) else record.environment
    file = ORIGIN_FILE if isinstance(record, SweepRecord) else "environment.json"
    for name, value in origin.model_dump(mode="json").items():
        for text in _texts(value):
            if holds_absolute_path(text):
                yield (
                    f"{file}: found an absolute path in {name!r}, need none: it tells a machine or a "
                    "user apart"
                )


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (str(key), *_texts(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
