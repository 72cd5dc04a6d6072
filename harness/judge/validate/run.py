"""Whether the record of a run is sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import get_args

from harness.judge.validate.faults import (
    path_faults,
    place_faults,
    repeated,
    seal_faults,
    unreadable,
)
from harness.records.folder import ASKED_FILE, file_of
from harness.records.run import (
    ARM_STEPS_FILE,
    CALIBRATION_FILE,
    HEADS_CONTROL_FILE,
    ROUNDING_FILE,
    TOKENS_FILE,
    TRACE_FILE,
    RunRecord,
    planned_trials,
)
from harness.records.trials import Generation, TrialKey
from harness.specs.suite import BackboneName

_PROBES = (ARM_STEPS_FILE, "step_costs.json", "profile.json", "likelihoods.json")


def run_faults(folder: Path) -> tuple[str, ...]:
    """Return every fault of a run's record; a file that does not load keeps no other from being looked at."""
    record = RunRecord(folder)
    loaders: dict[str, Callable[[], object]] = {
        "suite.toml": lambda: record.suite,
        ASKED_FILE: lambda: record.asked,
        "environment.json": lambda: record.environment,
        "trees.json": lambda: record.trees,
        "generations.jsonl": lambda: record.outcomes,
        ARM_STEPS_FILE: lambda: record.arm_steps,
        "step_costs.json": lambda: record.step_costs,
        "profile.json": lambda: record.profile,
        "device_limits.json": lambda: record.device_limits,
        "likelihoods.json": lambda: record.likelihoods,
        TOKENS_FILE: lambda: record.token_texts,
        "manifest.json": lambda: record.manifest,
    }
    for backbone in get_args(BackboneName):
        loaders[file_of(HEADS_CONTROL_FILE, backbone)] = partial(record.heads_control_of, backbone)
        loaders[file_of(ROUNDING_FILE, backbone)] = partial(record.rounding_of, backbone)
        loaders[file_of(TRACE_FILE, backbone)] = partial(record.trace_of, backbone)
        loaders[file_of(CALIBRATION_FILE, backbone)] = partial(record.calibration_of, backbone)
    unread = unreadable(loaders)
    faults = [f"{name}: {fault}" for name, fault in unread.items()]
    relations: tuple[tuple[set[str], Callable[[RunRecord], Iterator[str]]], ...] = (
        ({"manifest.json"}, seal_faults),
        ({"manifest.json", "generations.jsonl"}, _count_faults),
        ({"generations.jsonl"}, _sum_faults),
        ({"suite.toml", "generations.jsonl"}, _trial_faults),
        ({"suite.toml", "generations.jsonl", "manifest.json"}, _plan_faults),
        ({"suite.toml", ASKED_FILE}, _asked_faults),
        ({"suite.toml", "generations.jsonl", *_PROBES}, _probe_faults),
        (
            {
                "suite.toml",
                "generations.jsonl",
                *(file_of(TRACE_FILE, name) for name in get_args(BackboneName)),
            },
            _trace_faults,
        ),
        ({"environment.json"}, lambda record: place_faults(record.environment, file="environment.json")),
        ({"suite.toml"}, lambda record: path_faults(record.suite, file="suite.toml")),
    )
    for needed, relation in relations:
        if not needed & set(unread):
            faults += relation(record)
    return tuple(faults)


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


def _plan_faults(record: RunRecord) -> Iterator[str]:
    """Yield lines that are there twice, trials that were timed twice, and what of the plan is missing."""
    for number in record.repeated:
        yield f"generations.jsonl:{number}: found a second line of the same attempt at a trial, need one"
    timed = (
        outcome.trial
        for outcome in record.outcomes
        if isinstance(outcome, Generation) and record.is_timed(outcome)
    )
    yield from repeated(timed, file="generations.jsonl", noun="a valid timing of")
    orders: dict[int, TrialKey] = {}
    for number, outcome in enumerate(record.outcomes, start=1):
        if orders.setdefault(outcome.order, outcome.trial) != outcome.trial:
            yield f"generations.jsonl:{number}: found order {outcome.order} of another trial, need its own"
    trials = {outcome.trial for outcome in record.outcomes}
    planned = planned_trials(record.suite, {trial.prompt_key for trial in trials})
    if record.manifest is not None and (missing := planned - trials):
        yield f"generations.jsonl: found no line of {len(missing)} planned trials, need one of each"


def _asked_faults(record: RunRecord) -> Iterator[str]:
    """Yield where a shortened suite is another one than the one that was asked for."""
    suite, asked = record.suite, record.asked
    prompts = asked.prompts.model_copy(update={"limit": suite.prompts.limit})
    if asked.model_copy(update={"prompts": prompts, "rounds": suite.rounds}) != suite:
        yield f"{ASKED_FILE}: found another suite than suite.toml, need the same but for prompts and rounds"


def _probe_faults(record: RunRecord) -> Iterator[str]:
    """Yield measurements apart from the trials that are there twice, or of an arm that is not there."""
    arms = {arm.name: arm for arm in record.suite.arms}
    num_blocks = len(record.tries)
    for number, cost in enumerate(record.arm_steps, start=1):
        arm = arms.get(cost.arm) if cost.arm is not None else None
        if arm is None or arm.method not in ("vanilla", "medusa") or arm.stochastic:
            yield f"{ARM_STEPS_FILE}:{number}: found arm {cost.arm!r}, need a greedy arm of suite.toml"
    yield from repeated(
        (cost.model_dump_json() for cost in record.arm_steps), file=ARM_STEPS_FILE, noun="line"
    )
    keyed = (cost for cost in record.arm_steps if cost.prompt_key is not None)
    of_prompts = Counter((cost.arm, cost.prompt_key) for cost in keyed)
    for (arm_name, key), count in of_prompts.items():
        if count > (num_tries := sum(one.prompt_key == key for one in record.tries)):
            need = f"at most {num_tries}, one each time that its block was run"
            yield f"{ARM_STEPS_FILE}: found {count} lines of {arm_name} after {key}, need {need}"
    lines = Counter(cost.arm for cost in record.arm_steps)
    if more := sorted(str(arm) for arm, count in lines.items() if count > num_blocks):
        yield f"{ARM_STEPS_FILE}: found more than {num_blocks} lines of {more[0]}, need at most one a block"
    costs = record.step_costs.costs if record.step_costs is not None else ()
    shapes = ((one.num_nodes, one.num_heads, one.context_tokens) for one in costs if one.arm is None)
    yield from repeated(shapes, file="step_costs.json", noun="shape")
    rows = record.profile.rows if record.profile is not None else ()
    yield from repeated((row.arm for row in rows), file="profile.json", noun="arm")
    scored = [row.trial for row in record.likelihoods.rows] if record.likelihoods is not None else []
    yield from repeated(scored, file="likelihoods.json", noun="trial")
    for file, named in (
        ("profile.json", [row.arm for row in rows]),
        ("likelihoods.json", [one.arm for one in scored]),
    ):
        for name in sorted(set(named) - set(arms)):
            yield f"{file}: found arm {name!r}, need one of suite.toml"


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
