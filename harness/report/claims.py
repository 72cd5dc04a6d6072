"""The page of all claims: every entry of the registry once, in the group where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.judge.claims.standing import RecordVerdict, Standing
from harness.report.formatting import ABSENT, count, page, paragraphs, section, table
from harness.report.tables.run import marked_verdict, named_claims
from harness.report.tables.words import WORDS_NOTE, shown
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
with other values of settings that are this project's own. *power*: how often samples of this size and spread
say that it holds, at the size that the paper states, where there is no difference, or from which size on in
80 %; and at the bound itself, where it is an error. *elsewhere*: what other records find by the same
test, where it is not the same; of a speed it says where that machine shares no more than the name.
"""
_NOTE += WORDS_NOTE


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
    tests = _by_test(decided)
    found = [group[0].decides.verdict for group in tests if group[0].decides is not None]
    held = sum(verdict.kind.value == "reproduced" for verdict in found)
    alone = sum(verdict.form == "paper-only" for verdict in found)
    claims = sum(one.claim.kind == "claim" for one in standings)
    others = [one for one in standings if one.is_decided_elsewhere and one.claim.kind == "claim"]
    named = ", ".join(one.claim.id for one in others)
    elsewhere = (
        f" On other classes of machines alone {named} are decided, each by a test of its own: speeds that "
        "turn on the machine."
        if others
        else ""
    )
    link = (results / CLAIMS_PAGE).resolve().relative_to(base.resolve()).as_posix()
    return paragraphs(
        f"Over all records {len(decided)} of the {claims} claims are decided, by "
        f"{count(len(tests), 'different test')}: {held} hold, {len(tests) - held} do not; "
        f"{count(alone, 'test')} rest on arithmetic with the paper's figures alone.{elsewhere}",
        render_counts(standings),
        f"Each claim with the record that decides it: [`{CLAIMS_PAGE}`]({link}).",
    )


def _render_group(group: Group, title: str, standings: Sequence[Standing]) -> str:
    held = [one for one in standings if one.group == group]
    if not held:
        return ""
    if any(one.decides is not None for one in held):
        headers = ["claim", "what is stated", "paper", "ours", "verdict", "power", "record", "elsewhere"]
        return section(title, table(headers, [_decided_row(group) for group in _by_test(held)]), _NOTE)
    rows = [
        (
            named_claims([(one.claim.id, one.claim.place)]),
            one.claim.stated,
            one.claim.figure or ABSENT,
            _needs(one),
        )
        for one in held
    ]
    return section(title, table(["claim", "what is stated", "paper", "what it would take"], rows))


def _by_test(standings: Sequence[Standing]) -> list[list[Standing]]:
    """Return standings in groups: claims that one test of one record decides together are one."""
    groups: dict[object, list[Standing]] = {}
    for one in standings:
        found = one.decides
        test = one.claim.id if found is None else (found.record, found.verdict.ours, found.verdict.reason)
        groups.setdefault(test, []).append(one)
    return list(groups.values())


def _decided_row(group: Sequence[Standing]) -> tuple[object, ...]:
    one = group[0]
    named = named_claims([(other.claim.id, other.claim.place) for other in group])
    figure = ", ".join(dict.fromkeys(other.claim.figure for other in group if other.claim.figure)) or ABSENT
    if one.decides is None:
        return (named, one.claim.stated, figure, ABSENT, _needs(one), ABSENT, ABSENT, ABSENT)
    verdict = one.decides.verdict
    return (
        named,
        verdict.stated,
        figure,
        verdict.ours,
        marked_verdict(verdict),
        verdict.power or ABSENT,
        _link(one.decides),
        "; ".join(_differing(one, other) for other in one.differing) or ABSENT,
    )


def _differing(standing: Standing, other: RecordVerdict) -> str:
    """Return what another record finds, and why it is another machine where its name is the same."""
    mine, apart = standing.decides, standing.apart(other)
    is_one_name = mine is not None and mine.record.split("/")[-2] == other.record.split("/")[-2]
    why = f"; {apart}" if apart is not None and is_one_name else ""
    return f"{shown(other.verdict)} ({_link(other)}{why})"


def _link(found: RecordVerdict) -> str:
    if found.verdict.form == "paper-only":
        return "arithmetic"
    return f"[{' '.join(found.record.split('/')[:-1])}]({found.record}/report.md)"


def _needs(one: Standing) -> str:
    literal = one.claim.literal
    return one.claim.needs or (f"{literal.backbone} with {literal.heads}" if literal is not None else ABSENT)
