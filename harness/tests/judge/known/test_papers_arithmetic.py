"""Paper-only forms on a registry of a few round figures, so that every word can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from harness.judge.claims.findings import Finding, NotTestable
from harness.judge.claims.paper import Figures, judge_paper_only
from harness.judge.judgement import VerdictKind
from harness.specs.claims import ClaimSpec, OperatorTable, load_claims
from harness.specs.forms import paper as forms

YES, NO = VerdictKind.REPRODUCED, VerdictKind.NOT_REPRODUCED
WHY = "made up for a test"


@pytest.fixture(scope="module")
def any_claim() -> ClaimSpec:
    return load_claims()[0]


def registry(any_claim: ClaimSpec, figures: dict[str, Any]) -> dict[str, ClaimSpec]:
    def claim(claim_id: str, value: Any) -> ClaimSpec:
        is_table = isinstance(value, OperatorTable)
        changes = {"id": claim_id, "value": None if is_table else value, "table": value if is_table else None}
        return any_claim.model_copy(update=changes)

    return {claim_id: claim(claim_id, value) for claim_id, value in figures.items()}


def judged(any_claim: ClaimSpec, form: Any, figures: dict[str, Any], *, claim_id: str = "X") -> Finding:
    claims = registry(any_claim, {claim_id: None, **figures})
    return judge_paper_only(claims[claim_id], form, figures=Figures(claims))


def told(finding: Finding) -> tuple[VerdictKind, str]:
    return finding.kind, finding.ours


def test_figures_of_a_registry(any_claim: ClaimSpec) -> None:
    figures = Figures(registry(any_claim, {"one": 2, "half": 0.5, "parts": {"a": 3, "b": "c"}, "none": "n"}))
    assert (figures.number("one"), figures.number("half"), figures.part("parts", "a")) == (2.0, 0.5, 3.0)
    for claim_id in ("parts", "none"):
        with pytest.raises(NotTestable, match=f"claim {claim_id} no single figure"):
            figures.number(claim_id)
    for claim_id, key in (("parts", "b"), ("parts", "z"), ("one", "a")):
        with pytest.raises(NotTestable, match=f"claim {claim_id} no figure {key}"):
            figures.part(claim_id, key)
    with pytest.raises(NotTestable, match="claim one no table"):
        figures.table("one")
    with pytest.raises(NotTestable, match="has no claim other"):
        figures.claim("other")


@pytest.mark.parametrize(("value", "kind"), [(1.9, YES), (2.0, YES), (2.1, NO)])
def test_a_bound_is_missed_by_a_figure_at_it(any_claim: ClaimSpec, value: float, kind: VerdictKind) -> None:
    form = forms.BoundMissedForm(
        test="bound_missed", bound_claim="bound", figures=("high", "low"), reason=WHY
    )
    found = judged(any_claim, form, {"bound": 2.0, "high": 2.5, "low": value})
    assert told(found) == (kind, f"2.5x, {value:g}x")
    assert found.reason == f"not above the stated 2: {'low' if kind is YES else 'no figure'}"
    assert found.figure_kind == "computed"


@pytest.mark.parametrize(("printed", "kind"), [(2.0, YES), (2.01, YES), (1.99, YES), (2.05, NO), (1.95, NO)])
def test_quotients_of_rate_and_overhead(any_claim: ClaimSpec, printed: float, kind: VerdictKind) -> None:
    form = forms.QuotientsForm(test="quotients", models=("m", "n"), tolerance=0.01, reason=WHY)
    figures = {"m-acc": 3.0, "m-ovh": 1.5, "m-S": printed, "n-acc": 3.0, "n-ovh": 1.0, "n-S": 3.0}
    found = judged(any_claim, form, figures)
    assert told(found) == (kind, "2.000, 3.000")
    assert f"by at most {abs(2 / printed - 1):.2%}, allowed 1%" in found.reason


@pytest.mark.parametrize(
    ("overhead", "apart"), [(1.5, 0), (1.511, 0), (1.489, 0), (1.512, 1), (1.488, 1), (2.0, 1), (1.0, 1)]
)
def test_overheads_that_rounding_explains(any_claim: ClaimSpec, overhead: float, apart: int) -> None:
    """3.00 over 2.00, each rounded to two digits: 2.995 / 2.005 = 1.4938 to 3.005 / 1.995 = 1.5063; the
    overhead is rounded, too.
    """
    form = forms.ImpliedOverheadsForm(
        test="implied_overheads", pairs=(("other", "m"),), min_apart=1, half_unit=0.005, reason=WHY
    )
    figures = {"other": {"rate": 3.0, "speedup": 2.0}, "m-ovh": overhead}
    found = judged(any_claim, form, figures)
    assert told(found) == (YES if apart else NO, "1.500")
    assert f"{apart} of 1 differ from the printed overhead" in found.reason


@pytest.mark.parametrize(("words", "kind"), [(("a", "b"), YES), (("a", "a"), NO), (("a", "b", "c"), YES)])
def test_statements_differ_from_the_second_on(
    any_claim: ClaimSpec, words: tuple[str, ...], kind: VerdictKind
) -> None:
    said = tuple(forms.Statement(place=f"p{i}", says=word) for i, word in enumerate(words))
    form = forms.StatementsDifferForm(test="statements_differ", about="it", statements=said, reason=WHY)
    found = judged(any_claim, form, {})
    assert told(found) == (kind, "; ".join(f"p{i}: {word}" for i, word in enumerate(words)))
    assert found.reason == f"{len(words)} places in the paper say {len(set(words))} different things on it"


@pytest.mark.parametrize(("overall", "kind"), [(2.5, NO), (2.505, NO), (2.52, YES), (1.92, NO), (1.9, YES)])
def test_neither_mean_of_categories_is_the_overall(
    any_claim: ClaimSpec, overall: float, kind: VerdictKind
) -> None:
    form = forms.CategoryMeansForm(
        test="category_means", prefix="cat-", overall="all", half_unit=0.01, reason=WHY
    )
    figures = {"cat-a": 1.0, "cat-b": 2.0, "cat-c": 3.0, "cat-d": 4.0, "all": overall}
    found = judged(any_claim, form, figures)
    assert told(found) == (kind, "2.500 arithmetic, 1.920 harmonic")
    assert f"of 4 categories is {min(abs(2.5 - overall), abs(1.92 - overall)):.3f} from" in found.reason
    with pytest.raises(NotTestable, match="has no claim cat-"):
        judged(any_claim, form, {"all": overall})


def table(
    *, speeds: tuple[float, ...], intensity: tuple[float, ...], columns: tuple[int, ...]
) -> OperatorTable:
    return OperatorTable.model_construct(
        rows=(7,), columns=columns, tflop_per_s=(speeds,), intensity=(intensity,)
    )


@pytest.mark.parametrize(
    ("stated", "kind"), [((30.0, 40.0), YES), ((31.0, 40.0), NO), ((30.0, 39.0), NO), ((29.0, 41.0), NO)]
)
def test_quotients_of_a_table_round_to_the_stated(
    any_claim: ClaimSpec, stated: tuple[float, float], kind: VerdictKind
) -> None:
    form = forms.TableRatiosForm(test="table_ratios", table="T", row=7, column=64, reason=WHY)
    grid = table(speeds=(2.0, 60.8), intensity=(1.0, 39.6), columns=(1, 64))
    figures = {"T": grid, "X": {"throughput": stated[0], "intensity": stated[1]}}
    found = judged(any_claim, form, figures)
    assert told(found) == (kind, "30.4x, 39.6x")
    for other in ({"row": 8}, {"column": 65}):
        with pytest.raises(NotTestable, match="has no row"):
            judged(any_claim, form.model_copy(update=other), figures)


@pytest.mark.parametrize(("latency", "kind"), [(2.0, YES), (2.009, YES), (2.011, NO), (1.989, NO)])
def test_latencies_relative_to_one_node(any_claim: ClaimSpec, latency: float, kind: VerdictKind) -> None:
    form = forms.RelativeLatencyForm(test="relative_latency", table="T", row=7, tolerance=0.01, reason=WHY)
    grid = table(speeds=(3.0, 6.0), intensity=(1.0, 1.0), columns=(1, 4))
    found = judged(any_claim, form, {"T": grid, "X": {"1": 1.0, "4": latency}})
    assert told(found) == (kind, "1: 1.000, 4: 2.000")
    assert found.reason == (f"largest difference from the stated ratios {abs(2 - latency):.4f}, allowed 0.01")
    without_one = table(speeds=(3.0, 6.0), intensity=(1.0, 1.0), columns=(2, 4))
    for changed, other in ((form.model_copy(update={"row": 8}), grid), (form, without_one)):
        with pytest.raises(NotTestable, match="or no column 1"):
            judged(any_claim, changed, {"T": other, "X": {"1": 1.0, "4": latency}})


@pytest.mark.parametrize(("rate", "kind"), [(6.0, YES), (6.6, YES), (5.46, YES), (7.0, NO), (5.0, NO)])
def test_a_slope_times_a_logarithm(any_claim: ClaimSpec, rate: float, kind: VerdictKind) -> None:
    form = forms.LogConstantForm(
        test="log_constant", slope=1.0, bases=(2, 8), num_nodes=64, rate="r", tolerance=0.1, reason=WHY
    )
    found = judged(any_claim, form, {"r": rate})
    assert told(found) == (kind, "base 2: 6.00, base 8: 2.00 at 64 nodes")
    assert f"the nearest, 6.00, is {abs(6 / rate - 1):.0%} from {rate:g} of r, allowed 10%" in found.reason
    near_two = judged(any_claim, form, {"r": 2.0})
    assert near_two.kind is YES and "the nearest, 2.00, is 0% from 2 of r" in near_two.reason


class Best:
    """A simulation whose best speedups are given."""

    def __init__(self, best: dict[tuple[int, int], tuple[int, float]]) -> None:
        self.found = best

    def best(self, *, context_tokens: int, batch: int) -> tuple[int, float]:
        return self.found[context_tokens, batch]


def simulated(monkeypatch: pytest.MonkeyPatch, best: dict[tuple[int, int], tuple[int, float]]) -> None:
    monkeypatch.setattr("harness.judge.claims.paper.simulation", lambda form: Best(best))


SHARED: dict[str, Any] = {"device": "a100-80gb-pcie", "slope": 0.5, "log_base": 2.0, "reason": WHY}


@pytest.mark.parametrize(("peak", "kind"), [(64, YES), (70, YES), (58, YES), (72, NO), (56, NO)])
def test_a_simulated_peak(
    any_claim: ClaimSpec, monkeypatch: pytest.MonkeyPatch, peak: int, kind: VerdictKind
) -> None:
    simulated(monkeypatch, {(128, 1): (peak, 2.5)})
    form = forms.SimulatedPeakForm(
        test="simulated_peak", num_nodes=64, context_tokens=128, batch=1, tolerance=0.1, **SHARED
    )
    found = judged(any_claim, form, {})
    assert told(found) == (kind, f"peak 2.50x at {peak} candidates")
    assert found.figure_kind == "predicted"


@pytest.mark.parametrize(
    ("speedups", "words"),
    [
        ((4.0, 3.0, 2.0, 0.9), "falls with the batch and crosses 1 past 4"),
        ((4.0, 3.0, 2.0, 1.1), "falls with the batch and does not cross 1 past 4"),
        ((4.0, 3.0, 2.0, 1.0), "falls with the batch and crosses 1 past 4"),
        ((4.0, 3.0, 1.0, 0.9), "falls with the batch and does not cross 1 past 4"),
        ((4.0, 4.0, 2.0, 0.9), "does not fall with the batch and crosses 1 past 4"),
        ((3.0, 4.0, 2.0, 0.9), "does not fall with the batch and crosses 1 past 4"),
    ],
)
def test_a_simulated_batch(
    any_claim: ClaimSpec, monkeypatch: pytest.MonkeyPatch, speedups: tuple[float, ...], words: str
) -> None:
    best = {(128, 2**power): (9, speedup) for power, speedup in enumerate(speedups)}
    simulated(monkeypatch, best)
    form = forms.SimulatedBatchForm(test="simulated_batch", batch=4, context_tokens=128, **SHARED)
    found = judged(any_claim, form, {})
    assert found.reason == f"the best speedup {words}"
    assert found.kind is (NO if "not" in words else YES)
    assert found.ours == ", ".join(f"batch {2**i}: {one:.2f}x" for i, one in enumerate(speedups))


@pytest.mark.parametrize(
    ("best", "kind"),
    [
        (((100, 3.0), (100, 2.5), (100, 2.0)), YES),
        (((100, 3.0), (105, 2.5), (110, 2.0)), YES),
        (((100, 3.0), (112, 2.5), (100, 2.0)), NO),
        (((100, 3.0), (100, 3.0), (100, 2.0)), NO),
        (((100, 2.0), (100, 2.5), (100, 3.0)), NO),
    ],
)
def test_a_simulated_length(
    any_claim: ClaimSpec,
    monkeypatch: pytest.MonkeyPatch,
    best: tuple[tuple[int, float], ...],
    kind: VerdictKind,
) -> None:
    lengths = (128, 512, 2048)
    simulated(monkeypatch, {(length, 1): one for length, one in zip(lengths, best, strict=True)})
    form = forms.SimulatedLengthForm(
        test="simulated_length", batch=1, context_tokens=lengths, tolerance=0.11, **SHARED
    )
    found = judged(any_claim, form, {})
    assert told(found) == (kind, f"{best[0][1]:.2f}x at 128 to {best[2][1]:.2f}x at 2048 tokens")
    sizes = [nodes for nodes, _ in best]
    assert f"best sizes {min(sizes)} to {max(sizes)}, where 11% apart is allowed" in found.reason


def test_sizes_exactly_the_tolerance_apart_are_the_same(
    any_claim: ClaimSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated(monkeypatch, {(128, 1): (4, 3.0), (512, 1): (5, 2.0)})
    form = forms.SimulatedLengthForm(
        test="simulated_length", batch=1, context_tokens=(128, 512), tolerance=0.25, **SHARED
    )
    assert judged(any_claim, form, {}).kind is YES


@pytest.mark.parametrize(
    ("printed", "batch", "prefill_tokens", "kind"),
    [
        (((1.0, 8.0), (1.01, 8.01)), 1, 200, YES),
        (((1.0, 8.0), (1.01, 8.02)), 1, 200, NO),  # two half units are 0.01
        (((1.0, 8.0), (1.0, 8.0)), 160, 200, YES),
        (((1.0, 8.0), (1.0, 8.0)), 170, 200, NO),  # the A100 does 161 operations in the time of a byte
        (((1.0, 8.0), (1.0, 8.0)), 1, 160, NO),
    ],
)
def test_a_step_lies_below_the_ridge_and_a_prefill_above(
    any_claim: ClaimSpec,
    printed: tuple[tuple[float, ...], ...],
    batch: int,
    prefill_tokens: int,
    kind: VerdictKind,
) -> None:
    """A row of weights does one operation a byte a token and row of the batch, less what inputs and outputs
    add to the bytes; attention of one token does less than one.
    """
    form = forms.RegimesForm(
        test="regimes",
        device="a100-80gb-pcie",
        batch=batch,
        context_tokens=128,
        prefill_tokens=prefill_tokens,
        table="T",
        half_unit=0.005,
        reason=WHY,
    )
    grid = OperatorTable.model_construct(
        rows=(1, 2), columns=(1, 64), tflop_per_s=((1.0, 1.0), (1.0, 1.0)), intensity=printed
    )
    found = judged(any_claim, form, {"T": grid})
    step, prefill = (round(one / (1 + one / 6656 + one / 17920), 1) for one in (batch, prefill_tokens))
    assert told(found) == (kind, f"{step:.1f} and {prefill:.0f} operations a byte around 161")
    spread = max(abs(high - low) for low, high in zip(*printed, strict=True))
    assert found.reason.endswith(f"attention's printed intensity moves by {spread:.3f}")


@pytest.mark.parametrize(
    ("plotted", "kind", "apart"),
    [
        ((2000.0, 300.0), YES, ("0.0%", "0.0%")),
        ((2500.0, 300.0), YES, ("25.0%", "0.0%")),
        ((2000.0, 225.0), YES, ("0.0%", "25.0%")),
        ((2502.0, 300.0), NO, ("25.1%", "0.0%")),
        ((2000.0, 224.7), NO, ("0.0%", "25.1%")),
        ((4000.0, 600.0), NO, ("100.0%", "100.0%")),
    ],
)
def test_plotted_limits_are_the_makers_to_within_a_share(
    any_claim: ClaimSpec, plotted: tuple[float, float], kind: VerdictKind, apart: tuple[str, str]
) -> None:
    form = forms.VendorLimitsForm(
        test="vendor_limits", gb_per_s=2000.0, tflop_per_s=300.0, tolerance=0.25, reason=WHY
    )
    figures = {"X": dict(zip(("gb_per_s", "tflop_per_s"), plotted, strict=True))}
    found = judged(any_claim, form, figures)
    assert told(found) == (kind, "2000 GB/s, 300 TFLOP/s")
    assert found.reason == (
        f"the maker states 2000 GB/s, {apart[0]} from the paper's, and 300 TFLOP/s, {apart[1]} from it; "
        "allowed 25%"
    )
