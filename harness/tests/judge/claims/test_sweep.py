"""Verdicts on thresholds, rules and temperatures: each form with text that makes it hold, fail, or go
untested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.compose.plan import SweepPlan
from harness.judge.claims.findings import NotTestable
from harness.judge.claims.sweep import sampled_counts, shared_prompts, slope, sweep_verdicts
from harness.judge.judgement import VerdictKind
from harness.judge.sweep import (
    best_by_heads,
    decoded_checks,
    dense_points,
    depth_of,
    drawn_cell,
    searches_compared,
    sparse_points,
)
from harness.records.sweep import SweepRecord
from harness.records.sweep_cells import SampledCell
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.sweep import SampledSetting
from harness.tests.fake_sweep import made_up_plan, made_up_spec, sampled_cells, write_sweep

FORMS = ("F5-1", "F5-3", "Q-temp")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SweepPlan:
    return made_up_plan(tmp_path_factory.mktemp("claims"), predicted=None)


@pytest.fixture(scope="module")
def record(plan: SweepPlan, tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    return write_sweep(tmp_path_factory.mktemp("records") / "record", plan)


@pytest.fixture(scope="module")
def claims() -> tuple[ClaimSpec, ...]:
    return load_claims()


class Sampled(SweepRecord):
    """A record whose sampled cells are given and whose other files are never read."""

    def __init__(self, folder: Path, cells: list[SampledCell]) -> None:
        super().__init__(folder)
        self.__dict__["cells"] = tuple(cells)
        self.__dict__["spec"] = made_up_spec()


def verdicts(
    folder: Path,
    claims: tuple[ClaimSpec, ...],
    *,
    rate: Callable[[SampledSetting], float] | None = None,
    likelihood: Callable[[SampledSetting], float] | None = None,
    keep: Callable[[SampledCell], bool] = lambda cell: True,
) -> dict[str, VerdictKind]:
    cells = [cell for cell in sampled_cells(made_up_spec(), rate=rate, likelihood=likelihood) if keep(cell)]
    return {
        verdict.claim_id: verdict.kind
        for verdict in sweep_verdicts(Sampled(folder, cells), claims=claims)
        if verdict.form == "transfer"
    }


def test_the_papers_trends_are_reproduced(tmp_path: Path, claims: tuple[ClaimSpec, ...]) -> None:
    found = verdicts(tmp_path, claims, likelihood=lambda setting: -1.0)
    assert found == dict.fromkeys(("Q-temp", "F5-1", "F5-3"), VerdictKind.REPRODUCED)


def test_other_trends_are_not(tmp_path: Path, claims: tuple[ClaimSpec, ...]) -> None:
    def rate(setting: SampledSetting) -> float:
        return {
            "typical": 1.5 + 2 * (setting.epsilon or 0) - setting.temperature / 2,
            "rejection": 2.0 + setting.temperature,
        }.get(setting.rule, 2.0)

    assert verdicts(tmp_path, claims, rate=rate) == dict.fromkeys(
        ("Q-temp", "F5-1", "F5-3"), VerdictKind.NOT_REPRODUCED
    )


@pytest.mark.parametrize("gain", [-0.5, 0.4])
def test_faster_text_that_is_as_likely_alone_is_similar(
    gain: float, tmp_path: Path, claims: tuple[ClaimSpec, ...]
) -> None:
    """0.1 nats a token are allowed either way. Only less likely text counted once, so that truncation, which
    makes text more likely by construction, could not fail. F5-1 does not judge by likelihood at all.
    """

    def likelihood(setting: SampledSetting) -> float:
        return -1.5 + gain - (setting.epsilon or 0.0) if setting.rule == "typical" else -1.5

    found = verdicts(tmp_path, claims, likelihood=likelihood)
    assert found["F5-3"] is VerdictKind.NOT_REPRODUCED
    assert found["F5-1"] is found["Q-temp"] is VerdictKind.REPRODUCED


def test_no_trend_is_open(tmp_path: Path, claims: tuple[ClaimSpec, ...]) -> None:
    found = verdicts(
        tmp_path, claims, rate=lambda setting: 2.0 + 0.001 * hash_of(setting), likelihood=lambda setting: -1.0
    )
    assert found["Q-temp"] is not VerdictKind.REPRODUCED and found["F5-1"] is not VerdictKind.REPRODUCED


def hash_of(setting: SampledSetting) -> float:
    """Some number that follows neither temperature nor threshold."""
    return float(sum(map(ord, setting.words)) % 7)


@pytest.mark.parametrize(
    ("rule", "untested"),
    [("rejection", {"Q-temp", "F5-3"}), ("typical", {"Q-temp", "F5-1", "F5-3"}), ("greedy", set())],
)
def test_what_was_not_run_is_not_tested(
    rule: str, untested: set[str], tmp_path: Path, claims: tuple[ClaimSpec, ...]
) -> None:
    found = verdicts(tmp_path, claims, keep=lambda cell: cell.setting.rule != rule)
    assert {claim_id for claim_id, kind in found.items() if kind is VerdictKind.NOT_TESTED} == untested


def test_too_few_thresholds_say_so(tmp_path: Path, claims: tuple[ClaimSpec, ...]) -> None:
    cells = [cell for cell in sampled_cells(made_up_spec()) if cell.setting.epsilon in (None, 0.09)]
    verdict = next(
        one for one in sweep_verdicts(Sampled(tmp_path, cells), claims=claims) if one.claim_id == "F5-1"
    )
    assert verdict.kind is VerdictKind.NOT_TESTED and verdict.figure_kind is None
    assert verdict.reason == "1 thresholds with delta = sqrt(epsilon) at T 0.7, 5 are needed"


def test_slope_is_least_squares() -> None:
    at = [0.1, 0.3, 0.9, 1.0]
    values = [np.array([2.0 + 3 * x, 1.0]) for x in at]
    assert slope(values, at).tolist() == pytest.approx([3.0, 0.0])
    noisy = [np.array([y]) for y in (1.0, 2.5, 2.0, 4.0)]
    assert slope(noisy, at)[0] == pytest.approx(np.polyfit(at, [1.0, 2.5, 2.0, 4.0], 1)[0])


def test_counts_join_the_seeds_of_a_prompt(record: SweepRecord) -> None:
    cell = next(cell for cell in record.sampled if cell.setting.rule == "typical")
    prompts = shared_prompts([cell])
    assert prompts == ("p0", "p1", "p2", "p3")
    tokens, steps, texts, likelihood = sampled_counts(cell, prompts=prompts)
    rows = [row for row in cell.rows if row.prompt_key == "p1"]
    assert len(rows) == 2
    assert tokens[1] == sum(row.num_tokens - 1 for row in rows) == sum(sum(row.step_tokens) for row in rows)
    assert steps[1] == 40 and texts[1] == tokens[1] + 2
    assert likelihood[1] == pytest.approx(sum(row.log_likelihood for row in rows))


def test_settings_without_a_common_prompt(record: SweepRecord) -> None:
    first, second = record.sampled[1:3]
    other = second.model_copy(
        update={"rows": tuple(row.model_copy(update={"prompt_key": "q"}) for row in second.rows)}
    )
    with pytest.raises(NotTestable, match="share no prompt"):
        shared_prompts([first, other])


def test_decoded_points_beside_their_composition(record: SweepRecord) -> None:
    right, wrong = decoded_checks(record)
    measured = sum(row.vanilla_s for row in record.decoded[0].rows) / sum(
        row.medusa_s for row in record.decoded[0].rows
    )
    assert right.measured.estimate == pytest.approx(measured) and right.measured.num_prompts == 6
    assert right.gap == pytest.approx(0, abs=1e-9) and right.is_within
    assert wrong.gap == pytest.approx(0.2) and not wrong.is_within
    assert (right.num_ties, right.num_bugs) == (1, 0)
    assert replace(right, composed=2 * right.composed).gap == pytest.approx(1.0)


def test_points_of_a_figure(record: SweepRecord) -> None:
    one = drawn_cell(record)
    assert one is not None and one.kind == "composed"
    sparse = sparse_points(record, cell=one)
    assert [point.num_nodes for point in sparse] == [2, 8, 16, 96]
    assert sparse[-1].tokens_per_s is None  # 96 nodes were not timed
    assert sparse[0].tokens_per_s == one.tokens_per_s[one.trees.index(sparse[0].tree)]
    for point in sparse:
        rivals = [
            place
            for place, tree in enumerate(record.trees.trees)
            if len(tree.paths) == point.num_nodes and {"joint", "marginals"} & set(tree.families)
        ]
        assert record.trees.calibrated[point.tree] == max(record.trees.calibrated[place] for place in rivals)
    assert {point.num_nodes for point in dense_points(record)} <= {13, 15, 16}


def test_more_heads_never_choose_worse_on_the_calibration_trace(record: SweepRecord) -> None:
    found = best_by_heads(record, num_nodes=16)
    assert list(found) == [1, 2, 4]
    rates = [record.trees.calibrated[point.tree] for point in found.values()]
    assert rates == sorted(rates)
    assert all(depth_of(record.trees.trees[point.tree]) <= heads for heads, point in found.items())


def test_searches_are_counted(record: SweepRecord) -> None:
    better, same, ratio = searches_compared(record.composed)
    assert 0 <= better + same <= len(record.composed) and ratio > 0.8
    assert searches_compared([])[:2] == (0, 0)


def test_every_form_is_one_that_the_claims_ask_for(claims: tuple[ClaimSpec, ...]) -> None:
    assert {claim.id for claim in claims if claim.sweep is not None} == set(FORMS)
    # what the record of a suite says of it
    assert all(claim.needs for claim in claims if claim.sweep is not None)
