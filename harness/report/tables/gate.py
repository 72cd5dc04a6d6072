"""A gate as a Markdown summary, and as one line of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import ExitCode
from harness.records.gate.folder import GateFolder
from harness.records.gate.record import Calibration, Finding, GateRecord, SideInfo, SlowedPart
from harness.report.formatting import ABSENT, cell, heading, page, percent, significant, table
from harness.report.provenance import origin_facts
from harness.safe_text import page_text
from harness.specs.gate import TIMED, Quantity

_WORDS = {
    ExitCode.OK: "no regression",
    ExitCode.GATE_REGRESSION: "REGRESSION",
    ExitCode.INVALID_MEASUREMENT: "not decided",
}
_TEXTS: tuple[Quantity, ...] = ("parity", "tokens_per_step", "acceptance", "quality")
_PLAIN = ("acceptance", "quality")  # whose change is a difference, not a share


def render_gate_summary(record: GateRecord) -> str:
    """Return the summary of a gate, which ends with the command that repeats it."""
    base, head = record.sides["base"], record.sides["head"]
    lines = [
        f"## Gate `{cell(record.gate['name'])}`: {_verdict(record)}",
        f"Head {_version(head)} against base {_version(base)} ({cell(record.base_from)}), on "
        f"{cell(head.device.name)}, {head.device.num_cores} cores, {head.dtype}, engine {cell(head.mode)}. "
        f"{_looks(record)}",
    ]
    if record.slowed is not None:
        lines.append(f"**{_slowed(record.slowed)}**")
    lines += [_decided(record), _findings(record), *_seen(record)]
    if record.parts:
        lines.append(_parts(record))
    lines += [f"- {cell(note)}" for note in record.notes]
    lines.append(f"The same again here:\n\n```\n{record.repeat}\n```")
    return page_text("\n\n".join(lines) + "\n")


def render_gate_report(record: GateFolder) -> str:
    """Return the whole report of a gate: where it comes from, then its summary."""
    facts = origin_facts(record.origin, record.manifest)
    title = heading(f"A gate: `{cell(record.spec.name)}`", record.spec.description, facts)
    return page(title, render_gate_summary(record.gate).rstrip("\n"))


def _version(side: SideInfo) -> str:
    commit = "without a commit" if side.commit is None else f"`{side.commit[:12]}`"
    return f"{commit} with changes" if side.dirty else commit


def _looks(record: GateRecord) -> str:
    taken = ", ".join(map(str, record.looks_taken)) or "none"
    disturbed = len(record.disturbed_blocks)
    return (
        f"Looks after blocks: {taken}, of {', '.join(map(str, record.gate['looks']))} planned; "
        f"{disturbed} disturbed block{'s' if disturbed != 1 else ''}; {record.elapsed_s:.0f} s."
    )


def _undecided(record: GateRecord) -> list[Finding]:
    return [one for one in record.findings if one.outcome in ("inconclusive", "withheld")]


def _verdict(record: GateRecord) -> str:
    word = _WORDS[ExitCode(record.exit_code)]
    return f"{word} in what was decided" if record.exit_code == ExitCode.OK and _undecided(record) else word


def _decided(record: GateRecord) -> str:
    """Say how many quantities are decided, which are not, and why that may be no fault."""
    undecided, total = _undecided(record), len(record.findings)
    worse = sum(one.outcome == "worse" for one in record.findings)
    line = f"Decided: {total - len(undecided)} of {total} quantities, {worse or 'none'} of them worse."
    if not undecided:
        return line
    line += f" Not decided: {'; '.join(map(_left_open, undecided))}."
    if record.exit_code == ExitCode.OK and any(one.quantity == "step_s" for one in record.findings):
        must = percent(_must_see(record))
        line += f" That does not fail the gate: by their intervals no arm's steps are {must} slower."
    return line


def _left_open(finding: Finding) -> str:
    if finding.high is None:
        return f"{finding.name}, of which there is no figure"
    return (
        f"{finding.name}, which may be up to {percent(finding.high)} worse (margin {percent(finding.margin)})"
    )


def _must_see(record: GateRecord) -> float:
    return float(record.gate["must_see"])


def _findings(record: GateRecord) -> str:
    rows = [
        {
            "quantity": f"{one.quantity}" + ("" if one.depth is None else f", depth {one.depth}"),
            "arm": one.arm or ABSENT,
            "base": significant(one.base, digits=4),
            "head": significant(one.head, digits=4),
            "worse by": _change(one),
            "margin": _amount(one, one.margin),
            "outcome": f"**{one.outcome}**" if one.outcome == "worse" else one.outcome,
        }
        for one in record.findings
    ]
    return _table(rows)


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    return table(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""


def _amount(finding: Finding, value: float | None) -> str:
    return significant(value, digits=2) if finding.quantity in _PLAIN else percent(value)


def _change(finding: Finding) -> str:
    if finding.change is None:
        return ABSENT
    if finding.low is None or finding.high is None:
        return _amount(finding, finding.change)
    return f"{percent(finding.change)} [{percent(finding.low)}, {percent(finding.high)}]"


def _seen(record: GateRecord) -> list[str]:
    """Say which slowdown of a step this runner lets the gate find, where it is more than it must see.

    That is about gates to come; where this one decided its steps all the same, it says so.
    """
    must, power = _must_see(record), record.gate["power"]
    steps = [one for one in record.findings if one.quantity == "step_s" and one.sees is not None]
    worst = max(steps, key=lambda one: one.sees or 0.0, default=None)
    if worst is None or worst.sees is None or worst.sees <= must:
        return []
    if any(one.outcome == "inconclusive" and (one.high is None or one.high >= must) for one in steps):
        return [
            f"This runner is too noisy to find steps that are {percent(must)} slower in {percent(power)} of "
            f"gates: what it can hold is {percent(worst.sees)}, by {worst.name}."
        ]
    return [
        f"Whether steps are {percent(must)} slower was decided here. At this noise not every gate would: the "
        f"slowdown that {percent(power)} of them find is {percent(worst.sees)}, by {worst.name}."
    ]


def _slowed(part: SlowedPart) -> str:
    growth = percent(part.head_s / part.base_s - 1, signed=True) if part.base_s > 0 else "from nothing"
    return (
        f"The part that got slower most: {cell(part.part)} of {cell(part.arm)}, from "
        f"{significant(1e3 * part.base_s)} to {significant(1e3 * part.head_s)} ms a step ({growth})."
    )


def _parts(record: GateRecord) -> str:
    rows = [
        {
            "arm": part.arm,
            "part of a step": part.part,
            "base (ms)": significant(1e3 * part.base_s),
            "head (ms)": significant(1e3 * part.head_s),
        }
        for part in record.parts
    ]
    return _table(rows)


def gate_headline(record: GateRecord, folder: str) -> dict[str, Any]:
    """Return what the command's last line says."""
    return {
        "gate": record.gate["name"],
        "outcome": _WORDS[ExitCode(record.exit_code)],
        "exit_code": record.exit_code,
        "base": record.sides["base"].commit,
        "head": record.sides["head"].commit,
        "dirty": record.sides["head"].dirty,
        "device": record.sides["head"].device.name,
        "valid": {"texts": _is_valid(record, _TEXTS), "speeds": _is_valid(record, TIMED)},
        "undecided": [one.name for one in _undecided(record)],
        "looks": list(record.looks_taken),
        "disturbed_blocks": len(record.disturbed_blocks),
        "findings": {one.name: _short(one) for one in record.findings},
        "slowed": None if record.slowed is None else record.slowed.model_dump(),
        "repeat": record.repeat,
        "record": folder,
    }


def _is_valid(record: GateRecord, quantities: Sequence[Quantity]) -> bool:
    """Return whether something was compared of these quantities, and all of them that the gate judges."""
    found = [one for one in record.findings if one.quantity in quantities]
    return bool(found) and all(one.outcome != "withheld" for one in found)


def _short(finding: Finding) -> Mapping[str, Any]:
    return finding.model_dump(include={"change", "low", "high", "margin", "outcome"})


def render_calibration(calibration: Calibration) -> str:
    """Return a runner's calibration as a table."""
    rows = [
        {
            "quantity": name,
            "noise of a block": percent(noise.spread),
            "between runs": percent(noise.between),
            "least margin": percent(noise.floor),
            "finds": percent(noise.sees),
        }
        for name, noise in sorted(calibration.floors.items())
    ]
    head = (
        f"Gate `{calibration.gate}` against itself on {cell(calibration.device.name)}, "
        f"{calibration.device.num_cores} cores: {calibration.num_runs} runs, {calibration.num_blocks} blocks."
    )
    return page_text(f"{head}\n\n{_table(rows)}\n")


def calibration_headline(calibration: Calibration) -> dict[str, Any]:
    """Return what the last line of a calibration says."""
    return {
        "gate": calibration.gate,
        "calibrated": calibration.device.name,
        "runs": calibration.num_runs,
        "blocks": calibration.num_blocks,
        "floors": {name: noise.model_dump() for name, noise in calibration.floors.items()},
    }
