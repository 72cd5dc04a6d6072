"""Curves over nodes, rising losses and step times, on numbers whose answers are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.judge.claims.evidence import Evidence, Floats, halves, relative_gain
from harness.judge.claims.findings import NotTestable
from harness.judge.claims.heads import (
    judge_accuracy_falls,
    judge_loss_grows,
    judge_more_candidates,
    rising_losses,
)
from harness.judge.claims.trees import early_less_late_gain, judge_log_growth, log_fit, step_seconds
from harness.judge.judgement import ParityReport, VerdictKind
from harness.records.probes import StepCost, StepCosts
from harness.records.trace import PromptTrace, Trace
from harness.specs.forms.claims import (
    AccuracyFallsForm,
    LogGrowthForm,
    LossGrowsForm,
    MoreCandidatesForm,
)
from harness.specs.suite import IntervalSpec
from harness.tests.fake_record import FakeParts, write_fake_record

SPEC = IntervalSpec(num_resamples=200)
YES, NO, OPEN = VerdictKind.REPRODUCED, VerdictKind.NOT_REPRODUCED, VerdictKind.INCONCLUSIVE
SIZES = (1, 2, 4, 8, 16)
NO_PARITY = ParityReport(num_compared=0, num_tokens=0, num_identical=0, divergences=())


def totals_of(rates: list[float]) -> list[Floats]:
    """Numerators and denominators in turn, whose ratios are the rates."""
    return [np.array(value) for rate in rates for value in (7 * rate, 7.0)]


def test_a_line_has_no_bend_and_a_bend_has_its_sign() -> None:
    line = early_less_late_gain(totals_of([1.0, 1.5, 2.5, 4.5, 8.5]), SIZES)
    down = early_less_late_gain(totals_of([1.0, 1.5, 2.5, 3.0, 3.1]), SIZES)
    up = early_less_late_gain(totals_of([1.0, 1.1, 1.3, 4.0, 9.0]), SIZES)
    assert line == pytest.approx(0)
    assert down == pytest.approx((2.5 - 1) / 3 - (3.1 - 2.5) / 12)
    assert up == pytest.approx((1.3 - 1) / 3 - (9 - 1.3) / 12) and up < 0 < down


def test_the_halves_of_an_even_number_of_sizes_meet_in_the_upper_middle() -> None:
    found = early_less_late_gain(totals_of([1.0, 2.0, 2.5, 2.6]), (1, 2, 4, 8))
    assert found == pytest.approx((2.5 - 1) / 3 - (2.6 - 2.5) / 4)


@settings(deadline=None)
@given(intercept=st.floats(-5, 5), slope=st.floats(0.1, 5))
def test_a_logarithm_is_fitted_exactly(intercept: float, slope: float) -> None:
    rates = [intercept + slope * float(np.log(size)) for size in SIZES]
    assert [float(one) for one in log_fit(totals_of(rates), SIZES)] == pytest.approx([intercept, slope, 1.0])


def test_a_fit_is_that_of_least_squares() -> None:
    rates = [1.0, 1.8, 1.9, 3.0, 3.1]
    slope, intercept = np.polyfit(np.log(SIZES), rates, 1)
    correlation = np.corrcoef(np.log(SIZES), rates)[0, 1]
    found = [float(one) for one in log_fit(totals_of(rates), SIZES)]
    assert found == pytest.approx([intercept, slope, correlation**2])


def test_a_fit_of_many_draws_is_that_of_each_and_a_flat_curve_fits_nothing() -> None:
    rows = [[1.0, 1.8, 1.9, 3.0, 3.1], [2.0] * 5]
    together = [np.stack(both) for both in zip(*map(totals_of, rows), strict=True)]
    found = log_fit(together, SIZES)
    for index, row in enumerate(rows):
        assert [float(one[index]) for one in found] == pytest.approx(
            [float(one) for one in log_fit(totals_of(row), SIZES)]
        )
    assert [float(one[1]) for one in found] == pytest.approx([2.0, 0.0, 0.0])


def trace_of(ranks: list[int], like: Trace, *, num_prompts: int = 4, num_tokens: int = 40) -> Trace:
    """Prompts of one head whose ranks repeat a pattern."""
    column = np.resize(np.array(ranks), num_tokens).astype(np.int32)
    column[-1] = -1
    prompts = tuple(
        PromptTrace(
            key=f"p{number}",
            category=None,
            prompt_tokens=5,
            tokens=np.full(num_tokens, 9),
            ended_by="budget",
            ranks=column[:, None],
        )
        for number in range(num_prompts)
    )
    return Trace(provenance=like.provenance, prompts=prompts)


def growth_on(folder: Path, *, calibration: list[int], text: list[int]) -> str:
    """The reason of the judged logarithm, with trees of one head that grow by rank in the calibration."""
    record = write_fake_record(folder, rounds=1, num_prompts=4)
    like = record.trace
    assert like is not None
    object.__setattr__(record, "trace", trace_of(text, like))
    evidence = Evidence(
        record=record,
        arms=(),
        comparisons=(),
        parity=NO_PARITY,
        calibration=trace_of(calibration, like),
    )
    form = LogGrowthForm(
        test="log_growth", sizes=(1, 2, 3, 4), max_rank=8, min_r_squared=0.5, reason="made up for a test"
    )
    return judge_log_growth(form, evidence).reason


def test_growth_that_speeds_up_does_not_grow_ever_more_slowly(tmp_path: Path) -> None:
    """The test was once turned so that it could not fail: a node that helps late is faster growth."""
    by_rank = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]  # so the calibration grows (0), (1), (2), (3)
    late = growth_on(tmp_path / "late", calibration=by_rank, text=[3, 2, 3, 3])
    early = growth_on(tmp_path / "early", calibration=by_rank, text=[0, 1, 0, 0])
    assert "ever more slowly: fails" in late and "ever more slowly: holds" in early
    assert "tokens/step rise (1.00 tokens/step at 1 nodes, " in late
    assert " at 4): holds" in late and " at 4): holds" in early
    flat = growth_on(tmp_path / "flat", calibration=by_rank, text=[7, 7, 7, 7])
    assert " at 4): fails" in flat and "ever more slowly: fails" in flat and "R^2 above 0.5: fails" in flat


def losses(*means: float, num: int = 6) -> list[Floats]:
    return [np.tile(means, (5, 1)) + 0.1 * number for number in range(num)]


def test_each_head_is_held_against_the_head_before_it() -> None:
    """Held against head 1 alone, a third head that is better than the second would pass."""
    assert rising_losses(losses(1.0, 2.0, 2.5), bound=0.0, spec=SPEC).kind is YES
    falls = rising_losses(losses(1.0, 2.0, 1.5), bound=0.0, spec=SPEC)
    assert falls.kind is NO
    assert falls.ours == ("rise in nats from head to head: 1.00 [1.00, 1.00]; -0.50 [-0.50, -0.50]")
    assert falls.reason == (
        "the mean loss rises by more than 0 nats from one head to the next (1 to 2: holds; 2 to 3: fails)"
    )
    assert falls.figure_kind == "measured"


def test_a_rise_of_exactly_the_bound_is_none() -> None:
    assert rising_losses(losses(1.0, 1.5), bound=0.5, spec=SPEC).kind is NO
    assert rising_losses(losses(1.0, 1.5), bound=0.25, spec=SPEC, whose=" of arm").kind is YES


def test_positions_without_a_target_do_not_count() -> None:
    texts = losses(1.0, 2.0, 4.0)
    for text in texts:
        text[2:, 2] = np.nan
    found = rising_losses(texts, bound=0.0, spec=SPEC)
    assert found.ours.endswith("1.00 [1.00, 1.00]; 2.00 [2.00, 2.00]")
    for text in texts:
        text[:, 2] = np.nan
    with pytest.raises(NotTestable, match="no position has a target for head 3"):
        rising_losses(texts, bound=0.0, spec=SPEC)


def test_one_text_alone_leaves_a_rise_open() -> None:
    assert rising_losses(losses(1.0, 2.0, num=1), bound=0.0, spec=SPEC).kind is OPEN


def heads_evidence(folder: Path, ranks: list[list[int]], *, nll: bool = True) -> Evidence:
    """Evidence with these ranks, a row a position, in each of four prompts; head k loses k nats.

    At the end of the text, where head k has no target, ranks do not count.
    """
    record = write_fake_record(folder, rounds=1, num_prompts=4)
    like = record.trace
    assert like is not None
    rows = np.array(ranks, dtype=np.int32)
    heads = np.arange(1, rows.shape[1] + 1)
    beyond = np.arange(1, len(rows) + 1)[:, None] + heads > len(rows)
    losses = np.where(beyond, np.nan, heads).astype(np.float32)
    prompts = tuple(
        dataclasses.replace(
            prompt,
            tokens=np.full(len(rows), 9),
            ended_by="budget",
            ranks=np.where(beyond, -1, rows).astype(np.int32),
            gaps=None,
            nll=losses if nll else None,
        )
        for prompt in trace_of([0], like).prompts
    )
    provenance = like.provenance.model_copy(update={"max_new_tokens": len(rows)})
    object.__setattr__(record, "trace", Trace(provenance=provenance, prompts=prompts))
    return Evidence(record=record, arms=(), comparisons=(), parity=NO_PARITY)


def test_losses_and_accuracies_of_two_heads_are_judged_and_of_one_are_not(tmp_path: Path) -> None:
    loss = LossGrowsForm(test="loss_grows", bound=0.0, reason="made up for a test")
    falls = AccuracyFallsForm(test="accuracy_falls", first=(1,), bound=0.0, reason="made up for a test")
    one = heads_evidence(tmp_path / "one", [[0], [0], [1], [2], [9]])
    two = heads_evidence(tmp_path / "two", [[0, 0], [0, 1], [0, 2], [1, 3], [0, 9], [9, 9]])
    for evidence in (one, heads_evidence(tmp_path / "none", [[0, 0], [0, 1]], nll=False)):
        with pytest.raises(NotTestable, match="no losses of two heads or more"):
            judge_loss_grows(loss, evidence)
    with pytest.raises(NotTestable, match="the trace has one head"):
        judge_accuracy_falls(falls, one)
    found = judge_loss_grows(loss, two)
    assert found.kind is YES
    assert found.ours == "rise in nats from head to head: 1.00 [1.00, 1.00]"
    found = judge_accuracy_falls(falls, two)
    assert found.kind is YES and found.ours == "top-1 80.0 %, 25.0 %"


def test_how_often_a_head_is_right_on_top_and_among_its_first(tmp_path: Path) -> None:
    """Of nine positions the last has no target, two are right on top and six among the first three."""
    ranks = [[0], [0], [1], [1], [2], [2], [3], [9], [0]]
    form = MoreCandidatesForm(test="more_candidates", head=1, first=3, bound=2.5, reason="made up for a test")
    found = judge_more_candidates(form, heads_evidence(tmp_path / "record", ranks))
    assert found.kind is YES and found.figure_kind == "measured"
    assert found.ours == "top-1 and top-3: 25 % and 75 %; 3.00x [3.00, 3.00]"
    assert "among its first 3 at 25 % and 75 % of 32 positions; the quotient lies above 2.5" in found.reason
    at_it = judge_more_candidates(
        form.model_copy(update={"bound": 3.0}), heads_evidence(tmp_path / "at", ranks)
    )
    assert at_it.kind is NO


def test_a_steps_time_holds_the_heads_where_they_were_timed(tmp_path: Path) -> None:
    """A speed that leaves the heads out of a step's time is too good."""

    def cost(num_nodes: int, *, step_s: tuple[float, ...], arm: str | None = None) -> StepCost:
        return StepCost(
            arm=arm,
            num_nodes=num_nodes,
            num_heads=0,
            context_tokens=10,
            backbone_s=(1.0, 2.0, 9.0),
            step_s=step_s,
        )

    costs = (cost(1, step_s=()), cost(4, step_s=(5.0, 6.0, 7.0)), cost(8, step_s=(1.0,), arm="chain"))

    def spoil(parts: FakeParts) -> None:
        parts.step_costs = StepCosts(costs=costs)

    record = write_fake_record(tmp_path, rounds=1, num_prompts=4, spoil=spoil)
    evidence = Evidence(record=record, arms=(), comparisons=(), parity=NO_PARITY)
    assert step_seconds(evidence) == {1: 2.0, 4: 6.0}
    bare = write_fake_record(tmp_path / "bare", rounds=1, num_prompts=4, omit=("step_costs.json",))
    with pytest.raises(NotTestable, match="no separately timed steps"):
        step_seconds(dataclasses.replace(evidence, record=bare))


def test_a_gain_is_relative_and_scaled() -> None:
    ones = np.ones(6)
    gain = relative_gain((3 * ones, ones), over=(2 * ones, ones), spec=SPEC)
    assert (gain.low, gain.estimate, gain.high) == pytest.approx((0.5, 0.5, 0.5)) and gain.level == 0.9
    half = relative_gain((3 * ones, ones), over=(2 * ones, ones), spec=SPEC, scale=0.5)
    assert half.estimate == pytest.approx(-0.25)


def test_halves_take_every_other_prompt(tmp_path: Path) -> None:
    like = write_fake_record(tmp_path, rounds=1, num_prompts=4).trace
    assert like is not None
    trace = trace_of([0], like, num_prompts=5)
    first, second = halves(trace.provenance, trace.prompts)
    assert [one.key for one in first.prompts] == ["p0", "p2", "p4"]
    assert [one.key for one in second.prompts] == ["p1", "p3"]
    halves(trace.provenance, trace.prompts[:4])
    with pytest.raises(NotTestable, match="3 prompts are too few"):
        halves(trace.provenance, trace.prompts[:3])
