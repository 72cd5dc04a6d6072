"""Cases at the very edge of a test or of a sentence."""

from __future__ import annotations

import pytest

from harness.judge import checks
from harness.judge.claims.findings import percent
from harness.judge.claims.paper import Figures, judge_paper_only
from harness.judge.judgement import VerdictKind
from harness.specs.claims import OperatorTable, load_claims
from harness.specs.forms.paper import ImpliedOverheadsForm, RelativeLatencyForm
from harness.stats import Interval

WHY = "made up for a test"


def test_large_percentages_are_not_off_by_one_in_a_hundred() -> None:
    wide = Interval(estimate=0.0, low=-0.5, high=0.5, level=0.9, num_prompts=4)
    assert percent(wide) == "+0.0 % [-50.0, 50.0]"


@pytest.mark.parametrize(
    ("names", "told"),
    [([], ""), (["a"], "x: a"), (["a", "b"], "x: a and 1 more"), (list("abc"), "x: a and 2 more")],
)
def test_the_first_name_and_how_many_more(names: list[str], told: str) -> None:
    assert checks._first("x", names) == told


@pytest.mark.parametrize(("needed", "kind"), [(1, VerdictKind.REPRODUCED), (3, VerdictKind.NOT_REPRODUCED)])
def test_more_overheads_apart_than_needed_are_enough(needed: int, kind: VerdictKind) -> None:
    like = load_claims()[0]
    claims = {
        "a": like.model_copy(update={"value": {"rate": 3.0, "speedup": 2.0}}),
        "m-ovh": like.model_copy(update={"value": 2.0}),
    }
    form = ImpliedOverheadsForm(
        test="implied_overheads",
        pairs=(("a", "m"), ("a", "m")),
        min_apart=needed,
        half_unit=0.005,
        reason=WHY,
    )
    assert judge_paper_only(like, form, figures=Figures(claims)).kind is kind


def test_a_latency_off_by_exactly_the_tolerance_is_allowed() -> None:
    like = load_claims()[0]
    table = OperatorTable(rows=(7,), columns=(1, 4), tflop_per_s=((3.0, 6.0),), intensity=((1.0, 1.0),))
    claims = {
        "T": like.model_copy(update={"table": table}),
        like.id: like.model_copy(update={"value": {"1": 1.0, "4": 2.25}}),
    }
    form = RelativeLatencyForm(test="relative_latency", table="T", row=7, tolerance=0.25, reason=WHY)
    assert judge_paper_only(like, form, figures=Figures(claims)).kind is VerdictKind.REPRODUCED
