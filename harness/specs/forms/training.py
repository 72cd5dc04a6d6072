"""The forms in which a claim about training is judged, on the record of an ablation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.specs.bounds import HeadCount, NodeCount
from harness.specs.forms.paper import Form, Share


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
