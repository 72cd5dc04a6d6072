"""Where every claim of the registry stands, over all records: decided by which record, open, or out of reach.

One rule, which `claims.toml` gives, says which record decides; what others find is kept where it differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.judge.claims.ablation import training_verdicts
from harness.judge.claims.sweep import sweep_verdicts
from harness.judge.judgement import ClaimVerdict, VerdictKind
from harness.judge.run import judge
from harness.records.ablation import AblationRecord
from harness.records.opened import open_record
from harness.records.run import RunRecord
from harness.records.sweep import SweepRecord
from harness.specs.claims import ClaimsFile, ClaimSpec, Group
from harness.specs.forms.claims import FasterForm, LadderStepForm, SpeedIdentityForm, SpeedPeaksForm

_SPEED_FORMS = (FasterForm, LadderStepForm, SpeedIdentityForm, SpeedPeaksForm)  # whose figure holds times
_LAST = 10_000  # more than there are records
_DECIDED = (VerdictKind.REPRODUCED, VerdictKind.NOT_REPRODUCED)


@dataclass(frozen=True)
class Told:
    """What one record finds on a claim; `record` is the record's folder, from the results folder."""

    record: str
    verdict: ClaimVerdict


@dataclass(frozen=True)
class Standing:
    """One claim: its group, what decides it, and what other records find that is not the same."""

    claim: ClaimSpec
    group: Group
    decides: Told | None = None
    differing: tuple[Told, ...] = field(default=())


@dataclass(frozen=True)
class Records:
    """The finished records of a results folder that claims are judged on, each with its folder's name."""

    runs: Sequence[tuple[str, RunRecord]]
    ablations: Sequence[tuple[str, AblationRecord]]
    sweeps: Sequence[tuple[str, SweepRecord]]


def finished_records(results: Path) -> Records:
    """Return the records of a results folder that claims are judged on, the smoke suite's left out.

    Raises: UserError for a record that is not as it was sealed.
    """
    runs, ablations, sweeps = [], [], []
    for manifest in sorted(results.rglob("manifest.json")):
        name = manifest.parent.relative_to(results).as_posix()
        if name.startswith(("smoke/", "latency/")):
            continue
        record = open_record(manifest.parent)
        if isinstance(record, RunRecord):
            runs.append((name, record))
        elif isinstance(record, AblationRecord):
            ablations.append((name, record))
        elif isinstance(record, SweepRecord):
            sweeps.append((name, record))
    return Records(runs, ablations, sweeps)


def standings(registry: ClaimsFile, records: Records) -> tuple[Standing, ...]:
    """Return where each claim stands, in the order of the registry, once each."""
    told = _told(registry, records)
    return tuple(_standing(claim, registry, told.get(claim.id, [])) for claim in registry.claims)


def _standing(claim: ClaimSpec, registry: ClaimsFile, told: Sequence[Told]) -> Standing:
    if not told:
        return Standing(claim, group=registry.group_of(claim))
    first = next((one for one in told if one.verdict.kind is not VerdictKind.NOT_DECIDABLE), told[0])
    differing = tuple(
        one
        for one in told
        if one.verdict.form == first.verdict.form and one.verdict.kind is not first.verdict.kind
    )
    if first.verdict.is_ours:
        return Standing(claim, "consistency", first, differing)
    if first.verdict.kind is VerdictKind.NOT_DECIDABLE:
        return Standing(claim, "cannot", first, differing)
    group: Group = "decided" if first.verdict.kind in _DECIDED else "open"
    return Standing(claim, group, first, differing)


def _told(registry: ClaimsFile, records: Records) -> dict[str, list[Told]]:
    """Return what the records find on each claim that they test, the one that decides first."""
    timed = {claim.id for claim in registry.claims if isinstance(claim.transfer, _SPEED_FORMS)}
    found: dict[str, list[tuple[int, Told]]] = {}
    for rank, told in (*_of_runs(registry, records), *_of_others(registry, records)):
        verdict = told.verdict
        if verdict.kind is VerdictKind.NOT_TESTED or not verdict.decides:
            continue
        first = verdict.claim_id in timed and _is_for_speeds(registry, told)
        found.setdefault(verdict.claim_id, []).append((rank - _LAST if first else rank, told))
    return {
        claim_id: [told for _, told in sorted(ranked, key=lambda one: one[0])]
        for claim_id, ranked in found.items()
    }


def _of_runs(registry: ClaimsFile, records: Records) -> Iterator[tuple[int, Told]]:
    """Yield each run's verdicts: first the suite for counts, the rule's machine, the newest record."""
    in_order = sorted(records.runs, key=lambda one: one[1].environment.started_utc, reverse=True)
    for rank, (name, record) in enumerate(sorted(in_order, key=lambda one: _order(registry, one[1]))):
        for verdict in judge(record, claims=registry.claims).verdicts:
            yield rank, Told(name, verdict)


def _order(registry: ClaimsFile, record: RunRecord) -> tuple[bool, bool]:
    rule = registry.decides
    if rule is None:
        return False, False
    return record.suite.name != rule.counts, record.folder.parent.name != rule.machine


def _is_for_speeds(registry: ClaimsFile, told: Told) -> bool:
    suite, machine, *_ = told.record.split("/")
    rule = registry.decides
    return rule is not None and (suite, machine) == (rule.speeds, rule.machine)


def _of_others(registry: ClaimsFile, records: Records) -> Iterator[tuple[int, Told]]:
    """Yield the verdicts of ablations, the largest budget first, then those of sweeps."""
    largest = sorted(records.ablations, key=lambda one: -one[1].spec.answer_tokens)
    told: list[tuple[str, Sequence[ClaimVerdict]]] = [
        (name, training_verdicts(registry.claims, ablation)) for name, ablation in largest
    ]
    told += [(name, sweep_verdicts(sweep, claims=registry.claims)) for name, sweep in records.sweeps]
    for rank, (name, verdicts) in enumerate(told, start=_LAST // 2):
        for verdict in verdicts:
            yield rank, Told(name, verdict)
