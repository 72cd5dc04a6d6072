"""Where every claim stands over the committed records, and which record decides it."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from harness.judge.claims.standing import Records, Standing, finished_records, standings
from harness.judge.judgement import VerdictKind
from harness.report.claims import CLAIMS_PAGE, GROUPS, render_claims_page
from harness.report.readme import claims_block
from harness.specs.claims import ClaimsFile, Group, load_registry
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
    assert all(one.decides is not None and one.claim.kind in ("claim", "definition") for one in decided)


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
    assert all(f"| {claim.id} " in page for claim in registry.claims)
    assert shows(ROOT / "README.md", claims_block(found, results=RESULTS))
