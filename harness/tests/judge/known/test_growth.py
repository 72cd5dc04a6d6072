"""What the two forms about curves say, against replays of the same trees made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.compose.replay import replay
from harness.compose.trees import grow
from harness.judge.claims.evidence import Evidence, halves
from harness.judge.claims.findings import NotTestable
from harness.judge.claims.run import judge_transfer
from harness.judge.claims.trees import _correlation, log_fit
from harness.judge.judgement import ParityReport, VerdictKind
from harness.records.probes import StepCosts
from harness.specs.forms.claims import LogGrowthForm, SpeedPeaksForm
from harness.tests.fake_record import FakeParts, write_fake_record

SIZES = (1, 4, 16, 64)
WHY = "made up for a test"


def evidence_on(folder: Path, *, per_node: float = 0.05, **options: Any) -> Evidence:
    """Evidence whose step of n nodes costs 1 + `per_node` (n - 1) times that of one."""

    def spoil(parts: FakeParts) -> None:
        assert parts.step_costs is not None
        costs = [one for one in parts.step_costs.costs if one.arm is None]
        like = costs[0]
        parts.step_costs = StepCosts(
            costs=tuple(
                like.model_copy(
                    update={
                        "num_nodes": size,
                        "backbone_s": (0.02 * (1 + per_node * (size - 1)),),
                        "step_s": (),
                    }
                )
                for size in SIZES
            )
        )

    record = write_fake_record(folder, rounds=1, num_prompts=8, spoil=spoil, **options)
    parity = ParityReport(num_compared=0, num_tokens=0, num_identical=0, divergences=())
    return Evidence(record=record, arms=(), comparisons=(), parity=parity)


def rates(evidence: Evidence) -> tuple[list[float], list[float]]:
    """Tokens/step of the best trees, on the text that they grew on and on the rest."""
    trace = evidence.trace()
    growth, held_out = halves(trace.provenance, trace.prompts)
    grown = grow(growth, num_nodes=64, values="joint", max_rank=10, max_depth=None)
    trees = [grown.nested(size) for size in SIZES]
    return tuple([replay(text, tree).tokens_per_step for tree in trees] for text in (growth, held_out))  # type: ignore[return-value]


def test_a_logarithms_slope_and_fit_are_those_of_least_squares(tmp_path: Path) -> None:
    evidence = evidence_on(tmp_path)
    _, found = rates(evidence)
    form = LogGrowthForm(test="log_growth", sizes=SIZES, max_rank=10, min_r_squared=0.5, reason=WHY)
    judged = judge_transfer(form, evidence=evidence)
    slope = np.polyfit(np.log(SIZES), found, 1)[0]
    fit = np.corrcoef(np.log(SIZES), found)[0, 1] ** 2
    assert (
        judged.ours.startswith(f"slope {slope:.2f} [") and f"] a unit of ln n, R^2 {fit:.3f} [" in judged.ours
    )
    assert f"({found[0]:.2f} tokens/step at 1 nodes, {found[-1]:.2f} at 64)" in judged.reason


def test_a_peak_is_the_best_of_the_growth_text_judged_on_the_rest(tmp_path: Path) -> None:
    evidence = evidence_on(tmp_path)
    own, held_out = rates(evidence)
    cost = [1 + 0.05 * (size - 1) for size in SIZES]
    best = int(np.argmax([rate / one for rate, one in zip(own, cost, strict=True)]))
    assert 0 < best < 3
    form = SpeedPeaksForm(test="speed_peaks", sizes=SIZES, max_rank=10, bound=1.0, reason=WHY)
    judged = judge_transfer(form, evidence=evidence)
    falls = held_out[best] / cost[best] / (held_out[-1] / cost[-1])
    rises = held_out[-1] / held_out[best]
    assert judged.ours.startswith(f"speed at {SIZES[best]} over 64 nodes {falls:.2f}x [")
    assert f"; tokens/step at 64 over {SIZES[best]} nodes {rises:.2f}x [" in judged.ours


def test_without_a_cost_there_is_no_peak_and_two_sizes_show_none(tmp_path: Path) -> None:
    form = SpeedPeaksForm(test="speed_peaks", sizes=SIZES, max_rank=10, bound=1.0, reason=WHY)
    flat = judge_transfer(form, evidence=evidence_on(tmp_path / "flat", per_node=0.0))
    assert (flat.kind, flat.ours) == (VerdictKind.NOT_DECIDABLE, "no peak up to 64 nodes")
    few = form.model_copy(update={"sizes": (1, 2, 3, 64)})
    with pytest.raises(NotTestable, match="step times at 2 of the sizes"):
        judge_transfer(few, evidence=evidence_on(tmp_path / "few"))
    three = form.model_copy(update={"sizes": (1, 3, 16, 64)})
    assert "over 64 nodes" in judge_transfer(three, evidence=evidence_on(tmp_path / "three")).ours


@pytest.mark.parametrize("scale", [0.001, 1.0, 1000.0])
def test_a_fit_does_not_hang_on_the_unit(scale: float) -> None:
    rates = np.array([1.0, 1.8, 1.9, 3.0])
    totals = [np.array(value) for rate in rates for value in (scale * rate, 1.0)]
    correlation = np.corrcoef(np.log(SIZES), rates)[0, 1]
    assert float(log_fit(totals, SIZES)[2]) == pytest.approx(correlation**2)


def test_a_flat_curve_divides_nothing_by_nothing() -> None:
    totals = [np.full(3, value) for _ in SIZES for value in (2.0, 1.0)]
    with np.errstate(all="raise"):
        intercept, slope, fit = log_fit(totals, SIZES)
    assert (intercept.tolist(), slope.tolist(), fit.tolist()) == ([2.0] * 3, [0.0] * 3, [0.0] * 3)


def test_correlations_of_many_draws_are_those_of_numpy() -> None:
    """Column by column, ties and all; where all ranks are equal there is none."""
    rng = np.random.default_rng(0)
    ranks, stated = rng.integers(0, 4, size=(6, 20)).astype(float), np.array([3.0, 1.0, 2.0, 5.0, 4.0, 4.0])
    expected = [np.corrcoef(column, stated)[0, 1] for column in ranks.T]
    assert _correlation(ranks, stated) == pytest.approx(expected)
    assert float(_correlation(np.full((6, 1), 2.0), stated)[0]) == 0.0
    assert float(_correlation(ranks[:, 0], stated)) == pytest.approx(expected[0])
