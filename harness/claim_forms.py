"""The forms in which a claim can be judged, as validated data: literal, transfer, training, paper-only; each bound carries its reason."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.files import Frozen

Share = Annotated[float, Field(gt=0, lt=1)]


class _Form(Frozen):
    """What every form carries: why its bounds, margins and settings are what they are."""

    reason: str = Field(min_length=1)


class LiteralForm(_Form):
    """The same model, method, data and metric as the paper: what it needs, and how close counts as the same figure."""

    backbone: str
    heads: str
    device: str
    benchmark: str
    tolerance: Share


class LosslessForm(_Form):
    """Every greedy Medusa generation equals vanilla's, or differs from a shown tie on; ties at most `max_tie_rate` a token, or one.

    Half precision has no such limit, and says how many ties in how many tokens.
    """

    test: Literal["lossless"]
    max_tie_rate: Share


class FasterForm(_Form):
    """The arm of that role decodes more tokens/s than its vanilla arm, by more than `bound`, and without a parity bug."""

    test: Literal["faster"]
    arm: str
    bound: float


class LadderStepForm(_Form):
    """One rung: the arm exceeds the arm `over` by more than `bound`, in tokens/step and in measured tokens/s."""

    test: Literal["ladder_step"]
    arm: str
    over: str
    bound: float
    max_nodes: int | None = None


class SparseBeatsDenseForm(_Form):
    """The arm's sparse tree yields more tokens/step than random dense trees of `dense_nodes` nodes, pooled, by replay."""

    test: Literal["sparse_beats_dense"]
    tree: str
    max_nodes: int
    dense_nodes: int
    num_dense: int = Field(ge=2)
    seed: int
    bound: float


class SearchDepthForm(_Form):
    """The tree that the search grew to `num_nodes` nodes is at most `max_depth` deep."""

    test: Literal["search_depth"]
    tree: str
    num_nodes: int
    max_depth: int


class LossGrowsForm(_Form):
    """Head k + 1 has a greater loss than head k, for every k, at the positions where both have a target."""

    test: Literal["loss_grows"]
    bound: float


class ExtraHeadForm(_Form):
    """With `with_heads` heads tokens/step is that of `without_heads` to within a relative `margin`, each with its own best tree."""

    test: Literal["extra_head"]
    num_nodes: int
    with_heads: int
    without_heads: int
    max_rank: int
    margin: Share


class SpeedIdentityForm(_Form):
    """Measured speedup over (acceleration rate / separately timed overhead) is 1 to within `margin`, for each arm that was run."""

    test: Literal["speed_identity"]
    arms: tuple[str, ...]
    margin: Share


class LogGrowthForm(_Form):
    """Tokens/step of the best trees of `sizes` nodes rises, less a node late than early, and fits a + b log n with R^2 above the bound."""

    test: Literal["log_growth"]
    sizes: tuple[int, ...] = Field(min_length=4)
    max_rank: int
    min_r_squared: Share


class SpeedPeaksForm(_Form):
    """Tokens/step over the measured step time peaks before the largest of `sizes` and is less there than at the peak."""

    test: Literal["speed_peaks"]
    sizes: tuple[int, ...] = Field(min_length=3)
    max_rank: int
    bound: float


TransferForm = Annotated[
    LosslessForm
    | FasterForm
    | LadderStepForm
    | SparseBeatsDenseForm
    | SearchDepthForm
    | LossGrowsForm
    | ExtraHeadForm
    | SpeedIdentityForm
    | LogGrowthForm
    | SpeedPeaksForm,
    Field(discriminator="test"),
]


class MoreTokensForm(_Form):
    """An arm of an ablation exceeds the arm `over` in tokens/step by more than `bound`, at one `fixed` tree or at each one's `best`.

    It must do so on the text that each writes itself and on the original's answers, which both read: a backbone that has learnt to repeat
    itself is easy to draft for, and gains on the first alone. A step of both must cost the same: heads of one form, one LM head.
    """

    test: Literal["more_tokens"]
    arm: str
    over: str
    trees: Literal["fixed", "best"]
    bound: float


class KeepsQualityForm(_Form):
    """Each of the arms lies at most `max_kl` nats a token from the original, and yields more tokens/step than `over`, on the text that each
    writes itself and on the original's.

    The gain is `judged` with the divergence, or `required`: without one there is nothing that quality was kept for, and the claim is not
    tested. `control` names an arm whose figures are shown beside.
    """

    test: Literal["keeps_quality"]
    arms: tuple[str, ...] = Field(min_length=1)
    over: str
    gain: Literal["required", "judged"]
    max_kl: float = Field(gt=0)
    control: str | None = None


class UnchangedForm(_Form):
    """Training an arm left every tensor of its backbone as it was, by the hashes that were taken where it was trained."""

    test: Literal["unchanged"]
    arm: str


class HurtsMoreForm(_Form):
    """An arm lies further from the original than `over`, by more than `bound` nats a token, and `over` within `max_kl` where given.

    `on_references` asks for the same order, bound 0, in the likelihood of texts of another hand. `differ` are the settings of the recipe
    that the two arms may differ in, where the claim is about those alone.
    """

    test: Literal["hurts_more"]
    arm: str
    over: str
    bound: float
    max_kl: float | None = Field(default=None, gt=0)
    on_references: bool = False
    differ: tuple[str, ...] | None = None


class LittleMemoryForm(_Form):
    """Training an arm holds at most a relative `margin` more memory than the arm `over`."""

    test: Literal["little_memory"]
    arm: str
    over: str
    margin: Share


class HeadOrderForm(_Form):
    """Head k + 1 of a trained arm has a greater loss than head k, for every k, on the arm's own greedy text."""

    test: Literal["head_order"]
    arm: str
    bound: float


class SpareHeadForm(_Form):
    """With `with_heads` heads a trained arm's tokens/step is that of `without_heads` to within a `margin`, each at its best tree."""

    test: Literal["spare_head"]
    arm: str
    num_nodes: int
    with_heads: int
    without_heads: int
    margin: Share


TrainingForm = Annotated[
    MoreTokensForm | KeepsQualityForm | UnchangedForm | HurtsMoreForm | LittleMemoryForm | HeadOrderForm | SpareHeadForm,
    Field(discriminator="test"),
]


class BoundMissedForm(_Form):
    """At least one of `figures` lies on the wrong side of the bound that `bound_claim` states."""

    test: Literal["bound_missed"]
    bound_claim: str
    figures: tuple[str, ...]


class QuotientsForm(_Form):
    """Rate over overhead gives the printed speedup of every model to within a relative `tolerance`."""

    test: Literal["quotients"]
    models: tuple[str, ...]
    tolerance: Share


class ImpliedOverheadsForm(_Form):
    """Rate over speedup of one table lies outside the overhead of another, rounding allowed for, for at least `min_apart` models."""

    test: Literal["implied_overheads"]
    pairs: tuple[tuple[str, str], ...]
    min_apart: int
    half_unit: float


class Statement(Frozen):
    """What one place says, in one word or two."""

    place: str
    says: str


class StatementsDifferForm(_Form):
    """Places that ought to say the same thing do not."""

    test: Literal["statements_differ"]
    about: str
    statements: tuple[Statement, ...] = Field(min_length=2)


class CategoryMeansForm(_Form):
    """The arithmetic and the harmonic mean of the categories both differ from the overall figure by more than `half_unit`."""

    test: Literal["category_means"]
    prefix: str
    overall: str
    half_unit: float


class ClosedFormsForm(_Form):
    """The closed forms give every printed intensity to within `tolerance`."""

    test: Literal["closed_forms"]
    by_length: str
    by_batch: str
    linear: str
    table_context_tokens: int
    tolerance: float


class TableRatiosForm(_Form):
    """Two ratios of one table round to the whole figures that the text states."""

    test: Literal["table_ratios"]
    table: str
    row: int
    column: int


class RelativeLatencyForm(_Form):
    """n x TFLOP/s(1) / TFLOP/s(n) of one table row gives the stated latencies to within `tolerance`."""

    test: Literal["relative_latency"]
    table: str
    row: int
    tolerance: float


class LogConstantForm(_Form):
    """The slope times the logarithm of `num_nodes` gives the rate of Table 1 to within a relative `tolerance`, for one base at least."""

    test: Literal["log_constant"]
    slope: float
    bases: tuple[float, ...]
    num_nodes: int
    rate: str
    tolerance: Share


class _SimulationForm(_Form):
    device: str
    slope: float
    log_base: float = Field(gt=1)


class SimulatedPeakForm(_SimulationForm):
    """The simulated speedup is greatest at `num_nodes` candidates, to within a relative `tolerance`, and falls beyond."""

    test: Literal["simulated_peak"]
    num_nodes: int
    context_tokens: int
    batch: int
    tolerance: Share


class SimulatedBatchForm(_SimulationForm):
    """The best simulated speedup falls with the batch, is above 1 up to `batch`, and below 1 at the next power of two."""

    test: Literal["simulated_batch"]
    batch: int
    context_tokens: int


class SimulatedLengthForm(_SimulationForm):
    """Over `context_tokens` the best number of candidates stays within a relative `tolerance` while the best speedup falls."""

    test: Literal["simulated_length"]
    batch: int
    context_tokens: tuple[int, ...]
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
    | SimulatedLengthForm,
    Field(discriminator="test"),
]
