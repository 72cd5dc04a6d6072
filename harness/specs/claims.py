"""The registry of claims as data: what `suites/claims.toml`, or a user's file in its place, may say."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from harness.errors import UserError
from harness.files import read_toml
from harness.paths import shipped
from harness.specs.bounds import Spec
from harness.specs.forms.claims import SweepForm, TransferForm
from harness.specs.forms.literal import LiteralForm, Measure, Stated
from harness.specs.forms.paper import PaperOnlyForm
from harness.specs.forms.training import TrainingForm

CLAIMS_FILE = shipped("claims.toml")
ROLE_KEYS = ("arm", "over", "tree", "arms")  # keys of a form that name arms by their role

Kind = Literal["claim", "repo", "definition", "hyperparameter", "derived", "third_party", "inconsistency"]
# Where a claim stands over all records; together they hold every entry of the registry once.
Group = Literal["decided", "open", "cannot", "gpu", "weights", "judge", "consistency", "no claim"]
Reading = Literal["read", "read-from-figure", "digitised", "computed", "secondary", "memory"]


class OperatorTable(Spec):
    """A table of Appendix G: throughput and intensity of one operator.

    A row is a context length or batch, a column a number of candidates.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    tflop_per_s: tuple[tuple[float, ...], ...]
    intensity: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _rectangular(self) -> OperatorTable:
        for name, grid in (("tflop_per_s", self.tflop_per_s), ("intensity", self.intensity)):
            if len(grid) != len(self.rows) or any(len(row) != len(self.columns) for row in grid):
                raise ValueError(f"{name} must have {len(self.rows)} rows of {len(self.columns)} figures")
        return self


class ClaimSpec(Spec):
    """One claim: what is stated and where, the figure, and the forms in which it can be judged.

    `transfer` is judged on the record of a suite, `training` on that of an ablation, `sweep` on that of a
    sweep. `also` are further forms on the record of a suite: shown with the claim, they decide nothing.
    `value` holds the figure as numbers; `needs` says what it would take where no form decides it.
    `measures` are the figures of a run that the literal form compares with it; `unmeasured` says why no
    figure of a run can be.
    """

    id: str = Field(min_length=1)
    kind: Kind
    stated: str = Field(min_length=1)
    place: str
    version: str
    figure: str
    value: Stated = None
    reading: Reading
    note: str | None = None
    table: OperatorTable | None = None
    literal: LiteralForm | None = None
    measures: tuple[Measure, ...] = ()
    unmeasured: str | None = None
    transfer: TransferForm | None = None
    also: tuple[TransferForm, ...] = ()
    training: TrainingForm | None = None
    sweep: SweepForm | None = None
    paper_only: PaperOnlyForm | None = None
    needs: str | None = None

    @model_validator(mode="after")
    def _judged_somehow(self) -> ClaimSpec:
        if unsaid := [form.test for form in self.also if form.states is None]:
            raise ValueError(f"claim {self.id!r}: its further form {unsaid[0]!r} does not say what it states")
        forms = (self.literal, self.transfer, self.training, self.sweep, self.paper_only)
        if all(form is None for form in forms) and not self.needs:
            raise ValueError(f"claim {self.id!r}: give a form, or needs: what it would take")
        return self

    @model_validator(mode="after")
    def _measures_what_it_states(self) -> ClaimSpec:
        if self.measures and (self.literal is None or self.unmeasured is not None):
            raise ValueError(f"claim {self.id!r}: measures go with a literal form, and not with unmeasured")
        for measure in self.measures:
            try:
                measure.printed(self.value)
            except ValueError as error:
                raise ValueError(f"claim {self.id!r} {error}") from error
        return self


class MeasuredLimits(Protocol):
    """What a run measured of its device."""

    @property
    def read_bandwidth_bytes_per_s(self) -> float: ...


class DecidingRule(Spec):
    """Which of several records decides a claim: those of one class of machines, the newest of a suite.

    `counts` is the suite for what no machine bends (tokens/step, losses, replays, parity), `speeds` the one
    for what times enter. A class of machines is a name, a band of the read bandwidth that a run measures, and
    what the processor says of itself (`details`: stepping, caches, ..; a record that does not hold one of
    them is placed without it). The name is that of one machine's folder, or the plain one of kind, device and
    cores: older records lie under it, and newer ones of any such machine count as well.
    Units: GB/s, from the first up to the second.
    """

    counts: str
    speeds: str
    machine: str
    details: dict[str, str] = Field(default_factory=dict)
    read_gb_per_s: tuple[float, float]
    reason: str = Field(min_length=1)

    @model_validator(mode="after")
    def _a_band(self) -> DecidingRule:
        low, high = self.read_gb_per_s
        if not 0 <= low < high:
            raise ValueError(f"read_gb_per_s is a band, from lower to higher: not {low:g} to {high:g}")
        return self

    def is_machine(self, name: str, details: Mapping[str, str], limits: MeasuredLimits | None) -> bool:
        """Return whether a run's machine is of the class; one without measured limits is of none."""
        low, high = self.read_gb_per_s
        return (
            name == self.machine
            and all(details.get(key, value) == value for key, value in self.details.items())
            and limits is not None
            and low <= limits.read_bandwidth_bytes_per_s / 1e9 < high
        )


class KnownClaim(Spec):
    """A claim that people ask about first, in words that need no paper."""

    claim: str = Field(min_length=1)
    words: str = Field(min_length=1)


class ClaimsFile(Spec):
    """A registry: roles of arms, shared texts and literal forms by name, and the claims.

    `groups` says, by the names of `needs`, where a claim stands that no record tests; `decides` which record
    decides one that several test. `forms` are forms that several claims share, and so decide together.
    `known` are the claims of a README's short table, in its order; the first is the headline's.
    One that is no claim of the file is passed over, so that a copy with fewer claims is a registry, too.
    """

    schema_version: Literal[1]
    roles: dict[str, str] = Field(default_factory=dict)
    decides: DecidingRule | None = None
    needs: dict[str, str] = Field(default_factory=dict)
    groups: dict[str, Group] = Field(default_factory=dict)
    literal: dict[str, LiteralForm] = Field(default_factory=dict)
    forms: dict[str, TransferForm | TrainingForm] = Field(default_factory=dict)
    known: tuple[KnownClaim, ...] = Field(default=(), max_length=12)
    claims: tuple[ClaimSpec, ...]

    def group_of(self, claim: ClaimSpec) -> Group:
        """Return where a claim stands that no record tests."""
        if claim.kind in ("derived", "inconsistency"):
            return "consistency"
        if claim.kind != "claim":
            return "no claim"
        name = next((name for name, text in self.needs.items() if text == claim.needs), None)
        return self.groups.get(name or "", "weights" if claim.literal is not None else "open")

    @model_validator(mode="after")
    def _distinct(self) -> ClaimsFile:
        seen: set[str] = set()
        for claim in self.claims:
            if claim.id in seen:
                raise ValueError(f"claim {claim.id!r} stands twice")
            seen.add(claim.id)
        return self


def load_claims(path: Path | None = None, *, roles: Mapping[str, str] | None = None) -> tuple[ClaimSpec, ...]:
    """Return the claims of a registry file. Arguments and errors are those of `load_registry`."""
    return load_registry(path, roles=roles).claims


def load_registry(path: Path | None = None, *, roles: Mapping[str, str] | None = None) -> ClaimsFile:
    """Return a registry file, roles and shared texts filled in; without a path the one that ships.

    `roles` overrides which arm of the suite plays a role, such as {"optimised": "searched_64"}.
    Raises: UserError for an unreadable file, an unknown key, role, text or literal form, or an id that stands
    twice.
    """
    path = CLAIMS_FILE if path is None else path

    def prepare(data: dict[str, Any]) -> dict[str, Any]:
        if roles is not None:
            data = {**data, "roles": _overridden(data.get("roles", {}), roles, where=path.name)}
        return _filled(data, where=path.name)

    return read_toml(path, ClaimsFile, noun="a claims file", prepare=prepare, key_of=_key)


def _overridden(given: Any, roles: Mapping[str, str], *, where: str) -> dict[str, str]:
    if not isinstance(given, dict):
        raise UserError(found=f"roles = {reprlib.repr(given)}", need="a table [roles]", where=where)
    if unknown := sorted(set(roles) - set(given)):
        raise UserError(found=f"role {unknown[0]!r}", need=f"one of {', '.join(sorted(given))}", where=where)
    return {**given, **roles}


def _filled(data: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The registry with names of roles, needs and literal forms replaced by what they stand for."""
    claims = data.get("claims")
    if not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
        return data
    return {
        **data,
        "claims": [
            _filled_claim(claim, data, where=f"{where}, claim {claim.get('id')!r}") for claim in claims
        ],
    }


def _filled_claim(claim: dict[str, Any], data: dict[str, Any], *, where: str) -> dict[str, Any]:
    def look_up(table: str, name: str) -> Any:
        entries = data.get(table, {})
        if not isinstance(entries, dict):
            raise UserError(
                found=f"{table} = {reprlib.repr(entries)}", need=f"a table [{table}]", where=where
            )
        if name not in entries:
            raise UserError(
                found=f"{table} {name!r}", need=f"one of {', '.join(sorted(entries))}", where=where
            )
        return entries[name]

    filled = dict(claim)
    for key in ("needs", "literal", "transfer", "training"):
        if isinstance(filled.get(key), str):
            filled[key] = look_up(key if key in ("needs", "literal") else "forms", filled[key])

    def with_arms(form: dict[str, Any]) -> dict[str, Any]:
        named = dict(form)
        for key in ROLE_KEYS:
            role = form.get(key)
            if isinstance(role, str):
                named[key] = look_up("roles", role)
            elif isinstance(role, list) and all(isinstance(name, str) for name in role):
                named[key] = [look_up("roles", name) for name in role]
        return named

    if isinstance(transfer := filled.get("transfer"), dict):
        filled["transfer"] = with_arms(transfer)
    for key in ("also", "measures"):
        if isinstance(forms := filled.get(key), list) and all(isinstance(form, dict) for form in forms):
            filled[key] = [with_arms(form) for form in forms]
    return filled


def _key(data: dict[str, Any], location: tuple[int | str, ...]) -> str:
    """The key at fault, with a claim's id in place of its index."""
    parts = [str(part) for part in location] or ["claims file"]
    if len(location) > 1 and location[0] == "claims" and isinstance(location[1], int):
        claim = data["claims"][location[1]]
        parts[1] = str(claim.get("id", location[1])) if isinstance(claim, dict) else str(location[1])
    return ".".join(parts)
