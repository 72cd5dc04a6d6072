"""The forms in which a claim can be judged, as validated data; each bound carries its reason."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.specs.bounds import MAX_ENTRIES, HeadCount, NodeCount, Seed, Some
from harness.specs.forms.paper import Form, Share, VariedForm

Margin = Annotated[float, Field(gt=0, lt=1)]


class TemperatureTrendForm(Form):
    """Tokens/step of typical acceptance rises with temperature, and that of rejection falls.

    Both slopes lie beyond 0, over at least `min_temperatures` temperatures.
    """

    test: Literal["temperature_trend"]
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0)
    min_temperatures: int = Field(ge=3, le=MAX_ENTRIES)


class ThresholdTrendForm(Form):
    """Tokens/step falls with the threshold; delta is the square root of the threshold.

    Its slope lies below 0, over at least `min_epsilons` thresholds. Likelihood under the backbone is shown
    and not judged: a stricter threshold raises it by construction.
    """

    test: Literal["threshold_trend"]
    temperature: float = Field(gt=0)
    min_epsilons: int = Field(ge=3, le=MAX_ENTRIES)


class TypicalBeatsRejectionForm(Form):
    """Typical acceptance yields more than `bound` times rejection's tokens/step at one temperature.

    Its text is as likely: means a token under the original backbone, in nats, differ by at most `margin`.
    """

    test: Literal["typical_beats_rejection"]
    temperature: float = Field(gt=0)
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0)
    bound: float
    margin: Margin


SweepForm = Annotated[
    ThresholdTrendForm | TypicalBeatsRejectionForm | TemperatureTrendForm, Field(discriminator="test")
]


class LosslessForm(Form):
    """Every greedy Medusa generation equals vanilla's, or differs from a shown tie on.

    There are at most `max_tie_rate` ties a token, or one.
    Half precision has no such limit, and says how many ties in how many tokens.
    """

    test: Literal["lossless"]
    max_tie_rate: Share


class FasterForm(Form):
    """The arm of that role decodes more tokens/s than its vanilla arm, by more than `bound`.

    It shows no parity bug. `clock` is that of decoding alone or, as `wall`, that with the prefill.
    """

    test: Literal["faster"]
    arm: str
    bound: float
    clock: Literal["decode", "wall"] = "decode"


class LadderStepForm(Form):
    """One rung: the arm exceeds the arm `over` by more than `bound`, in tokens/step and in measured tokens/s.

    With `slack` it is not decidable on a device whose step costs, timed before the run, outweigh by that
    factor what calibration text promises.
    """

    test: Literal["ladder_step"]
    arm: str
    over: str
    bound: float
    max_nodes: NodeCount | None = None
    slack: float | None = Field(default=None, gt=1, le=100)


class RateOverForm(Form):
    """The arm exceeds the arm `over` with the same tree by more than `bound`, in tokens a step and a second.

    With `gain` it exceeds it by that much, such as 0.1 for 10 %, to within a relative `margin`; then
    `bound` is not asked.
    """

    test: Literal["rate_over"]
    arm: str
    over: str
    bound: float = 1.0
    gain: Share | None = None
    margin: Share | None = None

    @model_validator(mode="after")
    def _gain_with_margin(self) -> RateOverForm:
        if (self.gain is None) != (self.margin is None):
            raise ValueError("gain and margin need each other")
        return self


class SparseBeatsDenseForm(Form):
    """The arm's sparse tree yields more tokens/step than random dense trees of `dense_nodes` nodes.

    The dense trees are pooled; all are replayed.
    """

    test: Literal["sparse_beats_dense"]
    tree: str
    max_nodes: NodeCount
    dense_nodes: NodeCount
    num_dense: int = Field(ge=2, le=10_000)
    seed: Seed
    bound: float


class SearchDepthForm(VariedForm):
    """The tree of `num_nodes` nodes that a search grows on the calibration text is at most `max_depth` deep.

    `values` is what the search adds up: `marginals`, the paper's products of accuracies, or `joint` hits.
    """

    test: Literal["search_depth"]
    values: Literal["marginals", "joint"]
    num_nodes: NodeCount
    max_depth: HeadCount
    max_rank: NodeCount


class LossGrowsForm(Form):
    """Head k + 1 has a greater loss than head k, for every k, at the positions where both have a target."""

    test: Literal["loss_grows"]
    bound: float


class ExtraHeadForm(VariedForm):
    """With `with_heads` heads tokens/step is that of `without_heads`, to within a relative `margin`.

    Each number of heads has its own best tree.
    """

    test: Literal["extra_head"]
    num_nodes: NodeCount
    with_heads: HeadCount
    without_heads: HeadCount
    max_rank: NodeCount
    margin: Share


class SpeedIdentityForm(Form):
    """Measured speedup over (acceleration rate / overhead) is 1 to within `margin`, for each arm.

    The overhead is timed separately.
    """

    test: Literal["speed_identity"]
    arms: tuple[str, ...]
    margin: Share


class LogGrowthForm(VariedForm):
    """Tokens/step of the best trees of `sizes` nodes fits a + b log n, with R^2 above the bound.

    It rises, and a node late adds less than a node early.
    """

    test: Literal["log_growth"]
    sizes: tuple[NodeCount, ...] = Field(min_length=4, max_length=MAX_ENTRIES)
    max_rank: NodeCount
    min_r_squared: Share


class SpeedPeaksForm(VariedForm):
    """Tokens/step over the measured step time peaks before the largest of `sizes`.

    It is less at the largest than at the peak.
    """

    test: Literal["speed_peaks"]
    sizes: tuple[NodeCount, ...] = Field(min_length=3, max_length=MAX_ENTRIES)
    max_rank: NodeCount
    bound: float


class CategoryOrderForm(Form):
    """Categories of prompts stand in the order of `figures`, by tokens/step of one replayed tree.

    Spearman's rank correlation lies above `bound`; each category has at least `min_prompts` prompts.
    """

    test: Literal["category_order"]
    tree: str
    figures: dict[str, float] = Field(min_length=3, max_length=MAX_ENTRIES)
    min_prompts: int = Field(ge=2, le=10_000)
    bound: float = Field(ge=-1, lt=1)


class CategoryAboveForm(Form):
    """One category of prompts yields more than `bound` times the tokens/step of all others together.

    One tree is replayed on all.
    """

    test: Literal["category_above"]
    tree: str
    category: str
    min_prompts: int = Field(ge=2, le=10_000)
    bound: float


class AccuracyFallsForm(Form):
    """Head k + 1 has the right token among its first n less often than head k, for each k.

    That holds for each n of `first`, at the positions where both heads have a target, by more than `bound`.
    Units: shares of the positions.
    """

    test: Literal["accuracy_falls"]
    first: Some[HeadCount]
    bound: float


class MoreCandidatesForm(Form):
    """A head has the right token among its first `first` more than `bound` times as often as on top."""

    test: Literal["more_candidates"]
    head: HeadCount
    first: HeadCount
    bound: float = Field(gt=1)


class SearchPromiseForm(VariedForm):
    """The tokens/step that a search promises are those that its tree yields on other text.

    The promise is one more than the sum of the values of the tree's nodes on the calibration text, and holds
    to within a relative `margin`. `values` is what the search adds up, as in `search_depth`.
    """

    test: Literal["search_promise"]
    values: Literal["marginals", "joint"]
    num_nodes: NodeCount
    max_rank: NodeCount
    margin: Share


class AddedStepForm(Form):
    """A whole step of the arm takes less than `bound` times another, both timed apart from decoding.

    That other is the `backbone`'s part of it, which leaves heads, candidates, acceptance and cache, or a step
    of its `vanilla` arm.
    """

    test: Literal["added_step"]
    arm: str
    against: Literal["backbone", "vanilla"]
    bound: float = Field(gt=1)


class RejectionExactForm(Form):
    """Rejection sampling yields the very tokens of vanilla sampling with the same seed.

    At most one token in `tokens_a_tie` may part two texts, where rounding decides a draw.
    """

    test: Literal["rejection_exact"]
    arm: str
    tokens_a_tie: int = Field(ge=1, le=10**9)


TransferForm = Annotated[
    LosslessForm
    | FasterForm
    | LadderStepForm
    | RateOverForm
    | SparseBeatsDenseForm
    | SearchDepthForm
    | LossGrowsForm
    | ExtraHeadForm
    | SpeedIdentityForm
    | LogGrowthForm
    | SpeedPeaksForm
    | CategoryOrderForm
    | CategoryAboveForm
    | AccuracyFallsForm
    | MoreCandidatesForm
    | SearchPromiseForm
    | AddedStepForm
    | RejectionExactForm,
    Field(discriminator="test"),
]
