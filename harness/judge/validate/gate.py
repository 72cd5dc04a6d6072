"""Whether a gate's record is sound."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.errors import ExitCode, UserError
from harness.judge.validate.faults import load_faults, path_faults, repeated, seal_faults
from harness.records.folder import MANIFEST_FILE
from harness.records.gate.folder import GateFolder
from harness.records.gate.record import BMF_FILE, GATE_FILE, HEADLINE_FILE, SIDES, Turn


def gate_faults(folder: Path) -> tuple[str, ...]:
    """Return every fault of a gate's record."""
    record = GateFolder(folder)
    loaders: dict[str, Callable[[], object]] = {
        GATE_FILE: lambda: (record.gate, record.spec, record.origin),
        BMF_FILE: lambda: _json(record, BMF_FILE),
        HEADLINE_FILE: lambda: _json(record, HEADLINE_FILE),
        MANIFEST_FILE: lambda: record.manifest,
    }
    return load_faults(loaders) or (
        *seal_faults(record),
        *_count_faults(record),
        *_turn_faults(record),
        *_look_faults(record),
        *_finding_faults(record),
        *path_faults(record.gate, file=GATE_FILE),
    )


def _json(record: GateFolder, name: str) -> object:
    path = record.file(name)
    if not path.exists():  # of before gates were sealed
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(found="a file that is no JSON", need="one JSON object", where=name) from error


def _count_faults(record: GateFolder) -> Iterator[str]:
    manifest, gate = record.manifest, record.gate
    if manifest is None:
        return
    if (manifest.num_turns, manifest.num_findings) != (len(gate.turns), len(gate.findings)):
        yield (
            f"{GATE_FILE}: found {len(gate.turns)} turns and {len(gate.findings)} findings, need as many as "
            f"in {MANIFEST_FILE}"
        )
    if manifest.gate != record.spec.name:
        yield f"{GATE_FILE}: found the gate {record.spec.name!r}, need the one in {MANIFEST_FILE}"


def _turn_faults(record: GateFolder) -> Iterator[str]:
    """Yield turns of unknown arms or versions, that are there twice, or whose steps do not agree."""
    gate = record.gate
    arms = {"timed": record.spec.timed_arms, "scored": record.spec.sampled_arms}
    keys = ((turn.block, turn.arm, turn.side) for turn in gate.turns)
    yield from repeated(keys, file=GATE_FILE, noun="turn")
    blocks = {turn.block: turn.prompt_key for turn in gate.turns}
    if sorted(blocks) != list(range(len(blocks))):
        yield f"{GATE_FILE}: found blocks {sorted(blocks)[-1:]} of {len(blocks)}, need each from 0 on"
    if missing := [side for side in SIDES if side not in gate.sides]:
        yield f"{GATE_FILE}: found no {missing[0]}, need both versions"
    for number, turn in enumerate(gate.turns, start=1):
        where = f"{GATE_FILE}: turn {number}"
        if turn.arm not in {arm.name for arm in arms[turn.purpose]}:
            yield f"{where}: found {turn.purpose} arm {turn.arm!r}, need one of the gate's"
        if turn.prompt_key != blocks[turn.block]:
            yield f"{where}: found two prompts in block {turn.block}, need one"
        yield from (f"{where}: {fault}" for fault in _step_faults(turn))


def _step_faults(turn: Turn) -> Iterator[str]:
    if turn.purpose == "timed" and len(turn.step_s) != len(turn.step_tokens):
        yield f"found {len(turn.step_s)} step times, need {len(turn.step_tokens)}, one a step"
    if turn.purpose == "scored" and (turn.step_s or turn.mean_log_likelihood is None):
        yield "found step times or no likelihood, need a text that was scored alone"
    if len({len(times) for times in turn.parts_s.values()}) > 1:
        yield "found parts of different numbers of steps, need one time of each part a marked step"


def _look_faults(record: GateFolder) -> Iterator[str]:
    gate, blocks = record.gate, {turn.block for turn in record.gate.turns}
    looks = list(gate.looks_taken)
    if looks != sorted(set(looks)) or looks[-1:] > [len(blocks)]:
        yield f"{GATE_FILE}: found looks {looks}, need growing numbers of at most {len(blocks)} blocks"
    if not blocks.issuperset(gate.disturbed_blocks):
        yield f"{GATE_FILE}: found a disturbed block without turns, need one of its blocks"


def _finding_faults(record: GateFolder) -> Iterator[str]:
    """Yield findings that are there twice, of another margin than the gate's, or that the end contradicts."""
    gate, spec = record.gate, record.spec
    yield from repeated((one.name for one in gate.findings), file=GATE_FILE, noun="finding")
    for one in gate.findings:
        if one.margin != spec.margin(one.quantity):
            yield f"{GATE_FILE}: found a margin of {one.margin:g} for {one.name}, need the gate's"
        if one.low is not None and one.high is not None and one.low > one.high:
            yield f"{GATE_FILE}: found bounds of {one.name} the wrong way round, need the lower first"
        if one.change is None and one.outcome != "withheld":
            yield f"{GATE_FILE}: found {one.name} {one.outcome} without a change, need one"
    is_worse = any(one.outcome == "worse" for one in gate.findings)
    if is_worse != (gate.exit_code == ExitCode.GATE_REGRESSION):
        found = f"found exit code {gate.exit_code} where {'something' if is_worse else 'nothing'} is worse"
        yield f"{GATE_FILE}: {found}, need the one that says so"
    if gate.slowed is not None and gate.slowed not in gate.parts:
        yield f"{GATE_FILE}: found a slowed part that is none of the parts, need one of them"
