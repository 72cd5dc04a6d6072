"""Is this checkout worse than its base? Both decode in turn and are judged at looks fixed before."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from harness.errors import UserError
from harness.gate.calibrate import (
    calibration_of,
    check_margins,
    data_sha256,
    gate_sha256,
    same_device,
)
from harness.gate.repeat import GateOptions, repeat_of
from harness.gate.sides import Side, started, take_block
from harness.gate.worktree import Base, base_of, checkout_root, interrupted_by_term, worktree
from harness.judge.gate.exact import judge_exact
from harness.judge.gate.looks import exit_code, is_decided, kept
from harness.judge.gate.timed import (
    RATIOS,
    Change,
    calibrated,
    disturbed_blocks,
    for_baseline,
    judge_timed,
    most_slowed,
    next_prompt,
    no_times,
    parts_of,
    quiet_turns,
    tails_apart,
    timed_changes,
)
from harness.measure.turns import Wanted
from harness.paths import cache_dir, code_folder
from harness.records.gate.folder import stored_gate
from harness.records.gate.record import Calibration, Finding, GateRecord, SideInfo, SideName, Turn
from harness.records.store import portable, utc_now
from harness.specs.gate import TIMED, GateSpec, Quantity

_LEAST_BLOCKS = 3  # that a spread can be taken of


@dataclass
class Taken:
    """What was decoded so far, and what the looks found."""

    turns: list[Turn] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    findings: dict[str, Finding] = field(default_factory=dict)
    looks: list[int] = field(default_factory=list)
    longest_s: float = 0.0


def run_gate(spec: GateSpec, *, spec_file: Path, options: GateOptions, console: Console) -> GateRecord:
    """Return the record of a gate. Raises: UserError for what cannot be measured or compared."""
    began, started_utc = time.monotonic(), utc_now()
    stored, is_sealed = (None, True) if options.baseline is None else stored_gate(options.baseline)
    with interrupted_by_term(), _folders(options, console=console) as (folders, base_from):
        wanted = wanted_of(spec, spec_file, num_sides=len(folders))
        console.print(f"{spec.name}: loading {' and '.join(folders)}")
        with started(folders, wanted) as sides:
            infos = {name: side.info for name, side in sides.items()}
            past: tuple[Turn, ...] = ()
            if stored is not None:
                past = past_turns(stored, infos["head"], spec)
                infos = {"base": stored.sides["head"], **infos}
            notes = [] if is_sealed else ["the baseline has no seal: nothing says that it is as it was made"]
            notes += _checked(spec, sides, infos)
            taken = take_looks(
                sides, spec, past=past, deadline=began + 60 * spec.minutes, console=console, stops=True
            )
    return _record(
        spec,
        taken,
        infos,
        past=past,
        notes=notes,
        base_from=base_from,
        options=options,
        started_utc=started_utc,
        elapsed_s=time.monotonic() - began,
    )


def wanted_of(spec: GateSpec, spec_file: Path, *, num_sides: int = 2) -> Wanted:
    """Return what both versions load; paths go from the gate's folder, else are of each version's data."""
    return Wanted(suite=spec.suite_data(), base_folder=str(spec_file.parent.absolute()), num_sides=num_sides)


@contextlib.contextmanager
def _folders(options: GateOptions, *, console: Console) -> Iterator[tuple[dict[SideName, Path], Base]]:
    """Yield the folders to run, with where the base comes from."""
    head = code_folder().parent
    if options.baseline is not None:
        yield {"head": head}, Base("", f"stored record {options.baseline.name}")
        return
    root = checkout_root(code_folder())
    base = base_of(root, options.base)
    console.print(f"base: {base.commit[:12]}, {base.found}")
    with worktree(root, base.commit, home=cache_dir() / "gate" / "worktrees") as folder:
        yield {"base": folder, "head": head}, base


def past_turns(stored: GateRecord, head: SideInfo, spec: GateSpec) -> tuple[Turn, ...]:
    """Return a stored gate's turns as the base's.

    Raises: UserError for a record without a head, of another gate, device, model or engine, or of other
    prompts.
    """
    then = stored.sides.get("head")
    if then is None or data_sha256(stored.gate) != gate_sha256(spec):
        raise UserError(
            found="a baseline of another gate" if then is not None else "a baseline without a head",
            need=f"one of {spec.name!r} as it is now",
            where="--baseline",
            do="take one here: medusa-repro gate --calibrate keeps its record",
        )
    for what, mine, theirs in (
        ("dtype", head.dtype, then.dtype),
        ("engine", head.mode, then.mode),
        ("model", head.backbone_sha256, then.backbone_sha256),
    ):
        if mine != theirs:
            raise UserError(
                found=f"a baseline of another {what} ({theirs[:16]})",
                need=mine[:16],
                where="--baseline",
                do="take one anew",
            )
    if not same_device(then.device, head.device):
        raise UserError(
            found=f"a baseline of another device ({then.device.name}, {then.device.num_cores} cores)",
            need=f"one of this device ({head.device.name}, {head.device.num_cores} cores)",
            where="--baseline",
            do="take one here: medusa-repro gate --calibrate keeps its record",
        )
    if then.prompts_sha256 != head.prompts_sha256:
        raise UserError(
            found="a baseline of other prompts",
            need="the same gate's",
            where="--baseline",
            do="take one anew",
        )
    return for_baseline(stored.turns)


def _checked(spec: GateSpec, sides: Mapping[SideName, Side], infos: Mapping[SideName, SideInfo]) -> list[str]:
    """Return what a reader has to know of both versions before any figure.

    Raises: UserError for too few prompts, other prompts, or a margin below this runner's noise floor.
    """
    for name, side in sides.items():
        if len(side.ready.prompt_keys) < spec.looks[-1]:
            raise UserError(
                found=f"{len(side.ready.prompt_keys)} prompts in the {name}",
                need=f"{spec.looks[-1]}, one a block of the last look",
                where=f"the gate {spec.name!r}",
                do="name more prompts, or end its looks earlier",
            )
    base, head = infos["base"], infos["head"]
    if base.prompts_sha256 != head.prompts_sha256:
        raise UserError(
            found="other prompts in the base", need="the same token ids in both", where="the base's own data"
        )
    notes = [
        f"the {name}'s checkout differs from its commit: it was measured as it is"
        for name, info in infos.items()
        if info.dirty
    ]
    if base.commit == head.commit and not head.dirty and base.commit is not None:
        notes.append("base and head are the same commit")
    if base.backbone_sha256 != head.backbone_sha256:
        notes.append("base and head have different weights")
    if base.mode != head.mode:
        notes.append(f"the base's engine is {base.mode}, the head's {head.mode}")
    calibration = calibration_of(spec, head.device)
    if calibration is None:
        notes.append("this runner is not calibrated: medusa-repro gate --calibrate says what it can see")
    else:
        check_margins(spec, calibration)
    return notes


def take_looks(
    sides: Mapping[SideName, Side],
    spec: GateSpec,
    *,
    past: Sequence[Turn],
    deadline: float,
    console: Console,
    stops: bool,
) -> Taken:
    """Decode block after block and judge at each look, until all is decided or the time is used up.

    Without `stops` all blocks are taken. A disturbed block is kept and taken again.
    """
    taken, only = Taken(), judged_quantities(past)
    keys = sides["head"].ready.prompt_keys
    for look in spec.looks:
        if not _take_blocks(taken, sides, spec, keys=keys, wanted=look, deadline=deadline, console=console):
            console.print("the gate's time is used up")
        quiet = quiet_turns(taken.turns, spec)
        num_quiet = len({turn.prompt_key for turn in quiet})
        before = taken.looks[-1] if taken.looks else 0
        if num_quiet < _LEAST_BLOCKS or num_quiet == before:
            break
        changes = timed_changes((*quiet_turns(past, spec), *quiet), spec, only=only)
        now = judge_timed(changes, spec, num_blocks=num_quiet, judged_at=before)
        taken.findings = kept(taken.findings, now)
        taken.looks.append(num_quiet)
        open_ = sum(not is_decided(finding) for finding in taken.findings.values())
        console.print(f"look at {num_quiet} blocks: {open_} of {len(now)} timed quantities open")
        if num_quiet < look or (stops and not open_):
            break
    return taken


def judged_quantities(past: Sequence[Turn]) -> tuple[Quantity, ...]:
    """Return the timed quantities that are judged: ratios alone where the base's times are another day's."""
    return RATIOS if past else TIMED


def _take_blocks(
    taken: Taken,
    sides: Mapping[SideName, Side],
    spec: GateSpec,
    *,
    keys: Sequence[str],
    wanted: int,
    deadline: float,
    console: Console,
) -> bool:
    """Take blocks until so many are quiet; return whether they are."""
    while True:
        quiet = {turn.prompt_key for turn in quiet_turns(taken.turns, spec)}
        key = next_prompt(keys, tried=taken.tried, quiet=quiet, wanted=wanted)
        if key is None:
            return True
        if (begun := time.monotonic()) + taken.longest_s > deadline:
            return False
        number, prompt = len(taken.tried), keys.index(key)
        scores = prompt < spec.quality_prompts and key not in taken.tried
        block = take_block(sides, spec, number=number, prompt=prompt, scores=scores)
        taken.turns += block
        taken.tried.append(key)
        taken.longest_s = max(taken.longest_s, time.monotonic() - begun)
        if disturbed_blocks(block, spec):
            console.print(f"block {number + 1}: other processes disturbed it; it is taken again")


def _record(
    spec: GateSpec,
    taken: Taken,
    infos: Mapping[SideName, SideInfo],
    *,
    past: Sequence[Turn],
    notes: list[str],
    base_from: Base,
    options: GateOptions,
    started_utc: str,
    elapsed_s: float,
) -> GateRecord:
    """Return the record of what was taken, with what follows from it."""
    only = judged_quantities(past)
    timed = tuple(taken.findings.values())
    if not taken.looks or taken.looks[-1] < spec.looks[0]:
        timed = no_times(spec, only=only)
        num_quiet = len({turn.prompt_key for turn in quiet_turns(taken.turns, spec)})
        notes.append(f"times are withheld: {num_quiet} quiet blocks, need {spec.looks[0]}")
    if foreign := {turn.block for turn in taken.turns if turn.num_foreign}:
        notes.append(f"another process used the GPU in {len(foreign)} blocks: their times are not judged")
    quiet = (*quiet_turns(past, spec), *quiet_turns(taken.turns, spec))
    findings = (*timed, *judge_exact((*past, *taken.turns), infos, spec))
    if past and not quiet_turns(past, spec):
        notes.append("the baseline's blocks were all disturbed: its times are not judged")
    # Times of another day, or of too few quiet blocks, are not shown.
    are_shown = not past and all(one.outcome != "withheld" for one in timed)
    parts = parts_of(quiet, spec) if are_shown else ()
    for arm in tails_apart(quiet, spec, share=spec.must_see) if are_shown else ():
        notes.append(
            f"the total step time of {arm} changed otherwise than its middle steps: look at the turns"
        )
    again = repeat_of(options, base_commit=base_from.commit)
    if again.cut:
        notes.append(f"to repeat it, name the folder of {', '.join(again.cut)} as well: no record holds it")
    return GateRecord(
        gate=portable(spec),
        command=options.command,
        repeat=again.command,
        started_utc=started_utc,
        elapsed_s=elapsed_s,
        sides=dict(infos),
        base_from=base_from.found,
        disturbed_blocks=tuple(sorted(disturbed_blocks(taken.turns, spec))),
        looks_taken=tuple(taken.looks),
        findings=findings,
        slowed=most_slowed(parts, findings),
        parts=parts,
        notes=tuple(notes),
        exit_code=exit_code(findings, spec),
        turns=tuple(taken.turns),
    )


def run_calibration(
    spec: GateSpec, *, spec_file: Path, num_runs: int, options: GateOptions, console: Console
) -> tuple[Calibration, tuple[GateRecord, ...]]:
    """Return this runner's calibration, from runs of this checkout against itself, and their records."""
    head = code_folder().parent
    runs: list[tuple[Change, ...]] = []
    records = []
    for number in range(num_runs):
        began, started_utc = time.monotonic(), utc_now()
        console.print(f"{spec.name}: run {number + 1} of {num_runs} against itself")
        with (
            interrupted_by_term(),
            started({"base": head, "head": head}, wanted_of(spec, spec_file)) as sides,
        ):
            infos = {name: side.info for name, side in sides.items()}
            deadline = began + 60 * spec.minutes
            taken = take_looks(sides, spec, past=(), deadline=deadline, console=console, stops=False)
        changes = timed_changes(quiet_turns(taken.turns, spec), spec)
        if not changes or len(changes[0].values) < spec.looks[0]:
            raise UserError(
                found=f"{len(changes[0].values) if changes else 0} quiet blocks",
                need=f"{spec.looks[0]} for a calibration",
                where="this machine",
                do="stop what else runs on it",
            )
        runs.append(changes)
        base = Base(infos["head"].commit or "HEAD", "itself, for the runner's calibration")
        records.append(
            _record(
                spec,
                taken,
                infos,
                past=(),
                notes=[],
                base_from=base,
                options=options,
                started_utc=started_utc,
                elapsed_s=time.monotonic() - began,
            )
        )
    info = records[-1].sides["head"]
    calibration = Calibration(
        gate=spec.name,
        gate_sha256=gate_sha256(spec),
        device=info.device,
        commit=info.commit,
        taken_utc=utc_now(),
        num_runs=num_runs,
        num_blocks=sum(len(one[0].values) for one in runs),
        floors=calibrated(runs, spec),
    )
    return calibration, tuple(records)
