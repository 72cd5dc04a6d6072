"""Where every claim of the registry stands, over all records: decided by which record, open, or out of reach.

One rule, which `claims.toml` gives, says which record decides, whatever it finds; what others find is
kept where it differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harness.judge.claims.ablation import training_verdicts
from harness.judge.claims.sweep import sweep_verdicts
from harness.judge.judgement import ClaimVerdict, VerdictKind
from harness.judge.run import judge
from harness.records.ablation import AblationRecord
from harness.records.machines.comparable import MeasuredMachine, not_comparable
from harness.records.machines.identity import machine_folders
from harness.records.opened import machine_of, open_record
from harness.records.run import RunRecord
from harness.records.sweep import SweepRecord
from harness.specs.claims import ClaimsFile, ClaimSpec, DecidingRule, Group
from harness.specs.forms.claims import (
    AddedStepForm,
    FasterForm,
    LadderStepForm,
    RateOverForm,
    SpeedIdentityForm,
    SpeedPeaksForm,
)

# Forms whose figure holds times.
_SPEED_FORMS = (AddedStepForm, FasterForm, LadderStepForm, RateOverForm, SpeedIdentityForm, SpeedPeaksForm)
_GROUPS: dict[VerdictKind, Group] = {
    VerdictKind.REPRODUCED: "decided",
    VerdictKind.NOT_REPRODUCED: "decided",
    VerdictKind.INCONCLUSIVE: "open",
    VerdictKind.NOT_DECIDABLE: "cannot",
}
Source = Literal["run", "training", "sweep"]


@dataclass(frozen=True)
class RecordVerdict:
    """What one record finds on a claim; `record` is the record's folder, from the results folder.

    `machine` is the one that a run was made on; trainings and sweeps judge no times of a device.
    """

    record: str
    source: Source
    verdict: ClaimVerdict
    machine: MeasuredMachine | None = None

    @property
    def test(self) -> tuple[str, str]:
        """What was tested: two verdicts of one test can be compared."""
        is_arithmetic = self.verdict.form == "paper-only"
        return "arithmetic" if is_arithmetic else self.source, self.verdict.form


@dataclass(frozen=True)
class Standing:
    """One claim: its group, what decides it, and what other records find that is not the same."""

    claim: ClaimSpec
    group: Group
    decides: RecordVerdict | None = None
    differing: tuple[RecordVerdict, ...] = field(default=())

    @property
    def is_decided_elsewhere(self) -> bool:
        """Return whether a speed that the named class of machines leaves open is decided on another one."""
        return self.group in ("open", "cannot") and any(
            _GROUPS[one.verdict.kind] == "decided" and self.apart(one) is not None for one in self.differing
        )

    def apart(self, other: RecordVerdict) -> str | None:
        """Return why another record's times are not comparable with those that decide.

        None where they are, and for a claim that no times enter.
        """
        mine = self.decides.machine if self.decides is not None else None
        if not isinstance(self.claim.transfer, _SPEED_FORMS) or mine is None or other.machine is None:
            return None
        return not_comparable(mine, other.machine)


@dataclass(frozen=True)
class Records:
    """The finished records of a results folder that claims are judged on, each with its folder's name."""

    runs: Sequence[tuple[str, RunRecord]]
    ablations: Sequence[tuple[str, AblationRecord]]
    sweeps: Sequence[tuple[str, SweepRecord]]


def finished_records(results: Path) -> Records:
    """Return the records of a results folder that claims are judged on, tiny random models' left out.

    Raises: UserError for a record that is not as it was sealed.
    """
    runs, ablations, sweeps = [], [], []
    for manifest in sorted(results.rglob("manifest.json")):
        name = manifest.parent.relative_to(results).as_posix()
        record = open_record(manifest.parent)
        if isinstance(record, RunRecord) and record.suite.model.tiny is None:
            runs.append((name, record))
        elif isinstance(record, AblationRecord):
            ablations.append((name, record))
        elif isinstance(record, SweepRecord):
            sweeps.append((name, record))
    return Records(runs, ablations, sweeps)


def standings(registry: ClaimsFile, records: Records) -> tuple[Standing, ...]:
    """Return where each claim stands, in the order of the registry, once each."""
    found = verdicts_by_claim(registry, records)
    return standings_of(registry, found)


def standings_of(registry: ClaimsFile, found: Mapping[str, Sequence[RecordVerdict]]) -> tuple[Standing, ...]:
    """Return where each claim stands by what records found of it, the deciding record's verdict first."""
    return tuple(_standing(claim, registry, found.get(claim.id, [])) for claim in registry.claims)


def verdicts_by_claim(registry: ClaimsFile, records: Records) -> dict[str, list[RecordVerdict]]:
    """Return what every record finds of each claim, by its id; the record that decides stands first."""
    timed = {claim.id for claim in registry.claims if isinstance(claim.transfer, _SPEED_FORMS)}
    runs = _of_runs(registry, records)
    found: dict[str, list[RecordVerdict]] = {}
    for are_speeds in (False, True):
        ranked = sorted(runs, key=lambda run: _rank(registry.decides, run[0], are_speeds=are_speeds))
        for one in (one for _, verdicts in ranked for one in verdicts):
            if (one.verdict.claim_id in timed) == are_speeds:
                found.setdefault(one.verdict.claim_id, []).append(one)
    for one in (*_of_trainings(registry, records), *_of_sweeps(registry, records)):
        found.setdefault(one.verdict.claim_id, []).append(one)
    return found


def _standing(claim: ClaimSpec, registry: ClaimsFile, found: Sequence[RecordVerdict]) -> Standing:
    """Return where a claim stands; the first of what was found decides, whatever it says, a literal first."""
    if not found:
        return Standing(claim, group=registry.group_of(claim))
    # A record of the paper's own run goes before one that shares only the claim's shape.
    first, *others = sorted(found, key=lambda one: one.verdict.form != "literal")
    differing = tuple(
        one for one in others if one.test == first.test and one.verdict.kind is not first.verdict.kind
    )
    group: Group = "consistency" if first.verdict.is_ours else _GROUPS[first.verdict.kind]
    return Standing(claim, group, first, differing)


def _rank(rule: DecidingRule | None, run: RunRecord, *, are_speeds: bool) -> tuple[bool, bool]:
    """Return the place of a run among those that test a claim: by the rule's suite and machine.

    A rule may name a machine by its own name, or by the one that all of its device and cores share, which is
    the name of older records.
    """
    if rule is None:
        return False, False
    is_other_suite = run.suite.name != (rule.speeds if are_speeds else rule.counts)
    device = run.environment.device
    is_machine = any(
        rule.is_machine(name, device.details, run.device_limits)
        for name in {run.folder.parent.name, *machine_folders(device)}
    )
    return (not is_machine, is_other_suite) if are_speeds else (is_other_suite, not is_machine)


def _of_runs(registry: ClaimsFile, records: Records) -> list[tuple[RunRecord, list[RecordVerdict]]]:
    """Return the runs of valid texts, the newest first, each with the verdicts that decide.

    Where a run's times are invalid, it tests no claim about speed.
    """
    newest = sorted(records.runs, key=lambda one: one[1].environment.started_utc, reverse=True)
    judged = [(name, record, judge(record, claims=registry.claims)) for name, record in newest]
    return [
        (record, _deciding(name, "run", judgement.verdicts, machine=machine_of(record)))
        for name, record, judgement in judged
        if judgement.valid_texts and not record.failures
    ]


def _of_trainings(registry: ClaimsFile, records: Records) -> Iterator[RecordVerdict]:
    """Yield the verdicts of ablations, the largest budget first."""
    for name, record in sorted(records.ablations, key=lambda one: -one[1].spec.answer_tokens):
        yield from _deciding(name, "training", training_verdicts(registry.claims, record))


def _of_sweeps(registry: ClaimsFile, records: Records) -> Iterator[RecordVerdict]:
    for name, record in records.sweeps:
        yield from _deciding(name, "sweep", sweep_verdicts(record, claims=registry.claims))


def _deciding(
    name: str, source: Source, verdicts: Iterable[ClaimVerdict], *, machine: MeasuredMachine | None = None
) -> list[RecordVerdict]:
    """Return the verdicts of a record on claims that it tests, without those of further forms."""
    return [
        RecordVerdict(name, source, verdict, machine)
        for verdict in verdicts
        if verdict.kind is not VerdictKind.NOT_TESTED and verdict.decides
    ]
