"""The page of all claims: every entry of the registry once, in the group where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.judge.claims.standing import RecordVerdict, Standing
from harness.report.formatting import ABSENT, count, page, paragraphs, section, table
from harness.report.tables.run import marked_verdict
from harness.specs.claims import ClaimsFile, Group

CLAIMS_PAGE = "claims.md"
GROUPS: dict[Group, str] = {
    "decided": "Decided",
    "open": "Open",
    "cannot": "Cannot be decided here",
    "gpu": "Needs a GPU only",
    "weights": "Needs the published weights",
    "judge": "Needs a judge",
    "consistency": "The paper's consistency: statements of this project",
    "no claim": "No claim to test",
}
_NOTE = """\
*record*: the one that decides, by the rule above, whatever it finds. In brackets after a verdict: what it is
with other values of settings that are this project's own. *elsewhere*: what other records find by the same
test, where it is not the same. A claim that fails is a finding, not an error."""


def render_claims_page(registry: ClaimsFile, standings: Sequence[Standing]) -> str:
    """Return the page: counts, the rule, and each group's claims. It lies in the results folder."""
    rule = registry.decides
    return page(
        "# Where every claim stands",
        f"{count(len(standings), 'entry', plural='entries')} of the registry, once each. "
        "`medusa-repro claims` makes this page from the finished records next to it.",
        render_counts(standings),
        f"Where several records test a claim, this decides: {rule.reason}" if rule is not None else "",
        *(_render_group(group, title, standings) for group, title in GROUPS.items()),
    )


def render_counts(standings: Sequence[Standing]) -> str:
    """Return how many entries stand in each group, and how many of them are claims of the paper's."""
    rows = []
    for group, title in GROUPS.items():
        held = [one for one in standings if one.group == group]
        rows.append((title, len(held), sum(one.claim.kind == "claim" for one in held)))
    whole = ("all", len(standings), sum(one.claim.kind == "claim" for one in standings))
    return table(["group", "entries", "of them claims"], [*rows, whole])


def render_readme_claims(standings: Sequence[Standing], *, results: Path, base: Path) -> str:
    """Return what a README says of all claims together: a sentence, the counts, the link to the page."""
    decided = [one for one in standings if one.group == "decided" and one.claim.kind == "claim"]
    held = sum(one.decides is not None and one.decides.verdict.kind.value == "reproduced" for one in decided)
    tests = {
        (one.decides.record, one.decides.verdict.ours, one.decides.verdict.reason)
        for one in decided
        if one.decides is not None
    }
    alone = sum(one.decides is not None and one.decides.verdict.form == "paper-only" for one in decided)
    claims = sum(one.claim.kind == "claim" for one in standings)
    link = (results / CLAIMS_PAGE).resolve().relative_to(base.resolve()).as_posix()
    return paragraphs(
        f"Over all records {len(decided)} of the {claims} claims are decided, by "
        f"{count(len(tests), 'different test')}: {held} reproduced, {len(decided) - held} not reproduced; "
        f"{alone} of them by arithmetic with the paper's figures alone.",
        render_counts(standings),
        f"Each claim with the record that decides it: [`{CLAIMS_PAGE}`]({link}).",
    )


def _render_group(group: Group, title: str, standings: Sequence[Standing]) -> str:
    held = [one for one in standings if one.group == group]
    if not held:
        return ""
    if any(one.decides is not None for one in held):
        headers = ["claim", "what is stated", "paper", "ours", "verdict", "record", "elsewhere"]
        return section(title, table(headers, [_decided_row(one) for one in held]), _NOTE)
    rows = [(_named(one), one.claim.stated, one.claim.figure or ABSENT, _needs(one)) for one in held]
    return section(title, table(["claim", "what is stated", "paper", "what it would take"], rows))


def _decided_row(one: Standing) -> tuple[object, ...]:
    if one.decides is None:
        figure = one.claim.figure or ABSENT
        return (_named(one), one.claim.stated, figure, ABSENT, _needs(one), ABSENT, ABSENT)
    verdict = one.decides.verdict
    return (
        _named(one),
        verdict.stated,
        verdict.paper_figure or ABSENT,
        verdict.ours,
        marked_verdict(verdict),
        _link(one.decides),
        "; ".join(f"{other.verdict.kind.value} ({_link(other)})" for other in one.differing) or ABSENT,
    )


def _link(found: RecordVerdict) -> str:
    if found.verdict.form == "paper-only":
        return "arithmetic"
    return f"[{' '.join(found.record.split('/')[:-1])}]({found.record}/report.md)"


def _named(one: Standing) -> str:
    return f"{one.claim.id} ({one.claim.place})" if one.claim.place else one.claim.id


def _needs(one: Standing) -> str:
    literal = one.claim.literal
    return one.claim.needs or (f"{literal.backbone} with {literal.heads}" if literal is not None else ABSENT)
