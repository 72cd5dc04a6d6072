"""Where every claim stands over the committed records, and which record decides it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import get_args

import pytest
from pydantic import ValidationError

from harness.judge.claims.standing import Records, Standing, finished_records, standings
from harness.judge.judgement import VerdictKind
from harness.judge.run import judge
from harness.records.run import RunRecord
from harness.records.trials import Failure
from harness.report.claims import (
    CLAIMS_PAGE,
    GROUPS,
    render_claims_page,
    render_kinds,
    render_readme_answer,
    render_weights,
    weight_of,
)
from harness.report.formatting import ratio_interval
from harness.report.readme import answer_block, claims_block
from harness.report.tables.ending import answer
from harness.report.tables.words import shown
from harness.specs.claims import ClaimsFile, DecidingRule, Group, load_registry
from harness.tests.readme_blocks import shows
from harness.tests.test_layers import ROOT

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def registry() -> ClaimsFile:
    return load_registry()


@pytest.fixture(scope="module")
def records() -> Records:
    return finished_records(RESULTS)


@pytest.fixture(scope="module")
def found(registry: ClaimsFile, records: Records) -> tuple[Standing, ...]:
    return standings(registry, records)


def test_every_entry_stands_once_in_one_of_eight_groups(
    registry: ClaimsFile, found: tuple[Standing, ...]
) -> None:
    assert [one.claim.id for one in found] == [claim.id for claim in registry.claims]
    assert set(GROUPS) == set(get_args(Group)) and len(GROUPS) == 8
    assert sum(Counter(one.group for one in found).values()) == len(registry.claims) == 233
    assert set(registry.groups) <= set(registry.needs)
    decided = [one for one in found if one.group == "decided"]
    assert all(
        one.decides is not None and one.claim.kind in ("claim", "definition", "repo") for one in decided
    )


def test_counts_are_decided_by_the_most_prompts_and_speeds_by_the_named_machine(
    found: tuple[Standing, ...],
) -> None:
    by_id = {one.claim.id: one for one in found}
    deciding = {
        "Q-loss": "embedded_full/cpu-amd-epyc-2c",
        "A6": "embedded_full/cpu-amd-epyc-2c",
        "A1": "embedded/cpu-amd-epyc-2c",
        "T3-1": "embedded/cpu-amd-epyc-2c",
        "A2": "embedded_training_long/cpu-amd-epyc-2c",
        "F5-3": "sweep/embedded/cpu-amd-epyc-2c",
    }
    for claim_id, folder in deciding.items():
        decides = by_id[claim_id].decides
        assert decides is not None and decides.record.startswith(f"{folder}/"), claim_id
    loss, speed = by_id["Q-loss"], by_id["A1"]
    assert loss.group == "open" and {one.verdict.kind for one in loss.differing} == {VerdictKind.REPRODUCED}
    newest = max(path.name for path in (RESULTS / "embedded" / "cpu-amd-epyc-2c").iterdir())
    assert speed.decides is not None and speed.decides.record.endswith(newest)
    assert any("cuda" in one.record for one in speed.differing)


def _read_at(record: RunRecord, *, gb_per_s: float) -> RunRecord:
    """Return a run as if its machine had read memory that fast."""
    limits = record.device_limits
    assert limits is not None
    changed = copy.copy(record)
    changed.__dict__["device_limits"] = limits.model_copy(
        update={"read_bandwidth_bytes_per_s": 1e9 * gb_per_s}
    )
    return changed


def _failing(record: RunRecord) -> RunRecord:
    """Return a run as if its first trial had failed."""
    first = record.outcomes[0].trial
    changed = copy.copy(record)
    failure = Failure(trial=first, error_type="RuntimeError", message="planted", order=0)
    others = (one for one in record.outcomes if one.trial != first)
    changed.__dict__.update(outcomes=(failure, *others))
    changed.__dict__.pop("generations", None)
    return changed


def _deciding(registry: ClaimsFile, runs: list[tuple[str, RunRecord]], claim_id: str) -> Standing:
    """Return where one claim stands over some runs; the others are not judged."""
    (claim,) = (one for one in registry.claims if one.id == claim_id)
    (standing,) = standings(registry.model_copy(update={"claims": (claim,)}), Records(runs, [], []))
    return standing


def test_a_run_decides_whatever_it_finds_where_the_rule_names_it(
    registry: ClaimsFile, records: Records
) -> None:
    (large,) = (one for one in records.runs if one[1].suite.name == "embedded_full")
    small = [one for one in records.runs if one[1].suite.name == "embedded"]
    standing = _deciding(registry, [*small, large], "Q-loss")
    assert standing.decides is not None and standing.decides.record == large[0]
    assert standing.decides.verdict.kind is VerdictKind.INCONCLUSIVE and standing.group == "open"
    assert {one.verdict.kind for one in standing.differing} == {VerdictKind.REPRODUCED}


def test_a_run_with_a_failed_trial_decides_nothing(registry: ClaimsFile, records: Records) -> None:
    (large,) = (one for one in records.runs if one[1].suite.name == "embedded_full")
    small = [one for one in records.runs if one[1].suite.name == "embedded"]
    standing = _deciding(registry, [(large[0], _failing(large[1])), *small], "Q-loss")
    assert standing.decides is not None and standing.decides.record != large[0]
    assert not _deciding(registry, [(large[0], _failing(large[1]))], "Q-loss").decides


def test_speeds_need_a_machine_of_the_named_class_by_its_bandwidth(
    registry: ClaimsFile, records: Records
) -> None:
    rule = registry.decides
    assert rule is not None
    older, newer = sorted(
        (one for one in records.runs if one[0].startswith(f"embedded/{rule.machine}/")),
        key=lambda one: one[1].environment.started_utc,
    )
    low, high = rule.read_gb_per_s
    for newer_at, older_at, deciding in ((low, low, newer), (low - 1, low, older), (high, low, older)):
        at = ((newer, newer_at), (older, older_at))
        runs = [(name, _read_at(run, gb_per_s=speed)) for (name, run), speed in at]
        standing = _deciding(registry, runs, "A1")
        assert standing.decides is not None and standing.decides.record == deciding[0]


def test_a_class_of_machines_goes_by_what_the_processor_says_where_a_record_holds_it(
    registry: ClaimsFile, records: Records
) -> None:
    rule = registry.decides
    assert rule is not None
    limits = next(run.device_limits for name, run in records.runs if name.startswith("embedded/cpu"))
    named = rule.model_copy(update={"details": {"stepping": "1", "hypervisor": "yes"}})
    low = limits and limits.model_copy(update={"read_bandwidth_bytes_per_s": 1e9 * rule.read_gb_per_s[0]})
    for details, is_one in (
        ({}, True),
        ({"capability": "AVX2"}, True),
        ({"stepping": "1"}, True),
        ({"stepping": "1", "hypervisor": "no"}, False),
        ({"stepping": "2", "hypervisor": "yes"}, False),
    ):
        assert named.is_machine(rule.machine, details, low) is is_one
    assert not named.is_machine("another", {}, low) and not named.is_machine(rule.machine, {}, None)


@pytest.mark.parametrize("band", [(60.0, 60.0), (60.0, 45.0), (-1.0, 60.0), (60.0, float("inf"))])
def test_a_band_of_bandwidth_goes_from_lower_to_higher(band: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="read_gb_per_s"):
        DecidingRule(counts="a", speeds="b", machine="c", read_gb_per_s=band, reason="one")


def test_speeds_that_turn_on_the_machine_are_told_from_what_more_prompts_leave_open(
    registry: ClaimsFile, found: tuple[Standing, ...]
) -> None:
    by_id = {one.claim.id: one for one in found}
    elsewhere = {name for name, one in by_id.items() if one.is_decided_elsewhere}
    assert {"T3-1", "T3-2"} <= elsewhere
    assert all(by_id[name].group in ("open", "cannot") for name in elsewhere)
    # a loss is no speed: other records, of fewer prompts, decide it, and their machines are not why
    assert by_id["Q-loss"].differing and "Q-loss" not in elsewhere
    assert not any(one.is_decided_elsewhere for one in standings(registry, Records([], [], [])))


def test_without_records_nothing_is_decided(registry: ClaimsFile) -> None:
    found = standings(registry, Records([], [], []))
    counts = Counter(one.group for one in found)
    assert counts["decided"] == 0 and sum(counts.values()) == 233
    assert {one.claim.kind for one in found if one.group == "no claim"} == {
        "claim",
        "repo",
        "definition",
        "hyperparameter",
        "third_party",
    }


def test_the_committed_page_and_the_readme_show_what_the_records_give(
    registry: ClaimsFile, found: tuple[Standing, ...]
) -> None:
    page = (RESULTS / CLAIMS_PAGE).read_text(encoding="utf-8")
    assert page == render_claims_page(registry, found)
    first_cells = [
        line.split(" | ")[0].removeprefix("| ") for line in page.split("\n") if line.startswith("| ")
    ]
    named = [claim_id for cell in first_cells for claim_id in cell.split(" (")[0].split(", ")]
    ids = {claim.id for claim in registry.claims}
    assert sorted(claim_id for claim_id in named if claim_id in ids) == sorted(ids)
    assert shows(RESULTS / "README.md", claims_block(found, results=RESULTS))
    assert shows(ROOT / "README.md", answer_block(registry, found, results=RESULTS))


def test_the_answer_is_told_by_the_record_that_decides_the_headline(
    registry: ClaimsFile, found: tuple[Standing, ...]
) -> None:
    text = render_readme_answer(registry, found, results=RESULTS, base=ROOT)
    headline = next(one for one in found if one.claim.id == registry.known[0].claim)
    assert headline.decides is not None
    record = RunRecord.open(RESULTS / headline.decides.record)
    where = "one AMD EPYC (cpu)"
    assert text.startswith(f"**{answer(record, judge(record), where=where)}** Its tree has 4 nodes. With 64 ")
    (large,) = [one for one in judge(record, claims=()).comparisons if one.arm == "optimised"]
    assert f"(`optimised`) it is {ratio_interval(large.speedup)}, since a step then costs" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(registry.known) <= 12
    by_id = {one.claim.id: one for one in found}
    for row, known in zip(rows, registry.known, strict=True):
        decides = by_id[known.claim].decides
        assert known.words in row
        assert decides is None or (
            shown(decides.verdict) in row and f"(results/{decides.record}/report.md)" in row
        )
    assert "*Direction holds*: the claim's shape" in text


def test_entries_are_counted_by_weight_and_by_kind(found: tuple[Standing, ...]) -> None:
    claims = [one for one in found if one.claim.kind == "claim"]
    for rendered, whole in ((render_weights(found), len(claims)), (render_kinds(found), len(found))):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in rendered.splitlines()[2:]]
        held = [int(row[1]) for row in rows if row[0] != "all"]
        assert sum(held) == whole
        decided = [int(row[2]) for row in rows if row[0] != "all"]
        assert all(few <= many for few, many in zip(decided, held, strict=True))
    assert [
        weight_of(place) for place in ("Abstract; Section 1", "Table 3", "Fig 4", "App. B.1", "README")
    ] == [
        "abstract",
        "tables and figures",
        "tables and figures",
        "appendix",
        "code, blog and other papers",
    ]


def test_known_claims_are_claims_of_the_registry(registry: ClaimsFile) -> None:
    assert {one.claim for one in registry.known} <= {claim.id for claim in registry.claims}
