"""Every paper-only form on the shipped registry, and on figures changed so that it must say otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from harness.judge.claims.findings import NotTestable
from harness.judge.claims.paper import Figures, judge_paper_only
from harness.judge.judgement import VerdictKind
from harness.specs.claims import ClaimSpec, load_claims

YES, NO = VerdictKind.REPRODUCED, VerdictKind.NOT_REPRODUCED


@pytest.fixture(scope="module")
def registry() -> dict[str, ClaimSpec]:
    return {claim.id: claim for claim in load_claims()}


def _changed(registry: dict[str, ClaimSpec], claim_id: str, **values: Any) -> dict[str, ClaimSpec]:
    return {**registry, claim_id: registry[claim_id].model_copy(update=values)}


def _with_form(registry: dict[str, ClaimSpec], claim_id: str, **values: Any) -> dict[str, ClaimSpec]:
    form = registry[claim_id].paper_only
    assert form is not None
    return _changed(registry, claim_id, paper_only=form.model_copy(update=values))


def _kind(registry: dict[str, ClaimSpec], claim_id: str) -> VerdictKind:
    claim = registry[claim_id]
    assert claim.paper_only is not None
    finding = judge_paper_only(claim, claim.paper_only, figures=Figures(registry))
    assert finding.ours and finding.reason
    return finding.kind


@pytest.mark.parametrize(
    ("claim_id", "kind"),
    [
        ("CK1", YES),
        ("CK2", YES),
        ("CK3", YES),
        ("CK4", YES),
        ("CK5", YES),
        ("RL-OI", YES),
        ("RL-44", YES),
        ("RL-lat7", YES),
        ("RL-lat8", YES),
        ("RL-acc", NO),  # 0.477 log 64 is 1.98 or 2.86, Table 1 has 3.47
        ("RL-64", NO),  # the ideal roofline peaks where the linear layers reach the ridge, at 170
        ("RL-32", YES),
        ("RL-seq", YES),
    ],
)
def test_the_papers_figures(registry: dict[str, ClaimSpec], claim_id: str, kind: VerdictKind) -> None:
    assert _kind(registry, claim_id) is kind


def test_other_settings_give_the_other_word(registry: dict[str, ClaimSpec]) -> None:
    assert _kind(_with_form(registry, "RL-acc", tolerance=0.2), "RL-acc") is YES
    assert _kind(_with_form(registry, "RL-64", num_nodes=170), "RL-64") is YES
    assert _kind(_with_form(registry, "RL-32", log_base=2.718281828459045), "RL-32") is NO
    assert _kind(_with_form(registry, "RL-seq", context_tokens=(8192, 128)), "RL-seq") is NO


def test_an_incomplete_count_of_intensities_is_not_a_success(registry: dict[str, ClaimSpec]) -> None:
    assert _kind(_changed(registry, "RL-OI", value=169.0), "RL-OI") is NO


@pytest.mark.parametrize(
    ("claim_id", "missing"),
    [
        ("CK1", "A1"),
        ("CK2", "T1-Vicuna7B-S"),
        ("CK3", "T4-Vicuna-7b"),
        ("RL-OI", "RL-T7"),
        ("RL-lat7", "RL-T7"),
    ],
)
def test_a_registry_without_the_figure_is_not_testable(
    registry: dict[str, ClaimSpec], claim_id: str, missing: str
) -> None:
    rest = {key: claim for key, claim in registry.items() if key != missing}
    with pytest.raises(NotTestable, match=missing):
        _kind(rest, claim_id)
    with pytest.raises(NotTestable, match=missing):
        _kind(_changed(registry, missing, value="none", table=None), claim_id)


def test_an_unknown_device_is_not_testable(registry: dict[str, ClaimSpec]) -> None:
    with pytest.raises(NotTestable, match="no device abacus"):
        _kind(_with_form(registry, "RL-64", device="abacus"), "RL-64")
