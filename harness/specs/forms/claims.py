"""The forms in which a claim can be judged, as validated data; each bound carries its reason."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.specs.bounds import MAX_ENTRIES, HeadCount, NodeCount, Seed
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

    It shows no parity bug.
    """

    test: Literal["faster"]
    arm: str
    bound: float


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
    | SpeedPeaksForm,
    Field(discriminator="test"),
]


class MoreTokensForm(Form):
    """An arm of an ablation exceeds the arm `over` in tokens/step by more than `bound`.

    Both are compared at one `fixed` tree, or each at its `best`.
    It must do so on the text that each writes itself and on the original's answers, which both read: a
    backbone that has learnt to repeat itself is easy to draft for, and gains on the first alone. A step of
    both must cost the same: heads of one form, one LM head.
    """

    test: Literal["more_tokens"]
    arm: str
    over: str
    trees: Literal["fixed", "best"]
    bound: float


class KeepsQualityForm(Form):
    """Each arm stays near the original and yields more tokens/step than `over`.

    Near is at most `max_kl` nats a token. Tokens/step are compared on the text that each writes itself and on
    the original's.
    The gain is `judged` with the divergence, or `required`: without one there is nothing that quality was
    kept for, and the claim is not tested. `control` names an arm whose figures are shown too.
    """

    test: Literal["keeps_quality"]
    arms: tuple[str, ...] = Field(min_length=1)
    over: str
    gain: Literal["required", "judged"]
    max_kl: float = Field(gt=0)
    control: str | None = None


class UnchangedForm(Form):
    """Training an arm left every tensor of its backbone as it was.

    The hashes were taken where it was trained.
    """

    test: Literal["unchanged"]
    arm: str


class HurtsMoreForm(Form):
    """An arm lies further from the original than `over`, by more than `bound` nats a token.

    `over` lies within `max_kl`, where that is given. `on_references` asks for the same order, bound 0, in the
    likelihood of texts that neither model wrote. `differ` are the settings of the recipe that the two arms
    may differ in, where the claim is about those alone.
    """

    test: Literal["hurts_more"]
    arm: str
    over: str
    bound: float
    max_kl: float | None = Field(default=None, gt=0)
    on_references: bool = False
    differ: tuple[str, ...] | None = None


class LittleMemoryForm(Form):
    """Training an arm holds at most a relative `margin` more memory than the arm `over`."""

    test: Literal["little_memory"]
    arm: str
    over: str
    margin: Share


class HeadOrderForm(Form):
    """Head k + 1 of a trained arm has a greater loss than head k, for every k.

    The loss is that on the arm's own greedy text.
    """

    test: Literal["head_order"]
    arm: str
    bound: float


class SpareHeadForm(Form):
    """A trained arm's tokens/step with `with_heads` heads is that with `without_heads`, to within `margin`.

    Each number of heads has its own best tree.
    """

    test: Literal["spare_head"]
    arm: str
    num_nodes: NodeCount
    with_heads: HeadCount
    without_heads: HeadCount
    margin: Share


TrainingForm = Annotated[
    MoreTokensForm
    | KeepsQualityForm
    | UnchangedForm
    | HurtsMoreForm
    | LittleMemoryForm
    | HeadOrderForm
    | SpareHeadForm,
    Field(discriminator="test"),
]
