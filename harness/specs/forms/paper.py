"""Forms of claims that are judged on the paper's own figures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.specs.bounds import MAX_ENTRIES, BatchSize, NodeCount, Some, Spec, TokenCount

Share = Annotated[float, Field(gt=0, lt=1)]


class Form(Spec):
    """What every form carries: why its bounds, margins and settings are what they are.

    `states` says what the form tests where that is not the claim as the paper states it. `effects` are
    those that the paper states, in the units and order of what the form asks, as far as it states any: the
    chance to find them is shown with the verdict.
    """

    reason: str = Field(min_length=1)
    states: str | None = None
    effects: tuple[float, ...] = Field(default=(), max_length=MAX_ENTRIES)


class VariedForm(Form):
    """A form with settings that a claim does not give.

    It is judged again with each value of `vary`, setting by setting; a verdict that turns says so.
    """

    vary: dict[str, Some[int | float]] = Field(default_factory=dict, max_length=8)

    @model_validator(mode="after")
    def _known_settings(self) -> VariedForm:
        if unknown := sorted(set(self.vary) - set(type(self).model_fields)):
            raise ValueError(f"vary names {unknown[0]!r}, which is no setting of this form")
        return self


class BoundMissedForm(Form):
    """At least one of `figures` lies on the wrong side of the bound that `bound_claim` states."""

    test: Literal["bound_missed"]
    bound_claim: str
    figures: Some[str]


class QuotientsForm(Form):
    """Rate over overhead gives the printed speedup of every model to within a relative `tolerance`."""

    test: Literal["quotients"]
    models: Some[str]
    tolerance: Share


class ImpliedOverheadsForm(Form):
    """Rate over speedup of one table lies outside the overhead of another, rounding allowed for.

    That holds for at least `min_apart` models.
    """

    test: Literal["implied_overheads"]
    pairs: Some[tuple[str, str]]
    min_apart: int
    half_unit: float


class Statement(Spec):
    """What one place says, in one word or two."""

    place: str
    says: str


class StatementsDifferForm(Form):
    """Places that ought to say the same thing do not.

    What they say was copied from the paper, so the outcome is fixed until another version says otherwise.
    """

    test: Literal["statements_differ"]
    about: str
    statements: tuple[Statement, ...] = Field(min_length=2)


class CategoryMeansForm(Form):
    """Neither the arithmetic nor the harmonic mean of the categories is the overall figure.

    Both differ from it by more than `half_unit`.
    """

    test: Literal["category_means"]
    prefix: str
    overall: str
    half_unit: float


class ClosedFormsForm(Form):
    """The closed forms give every printed intensity to within `tolerance`."""

    test: Literal["closed_forms"]
    by_length: str
    by_batch: str
    linear: str
    table_context_tokens: TokenCount
    tolerance: float


class TableRatiosForm(Form):
    """Two ratios of one table round to the whole figures that the text states."""

    test: Literal["table_ratios"]
    table: str
    row: int
    column: int


class RelativeLatencyForm(Form):
    """n x TFLOP/s(1) / TFLOP/s(n) of one table row gives the stated latencies to within `tolerance`."""

    test: Literal["relative_latency"]
    table: str
    row: int
    tolerance: float


class LogConstantForm(Form):
    """The slope times the logarithm of `num_nodes` gives the rate of Table 1, for one base at least.

    Near is within a relative `tolerance`.
    """

    test: Literal["log_constant"]
    slope: float
    bases: Some[float]
    num_nodes: NodeCount
    rate: str
    tolerance: Share


class _SimulationForm(VariedForm):
    device: str
    slope: float
    log_base: float = Field(gt=1)


class SimulatedPeakForm(_SimulationForm):
    """The simulated speedup is greatest at `num_nodes` candidates, and falls beyond.

    The place of the peak holds to within a relative `tolerance`.
    """

    test: Literal["simulated_peak"]
    num_nodes: NodeCount
    context_tokens: TokenCount
    batch: BatchSize
    tolerance: Share


class SimulatedBatchForm(_SimulationForm):
    """The best simulated speedup falls with the batch.

    It is above 1 up to `batch`, and below 1 at the next power of two.
    """

    test: Literal["simulated_batch"]
    batch: BatchSize
    context_tokens: TokenCount


class SimulatedLengthForm(_SimulationForm):
    """Over `context_tokens` the best speedup falls, while the best number of candidates stays.

    It stays within a relative `tolerance`.
    """

    test: Literal["simulated_length"]
    batch: BatchSize
    context_tokens: Some[TokenCount]
    tolerance: Share


class RegimesForm(VariedForm):
    """Steps of one token are bound by memory on `device`, the linear layers of a prefill by arithmetic.

    Intensities come from the closed forms, steps at every batch up to `batch`. By the paper's `table` the
    batch leaves attention's intensity alone, to within `half_unit` of what is printed.
    """

    test: Literal["regimes"]
    device: str
    batch: BatchSize
    context_tokens: TokenCount
    prefill_tokens: TokenCount
    table: str
    half_unit: float = Field(gt=0)


class VendorLimitsForm(Form):
    """The limits of a device that the paper plots are those that its maker states.

    Near is within a relative `tolerance`; throughput is that of dense matrices in half precision.
    """

    test: Literal["vendor_limits"]
    gb_per_s: float = Field(gt=0)
    tflop_per_s: float = Field(gt=0)
    tolerance: Share


PaperOnlyForm = Annotated[
    BoundMissedForm
    | QuotientsForm
    | ImpliedOverheadsForm
    | StatementsDifferForm
    | CategoryMeansForm
    | ClosedFormsForm
    | TableRatiosForm
    | RelativeLatencyForm
    | LogConstantForm
    | SimulatedPeakForm
    | SimulatedBatchForm
    | SimulatedLengthForm
    | RegimesForm
    | VendorLimitsForm,
    Field(discriminator="test"),
]
