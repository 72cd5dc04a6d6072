"""The page of all claims: every entry of the registry once, in the group where it stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from harness.judge.anatomy.oracle import oracles
from harness.judge.claims.standing import RecordVerdict, Standing
from harness.judge.judgement import Judgement
from harness.judge.run import judge
from harness.records.run import RunRecord
from harness.report.anatomy.oracle import oracle_sentence
from harness.report.figures.run import SPEED_FILE, speed_title
from harness.report.formatting import (
    ABSENT,
    cell,
    count,
    page,
    paragraphs,
    percent,
    ratio_interval,
    section,
    table,
)
from harness.report.provenance import describe_origin, path_within
from harness.report.tables.ending import answer
from harness.report.tables.run import comparisons_by_arm, headline_arm, marked_verdict, named_claims
from harness.report.tables.words import WORDS_NOTE, shown
from harness.specs.claims import ClaimsFile, Group

CLAIMS_PAGE = "claims.md"
_WEIGHTS = ("abstract", "tables and figures", "text", "appendix", "code, blog and other papers")
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
        "The claims among them, by where the paper makes them:",
        render_weights(standings),
        "All entries, by their kind:",
        render_kinds(standings),
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


def weight_of(place: str) -> str:
    """Return where in the paper something is stated, by how much of the paper rests on it."""
    if place.startswith("Abstract"):
        return "abstract"
    if re.match(r"(Table|Fig)", place):
        return "tables and figures"
    if place.startswith("App"):
        return "appendix"
    return "text" if place.startswith("Section") else "code, blog and other papers"


def render_weights(standings: Sequence[Standing]) -> str:
    """Return how many claims of each weight are decided, open or out of reach."""
    rows = []
    claims = [one for one in standings if one.claim.kind == "claim"]
    for weight in _WEIGHTS:
        held = [one for one in claims if weight_of(one.claim.place) == weight]
        decided = sum(one.group == "decided" for one in held)
        rows.append(
            (weight, len(held), decided, *_left(held), percent(decided / len(held) if held else None))
        )
    decided = sum(one.group == "decided" for one in claims)
    whole = ("all", len(claims), decided, *_left(claims), percent(decided / len(claims) if claims else None))
    headers = ["stated in", "claims", "decided", "open", "out of reach here", "share decided"]
    return table(headers, [*rows, whole])


def _left(held: Sequence[Standing]) -> tuple[int, int]:
    """Return how many are open, and how many need what is not at hand or cannot be decided here."""
    opens = sum(one.group == "open" for one in held)
    return opens, sum(one.group not in ("decided", "open") for one in held)


def render_kinds(standings: Sequence[Standing]) -> str:
    """Return how many entries there are of each kind, and how many of them are decided."""
    kinds = dict.fromkeys(one.claim.kind for one in standings)
    rows = [
        (
            kind,
            sum(one.claim.kind == kind for one in standings),
            sum(one.claim.kind == kind and one.group == "decided" for one in standings),
        )
        for kind in kinds
    ]
    return table(["kind", "entries", "decided"], rows)


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


def render_readme_answer(
    registry: ClaimsFile, standings: Sequence[Standing], *, results: Path, base: Path
) -> str:
    """Return a README's answer: the headline run in a sentence, its picture, and the claims people know.

    The headline run is the record that decides the first known claim.
    """
    by_id = {one.claim.id: one for one in standings}
    known = {one.claim: one.words for one in registry.known if one.claim in by_id}
    rows = [_known_row(by_id[claim], words, results=results, base=base) for claim, words in known.items()]
    claims = [one for one in standings if one.claim.kind == "claim"]
    decided = sum(one.group == "decided" for one in claims)
    return paragraphs(
        *_headline_run(by_id[next(iter(known))] if known else None, results=results, base=base),
        f"{decided} of the {len(claims)} claims are decided so far; these are those that people ask about. "
        "*vanilla*: the model alone, on the same engine. Brackets hold 95 % intervals over prompts.",
        WORDS_NOTE,
        table(["the paper says", "here", "our figure", "the paper's", "record"], rows) if rows else "",
    )


def _headline_run(found: Standing | None, *, results: Path, base: Path) -> tuple[str, ...]:
    """Return sentence, origin and picture of the run that decides a claim; nothing without one."""
    if found is None or found.decides is None or found.decides.source != "run":
        return ()
    record = RunRecord.open(results / found.decides.record)
    judgement = judge(record, claims=[found.claim])
    record = record.withholding(judgement.withheld)
    about = f"Measured with {describe_origin(record.environment)}."
    best = next(
        (one for one in oracles(record) if (arm := headline_arm(record, judgement)) and one.arm == arm.arm),
        None,
    )
    home, picture = path_within(record.folder, base=base), record.folder / "figures" / SPEED_FILE
    title = " ".join(speed_title(record, judgement).split())
    image = f"![{cell(title)}]({home}/figures/{SPEED_FILE})" if home and picture.is_file() else ""
    where = f"one {record.environment.device.name} ({record.environment.device.kind})"
    told = [f"**{cell(answer(record, judgement, where=where))}**", _largest(record, judgement)]
    told.append(oracle_sentence(best) if best is not None else "")
    return " ".join(filter(None, told)), about, image


def _largest(record: RunRecord, judgement: Judgement) -> str:
    """Return what the headline arm's largest sibling does, where its tree is larger; else nothing."""
    arm, compared = headline_arm(record, judgement), comparisons_by_arm(judgement)
    if arm is None or not record.reports_speed:
        return ""
    backbone = record.suite.arm(arm.arm).backbone
    siblings = [
        one
        for one in judgement.arms
        if one.arm in record.suite.greedy_arms
        and one.arm in compared
        and record.suite.arm(one.arm).backbone == backbone
    ]
    largest = max(siblings, key=lambda one: (one.num_nodes, one.acceleration_rate.estimate), default=arm)
    if largest.num_nodes <= arm.num_nodes:
        return ""
    found = compared[largest.arm]
    return (
        f"Its tree has {count(arm.num_nodes, 'node')}. With {largest.num_nodes} nodes (`{largest.arm}`) it "
        f"is {ratio_interval(found.speedup)}, since a step then costs {ratio_interval(found.overhead)} times "
        "vanilla's."
    )


def _known_row(one: Standing, words: str, *, results: Path, base: Path) -> tuple[object, ...]:
    """Return a known claim's row: what is said, how it stands, both figures, and the record that decides."""
    figure = one.claim.figure or ABSENT
    if one.decides is None:
        return words, f"not tested: needs {_needs(one)}", ABSENT, figure, ABSENT
    verdict = one.decides.verdict
    link = path_within(results / one.decides.record, base=base)
    name = "/".join(one.decides.record.split("/")[:-2])
    return (
        f"{words} ({one.claim.id})",
        f"**{shown(verdict)}**",
        verdict.ours,
        figure,
        f"[{name}]({link}/report.md)" if link is not None else name,
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
